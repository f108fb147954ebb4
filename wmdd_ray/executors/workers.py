"""Units of work on Ray workers without gradient synchronization: a load-balanced stream of unit ids.

A worker takes the next unit, works, commits it to storage, and asks again; there is no barrier in between. Workers are

- none: the loop runs in the driver (Ray Train's local mode);
- a group of Ray Train workers. When one dies, Ray Train starts the group again: the units that were under way go back into
  the queue and go on from their checkpoints;
- isolated actors, for wide stages. When one dies, its unit goes to another, and nobody else notices.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from wmdd_ray.errors import WmddError
from wmdd_ray.executors.actors import fan_out
from wmdd_ray.executors.cluster import Width, last_line, width
from wmdd_ray.executors.heap import keep_freed_memory
from wmdd_ray.executors.queue import UnitQueue
from wmdd_ray.executors.train_groups import fit_until_done, queue_actor, quiet_environment, scaling
from wmdd_ray.spine.run import StageRun

logger = logging.getLogger(__name__)

# A larger group loses too much by its restarts, and one with few units a worker by waiting for its last, for it gives its
# machines back together (jobs/bench.py scale simulation).
_MAX_GROUP, _MIN_SHARE = 8, 4

Report = Callable[..., None]
"""report(fraction, note, **values): says which fraction of the unit under way is done, with a short note and, at the end of
an epoch, `epoch` (from 1) and `loss`."""

DoUnit = Callable[[str, Report], None]
"""Works on one unit and commits it."""

OpenWorker = Callable[[torch.device], DoUnit]
"""Loads what a worker keeps, on its device. Picklable."""


def do_units(
    stage: StageRun,
    units: Sequence[str],
    open_worker: OpenWorker,
    *,
    among: Sequence[str] | None = None,
) -> None:
    """Do every unit of `units` that is not finished yet, on as many workers as the run's resources say.

    Args:
        stage: The stage; its progress line shows units done.
        units: Unit ids, most expensive first: all of the stage, or those that can be done now.
        open_worker: Picklable; called once a worker with its device, loads what the worker keeps.
        among: All unit ids of the stage where `units` are some of them; the caller has started the progress line, for all.

    Raises:
        WmddError: A unit failed deliberately, or workers died too often. Finished units stay finished.
    """
    finished = stage.room.finished()
    left = [unit for unit in units if unit not in finished]
    every = units if among is None else among
    found = sum(unit in finished for unit in every)
    if among is None:
        stage.progress.start(len(units), found)
    if not left:
        return
    wide = width(stage.resources)
    executor = stage.resources.executor
    if executor == "auto":
        steady = wide.num_workers <= _MAX_GROUP and len(left) >= _MIN_SHARE * wide.num_workers
        executor = "train" if steady else "actors"
    if wide.num_workers == 0:
        _run_here(stage, left, open_worker, wide, found)
    elif executor == "train":
        _run_group(stage, left, open_worker, wide, found)
    else:
        _run_actors(stage, left, open_worker, wide, found)


def _run_here(
    stage: StageRun, left: list[str], open_worker: OpenWorker, wide: Width, found: int
) -> None:
    """Work in the driver: Ray Train's local mode."""
    queue = UnitQueue(
        left, lambda done, note: stage.progress.update(found + done, note), stage.event
    )
    trainer = DataParallelTrainer(
        _worker_loop,
        train_loop_config={"open_worker": open_worker, "cpus": wide.cpus, "queue": queue},
        scaling_config=ScalingConfig(num_workers=0),
    )
    with quiet_environment():
        trainer.fit()
    error = queue.error()
    if error is not None:
        raise error


def _run_group(
    stage: StageRun, left: list[str], open_worker: OpenWorker, wide: Width, found: int
) -> None:
    """Work on one elastic group of Ray Train workers."""
    with queue_actor(stage, left, found) as queue:

        def fit(run_config: RunConfig) -> None:
            DataParallelTrainer(
                _worker_loop,
                train_loop_config={"open_worker": open_worker, "cpus": wide.cpus, "queue": queue},
                scaling_config=scaling(wide, min(wide.num_workers, len(left))),
                run_config=run_config,
            ).fit()

        fit_until_done(stage, queue, fit)


def _run_actors(
    stage: StageRun, left: list[str], open_worker: OpenWorker, wide: Width, found: int
) -> None:
    """Work on isolated actors."""
    done = 0

    def finish(unit: str, result: None) -> None:
        nonlocal done
        done += 1
        stage.progress.update(found + done)

    def look(actors: list[ActorHandle]) -> None:
        told = [actor.progress.remote() for actor in actors]
        here, _ = ray.wait(told, num_returns=len(told), timeout=1.0) if told else ([], [])
        with contextlib.suppress(ray.exceptions.RayError):
            parts = ray.get(here)
            note = parts[0][1] if parts else ""
            stage.progress.update(found + done + sum(part[0] for part in parts), note)
            for _, _, unit, values in parts:
                if values:
                    stage.event("unit_told", unit=unit, values=values)

    actor = ray.remote(num_cpus=wide.cpus, num_gpus=wide.gpus, max_concurrency=2)(UnitActor)
    fan_out(
        stage,
        actor,
        (open_worker, wide.cpus),
        left,
        max_actors=wide.num_workers,
        first_actors=wide.num_workers,
        on_done=finish,
        on_wait=look,
    )


class UnitActor:
    """An isolated worker: keeps what `open_worker` loads, and does a unit a call."""

    def __init__(self, open_worker: OpenWorker, cpus: int) -> None:
        keep_freed_memory()
        torch.set_num_threads(cpus)
        self._cpus = cpus
        self._do_unit = open_worker(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._unit = ""
        self._progress: tuple[float, str, str, dict[str, float]] = (0.0, "", "", {})

    def ready(self) -> str:
        """Return the node's name once the worker can work."""
        return socket.gethostname()

    def work(self, unit: str) -> None:
        """Do the unit and commit it."""
        torch.set_num_threads(self._cpus)  # of this thread: the actor has two
        self._unit = unit
        self._do_unit(unit, self._report)
        self._progress = (0.0, "", "", {})

    def progress(self) -> tuple[float, str, str, dict[str, float]]:
        """Return the fraction of the unit under way that is done, a note, the unit, and the values that it told last."""
        return self._progress

    def _report(self, fraction: float, note: str = "", **values: float) -> None:
        self._progress = (min(fraction, 0.999), note, self._unit, values)


def call(queue: UnitQueue | ActorHandle, method: str, *args: Any) -> Any:
    """Call the queue, whether it lives in this process or in its actor."""
    if isinstance(queue, UnitQueue):
        return getattr(queue, method)(*args)
    return ray.get(getattr(queue, method).remote(*args))


def _worker_loop(config: dict[str, Any]) -> None:
    keep_freed_memory()
    context = ray.train.get_context()
    queue, rank = config["queue"], context.get_world_rank()
    torch.set_num_threads(config["cpus"])
    do_unit = config["open_worker"](device_of_worker())
    call(queue, "join", rank, context.get_world_size(), socket.gethostname())
    while (unit := call(queue, "take", rank)) is not None:
        try:
            do_unit(unit, reporter(queue, unit))
        except WmddError as error:
            call(queue, "fail", unit, error)
            return
        except Exception as error:
            # Not let through to Ray Train, which would start the group again for a fault that comes back every time.
            told = WmddError(f"unit {unit}: {last_line(error)}; --verbose shows where")
            told.__cause__ = error
            logger.info("unit %s", unit, exc_info=True)
            call(queue, "fail", unit, told)
            return
        call(queue, "report", unit, 1.0, "")


def reporter(queue: UnitQueue | ActorHandle, unit: str) -> Report:
    """Return a report function that speaks at most twice a second: units may step thousands of times a second."""
    last = time.monotonic()

    def report(fraction: float, note: str = "", **values: float) -> None:
        nonlocal last
        if time.monotonic() - last >= 0.5:
            last = time.monotonic()
            call(queue, "report", unit, min(fraction, 0.999), note, values)

    return report


def device_of_worker() -> torch.device:
    """Return the GPU that Ray gave to this worker, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    import ray.train.torch

    return ray.train.torch.get_device()
