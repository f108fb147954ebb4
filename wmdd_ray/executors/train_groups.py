"""Groups of Ray Train workers: how they are made, followed, and started again when one of them is lost."""

from __future__ import annotations

import contextlib
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
from wmdd_ray.executors.causes import last_line, root_cause
from wmdd_ray.executors.cluster import Width
from wmdd_ray.executors.dispatch import NOTES_FOLDER
from wmdd_ray.executors.queue import Queue, UnitQueue
from wmdd_ray.spine.run import StageRun

# Restarts of a group without any progress in between.
_MAX_RESTARTS = 8
_POLL_S = 1.0


class RemoteQueue(Queue):
    """A queue in an actor, as the workers of a group call it."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    def join(self, rank: int, world: int, node: str = "") -> None:
        ray.get(self._actor.join.remote(rank, world, node))

    def take(self, rank: int) -> str | None:
        return ray.get(self._actor.take.remote(rank))

    def report(
        self, unit: str, fraction: float, note: str, values: dict[str, float] | None = None
    ) -> None:
        ray.get(self._actor.report.remote(unit, fraction, note, values))

    def fail(self, unit: str, error: WmddError) -> None:
        ray.get(self._actor.fail.remote(unit, error))

    def error(self) -> WmddError | None:
        """Return the first deliberate error of any rank."""
        error: WmddError | None = ray.get(self._actor.error.remote())
        return error


@contextlib.contextmanager
def queue_actor(stage: StageRun, left: Sequence[str], num_done: int) -> Iterator[ActorHandle]:
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
        stage.progress.update(num_done + done, note)

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
                raise root_cause(error) from failure
            before = done
        finally:
            stage.run.store.delete(f"{NOTES_FOLDER}/{stage.run.token}")
    error = ray.get(queue.error.remote())
    if error is not None:
        raise root_cause(error)


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
        storage_path=stage.run.store.url(f"{NOTES_FOLDER}/{stage.run.token}"),
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
