"""recover: the distilled images, by workers that take groups of classes from one queue.

They are optimized against the teacher (`core/synthesis.py`), or sampled from a diffusion model (`diffusion/`); whoever
reads the room need not know. Where samples are led by their influence, a classifier of latents is a unit before all groups.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np

from wmdd_ray.config import DistillConfig
from wmdd_ray.diffusion import recovery, surrogate
from wmdd_ray.diffusion.card import read_card
from wmdd_ray.executors.dispatch import do_units
from wmdd_ray.options import fingerprint_options
from wmdd_ray.spine.numbers import Number, StageNumbers
from wmdd_ray.spine.rooms import UnitMarker, seconds_in_core
from wmdd_ray.spine.run import StageRun, Work
from wmdd_ray.store import codecs
from wmdd_ray.units.images import groups, open_image_maker


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the images depend on."""
    if config.recover.method == "diffusion":
        return {"seed": config.seed, "recover": recovery.options(config)}
    if config.recover.method == "real":
        names = ["method", "start", "tiles", "images_per_group"]
        names += ["crop_scale_min"] if config.recover.start == "mosaic" else []
        used = {name: getattr(config.recover, name) for name in names}
        return {"seed": config.seed, "recover": used}
    recover = fingerprint_options(config.recover)
    if config.recover.moments == "global":
        recover["matched_by"] = (
            "one image of every class"  # each class alone, before there was a choice
        )
    return {"seed": config.seed, "recover": recover}


def check_model(config: DistillConfig, class_names: tuple[str, ...]) -> str:
    """Return the identity of the diffusion model that images are sampled from, "" when they are not.

    Raises:
        ConfigError, ArtifactError: There is no such model, or it does not go with the options or the classes.
    """
    if config.recover.method != "diffusion":
        return ""
    card = read_card(config.recover.diffusion.model)
    recovery.checked(card, config, class_names)
    return card.identity


def plan(stage: StageRun) -> Work:
    """Return one unit a group of classes, after the surrogate where there is one."""
    config = stage.config
    class_names = stage.run.source("train").class_names
    check_model(config, class_names)
    num_classes = len(class_names)
    size = num_classes * config.ipc * config.source.image_size**2 * config.source.channels
    units = tuple(groups(config, num_classes))
    if surrogate.is_needed(config):
        card = read_card(config.recover.diffusion.model)
        size += surrogate.size_bytes(config, card, num_classes)
        units = (surrogate.UNIT, *units)
    return Work(units=units, estimated_bytes=size)


def work(stage: StageRun) -> dict[str, Any]:
    """Recover every group that is not finished."""
    config = stage.config
    units = groups(config, len(stage.inputs["features"].metrics["class_counts"]))
    identity = check_model(config, stage.run.source("train").class_names)
    worker = partial(
        open_image_maker,
        room=stage.room,
        teacher_room=stage.run.room("teacher"),
        features_room=stage.run.room("features"),
        barycenter_room=stage.run.room("barycenters"),
        source=stage.run.source("train"),
        config=config,
        units=units,
        model_identity=identity,
    )
    every = list(units)
    if surrogate.is_needed(config):
        every = [surrogate.UNIT, *units]
        stage.progress.start(len(every), len(stage.room.finished()))
        do_units(stage, [surrogate.UNIT], worker, among=every)
        do_units(stage, list(units), worker, among=every)
    else:
        do_units(stage, every, worker)
    markers = stage.room.read_units(every)
    losses = [loss for unit in units for loss in markers[unit].metrics["losses"]]
    return {
        "losses": {name: float(np.mean([loss[name] for loss in losses])) for name in losses[0]},
        "seconds_in_core": seconds_in_core(markers),
    }


def _series(unit: str) -> tuple[str, str]:
    return (unit, "") if unit == surrogate.UNIT else ("", unit)


def _numbers(stage: StageRun, marker: UnitMarker) -> list[Number]:
    part, detail = _series(marker.unit)
    if marker.unit == surrogate.UNIT:
        return [
            Number(stage="recover", metric="loss", part=part, value=loss, step=i + 1)
            for i, loss in enumerate(marker.metrics["epoch_losses"])
        ]
    recover = stage.config.recover
    last = recover.iterations if recover.method == "inversion" else stage.config.num_atoms
    losses_by_class = marker.metrics["losses"]
    return [
        Number(
            stage="recover",
            metric="loss",
            part=term,
            detail=detail,
            value=float(np.mean([losses[term] for losses in losses_by_class])),
            step=last,
        )
        for term in losses_by_class[0]
    ]


_groups = lru_cache(maxsize=1)(groups)


def _images(stage: StageRun, marker: UnitMarker) -> int:
    if marker.unit == surrogate.UNIT:
        return 0
    num_classes = len(stage.inputs["features"].metrics["class_counts"])
    made = _groups(stage.config, num_classes)[marker.unit]
    return len(made.labels) * len(made.positions)


def _curves(stage: StageRun, marker: UnitMarker) -> list[Number]:
    """Return the loss of a group by iteration, a curve a term: the mean over its classes."""
    if marker.unit == surrogate.UNIT:
        return []
    classes = [codecs.decode_class_images(stage.room.read(entry)) for entry in marker.files]
    at_P = classes[0].curve_at_P
    if at_P is None:
        return []
    return [
        Number(
            stage="recover",
            metric="loss",
            part=term,
            detail=marker.unit,
            value=float(value),
            step=int(at),
        )
        for term in classes[0].curves
        for at, value in zip(
            at_P, np.mean([record.curves[term] for record in classes], axis=0), strict=True
        )
    ]


NUMBERS = StageNumbers(series=_series, numbers=_numbers, images=_images, curves=_curves)
