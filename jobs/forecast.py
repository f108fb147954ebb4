"""What a run costs in hours of one GPU before anything starts: the network passes of each kind of work, by what a pass takes.

Unit times are those of `jobs/bench.py gpu` where its result lies in `benches/results/gpu.json`, and assumed where it does not.
They are of a ResNet-18 at 224 pixels; another network takes as much more time as it has more operations. `python -m
jobs.forecast` prints the table of cluster/README.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from wmdd_ray.config import DistillConfig, NetworkConfig
from wmdd_ray.recipes import full_table, recipe_of
from wmdd_ray.spine.run import Run

_IMAGENET = (1000, 1_281_167)
# Recipe, ipc, (classes, real images), GPUs, CPU machines, GB that are written (`--dry-run`).
_ROWS = (
    ("imagenette", 10, (10, 9_469), 1, 0, 0.1),
    ("tiny_imagenet", 10, (200, 100_000), 8, 0, 0.5),
    ("tiny_imagenet", 50, (200, 100_000), 8, 0, 1.8),
    ("imagenet1k", 10, _IMAGENET, 8, 2, 7),
    ("imagenet1k", 50, _IMAGENET, 8, 2, 25),
    ("imagenet1k", 100, _IMAGENET, 8, 2, 46),
)
_HEAD_DOLLARS, _GPU_DOLLARS = 0.384, {"L4": (0.53, 0.978)}
"""An hour of m6i.2xlarge; of a machine with one of these GPUs, spot and on demand (cluster/README.md)."""
_START_H = 0.3


MEASURED = Path(__file__).parent / "benches" / "results" / "gpu.json"


@dataclass(frozen=True)
class UnitTimes:
    """Images a second that go through a ResNet-18 at 224 pixels in each kind of work, on which chip, and how that is known."""

    chip: str
    known: str
    features: float
    recover: float
    relabel: float
    students: float


ASSUMED = UnitTimes("L4", "assumed", 514, 1000 / 4.23, 514, 200)
"""From published throughput; cluster/README.md says how."""


@dataclass(frozen=True)
class Price:
    """GPU hours to the set, those of its teachers among them, and of its students, and how many these are."""

    making_h: float
    teacher_h: float
    students_h: float
    num_students: int


def unit_times(path: Path = MEASURED) -> UnitTimes:
    """Return what `jobs/bench.py gpu` measured, if it ended, or what is assumed."""
    if not path.is_file():
        return ASSUMED
    record = json.loads(path.read_text())
    rates = record["unit_times"]
    if record["state"] != "complete" or record["settings"]["quick"] or len(rates) < 4:
        return ASSUMED
    of = {name.removesuffix("_images_per_s"): rate for name, rate in rates.items()}
    return UnitTimes(record["chip"], f"measured {record['date'][:10]}", **of)


@cache
def operations(network: NetworkConfig, num_classes: int, channels: int, image_size: int) -> int:
    """Return the floating-point operations of an image's forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from wmdd_ray.core.networks import build_network

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        shape = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
        made = build_network(network, **shape).eval()
        image_BCHW = torch.empty(1, channels, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(image_BCHW)
    return counter.get_total_flops()


def price(config: DistillConfig, num_classes: int, num_images: int, times: UnitTimes) -> Price:
    """Return what a run on so many real images costs, by the times of one GPU."""
    from wmdd_ray.units.students import parts_of, unit_ids

    of_one = operations(NetworkConfig(arch="resnet18"), 1000, 3, 224)

    def hours(passes: float, rate: float, network: NetworkConfig) -> float:
        source = config.source
        own = operations(network, num_classes, source.channels, source.image_size)
        return passes * own / of_one / rate / 3600

    teacher, student = config.squeeze.network, config.evaluate.network
    seen = num_classes * config.num_atoms
    label_h = hours(seen * config.relabel.epochs, times.relabel, teacher)
    making_h = hours(num_images, times.features, teacher)
    if config.recover.method == "inversion":
        making_h += hours(seen * config.recover.iterations, times.recover, teacher)
    if config.relabel.labels == "stored":
        making_h += label_h
    trained = 0 if config.teacher else num_images * config.squeeze.epochs * config.num_teachers
    teacher_h = hours(trained, times.students, teacher)
    making_h += teacher_h
    students_h, units = 0.0, unit_ids(config)
    for row, labels, _ in map(parts_of, units):
        passes = seen * config.evaluate.epochs
        if row == "all_real":
            passes = num_images * config.evaluate.all_real_epochs
        students_h += hours(passes, times.students, student)
        # Real images are labeled while their student trains.
        if labels == "soft" and row != "distilled":
            students_h += hours(passes, times.relabel, teacher) if row == "all_real" else label_h
    return Price(making_h, teacher_h, students_h, len(units))


def price_line(run: Run) -> str | None:
    """Return a line with both prices where a run trains fewer students than the full table has, if that takes over a minute."""
    full, source = full_table(run.config), run.source("train")
    if full.evaluate == run.config.evaluate:
        return None
    times, num_images = unit_times(), source.num_images
    here, all_of_it = (
        price(config, len(source.class_names), num_images or 0, times)
        for config in (run.config, full)
    )
    if all_of_it.students_h < 1 / 60:
        return None
    least = "" if num_images is not None else "at least "  # nobody has counted the real images
    return (
        f"price: {least}{here.making_h:.3g} GPU hours to the set, {here.students_h:.3g} for {here.num_students} students; "
        f"{all_of_it.students_h:.3g} for the {all_of_it.num_students} of --evaluate.full ({times.chip}, unit times {times.known})"
    )


def table() -> list[str]:
    """Return the table as lines of Markdown."""
    times = unit_times()
    lines = [
        f"GPU hours of one {times.chip}, unit times {times.known}:",
        "",
        "| recipe, ipc | beside the head | GPU hours: the set | 2 students | 18 students | hours: the set | with 2 | with 18 "
        "| $: the set | with 2 | with 18 | GB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, machines, size_gb, row in map(_row, _ROWS):
        cells = [f"{row[key]:.2g}" if row[key] < 10 else f"{row[key]:.0f}" for key in list(row)[:6]]
        cells += [row[f"dollars{which}"] for which in ("", "_2", "_18")]
        lines.append(f"| {' | '.join([name, machines, *cells, f'{size_gb:g}'])} |")
    return lines


def _row(
    about: tuple[str, int, tuple[int, int], int, int, float],
) -> tuple[str, str, float, dict[str, Any]]:
    recipe, ipc, (num_classes, num_images), gpus, cpus, size_gb = about
    config = recipe_of(recipe, ipc)
    if recipe == "imagenet1k":
        config = replace(config, teacher="torchvision:ResNet18_Weights.IMAGENET1K_V1")
    times = unit_times()
    few, full = (
        price(each, num_classes, num_images, times) for each in (config, full_table(config))
    )
    assert (few.num_students, full.num_students) == (2, 18), "what the table's heads say"
    gpu_h = {"": few.making_h, "_2": few.making_h + few.students_h}
    gpu_h["_18"] = full.making_h + full.students_h
    row: dict[str, Any] = {
        "gpu_h": few.making_h,
        "gpu_h_2": few.students_h,
        "gpu_h_18": full.students_h,
    }
    # Nobody but the workers that share a teacher's batches trains it.
    trained_h = few.teacher_h / min(gpus, config.squeeze.batch_parts)
    for which, hours in gpu_h.items():
        row[f"hours{which}"] = trained_h + (hours - few.teacher_h) / gpus + _START_H
    for which, hours in gpu_h.items():
        dollars = [
            f"{hours * price + row[f'hours{which}'] * _HEAD_DOLLARS:.{0 if hours > 2 else 1}f}"
            for price in _GPU_DOLLARS.get(times.chip, ())
        ]
        row[f"dollars{which}"] = " / ".join(dollars) or "–"
    machines = f"{gpus} GPU" + (f", {cpus} CPU" if cpus else "")
    return f"`{recipe}`, {ipc}", machines, size_gb, row


if __name__ == "__main__":
    print("\n".join(table()))
