"""barycenters: the weighted atoms of each class, one class a task on actors that grow with the cluster.

Those of images and labels together (`label_weight`) are one task: they need the features of all classes at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.networks import last_linear, network_of
from wmdd_ray.executors.dispatch import do_each, is_small
from wmdd_ray.options import fingerprint_options
from wmdd_ray.spine.numbers import Number, StageNumbers
from wmdd_ray.spine.rooms import UnitMarker, seconds_in_core
from wmdd_ray.spine.run import StageRun, Work
from wmdd_ray.units.atoms import ClassSolver, unit_of
from wmdd_ray.units.teacher import feature_width, read_teacher


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the barycenters depend on."""
    return {
        "ipc": config.ipc,
        "num_atoms": config.num_atoms,
        "seed": config.seed,
        "barycenters": fingerprint_options(config.barycenters),
    }


def plan(stage: StageRun) -> Work:
    """Return one unit a class."""
    num_classes = len(stage.run.source("train").class_names)
    width_D = feature_width(stage.config, num_classes)
    units = tuple(unit_of(label) for label in range(num_classes))
    return Work(units=units, estimated_bytes=num_classes * stage.config.num_atoms * width_D * 4)


def work(stage: StageRun) -> dict[str, Any]:
    """Solve every class that is not finished, largest class first."""
    counts = stage.inputs["features"].metrics["class_counts"]
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    arguments = (
        stage.room,
        stage.run.room("features"),
        stage.run.source("train").class_names,
        stage.config,
        _last_layer(stage),
    )
    options = stage.config.barycenters
    do_each(
        stage,
        ClassSolver,
        arguments,
        [unit_of(label) for label in order],
        together=options.label_weight is not None,
        # The others take a second and more a class.
        light=options.solver in ("lloyd", "uniform") and is_small(stage, sum(counts)),
    )
    markers = stage.room.read_units(unit_of(label) for label in range(len(counts)))
    costs = [marker.metrics["cost"] for marker in markers.values()]
    return {
        "cost_per_class": costs,
        "mean_cost": float(np.mean(costs)),
        "not_converged": [unit for unit, m in markers.items() if not m.metrics["converged"]],
        "seconds_in_core": seconds_in_core(markers),
    }


def _last_layer(stage: StageRun) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the teacher's last weights and biases (0 where it has none) where margins or label embeddings are asked for."""
    config = stage.config.barycenters
    if config.margin_fraction == 0 and config.label_weight is None:
        return None
    teacher = read_teacher(stage.run.room("teacher"))
    linear = last_linear(network_of(teacher, torch.device("cpu"), own_code=True))
    weights_YD = linear.weight.detach().numpy()
    # Typed as a tensor, and None in a layer without one.
    bias_Y: torch.Tensor | None = linear.bias
    if bias_Y is None:
        return weights_YD, np.zeros(len(weights_YD), weights_YD.dtype)
    return weights_YD, bias_Y.detach().numpy()


def _numbers(stage: StageRun, marker: UnitMarker) -> list[Number]:
    cost, label = marker.metrics["cost"], int(marker.unit)
    return [Number(stage="barycenters", metric="cost", value=cost, step=label)]


NUMBERS = StageNumbers(numbers=_numbers)
