"""From trained students to a sealed result: scoring, the label-robust score, and all that the numbers depend on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from typing import Any

import torch

from jobs.benches.accuracy.definitions import FULL, RANDOM, Table
from jobs.benches.accuracy.judge import configuration_of, open_test
from jobs.benches.accuracy.splits import Labeled, Split, Workplace
from jobs.benches.accuracy.units import FeaturesUnit, Labels, StudentUnit, TeacherUnit, network_at
from jobs.benches.accuracy.work import (
    LABELS,
    Trained,
    one_thread,
    stages_of,
    workers,
)
from wmdd_ray.core.batches import eval_batches
from wmdd_ray.core.training import accuracy
from wmdd_ray.errors import ArtifactError
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.store.documents import seal

_BATCH_IMAGES = 500
_STUDENTS_AT_A_TIME = 10


def label_robust_score(
    *, full_hard: float, hard: float, soft: float, random_soft: float
) -> dict[str, float]:
    """Return LRS of DD-Ranking with its parts; all accuracies are fractions.

    HLR = full_hard - hard is what the images lose against all real ones where labels do not help; IOR = soft -
    random_soft is what they gain over random real images with the same labels. alpha = (IOR - HLR) / 2 and
    LRS = (e^alpha - e^-1) / (e - e^-1), in [0, 1]. (The package's code takes percents into the exponential.)

    References:
        Li et al. 2024, DD-Ranking, with weight w = 1/2.
    """
    hlr, ior = full_hard - hard, soft - random_soft
    alpha = 0.5 * ior - 0.5 * hlr
    lrs = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
    return {"hlr": hlr, "ior": ior, "lrs": lrs}


def score(
    table: Table,
    rows: Sequence[Trained],
    place: Workplace,
    uri: str,
    split: Split,
    processes: int = 1,
) -> dict[str, Any]:
    """Return the result of a table whose students are all trained: on `val`, or once on the test split."""
    images, opening = place.val, None
    if split == "test":
        opening = open_test(table, rows, place, uri)
        images = opening.images
    students = [unit for unit in stages_of(rows)[-1] if isinstance(unit, StudentUnit)]
    reached = _all_top1(students, images, place, processes)
    with one_thread():
        teachers = _teachers(rows, images, place)
    found = [_row(trained, reached, place) for trained in rows]
    _add_scores(rows, found)
    groups: dict[str, dict[str, Any]] = {}
    for trained, row in zip(rows, found, strict=True):
        group = trained.group
        about = {
            "ipc": group.ipc,
            "labeled_by": group.teachers[0].name,
            "teachers": [t.name for t in group.teachers],
            "labelers": [t.name for t in group.labelers or group.teachers[:1]],
            "relabel": asdict(group.relabel),
            "student": asdict(group.student),
            "distill_seeds": group.distill_seeds,
            "student_seeds": group.student_seeds,
            "rows": [],
        }
        groups.setdefault(group.title, about)["rows"].append(row)
    counts = place.room("splits").read_unit(place.split_unit).metrics
    return {
        **configuration_of(table, rows, place),
        "split": split,
        "opened": opening and opening.opened,
        "opened_before": opening and opening.before,
        "num_images": {**counts, split: len(images.labels_N)},
        "teachers": teachers,
        "groups": [{"title": title, **about} for title, about in groups.items()],
        "hardware": hardware(),
        **versions(),
    }


def sealed(result: dict[str, Any]) -> bytes:
    """Return a result as it is committed: JSON with a checksum, so that no number changes by hand."""
    return seal(result)


def _all_top1(
    students: Sequence[StudentUnit], images: Labeled, place: Workplace, processes: int
) -> dict[str, float]:
    """Return top-1 by student's id. A wide network takes seconds for ten thousand images, and a table has hundreds."""
    starts = range(0, len(students), _STUDENTS_AT_A_TIME)
    parts = [students[start : start + _STUDENTS_AT_A_TIME] for start in starts]
    reached: dict[str, float] = {}

    def add(found: dict[str, float]) -> None:
        reached.update(found)
        print(f"{len(reached)}/{len(students)} students scored", flush=True)

    if processes == 1:
        with one_thread():
            for part in parts:
                add(_top1_of(part, images, place))
        return reached
    with workers(processes) as pool:
        for future in as_completed(pool.submit(_top1_of, part, images, place) for part in parts):
            add(future.result())
    return reached


def _top1_of(
    students: Sequence[StudentUnit], images: Labeled, place: Workplace
) -> dict[str, float]:
    return {student.id: top1(student.network(place), images, place) for student in students}


def top1(network: torch.nn.Module, images: Labeled, place: Workplace) -> float:
    """Return a network's top-1 accuracy on real images, in [0, 1]."""
    batches = eval_batches(
        images.images_NHWC,
        images.labels_N,
        mean_C=place.source.mean,
        std_C=place.source.std,
        batch_size=_BATCH_IMAGES,
        device=place.device,
    )
    return accuracy(network.to(memory_format=torch.channels_last), batches)[0]


def _teachers(rows: Sequence[Trained], images: Labeled, place: Workplace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    stages = stages_of(rows)
    for unit in stages[0]:
        assert isinstance(unit, TeacherUnit)
        marker = unit.marker(place)
        found[unit.recipe.name] = {
            "top1": top1(network_at(place, unit), images, place),
            "top1_val": marker.metrics["top1_val"],
            "given": unit.recipe.given,
            "bytes": marker.files[0].size_bytes,
            "seconds": marker.metrics["seconds"],
            "squeeze": asdict(unit.recipe.squeeze),
            "seed": unit.recipe.seed,
        }
    for unit in stages[1]:
        assert isinstance(unit, FeaturesUnit)
        name = unit.teacher.recipe.name
        found[name]["features_seconds"] = unit.marker(place).metrics["seconds"]
    return found


def _row(trained: Trained, reached: dict[str, float], place: Workplace) -> dict[str, Any]:
    row = trained.row
    images = [unit.marker(place).metrics for unit in trained.images]
    labeled = [unit.marker(place) for unit in trained.labeled]
    found: dict[str, Any] = {
        "name": row.name,
        "title": row.title,
        "kind": row.kind,
        "barycenters": asdict(row.barycenters),
        "recover": asdict(row.recover),
        "num_stored": images[0]["num_stored"],
        "num_read": images[0]["num_read"],
        "epochs": trained.students["soft"][0].student.epochs,
        "label_epochs": trained.labeled[0].relabel.epochs,
        "image_bytes": [m["image_bytes"] for m in images],
        "label_bytes": [sum(f.size_bytes for f in m.files) for m in labeled],
        "distill_seconds": [m["seconds"] for m in images],
        "label_seconds": [m.metrics["seconds"] for m in labeled],
    }
    for kind in LABELS:
        found[kind] = _accuracies(kind, trained, reached, place)
    return found


def _accuracies(
    kind: Labels, trained: Trained, reached: dict[str, float], place: Workplace
) -> dict[str, Any]:
    students = trained.students[kind]
    markers = [s.marker(place) for s in students]
    views = {m.metrics["views"] for m in markers}
    if len(views) != 1:
        raise ArtifactError(
            f"students of row {trained.row.name} read {sorted(views)} views: expected one number; the folder holds another "
            "version's units: delete its rooms `students` and `labels`"
        )
    values = [reached[s.id] for s in students]
    return {
        **spread(values),
        "top1": values,
        "seeds": [[s.labeled.images.seed, s.seed] for s in students],
        "views": views.pop(),
        "weights": [m.files[0].sha256 for m in markers],
        "seconds": statistics.fmean(m.metrics["seconds"] for m in markers),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard deviation (of a sample; 0 of one value)."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std}


def different(students: dict[str, Any]) -> list[float]:
    """Return the accuracies of a row's students by one kind of labels; those of the same weights are one student."""
    return list(dict(zip(students["weights"], students["top1"], strict=True)).values())


def _add_scores(rows: Sequence[Trained], found: Sequence[dict[str, Any]]) -> None:
    """Add LRS to each row for which there are random real images of its group, and all real ones for its student."""
    pairs = list(zip(rows, found, strict=True))
    full = {str(t.group.student.network): row for t, row in pairs if t.row.name == FULL}
    random = {t.group.title: row for t, row in pairs if t.row.name == RANDOM}
    for trained, row in pairs:
        whole = full.get(str(trained.group.student.network))
        if whole is not None and trained.row.kind != "full":
            row["lrs"] = label_robust_score(
                full_hard=whole["hard"]["mean"],
                hard=row["hard"]["mean"],
                soft=row["soft"]["mean"],
                random_soft=random[trained.group.title]["soft"]["mean"],
            )
