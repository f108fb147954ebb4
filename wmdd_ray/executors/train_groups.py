"""Groups of Ray Train workers: how they are made, followed, and started again when one of them is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wmdd_ray.errors import WmddError
from wmdd_ray.executors.cluster import Width, last_line, root_cause
from wmdd_ray.executors.queue import UnitQueue
from wmdd_ray.spine.run import Run, StageRun

# Restarts of a group without any progress in between.
_MAX_RESTARTS = 8
_POLL_S = 1.0
# Where Ray Train keeps its own notes of a group under a run's root; nothing there counts, and it goes with the group.
_FOLDER = "train"


@contextlib.contextmanager
def queue_actor(stage: StageRun, left: Sequence[str], found: int) -> Iterator[ActorHandle]:
    """Yield a queue in an actor beside the driver, whose progress and events the driver follows.

    Beside the driver, because a queue that is lost with a worker's node would end the stage.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(UnitQueue).options(scheduling_strategy=here).remote(left)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(_POLL_S):
            with contextlib.suppress(ray.exceptions.RayError):
                tell()

    def tell() -> None:
        (done, note), events = ray.get([actor.progress.remote(), actor.drain.remote()])
        for about in events:
            stage.event(about.pop("event"), **about)
        stage.progress.update(found + done, note)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            tell()
        ray.kill(actor)


def fit_until_done(stage: StageRun, queue: ActorHandle, fit: Callable[[RunConfig], None]) -> None:
    """Run a group of workers, again and again while there is progress between the losses.

    Raises:
        WmddError: A unit failed deliberately, or workers died too often.
    """
    before = 0.0
    while True:
        try:
            _in_thread(lambda: fit(_train_run_config(stage, queue)))
            break
        except SystemError:
            raise  # a signal that came while Ray's own code ran
        except Exception as failure:
            cause = root_cause(failure)
            if isinstance(cause, WmddError):
                raise cause from failure
            error = ray.get(queue.error.remote())
            done, _ = ray.get(queue.progress.remote())
            if error is None and done <= before:
                raise WmddError(
                    f"{stage.stage.name}: the workers failed again and again without progress, at last by "
                    f"{last_line(cause)}; finished units are kept: run the same command again"
                ) from failure
            if error is not None:
                raise error from failure
            before = done
        finally:
            stage.run.store.delete(f"{_FOLDER}/{stage.run.token}")
    error = ray.get(queue.error.remote())
    if error is not None:
        raise error


def _in_thread(do: Callable[[], None]) -> None:
    """Call `do` beside the main thread, in which Ray Train would take Ctrl-C for itself and end the process with 0."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            do()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # in pieces, so that a signal is heard
    if failures:
        raise failures[0]


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


def _train_run_config(stage: StageRun, queue: ActorHandle) -> RunConfig:
    """Return Ray Train's run. It stores nothing that counts, but in a place that all nodes see."""
    return RunConfig(
        name=f"{stage.stage.name}-{time.time_ns()}",
        storage_path=stage.run.store.url(f"{_FOLDER}/{stage.run.token}"),
        failure_config=FailureConfig(max_failures=_MAX_RESTARTS, max_preemption_failures=-1),
        callbacks=[_Blame(queue)],
    )


class _Blame(UserCallback):
    """Runs in Ray Train's controller; tells the queue whose worker died, for a group restarts whole."""

    def __init__(self, queue: ActorHandle) -> None:
        self._queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        reasons = {rank: last_line(error) for rank, error in worker_exceptions.items()}
        ray.get(self._queue.lose.remote(reasons))


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


def sweep_notes(run: Run) -> None:
    """Remove the notes that killed drivers left; called when a run has ended well, and so nobody else is at work."""
    run.store.delete(_FOLDER)
