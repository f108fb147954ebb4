"""The jobs behind the rows of a table: a chain of the pipeline a set, and its students by either kind of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from wmdd_ray.config import (
    AssembleConfig,
    DistillConfig,
    EvaluateConfig,
    HardLabelConfig,
    LabelKind,
    RecoverConfig,
    RelabelConfig,
)
from wmdd_ray.product.comparison import SOFT_ALONE
from wmdd_ray.recipes import recipe_of
from wmdd_ray.units.students import unit_ids

from .definitions import Group, Row, Table, TeacherRecipe, budget_of
from .engine import Job, Study, chain, student_rows, students

LABELS: tuple[LabelKind, ...] = ("soft", "hard")


@dataclass(frozen=True)
class Trained:
    """The jobs of one row in one group: a chain a set, and the students of each set by kind of labels."""

    group: Group
    row: Row
    sets: tuple[dict[str, Job], ...]
    students: dict[LabelKind, tuple[Job, ...]]

    @property
    def jobs(self) -> list[Job]:
        """All that is trained for the row; it needs all that is before."""
        return [*(s["assemble"] for s in self.sets), *self.student_jobs]

    @property
    def student_jobs(self) -> list[Job]:
        return [job for kind in LABELS for job in self.students[kind]]


def units_of(job: Job) -> tuple[str, ...]:
    """Return the units of a job of students."""
    return unit_ids(job.config, student_rows(job.config))


def jobs_of_row(table: Table, group: Group, row: Row, study: Study) -> Trained:
    """Return what a row needs; its budget is checked against what its images are."""
    full = row.kind == "full"
    base = _config(table, group, row)
    num_classes, num_train = len(study.place.class_names), 0
    if full:
        num_train = study.place.splits.read_unit(study.place.split_unit).metrics["train"]
    num_images = num_train if full else num_classes * group.ipc * row.tiles**2
    budget = budget_of(group, row, num_images)
    teacher, makers, labelers = _teacher(base, group.teacher, 1), None, None
    if base.recover.teachers > 1:
        makers = _teacher(base, group.teacher, base.recover.teachers)
    if len(group.labelers) > 1:
        labelers = _teacher(base, group.labelers[0], len(group.labelers))
    relabel = replace(
        group.relabel, epochs=budget.label_epochs, teachers=max(1, len(group.labelers))
    )
    # All real images are labeled as their students train; a set stands there to be opened, and is not looked at.
    unlabeled = RelabelConfig(labels="online", epochs=1)
    student = replace(
        group.student,
        epochs=budget.epochs,
        all_real_epochs=budget.epochs,
        num_seeds=group.student_seeds * (group.distill_seeds if full else 1),
        baselines=("all_real",) if full else (),
    )
    soft = replace(student, labels=("soft",), hard=HardLabelConfig())
    # By any loss to soft labels, so that groups that differ in it share them.
    unread = {name: getattr(EvaluateConfig(), name) for name in SOFT_ALONE}
    hard = replace(student, labels=("hard",), **unread)
    sets: list[dict[str, Job]] = []
    of_kind: dict[LabelKind, list[Job]] = {kind: [] for kind in LABELS}
    for seed in range(1 if full else group.distill_seeds):
        config = replace(base, seed=seed)
        once = replace(relabel, epochs=1)
        labeled = replace(config, relabel=once if full else relabel, evaluate=soft)
        jobs = chain(labeled, teacher=teacher, makers=makers, labelers=labelers)
        sets.append(jobs)
        of_kind["soft"].append(students(labeled, jobs))
        # Students by hard labels read no soft ones, and groups that differ in those alone share them.
        plain = replace(config, relabel=unlabeled, evaluate=hard)
        of_kind["hard"].append(students(plain, chain(plain, teacher=teacher, makers=makers)))
    return Trained(group, row, tuple(sets), {kind: tuple(jobs) for kind, jobs in of_kind.items()})


def _config(table: Table, group: Group, row: Row) -> DistillConfig:
    """Return the configuration that the images of a row come from."""
    recover = row.recover
    if row.kind != "recover":
        start = "random" if row.kind == "full" else row.kind
        real: dict[str, Any] = {"method": "real", "start": start}
        recover = replace(
            RecoverConfig(), tiles=recover.tiles, crop_scale_min=recover.crop_scale_min, **real
        )
    return replace(
        recipe_of(table.dataset, max(1, group.ipc)),
        source=table.source,
        squeeze=group.teacher.squeeze,
        barycenters=row.barycenters,
        recover=recover,
        assemble=AssembleConfig(preview_classes=1, preview_images=1),  # nobody looks at them
    )


def _teacher(base: DistillConfig, recipe: TeacherRecipe, count: int) -> Job:
    """Return the job of `count` teachers of a recipe, from other random starts."""
    return Job(
        "squeeze",
        replace(
            base,
            seed=recipe.seed,
            squeeze=recipe.squeeze,
            teacher=recipe.given or None,
            relabel=RelabelConfig(teachers=count),
            recover=RecoverConfig(),
        ),
    )


def rows_of(table: Table, study: Study) -> list[Trained]:
    """Return the jobs of every row of a table, in its order."""
    return [jobs_of_row(table, group, row, study) for group in table.groups for row in group.rows]


def jobs_of(rows: Sequence[Trained]) -> list[Job]:
    """Return the jobs of some rows."""
    return [job for row in rows for job in row.jobs]
