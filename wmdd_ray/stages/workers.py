"""Units of work on Ray Train workers without gradient synchronization: a load-balanced stream of unit ids.

Every worker takes the next unit from a queue, works, commits it to storage, and asks again; there is no barrier in
between. When a worker dies, Ray Train starts the group again and the units that were under way go back into the
queue: everything committed stays. With no workers, the same loop runs in the driver (Ray Train's local mode).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from wmdd_ray.errors import WmddError
from wmdd_ray.run import Progress, StageRun
from wmdd_ray.stages.cluster import Width, root_cause, width

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
_MAX_GROUP_RESTARTS = 32
_POLL_S = 1.0
# Where Ray Train keeps its own notes of a group under a run's root; nothing there counts, and it goes with the group.
TRAIN_FOLDER = "train"
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

Report = Callable[[float, str], None]
"""Says which fraction of the unit under way is done, with a short note."""

DoUnit = Callable[[str, Report], None]
"""Works on one unit and commits it."""


class UnitQueue:
    """The units that are left, and who works on which. Rebuilt by running again: it holds nothing of its own.

    Args:
        units: Unfinished unit ids, in the order to hand them out (most expensive first).
        on_change: Called with (units done, note) after every report; in the driver only.
    """

    def __init__(
        self, units: Sequence[str], on_change: Callable[[float, str], None] | None = None
    ) -> None:
        self._waiting = deque(units)
        self._taken: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        self._fractions: dict[str, float] = {}
        self._done = 0
        self._note = ""
        self._error: WmddError | None = None
        self._on_change = on_change

    def join(self, rank: int, world: int) -> None:
        """Enter as `rank` of a group of `world`. What this rank, or one beyond the group, had taken before is free again."""
        for unit, holder in list(self._taken.items()):
            if holder == rank or holder >= world:
                del self._taken[unit]
                self._fractions.pop(unit, None)
                self._waiting.appendleft(unit)

    def take(self, rank: int) -> str | None:
        """Return the next unit, or None when nothing is left to begin."""
        if self._error or not self._waiting:
            return None
        unit = self._waiting.popleft()
        self._attempts[unit] = self._attempts.get(unit, 0) + 1
        if self._attempts[unit] > MAX_ATTEMPTS:
            self._error = WmddError(
                f"unit {unit} ended its worker {MAX_ATTEMPTS} times (killed, or out of memory); look at the workers' "
                "logs, give a worker more memory, and run the same command again"
            )
            return None
        self._taken[unit] = rank
        return unit

    def report(self, unit: str, fraction: float, note: str) -> None:
        """Note the fraction of a unit that is done; 1 finishes it."""
        if fraction >= 1:
            self._taken.pop(unit, None)
            self._fractions.pop(unit, None)
            self._done += 1
        else:
            self._fractions[unit] = fraction
        self._note = note or self._note
        if self._on_change:
            self._on_change(*self.progress())

    def fail(self, unit: str, error: WmddError) -> None:
        """Stop handing out units because of a deliberate error."""
        self._error = self._error or error

    def progress(self) -> tuple[float, str]:
        """Return (units done, with the fractions under way; last note)."""
        return self._done + sum(self._fractions.values()), self._note

    def error(self) -> WmddError | None:
        """Return the first deliberate error."""
        return self._error


def do_units(
    stage: StageRun, units: Sequence[str], open_worker: Callable[[torch.device], DoUnit]
) -> None:
    """Do every unit of `units` that is not finished yet, on as many workers as the run's resources say.

    Args:
        stage: The stage; its progress line shows units done.
        units: All unit ids of the stage, most expensive first.
        open_worker: Picklable; called once a worker with its device, loads what the worker keeps.

    Raises:
        WmddError: A unit failed deliberately, or workers died too often. Finished units stay finished.
    """
    finished = stage.room.finished()
    left = [unit for unit in units if unit not in finished]
    stage.progress.start(len(units), len(units) - len(left))
    if left:
        wide = width(stage.resources)
        run_loop(stage, UnitQueue, left, open_worker, wide, found=len(units) - len(left))


def run_loop(
    stage: StageRun,
    queue_class: type[UnitQueue],
    left: list[str],
    open_worker: Callable[[torch.device], DoUnit],
    wide: Width,
    *,
    found: int,
) -> None:
    """Run the worker loop over `left` on a group of workers, or in the driver when `wide` has none."""
    config: dict[str, Any] = {"open_worker": open_worker, "cpus": wide.cpus}
    if wide.num_workers == 0:
        queue: Any = queue_class(left, lambda done, note: stage.progress.update(found + done, note))
        config["queue"] = queue
        trainer = DataParallelTrainer(
            _worker_loop, train_loop_config=config, scaling_config=ScalingConfig(num_workers=0)
        )
        with quiet_environment():
            trainer.fit()
        error = queue.error()
    else:
        queue = ray.remote(num_cpus=0)(queue_class).remote(left)
        config["queue"] = queue
        num_workers = min(wide.num_workers, len(left))
        trainer = DataParallelTrainer(
            _worker_loop,
            train_loop_config=config,
            scaling_config=scaling(wide, num_workers),
            run_config=train_run_config(stage, f"{stage.stage.name}-{uuid.uuid4().hex[:8]}"),
        )
        with polled(queue, stage.progress, found):
            try:
                trainer.fit()
            except Exception as failure:
                raise workers_lost(stage, failure) from failure
        error = ray.get(queue.error.remote())
        ray.kill(queue)
        stage.run.store.delete(TRAIN_FOLDER)
    if error is not None:
        raise error


def scaling(wide: Width, num_workers: int, *, elastic: bool = True) -> ScalingConfig:
    """Return Ray Train's scaling: elastic from one worker up, so that a lost node does not stop the stage."""
    resources = {"CPU": float(wide.cpus)}
    if wide.gpus:
        resources["GPU"] = wide.gpus
    return ScalingConfig(
        num_workers=(1, num_workers) if elastic and num_workers > 1 else num_workers,
        use_gpu=wide.gpus > 0,
        resources_per_worker=resources,
    )


def train_run_config(stage: StageRun, name: str) -> RunConfig:
    """Return Ray Train's run: it stores nothing that counts, so a folder of the machine is enough on one node."""
    if "://" in stage.run.store.uri:
        storage = stage.run.store.url(TRAIN_FOLDER)
    else:
        storage = os.path.join(tempfile.gettempdir(), "wmdd_ray_train")
    return RunConfig(
        name=name,
        storage_path=storage,
        failure_config=FailureConfig(max_failures=_MAX_GROUP_RESTARTS, max_preemption_failures=-1),
    )


def workers_lost(stage: StageRun, failure: Exception) -> BaseException:
    """Return the deliberate error inside `failure`, or one that says what to do when workers died too often."""
    cause = root_cause(failure)
    if isinstance(cause, WmddError):
        return cause
    return WmddError(
        f"{stage.stage.name}: the workers were lost more than {_MAX_GROUP_RESTARTS} times, at last by "
        f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else cause!r}; finished "
        "units are kept: run the same command again"
    )


def call(queue: UnitQueue | ActorHandle, method: str, *args: Any) -> Any:
    """Call the queue, whether it lives in this process or in its actor."""
    if isinstance(queue, UnitQueue):
        return getattr(queue, method)(*args)
    return ray.get(getattr(queue, method).remote(*args))


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed tensors back to the system.

    It does so above 32 MB by default, at 10,000 to 38,000 page faults an iteration of recover: 20 to 35 % of the time
    of a small network on CPU. Other C libraries have no such call.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _worker_loop(config: dict[str, Any]) -> None:
    keep_freed_memory()
    context = ray.train.get_context()
    queue, rank = config["queue"], context.get_world_rank()
    torch.set_num_threads(config["cpus"])
    do_unit = config["open_worker"](device_of_worker())
    call(queue, "join", rank, context.get_world_size())
    while (unit := call(queue, "take", rank)) is not None:
        try:
            do_unit(unit, reporter(queue, unit))
        except WmddError as error:
            call(queue, "fail", unit, error)
            return
        except Exception as error:
            if isinstance(queue, UnitQueue):
                raise
            # Ray Train would start the whole group again and again for a fault that comes back every time.
            logger.exception("unit %s", unit)
            text = f"unit {unit}: {type(error).__name__}: {error}; --verbose shows the workers' log"
            call(queue, "fail", unit, WmddError(text))
            return
        call(queue, "report", unit, 1.0, "")


def reporter(queue: UnitQueue | ActorHandle, unit: str) -> Report:
    """Return a report function that speaks at most twice a second: units may step thousands of times a second."""
    last = time.monotonic()

    def report(fraction: float, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= 0.5:
            last = time.monotonic()
            call(queue, "report", unit, min(fraction, 0.999), note)

    return report


def device_of_worker() -> torch.device:
    """Return the GPU that Ray gave to this worker, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    import ray.train.torch

    return ray.train.torch.get_device()


@contextlib.contextmanager
def polled(queue: ActorHandle, progress: Progress, found: int) -> Iterator[None]:
    """Show the queue's progress while the driver waits for the workers."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(_POLL_S):
            with contextlib.suppress(ray.exceptions.RayError):
                done, note = ray.get(queue.progress.remote())
                progress.update(found + done, note)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Hold back the log lines with which Ray Train announces its local mode."""
    train_logger = logging.getLogger("ray.train")
    level = train_logger.level
    train_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        train_logger.setLevel(level)
