"""A run's numbers as Ray's own metrics, and Ray Data's statistics in the run's event log."""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Sequence
from urllib.parse import quote

import ray.data
from ray.util.metrics import Gauge

from wmdd_ray.spine.numbers import Number
from wmdd_ray.spine.run import Run
from wmdd_ray.telling.trackers import TrackedRun, Tracker
from wmdd_ray.telling.watch import LiveWatch

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
        # Ray takes no tag beyond ASCII.
        self._run_name = quote(run_name, safe=string.printable)

    def open(self) -> None:
        keys = ("run", "stage", "part")
        self._gauges = {
            name: Gauge(f"wmdd_{name}", description=text, tag_keys=keys)
            for name, text in DESCRIPTIONS.items()
        }

    def log(self, numbers: Sequence[Number]) -> None:
        for number in numbers:
            tags = {"run": self._run_name, "stage": number.stage, "part": number.part}
            self._gauges[number.metric].set(number.value, tags=tags)


class RayWatch(LiveWatch):
    """Watches a run for trackers and for Ray's metrics, and keeps Ray Data's statistics."""

    def __init__(self, run: TrackedRun, trackers: Sequence[Tracker]) -> None:
        super().__init__(trackers, [RayMetrics(run.name)])

    def begin(self, run: Run) -> None:
        super().begin(run)
        self._statistics = _DataStatistics(
            lambda text: run.events.write("data_statistics", stage=self.stage, text=text)
        )

    def end(self, exit_code: int) -> None:
        self._statistics.close()
        super().end(exit_code)


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
