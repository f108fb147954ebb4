"""squeeze: a classifier trained on the real images, or one that is given; several where several label.

Whichever it is, its top-1 on held-out images is measured before anything is built on it, and a teacher at chance
level or with its classes in another order is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.teacher_check import check_teacher
from wmdd_ray.executors.dispatch import ray_or_here
from wmdd_ray.options import fingerprint_options
from wmdd_ray.spine.numbers import Number, StageNumbers
from wmdd_ray.spine.rooms import UnitMarker
from wmdd_ray.spine.run import StageRun, Work
from wmdd_ray.store.sources import Source
from wmdd_ray.units.features import check_listed
from wmdd_ray.units.given_teacher import import_teacher
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.teacher import UNIT, Training, units_of


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the teachers depend on; given ones do not depend on the training's."""
    several = {"teachers": config.num_teachers} if config.num_teachers > 1 else {}
    source = fingerprint_options(config.source)
    if config.teacher is not None:
        squeeze = fingerprint_options(config.squeeze)
        squeeze = {name: squeeze[name] for name in ("network", "min_top1")}
        return {"teacher": config.teacher, "source": source, "squeeze": squeeze, **several}
    # Where the curvature's weight comes from makes no difference to the teacher.
    squeeze = fingerprint_options(config.squeeze.at_ipc(config.ipc))
    about = {"teacher": None, "seed": config.seed, "source": source}
    return {**about, "squeeze": squeeze, **several}


def plan(stage: StageRun) -> Work:
    """Return a unit a teacher."""
    units, size = units_of(stage.config), sum(4 * p.numel() for p in _network(stage).parameters())
    return Work(units=units, estimated_bytes=len(units) * size)


def _network(stage: StageRun) -> torch.nn.Module:
    """Return the network that the options name, refused if it is to be trained and cannot be a teacher."""
    shape = stage.config.source.shape
    num_classes = len(stage.run.source("train").class_names)
    network = build_network(stage.config.squeeze.network, num_classes=num_classes, **shape)
    if stage.config.teacher is None:
        check_teacher(network, needs_norms=stage.config.needs_norms, **shape)
    return network


def work(stage: StageRun) -> dict[str, Any]:
    """Train or import each teacher, measure it, and commit it."""
    units, finished = units_of(stage.config), stage.room.finished()
    left = [unit for unit in units if unit not in finished]
    stage.progress.start(len(units), len(units) - len(left))
    if left and stage.config.teacher is None:
        source: Source = stage.run.source("train")
        # Told before hours of training.
        _network(stage)
        check_listed(source.shards(stage.config.features.chunk_images), source, stage.config)
    for number, unit in enumerate(left, len(units) - len(left)):
        if stage.config.teacher is None:
            _train(stage, unit, number)
        else:
            import_teacher(stage, stage.config.teacher, unit)
    markers = stage.room.read_units(units)
    top1 = [markers[unit].metrics["top1"] for unit in units]
    stage.progress.update(len(units), f"top-1 {', '.join(f'{100 * t:.1f}' for t in top1)} %")
    # Features and atoms are of the first.
    return {**markers[UNIT].metrics, **({"teachers_top1": top1} if len(units) > 1 else {})}


def _train(stage: StageRun, unit: str, num_finished: int) -> None:
    """Train a teacher on the workers that the run has; `num_finished` others are done."""
    source: Source = stage.run.source("train")
    executor = ray_or_here(stage, "data_parallel")
    limit = int(stage.config.squeeze.memory_limit_gib * 2**30)
    image_bytes = stage.config.source.image_size**2 * stage.config.source.channels
    num_images = source.num_images
    in_memory = num_images is not None and num_images * image_bytes <= limit
    training = Training(
        unit=unit,
        room=stage.room,
        config=stage.config,
        class_names=source.class_names,
        num_images=num_images or executor.count_images(source),
        train=Listed.of(source, stage.config.source) if in_memory else None,
        val=Listed.of(stage.run.source("val"), stage.config.source),
    )
    executor.train(stage, training, source, num_finished)


def _series(unit: str) -> tuple[str, str]:
    return ("" if unit == UNIT else unit), ""


def _numbers(stage: StageRun, marker: UnitMarker) -> list[Number]:
    part, _ = _series(marker.unit)
    losses = [
        Number(stage="squeeze", metric="loss", part=part, value=loss, step=i + 1)
        for i, loss in enumerate(marker.metrics.get("losses", []))  # a given teacher has none
    ]
    top1 = marker.metrics["top1"]
    return [*losses, Number(stage="squeeze", metric="top1", part=marker.unit, value=top1, step=0)]


def _images(stage: StageRun, marker: UnitMarker) -> int | None:
    num_images = stage.run.source("train").num_images
    return None if num_images is None else len(marker.metrics.get("losses", [])) * num_images


NUMBERS = StageNumbers(series=_series, numbers=_numbers, images=_images, images_by_epoch=True)
