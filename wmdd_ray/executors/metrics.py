"""What a run tells while it works: its numbers to Ray's metrics and to trackers, Ray Data's statistics to the event log.

Everything is told by the driver, about units that are committed: it reads their markers, in a thread beside the work. So
a number is told once, whoever worked on its unit and however often, and Prometheus keeps a series a run, not one a worker.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import ray.data
from ray.util.metrics import Gauge

from wmdd_ray.config import DistillConfig
from wmdd_ray.spine.rooms import UnitMarker
from wmdd_ray.spine.run import Run, StageRun, Watch
from wmdd_ray.store import codecs
from wmdd_ray.telling.trackers import Number, Told, TrackedRun, Tracker

logger = logging.getLogger(__name__)

# A student's unit is a row, labels and a seed, in `evaluate` and in the stages of jobs/evaluate.py, one an architecture.
_STUDENT = re.compile(r"(.+-(?:soft|hard))-(s\d+)")
# A page with thousands of curves shows nothing, and the curves of recover come with its images.
_SHOWN_UNITS = 20
_RATE_OVER_S = 60.0
_UNITS_EVERY_S = 2.0
# How long the end of a run waits for trackers; `ray job stop` leaves 3 s between its two signals.
_END_S, _STOPPED_S = 20.0, 1.5

DESCRIPTIONS = {
    "units_done": "Finished units of work of the stage; those under way count in part (units)",
    "units_total": "Units of work of the stage; absent while the data streams and nobody knows (units)",
    "units_retried": "Attempts at units that were lost with their workers, since the run began (attempts)",
    "images_done": "Images of the units finished by this run: real ones that a teacher was trained on (once an epoch), embedded, "
    "or summed up in a barycenter; distilled ones recovered; views labeled (images)",
    "images_per_second": "Rate of images_done over the last minute, or between the last two units (images/s)",
    "loss": "Last told loss: of an epoch (teacher, students), or a term of recover after the last iteration, the mean over the "
    "classes of the unit finished last (in the loss's own units)",
    "cost": "W2^2 between the atoms of the class solved last and its real images (squared feature units)",
    "top1": "Top-1 accuracy on held-out images, of the teacher or of the student tested last (fraction)",
}
"""Name of a metric, without its prefix `wmdd_` -> what Prometheus says of it."""


class RayMetrics(Tracker):
    """Sets gauges `wmdd_<metric>`, which Ray's dashboard and Prometheus show as `ray_wmdd_<metric>`."""

    title = "Ray's metrics"

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name

    def open(self) -> None:
        keys = ("run", "stage", "part")
        self._gauges = {
            name: Gauge(f"wmdd_{name}", description=told, tag_keys=keys)
            for name, told in DESCRIPTIONS.items()
        }

    def log(self, numbers: Sequence[Number]) -> None:
        for number in numbers:
            tags = {"run": self._run_name, "stage": number.stage, "part": number.part}
            self._gauges[number.metric].set(number.value, tags=tags)


class LiveWatch(Watch):
    """Watches a run for Ray's metrics and for trackers, and keeps Ray Data's statistics."""

    def __init__(self, run: TrackedRun, trackers: Sequence[Tracker]) -> None:
        self._name, self._trackers = run.name, trackers
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stage = ""
        self._shown: dict[str, set[str]] = {}
        self._images: Counter[str] = Counter()
        self._rates: dict[str, deque[tuple[float, float]]] = {}
        self._retried: Counter[str] = Counter()
        self._told_epochs: dict[str, int] = {}
        self._units_told = 0.0

    def begin(self, run: Run) -> None:
        self._began = time.monotonic()
        self._ray = Told(RayMetrics(self._name))
        self._others = [Told(tracker) for tracker in self._trackers]
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()
        self._statistics = _DataStatistics(
            lambda text: run.events.write("data_statistics", stage=self._stage, text=text)
        )

    def units(self, stage: str, done: float, total: int | None, *, final: bool = False) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage = stage
            self._rates[stage] = deque([(now, 0.0)])
            if total is not None:
                self._tell([self._progress(stage, "units_total", total)])
        elif not final and now - self._units_told < _UNITS_EVERY_S:
            return
        self._units_told = now
        self._tell([self._progress(stage, "units_done", done)])
        # Behind the markers that wait to be read.
        self._waiting.put(lambda: self._tell_images(stage))

    def event(self, stage: StageRun, event: str, about: dict[str, Any]) -> None:
        name = stage.stage.name
        if event == "unit_done":
            self._waiting.put(lambda: self._unit_done(stage, about["unit"]))
        elif event == "unit_told":
            at = time.time()
            self._waiting.put(lambda: self._unit_told(stage, about["unit"], about["values"], at))
        elif event == "unit_retried":
            self._retried[name] += 1
            self._tell([self._progress(name, "units_retried", self._retried[name])])

    def end(self, exit_code: int) -> None:
        until = time.monotonic() + (_STOPPED_S if exit_code in (130, 143) else _END_S)
        self._statistics.close()
        self._waiting.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        everybody = [self._ray, *self._others]
        for told in everybody:
            told.end(exit_code)
        for told in everybody:
            told.join(until - time.monotonic())

    def _work(self) -> None:
        warned = False
        while (do := self._waiting.get()) is not None:
            try:
                do()
            except Exception as error:
                if not warned:
                    logger.warning("metrics: %s: %s", type(error).__name__, error)
                warned = True

    def _unit_done(self, stage: StageRun, unit: str) -> None:
        name, marker = stage.stage.name, stage.room.read_unit(unit)
        last = self._told_epochs.get(f"{name}/{unit}", 0)
        numbers = [n for n in numbers_of(stage, marker) if n.metric != "loss" or n.step > last]
        images = images_of(stage, marker)
        if images is not None:
            self._count_images(name, images if name == "squeeze" else self._images[name] + images)
        self._ray.tell(numbers)
        if self._others and self._shows(name, unit):
            self._tell_others((name == "recover" and curves_of(stage, marker)) or numbers)
        else:
            self._tell_others(n for n in numbers if not n.detail)

    def _unit_told(
        self, stage: StageRun, unit: str, values: dict[str, float], seconds: float
    ) -> None:
        """Tell what a unit under way has said of an epoch."""
        name, epoch = stage.stage.name, int(values["epoch"])
        if epoch <= self._told_epochs.get(f"{name}/{unit}", 0):
            return  # asked twice within an epoch, or a training that was started again
        self._told_epochs[f"{name}/{unit}"] = epoch
        part, detail = _series(name, unit)
        loss = Number(
            stage=name,
            metric="loss",
            part=part,
            detail=detail,
            value=values["loss"],
            step=epoch,
            seconds=seconds,
        )
        self._ray.tell([loss])
        if not detail or self._shows(name, unit):
            self._tell_others([loss])
        num_images = stage.run.source("train").num_images if name == "squeeze" else None
        if num_images is not None:
            if not self._images[name]:  # a training that goes on has earlier epochs behind it
                self._rates[name].clear()
            self._count_images(name, epoch * num_images)

    def _count_images(self, stage: str, done: int) -> None:
        self._images[stage] = done
        now, seen = time.monotonic(), self._rates[stage]
        seen.append((now, done))
        while len(seen) > 2 and now - seen[1][0] > _RATE_OVER_S:
            seen.popleft()

    def _tell_images(self, stage: str) -> None:
        if not self._images[stage]:
            return
        numbers = [self._progress(stage, "images_done", self._images[stage])]
        (first, before), (last, done) = self._rates[stage][0], self._rates[stage][-1]
        if last > first:
            rate = (done - before) / (last - first)
            numbers.append(self._progress(stage, "images_per_second", rate))
        self._tell(numbers)

    def _shows(self, stage: str, unit: str) -> bool:
        units = self._shown.setdefault(stage, set())
        if len(units) < _SHOWN_UNITS:
            units.add(unit)
        return unit in units

    def _progress(self, stage: str, metric: str, value: float) -> Number:
        step = round(time.monotonic() - self._began)
        return Number(stage=stage, metric=metric, value=value, step=step)

    def _tell(self, numbers: Sequence[Number]) -> None:
        self._ray.tell(numbers)
        self._tell_others(numbers)

    def _tell_others(self, numbers: Iterable[Number]) -> None:
        numbers = list(numbers)
        for told in self._others:
            told.tell(numbers)


def numbers_of(stage: StageRun, marker: UnitMarker) -> list[Number]:
    """Return the losses, costs and accuracies that the marker of a finished unit holds."""
    name, metrics, unit = stage.stage.name, marker.metrics, marker.unit
    part, detail = _series(name, unit)
    if name == "squeeze":
        losses = metrics.get("losses", [])  # a given teacher has none
        numbers = [
            Number(stage=name, metric="loss", part=part, value=loss, step=i + 1)
            for i, loss in enumerate(losses)
        ]
        top1 = Number(stage=name, metric="top1", part=unit, value=metrics["top1"], step=0)
        return [*numbers, top1]
    if name == "barycenters":
        return [Number(stage=name, metric="cost", value=metrics["cost"], step=int(unit))]
    if name == "recover" and not metrics["labels"]:  # the surrogate
        return [
            Number(stage=name, metric="loss", part=part, value=loss, step=i + 1)
            for i, loss in enumerate(metrics["epoch_losses"])
        ]
    if name == "recover":
        terms, recover = metrics["losses"][0], stage.config.recover
        inverted = recover.method == "inversion"
        last = recover.iterations if inverted else stage.config.num_atoms  # images sampled
        return [
            Number(
                stage=name,
                metric="loss",
                part=term,
                detail=detail,
                value=float(np.mean([losses[term] for losses in metrics["losses"]])),
                step=last,
            )
            for term in terms
        ]
    if _STUDENT.fullmatch(unit):
        top1, seed = metrics["top1"], int(detail.removeprefix("s"))
        return [Number(stage=name, metric="top1", part=part, value=top1, step=seed)]
    return []


def images_of(stage: StageRun, marker: UnitMarker) -> int | None:
    """Return the images of a finished unit, of a teacher all that it has seen; None where nobody counts them."""
    name, metrics = stage.stage.name, marker.metrics
    if name == "squeeze":
        num_images = stage.run.source("train").num_images
        return None if num_images is None else len(metrics.get("losses", [])) * num_images
    if name == "recover":
        return len(metrics["labels"]) * stage.config.num_atoms
    if name == "relabel":
        num_classes = len(stage.inputs["features"].metrics["class_counts"])
        epochs, labels = _label_blocks(stage.config, num_classes)[marker.unit]
        return len(epochs) * len(labels) * stage.config.num_atoms
    return metrics.get("num_images")


def curves_of(stage: StageRun, marker: UnitMarker) -> list[Number]:
    """Return the loss of a unit of recover by iteration, a curve a term: the mean over its classes."""
    if not marker.metrics["labels"]:
        return []
    classes = [codecs.decode_class_images(stage.room.read(entry)) for entry in marker.files]
    at_P = classes[0].curve_at_P
    if at_P is None:
        return []
    numbers = []
    for term in classes[0].curves:
        mean_P = np.mean([record.curves[term] for record in classes], axis=0)
        numbers += [
            Number(
                stage="recover",
                metric="loss",
                part=term,
                detail=marker.unit,
                value=float(value),
                step=int(at),
            )
            for at, value in zip(at_P, mean_P, strict=True)
        ]
    return numbers


@lru_cache(maxsize=1)
def _label_blocks(config: DistillConfig, num_classes: int) -> dict[str, tuple[range, np.ndarray]]:
    from wmdd_ray.stages import relabel  # it loads torch, which jobs/prepare.py does without

    return relabel.blocks(config, num_classes)


def _series(stage: str, unit: str) -> tuple[str, str]:
    """Return (part, detail) of the numbers of a unit."""
    if student := _STUDENT.fullmatch(unit):
        return student[1], student[2]
    only_labels = stage == "squeeze" and unit != "teacher"
    if only_labels or (stage == "recover" and unit == "surrogate"):
        return unit, ""
    return "", unit if stage == "recover" else ""


class _DataStatistics(logging.Handler):
    """Hands on the statistics that Ray Data logs at the end of an execution, which then also are in its own log file."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._write = write
        self._context = ray.data.DataContext.get_current()
        self._before = self._context.enable_auto_log_stats
        self._context.enable_auto_log_stats = True
        self._logger = logging.getLogger("ray.data")
        self._level = self._logger.level
        if self._level > logging.INFO:  # silenced for the terminal's sake: now there alone
            self._logger.setLevel(logging.INFO)
            self._mute = [h for h in self._logger.handlers if isinstance(h, logging.StreamHandler)]
            for handler in self._mute:
                handler.addFilter(_nothing)
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "tasks executed" in text:
            self._write(text)

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._context.enable_auto_log_stats = self._before
        if self._level > logging.INFO:
            self._logger.setLevel(self._level)
            for handler in self._mute:
                handler.removeFilter(_nothing)
        super().close()


def _nothing(record: logging.LogRecord) -> bool:
    return False
