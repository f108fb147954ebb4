"""barycenters: the weighted atoms of each class, one class a task on actors that grow with the cluster."""

from __future__ import annotations

import socket
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import ray

from wmdd_ray.config import DistillConfig
from wmdd_ray.records import Barycenter, ClassBarycenter
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
        "barycenters": asdict(config.barycenters),
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

    def show(unit: str, seconds: float) -> None:
        nonlocal done
        done += 1
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
            units,
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
    """Return the teacher's last weights and biases where atoms are asked for by their margin."""
    if stage.config.barycenters.margin_fraction == 0:
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
        """Solve the class `unit`, commit it, and return the seconds it took."""
        from wmdd_ray.core.barycenter import nearest_images
        from wmdd_ray.core.selection import margin_of, solve_with_margin

        label, config = int(unit), self._config
        started = time.perf_counter()
        attempt = self._room.begin_unit(unit)
        if attempt is None:
            return 0.0
        real = self._features.read(label)
        in_core = time.perf_counter()
        where = f'class {label} ("{self._class_names[label]}")'
        seed = unit_seed(config.seed, "barycenters", unit)

        margin_N = np.zeros(len(real.keys))
        if self._last_layer is not None:
            margin_N = margin_of(real.features_ND, *self._last_layer, label)

        def solve(num_atoms: int) -> Barycenter:
            return solve_with_margin(
                real.features_ND, margin_N, num_atoms, config.barycenters, seed=seed, where=where
            )

        found = solve(config.num_atoms)
        nearest = whole = nearest_images(found.atoms_KD, real.features_ND)
        if config.num_atoms > config.ipc:
            whole = nearest_images(solve(config.ipc).atoms_KD, real.features_ND)
        rng = np.random.Generator(np.random.Philox(key=unit_seed(config.seed, "random_real", unit)))
        pool = min(len(real.keys), max(4 * config.num_atoms, _POOL))
        drawn = rng.choice(len(real.keys), size=pool, replace=False)
        in_core = time.perf_counter() - in_core
        record = ClassBarycenter(
            label=label,
            num_images=len(real.keys),
            barycenter=found,
            nearest_keys=tuple(real.keys[i] for i in nearest),
            whole_keys=tuple(real.keys[i] for i in whole),
            random_keys=tuple(real.keys[i] for i in drawn),
            moments=real.moments,
        )
        seconds = time.perf_counter() - started
        self._room.commit_unit(
            unit,
            {key_of(label): codecs.encode_class_barycenter(record)},
            metrics={
                "cost": found.cost,
                "num_iters": found.num_iters,
                "converged": found.converged,
                "num_images": record.num_images,
                "seconds_in_core": round(in_core, 4),
            },
            attempt=attempt,
            seconds=seconds,
        )
        return seconds
