"""relabel: the teachers' soft labels of self-contained views, stored by label epoch, by workers.

A unit is a block of label epochs of a slice of the data set: whole classes, drawn anew every block, that fit a
worker's memory and mix among themselves. A set of up to `slice_images` images is one slice.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from wmdd_ray.config import DistillConfig
from wmdd_ray.executors.dispatch import do_units
from wmdd_ray.options import fingerprint_options
from wmdd_ray.spine.numbers import StageNumbers
from wmdd_ray.spine.rooms import UnitMarker, seconds_in_core
from wmdd_ray.spine.run import StageRun, Work
from wmdd_ray.store.label_files import VIEW_BYTES
from wmdd_ray.units.labels import blocks, by_seed, open_labeler

# Bytes of a label file without a view: Parquet's footer, and what views are drawn from.
_FILE_BYTES = 2000


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the labels depend on."""
    # How the number of teachers comes about makes no difference.
    relabel = replace(config.relabel, teachers=config.num_labelers, teacher_schedule=())
    return {"seed": config.seed, "relabel": fingerprint_options(relabel)}


def plan(stage: StageRun) -> Work:
    """Return one unit a block of label epochs and slice."""
    config = stage.config
    relabel = config.relabel
    num_classes = len(stage.run.source("train").class_names)
    each = 1 if relabel.precision == "int8" else 2
    top_k = relabel.compression == "top_k" and relabel.top_k < num_classes
    view_bytes = relabel.top_k * (each + 2) + 2 if top_k else num_classes * each
    if relabel.labels == "online":
        view_bytes = 0
    if not by_seed(config):
        view_bytes += VIEW_BYTES
    views = num_classes * config.num_atoms * relabel.epochs
    units = tuple(blocks(config, num_classes))
    return Work(units=units, estimated_bytes=views * view_bytes + len(units) * _FILE_BYTES)


def work(stage: StageRun) -> dict[str, Any]:
    """Label every block that is not finished."""
    num_classes = len(stage.inputs["features"].metrics["class_counts"])
    units = blocks(stage.config, num_classes)
    worker = partial(
        open_labeler,
        room=stage.room,
        teacher_room=stage.run.room("teacher"),
        images_room=stage.run.room("images"),
        config=stage.config,
        units=units,
    )
    do_units(stage, list(units), worker)
    markers = stage.room.read_units(units)
    return {
        "label_bytes": sum(f.size_bytes for m in markers.values() for f in m.files),
        "seconds_in_core": seconds_in_core(markers),
    }


_blocks = lru_cache(maxsize=1)(blocks)


def _images(stage: StageRun, marker: UnitMarker) -> int:
    num_classes = len(stage.inputs["features"].metrics["class_counts"])
    epochs, labels = _blocks(stage.config, num_classes)[marker.unit]
    return len(epochs) * len(labels) * stage.config.num_atoms


NUMBERS = StageNumbers(images=_images)
