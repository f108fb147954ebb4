"""Units of work on Ray workers without gradient synchronization: a load-balanced stream of unit ids.

A worker takes the next unit, works, commits it to storage, and asks again; there is no barrier in between. Workers are

- none: the loop runs in the driver, and on a laptop beside it where that pays (`beside.py`);
- a group of Ray Train workers. When one dies, Ray Train starts the group again: the units that were under way go back into
  the queue and go on from their checkpoints;
- isolated actors, for wide stages. When one dies, its unit goes to another, and nobody else notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from wmdd_ray.core.device import device_for
from wmdd_ray.errors import WmddError
from wmdd_ray.executors import beside, here
from wmdd_ray.executors.actors import Part, UnitActor, fan_out
from wmdd_ray.executors.cluster import Width, await_room, width
from wmdd_ray.executors.heap import keep_freed_memory
from wmdd_ray.executors.queue import work_through
from wmdd_ray.executors.train_groups import RemoteQueue, fit_until_done, queue_actor, scaling
from wmdd_ray.spine.run import OpenWorker, StageRun

# A larger group loses too much by its restarts, and one with few units a worker by waiting for its last, for it gives its
# machines back together (by simulation: jobs/benches/README.md).
_MAX_GROUP, _MIN_SHARE = 8, 4


def do_units(
    stage: StageRun, units: Sequence[str], open_worker: OpenWorker, num_finished: int
) -> None:
    """Do the units on as many workers as the run's resources say; `num_finished` others of the stage are done."""
    wide = width(stage.resources)
    executor = stage.resources.executor
    if executor == "auto":
        steady = wide.num_workers <= _MAX_GROUP and len(units) >= _MIN_SHARE * wide.num_workers
        executor = "train" if steady else "actors"
    if wide.num_workers == 0:
        keep_freed_memory()
        alone = stage.resources.num_workers == 0
        (here if alone else beside).do_units(stage, units, open_worker, num_finished)
        return
    await_room(stage, wide)
    if executor == "train":
        _run_group(stage, units, open_worker, wide, num_finished)
    else:
        _run_actors(stage, units, open_worker, wide, num_finished)


def _run_group(
    stage: StageRun, units: Sequence[str], open_worker: OpenWorker, wide: Width, num_finished: int
) -> None:
    """Work on one elastic group of Ray Train workers."""
    with queue_actor(stage, units, num_finished) as queue:

        def fit(run_config: RunConfig) -> None:
            DataParallelTrainer(
                _worker_loop,
                train_loop_config={
                    "open_worker": open_worker,
                    "cpus": wide.cpus,
                    "gpus": wide.gpus,
                    "queue": queue,
                },
                scaling_config=scaling(wide, min(wide.num_workers, len(units))),
                run_config=run_config,
            ).fit()

        fit_until_done(stage, queue, fit)


def _run_actors(
    stage: StageRun, units: Sequence[str], open_worker: OpenWorker, wide: Width, num_finished: int
) -> None:
    done = num_finished

    def finish(unit: str) -> None:
        nonlocal done
        done += 1
        stage.progress.update(done)

    def look(parts: list[Part]) -> None:
        note = parts[0][1] if parts else ""
        stage.progress.update(done + sum(part[0] for part in parts), note)
        for _, _, unit, values in parts:
            if values:
                stage.event("unit_told", unit=unit, values=values)

    actor = ray.remote(num_cpus=wide.cpus, num_gpus=wide.gpus, max_concurrency=2)(UnitActor)
    fan_out(
        stage,
        actor,
        (open_worker, wide.cpus, wide.gpus),
        units,
        wide=wide,
        max_actors=wide.num_workers,
        first_actors=wide.num_workers,
        on_done=finish,
        on_wait=look,
    )


def _worker_loop(config: dict[str, Any]) -> None:
    keep_freed_memory()
    torch.set_num_threads(config["cpus"])
    context = ray.train.get_context()
    queue = RemoteQueue(config["queue"])
    try:
        do_unit = config["open_worker"](device_of_worker(config["gpus"]))
    except WmddError as error:  # which a group that is started again would meet again
        queue.fail("a new worker", error)
        return
    work_through(
        queue,
        do_unit,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
    )


def device_of_worker(gpus: float) -> torch.device:
    """Return what `device_for` does; a worker of a group may see the GPUs of the others, and have one in their middle."""
    device = device_for(gpus)
    if device.type == "cpu":
        return device
    import ray.train.torch

    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device
