"""Units in the driver of a laptop, and on actors beside it once what is left would keep it for long."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence

import ray
import torch

from wmdd_ray.config import Resources
from wmdd_ray.core.device import device_for
from wmdd_ray.errors import WmddError
from wmdd_ray.executors import here
from wmdd_ray.executors.actors import Pool, UnitActor
from wmdd_ray.executors.queue import work_through
from wmdd_ray.spine.run import OpenWorker, StageRun

# A process that imports torch and opens its data takes 5 to 10 s of a CPU: a third of this, at most, for one beside the driver.
_WORTH_S = 30.0
# How often the driver, at work itself, gives units to the others, and tells how far they are.
_GIVE_EVERY_S, _TELL_EVERY_S = 0.1, 1.0


def most_beside(resources: Resources) -> int:
    """Return how many workers have room beside the driver: a CPU each, and as much memory as the driver has needed."""
    here_has = ray.cluster_resources()
    in_kib = sys.platform != "darwin"
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (10 if in_kib else 0)
    cpus = min(int(here_has.get("CPU", 0)), os.cpu_count() or 1) // resources.cpus_per_worker
    return max(0, min(cpus - 1, int(here_has.get("memory", 0) // peak_bytes)))


def do_units(
    stage: StageRun, units: Sequence[str], open_worker: OpenWorker, num_finished: int
) -> None:
    """Do the units in this process; what would take it more than `_WORTH_S` alone, on a pool of actors beside it as well.

    It is measured by the units and parts of units that are done. Between the steps of its own unit the driver gives the actors
    others from its queue. One that is lost hands its unit back, and is not replaced.
    """
    queue = here.queue_here(stage, units, num_finished)
    cpus = stage.resources.cpus_per_worker
    torch.set_num_threads(cpus)
    do_unit = open_worker(device_for(0))
    pool: Pool | None = None
    failures: list[WmddError] = []
    began = gave = told = time.monotonic()

    def look() -> None:
        nonlocal pool, gave, told
        now = time.monotonic()
        if pool is not None and now - gave >= _GIVE_EVERY_S:
            gave = now
            try:
                pool.take_next(0.0)
            except WmddError as error:
                failures.append(error)
                queue.waiting.clear()
        if now - told < _TELL_EVERY_S:
            return
        told = now
        done, _ = queue.progress()
        if pool is not None:
            for fraction, note, unit, values in pool.progress():
                if unit:
                    queue.report(unit, fraction, note, values)
        elif done and (now - began) * (len(units) - done) >= _WORTH_S * done:
            actor = ray.remote(num_cpus=cpus, max_concurrency=2)(UnitActor)
            most = most_beside(stage.resources)
            pool = Pool(
                stage,
                actor,
                (open_worker, cpus, 0.0),
                queue.waiting,
                most,
                most,
                lambda unit: queue.report(unit, 1.0, ""),
            )
            pool.grow()

    def watched(unit: str, report: Callable[..., None]) -> None:
        def reported(fraction: float, note: str = "", **values: float) -> None:
            report(fraction, note, **values)
            look()

        do_unit(unit, reported)

    try:
        work_through(queue, watched)
        while pool is not None and pool.working and not failures and queue.error() is None:
            time.sleep(_GIVE_EVERY_S)
            look()
            work_through(queue, watched)  # what a lost one has handed back
    finally:
        if pool is not None:
            pool.end()
    error = next(iter(failures), queue.error())
    if error is not None:
        raise error
