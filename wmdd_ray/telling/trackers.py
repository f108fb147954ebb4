"""Trackers of a run's numbers: TensorBoard, MLflow, Weights & Biases. None is required, and none can end a run.

A number is told as (group/name, step, value, time); the group says what a step counts (`STEPS`). Each tracker has a thread
of its own, so that one that hangs holds up nobody.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from socket import gethostname
from typing import Any

from wmdd_ray.config import Reporting
from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.numbers import STEPS, Number
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import local_path

logger = logging.getLogger(__name__)

_MLFLOW_METRICS, _MLFLOW_PARAMS, _MLFLOW_LENGTH = 1000, 100, 6000  # limits of its REST API
_PUT_EVERY_S = 15.0


class Tracker:
    """Somebody who is told numbers. Any exception of `open`, `log` and `close` is taken as its failure."""

    title = "tracker"

    def open(self) -> None:
        """Connect; called once, before the first number."""

    def log(self, numbers: Sequence[Number]) -> None:
        """Take numbers; all values are finite."""

    def close(self, exit_code: int) -> None:
        """End well; called once, with the exit code of the job."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What trackers are told of a run: its name, a key that the same command has again, its options by dotted name."""

    name: str
    key: str
    options: dict[str, Any]


class TensorBoard(Tracker):
    """Writes an event file into `<folder>/<name of the run>`; in an object store it is put again whole now and then."""

    title = "TensorBoard"

    def __init__(self, uri: str, run: TrackedRun) -> None:
        # Not its SummaryWriter, whose queue would block for ever on a full disk.
        self._records = _import("tensorboardX.record_writer", "--tensorboard", "tensorboardX")
        self._event_of = import_module("tensorboardX.proto.event_pb2").Event
        self._summary = import_module("tensorboardX.summary")
        self._store = Store(uri).child(run.name)
        self._run = run

    def open(self) -> None:
        folder = local_path(self._store.uri)
        self._remote = folder is None
        if folder is None:
            self._staged = tempfile.TemporaryDirectory()
            folder = Path(self._staged.name)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._path = folder / f"events.out.tfevents.{int(now)}.{gethostname()}.{os.getpid()}"
        self._file = self._records.RecordWriter(str(self._path))
        self._put_at = time.monotonic()
        options = "\n".join(f"    {name}: {value}" for name, value in self._run.options.items())
        text = self._summary.text("options", options)
        self._write(
            [
                self._event_of(wall_time=now, file_version="brain.Event:2"),
                self._event_of(wall_time=now, summary=text),
            ]
        )

    def log(self, numbers: Sequence[Number]) -> None:
        self._write(
            self._event_of(
                wall_time=n.seconds, step=n.step, summary=self._summary.scalar(n.name, n.value)
            )
            for n in numbers
        )
        if self._remote and time.monotonic() - self._put_at >= _PUT_EVERY_S:
            self._put()

    def close(self, exit_code: int) -> None:
        self._file.close()
        if self._remote:
            self._put()
            self._staged.cleanup()

    def _write(self, events: Iterable[Any]) -> None:
        try:
            for event in events:
                self._file.write(event.SerializeToString())
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def _put(self) -> None:
        self._store.put(self._path.name, self._path.read_bytes())
        self._put_at = time.monotonic()


class MLflow(Tracker):
    """Logs to one run of an MLflow experiment; the same command goes on in the same run."""

    title = "MLflow"

    def __init__(self, uri: str, run: TrackedRun) -> None:
        mlflow = _import("mlflow", "--mlflow", "mlflow")
        self._entities = import_module("mlflow.entities")
        self._client_of = mlflow.MlflowClient
        self._uri, self._run = uri, run

    def open(self) -> None:
        self._client = self._client_of(tracking_uri=self._uri)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "wmdd_ray"))
        runs = self._client.search_runs(
            [experiment], f"tags.`wmdd_ray.key` = '{self._run.key}'", max_results=1
        )
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(
            experiment, run_name=self._run.name, tags={"wmdd_ray.key": self._run.key}
        )
        self._id = made.info.run_id
        params = [
            self._entities.Param(name, str(value)[:_MLFLOW_LENGTH])
            for name, value in self._run.options.items()
        ]
        for i in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[i : i + _MLFLOW_PARAMS])

    def log(self, numbers: Sequence[Number]) -> None:
        metrics = [
            self._entities.Metric(n.name, n.value, int(1000 * n.seconds), n.step) for n in numbers
        ]
        for i in range(0, len(metrics), _MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=metrics[i : i + _MLFLOW_METRICS])

    def close(self, exit_code: int) -> None:
        status = {0: "FINISHED", 130: "KILLED", 143: "KILLED"}.get(exit_code, "FAILED")
        self._client.set_terminated(self._id, status)

    def _experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name)
            except Exception:  # another run has made it since; where not, the next line says so
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return experiment.experiment_id


class WandB(Tracker):
    """Logs to one run of a Weights & Biases project; the same command goes on in the same run."""

    title = "Weights & Biases"

    def __init__(self, project: str, run: TrackedRun) -> None:
        self._wandb = _import("wandb", "--wandb", "wandb")
        # Asked now: the question for a key that `init` asks on a terminal would stand between the bars.
        online = self._wandb.setup().settings.mode in ("online", "shared")
        if online and not self._wandb.login(prompt=False, verify=False):
            raise ConfigError(
                f"--wandb {project}: expected credentials of Weights & Biases, found none; run `wandb login`, set "
                "WANDB_API_KEY, or set WANDB_MODE=offline to keep the numbers in a folder and sync them later"
            )
        entity, _, self._project = project.rpartition("/")
        self._entity, self._run = entity or None, run

    def open(self) -> None:
        self._live = self._wandb.init(
            project=self._project,
            entity=self._entity,
            id=self._run.key,
            name=self._run.name,
            resume="allow",
            config=self._run.options,
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        for group, counted in STEPS.items():
            self._live.define_metric(f"{group}/{counted}", hidden=True)
            self._live.define_metric(f"{group}/*", step_metric=f"{group}/{counted}")

    def log(self, numbers: Sequence[Number]) -> None:
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for number in numbers:
            row = rows.setdefault((number.group, number.step), {})
            row[f"{number.group}/{STEPS[number.group]}"] = number.step
            row[number.name] = number.value
        for row in rows.values():
            self._live.log(row)

    def close(self, exit_code: int) -> None:
        self._live.finish(exit_code=exit_code)


def trackers_of(reporting: Reporting, run: TrackedRun) -> list[Tracker]:
    """Return the trackers that are asked for.

    Raises:
        ConfigError: One is not installed, or has no credentials.
    """
    places: tuple[tuple[str | None, Callable[[str, TrackedRun], Tracker]], ...] = (
        (reporting.tensorboard, TensorBoard),
        (reporting.mlflow, MLflow),
        (reporting.wandb, WandB),
    )
    return [make(where, run) for where, make in places if where is not None]


class Told:
    """A tracker in a thread of its own. Its first failure is a warning, and the end of telling it."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._waiting: queue.SimpleQueue[Number | int] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=tracker.title, daemon=True)
        self._thread.start()

    def tell(self, numbers: Iterable[Number]) -> None:
        """Hand over numbers; returns at once. A value that is not finite is left out: not every tracker takes one."""
        if self._thread.is_alive():
            for number in numbers:
                if math.isfinite(number.value):
                    self._waiting.put(number)

    def end(self, exit_code: int) -> None:
        """Say that nothing more comes; returns at once."""
        self._waiting.put(exit_code)

    def join(self, timeout_s: float) -> None:
        """Wait until the tracker has taken everything; warn when it has not by then."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            logger.warning(
                "%s did not take everything in time; the rest is lost",
                self._tracker.title,
            )

    def _work(self) -> None:
        try:
            self._tracker.open()
            exit_code = None
            while exit_code is None:
                numbers, exit_code = self._take()
                if numbers:
                    self._tracker.log(numbers)
            self._tracker.close(exit_code)
        except Exception as error:
            logger.info("%s", self._tracker.title, exc_info=True)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning(
                "%s failed (%s) and is told nothing more; the run goes on",
                self._tracker.title,
                reason,
            )

    def _take(self) -> tuple[list[Number], int | None]:
        """Return all that waits, at least one, and the exit code when it is there."""
        numbers: list[Number] = []
        given: Number | int = self._waiting.get()
        with contextlib.suppress(queue.Empty):
            while isinstance(given, Number):
                numbers.append(given)
                given = self._waiting.get_nowait()
            return numbers, given
        return numbers, None


def _import(module: str, option: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option}: expected {package} to be installed, and it cannot be imported ({error}); `pip install {package}`, or leave "
            f"out {option}"
        ) from error
