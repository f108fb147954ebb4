"""From trained students to a sealed result: scoring, the label-robust score, and all that the numbers depend on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from wmdd_ray.core.batches import eval_batches
from wmdd_ray.core.device import device_for
from wmdd_ray.core.networks import network_of
from wmdd_ray.core.training import accuracy
from wmdd_ray.product.comparison import label_robust_score
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.store import codecs
from wmdd_ray.units.students import parts_of, read_student, student_key
from wmdd_ray.units.teacher import read_teacher
from wmdd_ray.units.teacher import units_of as teacher_units

from ..reporting import mean_and_std
from .definitions import FULL, RANDOM, Table
from .engine import Job, Study, map_in, one_thread
from .judge import configuration_of, open_test
from .splits import Labeled, Place, Split
from .work import LABELS, Trained, units_of

_BATCH_IMAGES = 500


def score(
    table: Table, rows: Sequence[Trained], study: Study, uri: str, split: Split, processes: int = 1
) -> dict[str, Any]:
    """Return the result of a table whose students are all trained: on `val`, or once on the test split."""
    opening = open_test(table, rows, study, uri) if split == "test" else None
    images = opening.images if opening else study.place.load("val")
    jobs = {study.id(job): job for trained in rows for job in trained.student_jobs}
    reached: dict[tuple[str, str], float] = {}
    parts = [(study.place, job, images) for job in jobs.values()]
    for top1_of_unit in map_in(processes, top1_of_students, parts):
        reached |= top1_of_unit
        print(f"{len(reached)} students scored", flush=True)
    with one_thread():
        teachers = _teachers(rows, images, study)
    scored = [_row(trained, reached, study) for trained in rows]
    groups: dict[str, dict[str, Any]] = {}
    for trained, row in zip(rows, scored, strict=True):
        group = trained.group
        about = {
            "ipc": group.ipc,
            "labeled_by": group.teacher.name,
            "teachers": [group.teacher.name],
            "labelers": [t.name for t in group.labelers or (group.teacher,)],
            "relabel": asdict(group.relabel),
            "student": asdict(group.student),
            "distill_seeds": group.distill_seeds,
            "student_seeds": group.student_seeds,
            "rows": [],
        }
        groups.setdefault(group.title, about)["rows"].append(row)
    for row, lrs in scored_rows(list(groups.values())):
        if lrs is not None:
            row["lrs"] = lrs
    counts = study.place.splits.read_unit(study.place.split_unit).metrics
    return {
        **configuration_of(table, rows, study),
        "split": split,
        "opened": opening and opening.opened,
        "opened_before": opening and opening.before,
        "num_images": {**counts, split: len(images.labels_N)},
        "teachers": teachers,
        "groups": [{"title": title, **about} for title, about in groups.items()],
        "hardware": hardware(),
        **versions(),
    }


def top1_of_students(place: Place, job: Job, images: Labeled) -> dict[tuple[str, str], float]:
    """Return (id of the job, unit) -> top-1 of its students on real images."""
    study, num_classes = Study(place), len(place.class_names)
    room, device = study.room(job), device_for(-1)
    return {
        (study.id(job), unit): top1(
            read_student(room, unit, job.config, num_classes, device), images, place
        )
        for unit in units_of(job)
    }


def top1(network: torch.nn.Module, images: Labeled, place: Place) -> float:
    """Return a network's top-1 accuracy on real images, in [0, 1]."""
    batches = eval_batches(
        images.images_NHWC,
        images.labels_N,
        mean_C=place.source.mean,
        std_C=place.source.std,
        batch_size=_BATCH_IMAGES,
        device=next(network.parameters()).device,
    )
    return accuracy(network.to(memory_format=torch.channels_last), batches)[0]


def _teachers(rows: Sequence[Trained], images: Labeled, study: Study) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for trained in rows:
        jobs = trained.sets[0]
        recipes = trained.group.labelers or (trained.group.teacher,)
        job = jobs["relabel"].inputs[0]
        commit = study.done(job)
        for recipe, unit in zip(recipes, teacher_units(job.config), strict=True):
            if recipe.name in described:
                continue
            teacher, marker = read_teacher(study.room(job), unit), commit.units[unit]
            described[recipe.name] = {
                "top1": top1(network_of(teacher, device_for(-1)), images, study.place),
                "top1_val": marker.metrics["top1"],
                "given": recipe.given,
                "seconds": marker.seconds,
                "squeeze": asdict(recipe.squeeze),
                "seed": recipe.seed,
            }
    return described


def seconds_of(study: Study, job: Job) -> float:
    """Return the seconds of a finished job's units, inside core and storage."""
    return round(sum(marker.seconds for marker in study.done(job).units.values()), 3)


def _row(trained: Trained, reached: dict[tuple[str, str], float], study: Study) -> dict[str, Any]:
    row, soft = trained.row, trained.students["soft"][0]
    made = [study.done(jobs["assemble"]).metrics for jobs in trained.sets]
    num_stored, image_bytes = made[0]["num_images"], [m["image_bytes"] for m in made]
    if row.kind == "full":
        train = study.place.load("train")
        num_stored = len(train.labels_N)
        weights_N1 = np.ones((num_stored, 1))
        whole = codecs.encode_images(
            train.images_NHWC, train.labels_N, weights_N1, study.place.class_names
        )
        image_bytes = [len(whole)]
    described: dict[str, Any] = {
        "name": row.name,
        "title": row.title,
        "kind": row.kind,
        "barycenters": asdict(row.barycenters),
        "recover": asdict(row.recover),
        "num_stored": num_stored,
        "num_read": num_stored * row.tiles**2,
        "epochs": soft.config.evaluate.epochs,
        "label_epochs": soft.config.relabel.epochs,
        "image_bytes": image_bytes,
        "label_bytes": [m["label_bytes"] for m in made],
        "distill_seconds": [
            round(sum(seconds_of(study, jobs[stage]) for stage in ("barycenters", "recover")), 3)
            for jobs in trained.sets
        ],
    }
    for kind in LABELS:
        jobs = trained.students[kind]
        described[kind] = _accuracies(jobs, reached, study, described["num_read"])
    return described


def _accuracies(
    jobs: Sequence[Job], reached: dict[tuple[str, str], float], study: Study, num_read: int
) -> dict[str, Any]:
    students = [(job, unit) for job in jobs for unit in units_of(job)]
    markers = [study.done(job).units[unit] for job, unit in students]
    values = [reached[study.id(job), unit] for job, unit in students]
    return {
        **spread(values),
        "top1": values,
        "seeds": [[job.config.seed, parts_of(unit)[2]] for job, unit in students],
        "views": jobs[0].config.evaluate.epochs * num_read,
        "weights": [study.done(job).file(student_key(unit)).sha256 for job, unit in students],
        "seconds": statistics.fmean(marker.seconds for marker in markers),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and sample standard deviation."""
    return {name: mean_and_std(values)[name] for name in ("mean", "std")}


def different(students: dict[str, Any]) -> list[float]:
    """Return the accuracies of a row's students by one kind of labels; those of the same weights are one student."""
    return list(dict(zip(students["weights"], students["top1"], strict=True)).values())


def scored_rows(
    groups: Sequence[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], dict[str, float] | None]]:
    """Yield every row of a result, and its LRS where there are all real images for its student."""
    rows = [(group, row) for group in groups for row in group["rows"]]
    full = {str(group["student"]["network"]): row for group, row in rows if row["name"] == FULL}
    for group, row in rows:
        whole = full.get(str(group["student"]["network"]))
        if whole is None or row["kind"] == "full":
            yield row, None
            continue
        random = next(each for each in group["rows"] if each["name"] == RANDOM)
        yield (
            row,
            label_robust_score(
                full_hard=whole["hard"]["mean"],
                hard=row["hard"]["mean"],
                soft=row["soft"]["mean"],
                random_soft=random["soft"]["mean"],
            ),
        )
