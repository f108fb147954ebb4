"""The units of a table, in order, and the processes that do them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from jobs.benches.accuracy.definitions import Group, Row, Table, TeacherRecipe, budget_of
from jobs.benches.accuracy.splits import Workplace
from jobs.benches.accuracy.units import (
    FeaturesUnit,
    ImagesUnit,
    Labels,
    LabelsUnit,
    Speed,
    StudentUnit,
    TeacherUnit,
    Unit,
    new_network,
)
from wmdd_ray.config import (
    BarycenterConfig,
    EvaluateConfig,
    HardLabelConfig,
    NetworkConfig,
    RelabelConfig,
    ViewConfig,
)
from wmdd_ray.core.training import train_student
from wmdd_ray.core.views import StoredImages, draw_views
from wmdd_ray.executors.heap import keep_freed_memory

LABELS: tuple[Labels, ...] = ("soft", "hard")
_MEASURED_IMAGES = 100
# Options of the loss to soft labels.
_SOFT = (
    *("loss", "temperature", "ce_weight"),
    *("sinkhorn_weight", "sinkhorn_regularization", "sinkhorn_iterations"),
)


@dataclass(frozen=True)
class Trained:
    """The units of one row in one group: students by label kind, and the images by distill seed behind them."""

    group: Group
    row: Row
    images: tuple[ImagesUnit, ...]
    labeled: tuple[LabelsUnit, ...]
    students: dict[Labels, tuple[StudentUnit, ...]]


def teacher_unit(recipe: TeacherRecipe, place: Workplace) -> TeacherUnit:
    """Return the unit of a teacher; of a given one its bytes say all."""
    return TeacherUnit(data=place.data, recipe=recipe)


def units_of_row(group: Group, row: Row, place: Workplace) -> Trained:
    """Return what a row needs; its budget is checked against what its images are."""
    teachers = tuple(teacher_unit(recipe, place) for recipe in group.teachers)
    features = tuple(FeaturesUnit(data=place.data, teacher=teacher) for teacher in teachers)
    labelers = tuple(teacher_unit(recipe, place) for recipe in group.labelers) or teachers[:1]
    needs_teacher = row.kind not in ("random", "full")
    needs_atoms = row.kind in ("nearest", "recover")
    full = row.kind == "full"
    num_images = len(place.train.labels_N)
    if not full:
        num_images = len(place.class_names) * group.ipc * row.tiles**2
    budget = budget_of(group, row, num_images)
    images = tuple(
        ImagesUnit(
            data=place.data,
            name=row.name,
            kind=row.kind,
            ipc=group.ipc,
            seed=seed,
            features=features if needs_teacher else (),
            barycenters=row.barycenters if needs_atoms else BarycenterConfig(),
            recover=row.recover,
        )
        for seed in range(1 if full else group.distill_seeds)
    )
    labeled = tuple(
        LabelsUnit(
            data=place.data,
            images=each,
            num_images=num_images,
            teachers=labelers,
            relabel=replace(group.relabel, epochs=budget.label_epochs),
        )
        for each in images
    )
    # What no student depends on is set to one value, so that it changes no id.
    student = replace(
        group.student, epochs=budget.epochs, all_real_epochs=1, num_seeds=1, baselines=()
    )
    of_kind = {
        "soft": replace(student, hard=HardLabelConfig()),
        # By any loss to soft labels, so that groups that differ in it share them.
        "hard": replace(
            student.for_labels("hard"), **{name: getattr(EvaluateConfig(), name) for name in _SOFT}
        ),
    }
    # Students by hard labels read no soft ones, and groups that differ in those alone share them.
    unread: dict[str, Any] = {"teachers": teachers[:1], "relabel": RelabelConfig()}
    per_set = group.student_seeds * (group.distill_seeds if full else 1)
    students = {
        kind: tuple(
            StudentUnit(
                data=place.data,
                labeled=each if kind == "soft" else replace(each, **unread),
                student=of_kind[kind],
                labels=kind,
                # All differ: where the sets of a row are the same images, students of one seed would be the same too.
                seed=each.images.seed * per_set + number,
            )
            for each in labeled
            for number in range(per_set)
        )
        for kind in LABELS
    }
    return Trained(group, row, images, labeled, students)


def rows_of(table: Table, place: Workplace) -> list[Trained]:
    """Return the units of every row of a table, in its order."""
    return [units_of_row(group, row, place) for group in table.groups for row in group.rows]


def stages_of(rows: Sequence[Trained]) -> list[list[Unit]]:
    """Return all units, each once, in stages that need only what is before them."""
    students = [s for row in rows for kind in LABELS for s in row.students[kind]]
    labeled = [labels for row in rows for labels in row.labeled]
    images = [each for row in rows for each in row.images]
    features = [f for each in images for f in each.features]
    teachers = [t for labels in labeled for t in labels.teachers] + [f.teacher for f in features]
    stages: list[list[Unit]] = [list(dict.fromkeys(teachers)), list(dict.fromkeys(features))]
    stages += [list(dict.fromkeys(images)), list(dict.fromkeys(labeled))]
    stages += [list(dict.fromkeys(students))]
    return stages


def unfinished(units: Sequence[Unit], place: Workplace) -> list[Unit]:
    """Return the units that are not committed, in order, by one listing a room."""
    done = {room: place.room(room).finished() for room in {unit.room for unit in units}}
    return [unit for unit in units if unit.id not in done[unit.room]]


def bring(stages: Sequence[Sequence[Unit]], place: Workplace, processes: int) -> None:
    """Do every unit that is not finished, stage after stage, and say how far it is.

    Args:
        stages: Units, those of a stage independent of each other.
        place: Where they work.
        processes: Processes of one computing thread each; 1 works in this one.
    """
    speed = speed_on(place)
    open_stages = [unfinished(stage, place) for stage in stages]
    seconds = {u.id: u.seconds(place, speed) for stage in open_stages for u in stage}
    total, left = len(seconds), sum(seconds.values())
    line = _Line(total, left, processes)
    if not total:
        return
    if processes == 1:
        with one_thread():
            for stage in open_stages:
                for unit in stage:
                    unit.bring(place)
                    line.finished(unit, seconds[unit.id])
        return
    with workers(processes) as pool:
        for stage in open_stages:
            futures = {pool.submit(unit.bring, place): unit for unit in stage}
            try:
                for future in as_completed(futures):
                    future.result()
                    line.finished(futures[future], seconds[futures[future].id])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def workers(processes: int) -> ProcessPoolExecutor:
    """Return a pool of processes with one computing thread each, which end with this one."""
    return ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(),),
    )


class _Line:
    """A line a unit, with the time that the rest will take at the pace so far."""

    def __init__(self, total: int, estimated_s: float, processes: int) -> None:
        self.total, self.left_s, self.processes = total, estimated_s, processes
        self.done, self.done_s, self.began = 0, 0.0, time.monotonic()

    def finished(self, unit: Unit, estimated_s: float) -> None:
        self.done += 1
        self.done_s += estimated_s
        self.left_s -= estimated_s
        pace = (time.monotonic() - self.began) / max(self.done_s, 1e-9)
        left = duration(max(0.0, self.left_s) * pace)
        print(f"{self.done}/{self.total} {unit.room} {unit.label}, about {left} left", flush=True)


def duration(seconds: float) -> str:
    """Return seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def speed_on(place: Workplace) -> Speed:
    """Return a function that measures a network once: seconds of an image's forward and backward pass."""

    @cache
    def speed(config: NetworkConfig, mixed_precision: bool) -> float:
        source, size = place.source, place.source.image_size
        pixels = np.zeros((_MEASURED_IMAGES, size, size, source.channels), np.uint8)
        views = draw_views(_MEASURED_IMAGES, size, ViewConfig(), seed=0, epoch=0)
        logits_VY = np.zeros((_MEASURED_IMAGES, len(place.class_names)), np.float32)
        ended: list[float] = []
        with torch.random.fork_rng([]), one_thread():
            train_student(
                new_network(config, place),
                StoredImages(pixels, source.mean, source.std, place.device),
                lambda epoch: (views, logits_VY),
                None,
                EvaluateConfig(network=config, mixed_precision=mixed_precision),
                epochs=3,
                image_size=size,
                seed=0,
                on_epoch=lambda *_: ended.append(time.perf_counter()),
            )
        return min(np.diff(ended)) / _MEASURED_IMAGES

    return speed


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the worker processes do: more add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(parent: int) -> None:
    """Prepare a worker process: one computing thread, and an end when the process that started it has ended."""
    keep_freed_memory()
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def print_plan(stages: Sequence[Sequence[Unit]], place: Workplace, processes: int) -> None:
    """Print every unit with its estimated seconds, and the time that the unfinished ones will take."""
    speed = speed_on(place)
    total = 0.0
    for stage in stages:
        open_ids = {unit.id for unit in unfinished(stage, place)}
        for unit in stage:
            seconds = unit.seconds(place, speed)
            total += seconds if unit.id in open_ids else 0.0
            state = "" if unit.id in open_ids else "  finished"
            print(f"{unit.room:9} {unit.label:48} {seconds:9.1f} s{state}")
    count = sum(len(stage) for stage in stages)
    left = duration(total / processes)
    print(f"{count} units; what is not finished takes about {left} with {processes} processes")
