"""barycenters: the weighted atoms of each class, one class a task on actors that grow with the cluster.

Those of images and labels together (`label_weight`) are one task: they need the features of all classes at once.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
import ray

from wmdd_ray.config import DistillConfig
from wmdd_ray.options import fingerprint_options
from wmdd_ray.records import Barycenter, ClassBarycenter, ClassFeatures
from wmdd_ray.rooms import Room
from wmdd_ray.run import StageRun, Work, unit_seed
from wmdd_ray.stages.actors import fan_out
from wmdd_ray.stages.class_features import ClassFeaturesReader
from wmdd_ray.store import codecs, documents

# Real images of a class that the mosaic start crops from (300 in RDED).
_POOL = 300


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the barycenters depend on."""
    return {
        "ipc": config.ipc,
        "num_atoms": config.num_atoms,
        "seed": config.seed,
        "barycenters": fingerprint_options(config.barycenters),
    }


def unit_of(label: int) -> str:
    """Return the unit id of a class."""
    return f"{label:05d}"


def key_of(label: int) -> str:
    """Return the key of a class's barycenter."""
    return f"classes/{label:05d}.safetensors"


def read_barycenter(
    room: Room, commit_files: dict[str, documents.FileEntry], label: int
) -> ClassBarycenter:
    """Return one class's barycenter, verified."""
    return codecs.decode_class_barycenter(room.read(commit_files[key_of(label)]))


def plan(stage: StageRun) -> Work:
    """Return one unit a class."""
    # Imported here: actors import this module, and need no torch.
    from wmdd_ray.stages.teacher import feature_width

    num_classes = len(stage.run.source("train").class_names)
    width_D = feature_width(stage.config, num_classes)
    units = tuple(unit_of(label) for label in range(num_classes))
    return Work(units=units, estimated_bytes=num_classes * stage.config.num_atoms * width_D * 4)


def work(stage: StageRun) -> dict[str, Any]:
    """Solve every class that is not finished, largest class first."""
    counts = stage.inputs["features"].metrics["class_counts"]
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    finished = stage.room.finished()
    units = [unit_of(label) for label in order if unit_of(label) not in finished]
    done = len(counts) - len(units)
    stage.progress.start(len(counts), done)

    # One task for all classes carries the name of the first, and commits the units of all.
    joint = stage.config.barycenters.label_weight is not None

    def show(unit: str, seconds: float) -> None:
        nonlocal done
        for other in units[1:] if joint else ():
            marker = stage.room.read_unit(other)
            stage.event("unit_done", unit=other, attempt=1, seconds=marker.seconds)
        done += len(units) if joint else 1
        stage.progress.update(done)

    if units:
        arguments = (
            stage.room,
            stage.run.room("features"),
            stage.run.source("train").class_names,
            stage.config,
            _last_layer(stage),
        )
        actor = ray.remote(num_cpus=1)(BarycenterActor)
        fan_out(
            stage,
            actor,
            arguments,
            units[:1] if joint else units,
            max_actors=stage.resources.max_actors,
            on_done=show,
        )
    markers = stage.room.read_units(unit_of(label) for label in range(len(counts)))
    costs = [marker.metrics["cost"] for marker in markers.values()]
    return {
        "cost_per_class": costs,
        "mean_cost": float(np.mean(costs)),
        "not_converged": [unit for unit, m in markers.items() if not m.metrics["converged"]],
        "seconds_in_core": round(sum(m.metrics["seconds_in_core"] for m in markers.values()), 3),
    }


def _last_layer(stage: StageRun) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the teacher's last weights and biases where margins or label embeddings are asked for."""
    config = stage.config.barycenters
    if config.margin_fraction == 0 and config.label_weight is None:
        return None
    # Imported here: actors import this module, and need no torch.
    import torch

    from wmdd_ray.core.networks import last_linear, network_of
    from wmdd_ray.stages.teacher import read_teacher

    linear = last_linear(network_of(read_teacher(stage.run.room("teacher")), torch.device("cpu")))
    return linear.weight.detach().numpy(), linear.bias.detach().numpy()


class BarycenterActor:
    """Solves one class a call. Holds only where things are: features come from storage, results go there."""

    def __init__(
        self,
        room: Room,
        features_room: Room,
        class_names: tuple[str, ...],
        config: DistillConfig,
        last_layer: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        self._room = room
        self._features = ClassFeaturesReader(features_room)
        self._class_names = class_names
        self._config = config
        self._last_layer = last_layer

    def ready(self) -> str:
        """Return the node's name once the actor can work: imports are the larger part of its start."""
        import wmdd_ray.core.barycenter  # noqa: F401

        return socket.gethostname()

    def work(self, unit: str) -> float:
        """Solve the class `unit`, or all at once, commit what is not finished, and return the seconds it took."""
        started = time.perf_counter()
        if self._config.barycenters.label_weight is not None:
            self._work_all()
            return time.perf_counter() - started
        attempt = self._room.begin_unit(unit)
        if attempt is None:
            return 0.0
        real = self._features.read(int(unit))
        in_core = time.perf_counter()
        found = self._solve(real, self._config.num_atoms)
        self._commit(real, found, attempt, started, in_core)
        return time.perf_counter() - started

    def _work_all(self) -> None:
        from wmdd_ray.core.joint import solve_joint

        assert self._last_layer is not None, "label embeddings are the rows of the last layer"
        began, config = time.perf_counter(), self._config
        classes = [self._features.read(label) for label in range(len(self._class_names))]
        solved = solve_joint(
            [real.features_ND for real in classes],
            self._last_layer[0],
            config.num_atoms,
            config.barycenters,
            seeds=[self._seed(real.label) for real in classes],
            where=[self._where(real.label) for real in classes],
        )
        share = (time.perf_counter() - began) / len(classes)
        for real, found in zip(classes, solved, strict=True):
            attempt = self._room.begin_unit(unit_of(real.label))
            if attempt is not None:
                now = time.perf_counter()
                self._commit(real, found, attempt, now - share, now - share)

    def _solve(self, real: ClassFeatures, num_atoms: int) -> Barycenter:
        from wmdd_ray.core.selection import margin_of, solve_with_margin

        margin_N = np.zeros(len(real.keys))
        if self._config.barycenters.margin_fraction > 0:
            assert self._last_layer is not None, "margins are those of the last layer"
            margin_N = margin_of(real.features_ND, *self._last_layer, real.label)
        return solve_with_margin(
            real.features_ND,
            margin_N,
            num_atoms,
            self._config.barycenters,
            seed=self._seed(real.label),
            where=self._where(real.label),
        )

    def _commit(
        self, real: ClassFeatures, found: Barycenter, attempt: int, started: float, in_core: float
    ) -> None:
        """Commit a class with the real images that recover and the baselines start from."""
        from wmdd_ray.core.barycenter import nearest_images

        config, unit, count = self._config, unit_of(real.label), len(real.keys)
        nearest = whole = nearest_images(found.atoms_KD, real.features_ND)
        if config.num_atoms > config.ipc:
            whole = nearest_images(self._solve(real, config.ipc).atoms_KD, real.features_ND)
        rng = np.random.Generator(np.random.Philox(key=unit_seed(config.seed, "random_real", unit)))
        pool = min(count, max(4 * config.num_atoms, _POOL))
        drawn = rng.choice(count, size=pool, replace=False)
        record = ClassBarycenter(
            label=real.label,
            num_images=count,
            barycenter=found,
            nearest_keys=tuple(real.keys[i] for i in nearest),
            whole_keys=tuple(real.keys[i] for i in whole),
            random_keys=tuple(real.keys[i] for i in drawn),
            moments=real.moments,
        )
        now = time.perf_counter()
        self._room.commit_unit(
            unit,
            {key_of(real.label): codecs.encode_class_barycenter(record)},
            metrics={
                "cost": found.cost,
                "num_iters": found.num_iters,
                "converged": found.converged,
                "num_images": count,
                "seconds_in_core": round(now - in_core, 4),
            },
            attempt=attempt,
            seconds=now - started,
        )

    def _seed(self, label: int) -> int:
        return unit_seed(self._config.seed, "barycenters", unit_of(label))

    def _where(self, label: int) -> str:
        return f'class {label} ("{self._class_names[label]}")'
