"""Follows a run at work and tells its numbers to trackers.

Everything is told by the driver, about units that are committed: it reads their markers, in a thread beside the work. So
a number is told once, whoever worked on its unit and however often, and Prometheus keeps a series a run, not one a worker.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wmdd_ray.spine.numbers import Number
from wmdd_ray.spine.run import Run, StageRun, Watch
from wmdd_ray.telling.trackers import Told, Tracker

logger = logging.getLogger(__name__)

# A page with thousands of curves shows nothing, and the curves of recover come with its images.
_SHOWN_UNITS = 20
_RATE_OVER_S = 60.0
_UNITS_EVERY_S = 2.0
# How long the end of a run waits for trackers; `ray job stop` leaves 3 s between its two signals.
_END_S, _STOPPED_S = 20.0, 1.5


class LiveWatch(Watch):
    """Watches a run for trackers.

    Args:
        trackers: Told of every number, of the series of single units up to some, and of whole curves.
        gauges: Told of every number as it is now (Ray's metrics).
    """

    def __init__(self, trackers: Sequence[Tracker], gauges: Sequence[Tracker] = ()) -> None:
        self._trackers, self._all_gauges = trackers, gauges
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stage = ""
        """The stage that works now."""
        self._shown: dict[str, set[str]] = {}
        self._images: Counter[str] = Counter()
        self._rates: dict[str, deque[tuple[float, float]]] = {}
        self._retried: Counter[str] = Counter()
        self._told_epochs: dict[str, int] = {}
        self._units_told = 0.0

    def begin(self, run: Run) -> None:
        self._began = time.monotonic()
        self._gauges = [Told(gauge) for gauge in self._all_gauges]
        self._others = [Told(tracker) for tracker in self._trackers]
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def units(self, stage: str, done: float, total: int | None, *, final: bool = False) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage = stage
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
        self._waiting.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        everybody = [*self._gauges, *self._others]
        for audience in everybody:
            audience.end(exit_code)
        for audience in everybody:
            audience.join(until - time.monotonic())

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
        name, marker, tells = stage.stage.name, stage.room.read_unit(unit), stage.stage.numbers
        last = self._told_epochs.get(f"{name}/{unit}", 0)
        numbers = [n for n in tells.numbers(stage, marker) if n.metric != "loss" or n.step > last]
        images = tells.images(stage, marker)
        if images is not None:
            before = 0 if tells.images_by_epoch else self._images[name]
            self._count_images(name, before + images)
        self._tell_gauges(numbers)
        if self._others and self._shows(name, unit):
            self._tell_others(tells.curves(stage, marker) or numbers)
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
        part, detail = stage.stage.numbers.series(unit)
        loss = Number(
            stage=name,
            metric="loss",
            part=part,
            detail=detail,
            value=values["loss"],
            step=epoch,
            seconds=seconds,
        )
        self._tell_gauges([loss])
        if not detail or self._shows(name, unit):
            self._tell_others([loss])
        by_epoch = stage.stage.numbers.images_by_epoch
        num_images = stage.run.source("train").num_images if by_epoch else None
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
        self._tell_gauges(numbers)
        self._tell_others(numbers)

    def _tell_gauges(self, numbers: Sequence[Number]) -> None:
        for audience in self._gauges:
            audience.tell(numbers)

    def _tell_others(self, numbers: Iterable[Number]) -> None:
        numbers = list(numbers)
        for audience in self._others:
            audience.tell(numbers)
