"""ImageNet on 8 to 256 GPUs that cannot be had here: the simulation, fed with measured and with published numbers.

Units come from the code (`recover.groups`, `relabel.blocks`, `evaluate.unit_ids`), starts and commits from `scale workers`
and `scale classes` on this machine. Seconds on a GPU are an assumption: CDA recovers ImageNet-1K at ipc 50 in 4000
iterations with a ResNet-18 in 29 h on an RTX 4090 (Yin and Shen, TMLR 2024), 1916 images x iterations a second; Ray's
documentation reports 903 ResNet-18 inferences a second on an L4, decoding included. Other GPUs by memory bandwidth.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jobs.benches.reporting import Row
from jobs.benches.scale.simulation import BOOT, Cluster, Outcome, Units, random_lives, simulate
from wmdd_ray.recipes import recipe_of

# GB/s, from the vendor's data sheets.
_BANDWIDTH = {"l4": 300, "rtx4090": 1008, "a100": 1555, "h100": 3350}
# ImageNet-21K is its winter-2021 processed version.
_CLASSES = {"imagenet1k": 1000, "imagenet21k": 10_450}

Stages = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Makespan, efficiency and GPU hours of recover, relabel and students on a cluster that loses nodes."""

    sets: tuple[Literal["imagenet1k", "imagenet21k"], ...] = ("imagenet1k", "imagenet21k")
    """Data sets: 1000 classes; 10,450 (winter 2021, processed)."""
    ipc: tuple[int, ...] = (10, 50, 100)
    """Images per class."""
    workers: tuple[int, ...] = (8, 64, 256)
    """GPUs, one a node."""
    designs: tuple[Literal["one_group", "groups_of_8", "actors"], ...] = (
        "one_group",
        "groups_of_8",
        "actors",
    )
    """Who restarts together when a node is lost: all workers, the eight of a group, or nobody else."""
    gpu: Literal["l4", "rtx4090", "a100", "h100"] = "l4"
    """Kind of GPU; an L4 is what spot markets have most of."""
    recover_images_per_s: float = 0.0
    """Images x iterations a second of recover; 0: 1916 on an RTX 4090, by bandwidth elsewhere."""
    label_images_per_s: float = 0.0
    """Views a second that the teacher labels; 0: 903 on an L4, by bandwidth elsewhere."""
    student_images_per_s: float = 0.0
    """Images a second of a student's training; 0: as recover, which has the same passes."""
    losses_per_hour: float = 0.05
    """Share of the nodes that is lost in an hour, without notice."""
    replacement_s: float = 300.0
    """From a loss until another node can work, boot included."""
    boot_s: float = 120.0
    """Paid seconds of a node before it can work."""
    detect_s: float = 10.0
    """From a loss until it is noticed (3 s for a process; a node that falls silent: up to 30 s by Ray's defaults)."""
    group_start_s: float = 25.0
    """Start or restart of a Ray Train group until its workers take units."""
    actor_start_s: float = 20.0
    """The same of an actor: process, imports, teacher, first CUDA call."""
    checkpoint_s: float = 20.0
    """Seconds of work between two checkpoints of a student."""
    recover_checkpoint_s: float = 120.0
    """The same of recover, as ImageNet's recipe has it."""
    stall_s: float = 0.0
    """Seconds that a checkpoint holds up the work; 0: it is written in the background."""
    overhead_s: float = 2.0
    """Seconds around a unit: reading what it needs, committing what it made."""
    spread: float = 0.03
    """Relative spread of unit times (standard deviation of their logarithm)."""
    seeds: int = 3
    """Draws of each cell; medians are shown."""

    def rows(self) -> list[Row]:
        """Simulate every cell of the table."""
        return [
            self.row(name, ipc, workers, design)
            for name in self.sets
            for ipc in self.ipc
            for workers in self.workers
            for design in self.designs
        ]

    def settings(self) -> Row:
        """Return what the rows depend on."""
        return dataclasses.asdict(self) | {"images_per_s": self.rates()}

    def rates(self) -> dict[str, float]:
        """Return images a second: recover, label, student."""
        bandwidth = _BANDWIDTH[self.gpu]
        recover = self.recover_images_per_s or 1916 * bandwidth / _BANDWIDTH["rtx4090"]
        label = self.label_images_per_s or 903 * bandwidth / _BANDWIDTH["l4"]
        student = self.student_images_per_s or recover
        return {"recover": round(recover), "label": round(label), "student": round(student)}

    def row(self, name: str, ipc: int, workers: int, design: str) -> Row:
        """Return a cell of the table: the stages one after another."""
        stages = unit_seconds(name, ipc, self.rates())
        runs = [
            {
                stage: self.outcome(stage, units, workers, design, seed)
                for stage, units in stages.items()
            }
            for seed in range(self.seeds)
        ]
        jobs = [whole(list(run.values())) for run in runs]
        most = Counter(_largest_loss(job) for job in jobs).most_common(1)[0][0]
        row: Row = {"set": name, "ipc": ipc, "workers": workers, "design": design}
        row["hours"] = statistics.median(job.makespan_s for job in jobs) / 3600
        row["gpu_hours"] = statistics.median(job.paid_s for job in jobs) / 3600
        for stage in stages:
            found = [in_service(run[stage]) for run in runs]
            row[stage] = round(100 * statistics.median(found), 1)
        row["all"] = round(100 * statistics.median(in_service(job) for job in jobs), 1)
        row["with_boot"] = round(100 * statistics.median(job.efficiency for job in jobs), 1)
        row["losses"] = statistics.median(job.num_losses for job in jobs)
        row["most_lost_to"] = most
        return row

    def outcome(
        self, stage: str, unit_s: Sequence[float], workers: int, design: str, seed: int
    ) -> Outcome:
        """Simulate a stage; it takes no more workers than it has units."""
        rng = np.random.default_rng(seed)
        spread_U = np.exp(rng.normal(0, self.spread, len(unit_s)))
        workers = min(workers, len(unit_s))
        checkpoint_s = {"recover": self.recover_checkpoint_s, "relabel": 0.0}
        size = {"one_group": workers, "groups_of_8": min(8, workers), "actors": 1}[design]
        units = Units(
            seconds=(np.asarray(unit_s) * spread_U).tolist(),
            overhead_s=self.overhead_s,
            checkpoint_s=checkpoint_s.get(stage, self.checkpoint_s),
            stall_s=self.stall_s,
            write_s=2.0,
        )
        cluster = Cluster(
            num_workers=workers,
            group_size=size,
            replacement_s=self.replacement_s,
            # The nodes come when recover begins, and stay for the stages after it.
            boot_s=self.boot_s,
            arrival_s=60.0 if stage == "recover" else 0.0,
            first_boot=stage == "recover",
            detect_s=self.detect_s,
            start_s=self.actor_start_s if design == "actors" else self.group_start_s,
        )
        return simulate(units, cluster, random_lives(self.losses_per_hour, seed))


def unit_seconds(name: str, ipc: int, rates: dict[str, float]) -> Stages:
    """Return stage -> seconds of its units on one GPU, with the units that the code cuts."""
    # Imported here: stages load torch and Ray.
    from wmdd_ray.units import images, labels, students

    config, num_classes = recipe_of("imagenet1k", ipc), _CLASSES[name]
    units = students.longest_first(students.unit_ids(config))
    student_s = num_classes * ipc * config.evaluate.epochs / rates["student"]
    label_s = num_classes * ipc * config.evaluate.epochs / rates["label"]
    return {
        "recover": [
            len(group) * ipc * config.recover.iterations / rates["recover"]
            for group in images.groups(config, num_classes).values()
        ],
        "relabel": [
            len(classes) * ipc * len(epochs) / rates["label"]
            for epochs, classes in labels.blocks(config, num_classes).values()
        ],
        # Rows of real images are labeled while their student by soft labels trains.
        "evaluate": [
            student_s + (label_s if row != "distilled" and kind == "soft" else 0)
            for row, kind, _ in map(students.parts_of, units)
        ],
    }


def in_service(outcome: Outcome) -> float:
    """Return the efficiency without the boot of nodes, which is the cloud's."""
    return outcome.efficiency / (1 - outcome.shares[BOOT])


def whole(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of stages one after another."""
    paid_s = math.fsum(o.paid_s for o in outcomes)

    def share(value: str) -> float:
        return math.fsum(o.shares[value] * o.paid_s for o in outcomes) / paid_s

    return Outcome(
        makespan_s=math.fsum(o.makespan_s for o in outcomes),
        paid_s=paid_s,
        efficiency=math.fsum(o.efficiency * o.paid_s for o in outcomes) / paid_s,
        shares={kind: share(kind) for kind in outcomes[0].shares},
        num_losses=sum(o.num_losses for o in outcomes),
        num_starts=sum(o.num_starts for o in outcomes),
        most_attempts=max(o.most_attempts for o in outcomes),
    )


def _largest_loss(outcome: Outcome) -> str:
    kind = max(outcome.shares, key=lambda kind: outcome.shares[kind])
    return f"{kind} {100 * outcome.shares[kind]:.0f} %"
