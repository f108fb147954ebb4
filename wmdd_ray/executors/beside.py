"""Units in the driver of a laptop, and on actors beside it once what is left would keep it for long."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from wmdd_ray.config import Resources
from wmdd_ray.executors import here
from wmdd_ray.executors.actors import told
from wmdd_ray.executors.causes import last_line
from wmdd_ray.executors.queue import Queue, work_through
from wmdd_ray.spine.run import OpenWorker, StageRun

logger = logging.getLogger(__name__)

# A process that imports torch and opens its data takes 5 to 10 s of a CPU: a third of this, at most, for one beside the driver.
_WORTH_S = 30.0
_LOOK_EVERY_S = 1.0


def most_beside(resources: Resources) -> int:
    """Return how many workers have room beside the driver: a CPU each, and as much memory as the driver has needed."""
    if resources.num_workers == 0:
        return 0
    here_has = ray.cluster_resources()
    in_kib = sys.platform != "darwin"
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (10 if in_kib else 0)
    cpus = min(int(here_has.get("CPU", 0)), os.cpu_count() or 1) // resources.cpus_per_worker
    return max(0, min(cpus - 1, int(here_has.get("memory", 0) // peak_bytes)))


def do_units(
    stage: StageRun,
    units: Sequence[str],
    open_worker: OpenWorker,
    num_finished: int,
    actor_class: type,
) -> None:
    """Do the units in this process; what would take it more than `_WORTH_S` alone, on `actor_class` beside it as well.

    It is measured by the units and parts of units that are done. A worker that is lost hands its unit back to the driver.
    """
    queue = _Locked(here.queue_here(stage, units, num_finished))
    torch.set_num_threads(stage.resources.cpus_per_worker)
    do_unit = open_worker(here.device_here())
    actors: list[ActorHandle] = []
    threads: list[threading.Thread] = []
    over = threading.Event()
    began = looked = time.monotonic()

    def look() -> None:
        nonlocal looked
        if threads or time.monotonic() - looked < _LOOK_EVERY_S:
            return
        looked = time.monotonic()
        passed_s, (done, _) = looked - began, queue.progress()
        left = len(units) - done
        if done == 0 or passed_s * left < _WORTH_S * done:
            return
        most = min(most_beside(stage.resources), int(left))
        actor = ray.remote(num_cpus=stage.resources.cpus_per_worker, max_concurrency=2)(actor_class)
        for rank in range(1, most + 1):
            actors.append(actor.remote(open_worker, stage.resources.cpus_per_worker))
            about = queue, actors[-1], rank, most + 1, over
            threads.append(threading.Thread(target=_serve, args=about, daemon=True))
            threads[-1].start()

    def watched(unit: str, report: Callable[..., None]) -> None:
        def reported(fraction: float, note: str = "", **values: float) -> None:
            report(fraction, note, **values)
            look()

        do_unit(unit, reported)

    try:
        work_through(cast(Queue, queue), watched)
        over.set()
        while queue.error() is None and any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
        work_through(cast(Queue, queue), watched)  # what lost workers have handed back
    finally:
        for each in actors:
            ray.kill(each)
    error = queue.error()
    if error is not None:
        raise error


class _Locked:
    """A queue that several threads call."""

    def __init__(self, queue: Any) -> None:
        self._queue, self._lock = queue, threading.RLock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with self._lock:
                return getattr(self._queue, name)(*arguments)

        return call


def _serve(
    queue: _Locked, actor: ActorHandle, rank: int, world: int, over: threading.Event
) -> None:
    """Hand one unit after another to an actor once it has started, until none is left or it is lost."""
    unit = ""
    try:
        ready = actor.ready.remote()
        while not ray.wait([ready], timeout=_LOOK_EVERY_S / 4)[0]:
            if over.is_set():
                return
        queue.join(rank, world, ray.get(ready))
        while (unit := queue.take(rank)) is not None:
            ref = actor.work.remote(unit)
            while not ray.wait([ref], timeout=_LOOK_EVERY_S)[0]:
                fraction, note, of, values = ray.get(actor.progress.remote())
                if of == unit:
                    queue.report(unit, fraction, note, values)
            ray.get(ref)
            queue.report(unit, 1.0, "")
    except (ActorDiedError, ActorUnavailableError) as error:
        with contextlib.suppress(RayError):
            ray.kill(actor)
        logger.info("a worker beside the driver has ended: %s", last_line(error))
        queue.join(rank, world, "", f"by {last_line(error)}")
    except RayError as error:
        queue.fail(unit, told(error, f"unit {unit}" if unit else "a new worker"))
