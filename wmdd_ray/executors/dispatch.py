"""Who does the units of a stage: this process without Ray (`--executor here`), or workers on Ray, imported only then."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from wmdd_ray.spine.run import OpenWorker, Run, StageRun
from wmdd_ray.telling.trackers import TrackedRun, Tracker
from wmdd_ray.telling.watch import LiveWatch

NOTES_FOLDER = "train"
"""Where Ray Train keeps its own notes of a group under a run's root; nothing there counts, and it goes with the group."""

# An actor takes 2 to 3 seconds of a processor to start, as long as the driver takes for the barycenters of so many images.
_SMALL_IMAGES = 20_000


def is_here(stage: StageRun) -> bool:
    """Return whether the run works in this process, without Ray."""
    return stage.resources.executor == "here"


def ray_or_here(stage: StageRun, module: str, *, small: bool = False) -> Any:
    """Return `executors.here`, also for what is small, or the module of `executors` that does the same on Ray."""
    chosen = "here" if small or is_here(stage) else module
    return importlib.import_module(f"wmdd_ray.executors.{chosen}")


def is_small(stage: StageRun, num_images: int | None) -> bool:
    """Return whether a laptop's driver has embedded and solved so many images before actors have started.

    It does not where an executor is named.
    """
    if stage.resources.executor != "auto" or num_images is None or num_images > _SMALL_IMAGES:
        return False
    from wmdd_ray.executors.cluster import width

    return width(stage.resources).num_workers == 0


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
    num_finished = sum(unit in finished for unit in (units if among is None else among))
    if among is None:
        stage.progress.start(len(units), num_finished)
    if not left:
        return
    ray_or_here(stage, "workers").do_units(stage, left, open_worker, num_finished)


def do_each(
    stage: StageRun,
    worker_class: type,
    arguments: tuple[Any, ...],
    units: Sequence[str],
    *,
    together: bool = False,
    light: bool = False,
) -> None:
    """Do every unit of a stage that is not finished yet, on actors of one CPU each that grow with the cluster (`actors.fan_out`).

    Args:
        stage: The stage; its progress line shows units done.
        worker_class: A class with methods `work(unit)` and `ready()`.
        arguments: Its constructor's arguments.
        units: All unit ids, most expensive first.
        together: Whether one call does all that is left: it is told the first of these units, and commits each.
        light: Whether the driver does the units itself where the run has no workers.
    """
    finished = stage.room.finished()
    left = [unit for unit in units if unit not in finished]
    done = len(units) - len(left)
    stage.progress.start(len(units), done)
    if not left:
        return
    told, others = (left[:1], left[1:]) if together else (left, [])

    def on_done(unit: str) -> None:
        nonlocal done
        for other in others:
            seconds = stage.room.read_unit(other).seconds
            stage.event("unit_done", unit=other, attempt=1, seconds=seconds)
        done += 1 + len(others)
        stage.progress.update(done)

    if not is_here(stage):
        import ray

        from wmdd_ray.executors.actors import fan_out
        from wmdd_ray.executors.cluster import Width, await_room, width

        if not (light and width(stage.resources).num_workers == 0):
            most = stage.resources.max_actors
            wide = Width(min(most, len(told)), cpus=1, gpus=0.0)
            await_room(stage, wide)
            actor = ray.remote(num_cpus=1)(worker_class)
            fan_out(stage, actor, arguments, told, wide=wide, max_actors=most, on_done=on_done)
            return
    from wmdd_ray.executors import here

    here.do_each(stage, worker_class(*arguments), told, on_done)


def watch_of(run: Run, tracked: TrackedRun, trackers: Sequence[Tracker] = ()) -> LiveWatch:
    """Return who tells the run's numbers: to trackers, and on Ray to its metrics."""
    if run.resources.executor == "here":
        return LiveWatch(trackers)
    from wmdd_ray.executors.metrics import RayWatch

    return RayWatch(tracked, trackers)


def sweep_notes(run: Run) -> None:
    """Remove the notes that killed drivers left, when a run has ended well.

    Only those of runs, whose tokens are their names: somebody's training images may lie in a folder `train` beside the rooms.
    """
    names = {key.partition("/")[0] for key in run.store.child(NOTES_FOLDER).list()}
    notes = {name for name in names if re.fullmatch("[0-9a-f]{32}", name)}
    for folder in [NOTES_FOLDER] if notes == names else [f"{NOTES_FOLDER}/{n}" for n in notes]:
        run.store.delete(folder)
