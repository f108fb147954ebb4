"""The teacher as a committed artifact: measured and written by squeeze, read by the later stages."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from wmdd_ray.config import DistillConfig, NetworkConfig
from wmdd_ray.core.class_order import confusion, permuted_classes
from wmdd_ray.core.networks import build_network, last_linear, weights_of
from wmdd_ray.errors import DataError
from wmdd_ray.records import Teacher
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store import codecs
from wmdd_ray.units.held_out import HeldOut, Listed

UNIT = "teacher"
TEACHER_KEY = "teacher.safetensors"


def units_of(config: DistillConfig) -> tuple[str, ...]:
    """Return a unit a teacher of the run: the one that images are made for, then those that only label."""
    return (UNIT, *(f"{UNIT}-{number}" for number in range(1, config.num_teachers)))


def key_of(unit: str) -> str:
    """Return the key of a teacher."""
    return f"{unit}.safetensors"


def read_teacher(room: Room, unit: str = UNIT) -> Teacher:
    """Return a teacher of a committed room, verified."""
    return codecs.decode_teacher(room.read(room.committed().file(key_of(unit))))


def feature_width(config: DistillConfig, num_classes: int) -> int:
    """Return D, the width of the features of the network that the options name."""
    with torch.device("meta"):
        network = build_network(
            config.squeeze.network,
            num_classes=num_classes,
            channels=config.source.channels,
            image_size=config.source.image_size,
        )
    return last_linear(network).in_features


def measure(
    network: torch.nn.Module, val: Listed, config: DistillConfig, name: str, device: torch.device
) -> float:
    """Return the top-1 on held-out images, in [0, 1].

    Raises:
        DataError: It is at chance level, below `squeeze.min_top1`, or its classes are in another order.
    """
    class_names = val.source.class_names
    num_classes = len(class_names)
    held_out = HeldOut(val, config.source.mean, config.source.std, device)
    counts_YY = confusion(network, held_out, num_classes)
    top1 = float(np.trace(counts_YY) / counts_YY.sum())
    moved = permuted_classes(counts_YY)
    if moved:
        shown = ", ".join(
            f'class {k} ("{class_names[k]}") is its class {j}' for k, j in list(moved.items())[:3]
        )
        raise DataError(
            f"{name}: its classes are in another order than the data's: {len(moved)} of {num_classes} are exchanged "
            f"({shown}); its top-1 is {top1:.3f} as it is. Reorder the class names of the data or the teacher's last layer"
        )
    needed = config.squeeze.min_top1 or min(3 / num_classes, (1 + 1 / num_classes) / 2)
    if top1 < needed:
        raise DataError(
            f"{name}: top-1 {top1:.3f} on {int(counts_YY.sum())} held-out images, expected at least {needed:.3f} "
            f"(chance is {1 / num_classes:.3f}); check the data, its normalization, and the training, or set "
            "--squeeze.min-top1"
        )
    return top1


def commit_teacher(
    room: Room,
    config: DistillConfig,
    network_config: NetworkConfig,
    network: torch.nn.Module,
    class_names: tuple[str, ...],
    top1: float,
    started: float,
    metrics: dict[str, Any],
    *,
    attempt: int,
    unit: str = UNIT,
) -> None:
    """Store a measured network as a teacher of this run, with everything that is needed to feed it."""
    source = config.source
    teacher = Teacher(
        arch=network_config.arch,
        width=network_config.width,
        small_stem=network_config.small_stem,
        class_names=class_names,
        image_size=source.image_size,
        resize=source.resize,
        channels=source.channels,
        mean_C=source.mean,
        std_C=source.std,
        top1=top1,
        weights=weights_of(network),
    )
    seconds = time.perf_counter() - started
    room.commit_unit(
        unit,
        {key_of(unit): codecs.encode_teacher(teacher)},
        metrics={
            "top1": top1,
            "arch": network_config.arch,
            "seconds_in_core": round(seconds, 3),
            **metrics,
        },
        attempt=attempt,
        seconds=seconds,
    )
