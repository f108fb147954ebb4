"""evaluate: students trained from `dataset/` alone, and the real-image baselines under the identical recipe.

Students are independent: one (row, labels, seed) is a unit, and units run side by side. The held-out
images are opened once a worker and used after training only; the last epoch is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from wmdd_ray.config import DistillConfig
from wmdd_ray.executors.dispatch import do_units
from wmdd_ray.options import fingerprint_options
from wmdd_ray.spine.numbers import Number, StageNumbers
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.spine.rooms import Room, StageCommit, UnitMarker, seconds_in_core
from wmdd_ray.spine.run import StageRun, Work
from wmdd_ray.store import documents
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.students import longest_first, open_student_trainer, parts_of, rows, unit_ids
from wmdd_ray.units.training_sets import OpenSets, TrainingSets

# Of the labels, which all students of a row share.
_OF_LABELS = ("label_entropy", "label_diversity")


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the results depend on."""
    return {"seed": config.seed, "evaluate": fingerprint_options(config.evaluate)}


def plan(stage: StageRun) -> Work:
    """Return one unit a student."""
    units = unit_ids(stage.config)
    return Work(units=units, estimated_bytes=2000 * len(units))


def work(stage: StageRun, *, of: Sequence[str] | None = None, keep: bool = False) -> dict[str, Any]:
    """Do what `train_students` says, of all rows where none are named."""
    config = stage.config
    source = stage.run.source("train")
    _take_all_real(stage)
    sets = partial(
        TrainingSets,
        dataset_uri=stage.run.room("dataset").store.uri,
        barycenter_room=stage.run.room("barycenters"),
        source=source,
        # Its listing can be long, and only this row reads all of it.
        train=Listed.of(source, config.source) if "all_real" in config.evaluate.baselines else None,
        config=config,
    )
    return {
        **train_students(stage, config, sets, of=of or rows(config), keep=keep),
        "teacher_top1": stage.inputs["teacher"].metrics["top1"],
    }


def _take_all_real(stage: StageRun) -> None:
    """Commit the students of all real images that a relative of this run has trained alike: they depend on no distilled image."""
    run, room, plan = stage.run, stage.room, stage.room.read_plan()
    if not run.relatives or plan is None or "all_real" not in rows(stage.config):
        return
    made = (run.room("labels").committed(), run.room("dataset").committed())
    own = _all_real_depends_on(plan["options"], plan["inputs"], *made)
    for store in run.relatives:
        other = Room(store, room.name)
        commit, labels, dataset = (
            Room(store, name).read_commit() for name in (room.name, "labels", "dataset")
        )
        if commit is None or labels is None or dataset is None:
            continue
        theirs = _all_real_depends_on(commit.options, commit.inputs, labels, dataset)
        if theirs != own or commit.version != stage.stage.version:
            continue
        for unit in unit_ids(stage.config, ["all_real"]):
            marker = commit.units.get(unit)
            if marker is None or unit in room.finished():
                continue
            payloads = {entry.key: other.read(entry) for entry in marker.files}
            metrics = {**marker.metrics, "seconds_in_core": 0.0, "taken_from": store.uri}
            if (attempt := room.begin(unit)) is not None:
                attempt.commit(payloads, metrics)


def _all_real_depends_on(
    options: dict[str, Any], inputs: dict[str, str], labels: StageCommit, dataset: StageCommit
) -> dict[str, Any]:
    """Return what students of all real images depend on, of a plan or commit of this stage, and the commits before it."""
    relabel = labels.options["relabel"]
    others = ("epochs", "num_seeds", "labels", "baselines")
    return {
        "seed": options["seed"],
        "evaluate": {k: v for k, v in options["evaluate"].items() if k not in others},
        "labels": [relabel.get(k) for k in ("views", "batch_size", "batch_statistics")],
        "inputs": [inputs[name] for name in ("data", "val_data")],
        "teachers": {k: f.sha256 for k, f in dataset.files.items() if k.startswith("teacher")},
    }


def train_students(
    stage: StageRun, config: DistillConfig, sets: OpenSets, *, of: Sequence[str], keep: bool
) -> dict[str, Any]:
    """Train the students of the rows `of` that are not trained yet, test them on held-out images, and return the table.

    The room holds a result a student, and to `keep` them their weights too (`read_student`).
    """
    units = unit_ids(config, of)
    val = Listed.of(stage.run.source("val"), config.source)
    opened = partial(
        open_student_trainer, room=stage.room, sets=sets, val=val, config=config, kept=keep
    )
    do_units(stage, longest_first(units), opened)
    markers = stage.room.read_units(units)
    results = {
        unit: documents.load_json(stage.room.read(marker.files[0]), unit)
        for unit, marker in markers.items()
    }
    table = []
    for row, labels in product(of, config.evaluate.labels):
        of_row = [r for r in results.values() if (r["row"], r["labels"]) == (row, labels)]
        top1 = np.array([r["top1"] for r in of_row])
        recall_SY = np.array([r["recall_per_class"] for r in of_row])
        table.append(
            {
                "row": row,
                "num_images": of_row[0]["num_images"],
                "epochs": of_row[0]["epochs"],
                "labels": labels,
                "top1_mean": float(top1.mean()),
                "top1_std": float(top1.std(ddof=1)) if len(top1) > 1 else 0.0,
                "top1": top1.tolist(),
                "num_seeds": len(of_row),
                "seconds_per_student": float(np.mean([r["seconds"] for r in of_row])),
                "recall_per_class": recall_SY.mean(axis=0).round(4).tolist(),
                **{name: of_row[0][name] for name in _OF_LABELS if name in of_row[0]},
            }
        )
    return {
        "table": table,
        "student": asdict(config.evaluate),
        "hardware": hardware(),
        **versions(),
        "seconds_in_core": seconds_in_core(markers),
    }


def _series(unit: str) -> tuple[str, str]:
    series, _, seed = unit.rpartition("-")
    return series, seed


def _numbers(stage: StageRun, marker: UnitMarker) -> list[Number]:
    row, labels, seed = parts_of(marker.unit)
    name, top1 = stage.stage.name, marker.metrics["top1"]
    return [Number(stage=name, metric="top1", part=f"{row}-{labels}", value=top1, step=seed)]


NUMBERS = StageNumbers(series=_series, numbers=_numbers)
