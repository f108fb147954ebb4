"""Units of work on a pool of Ray actors that grows with the cluster: a lost actor costs the unit that it worked on."""

from __future__ import annotations

import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayError

from wmdd_ray.core.device import device_for
from wmdd_ray.errors import WmddError
from wmdd_ray.executors.causes import last_line, root_cause
from wmdd_ray.executors.cluster import Width, await_room
from wmdd_ray.executors.heap import keep_freed_memory
from wmdd_ray.executors.queue import Deaths
from wmdd_ray.spine.rooms import MAX_ATTEMPTS, unit_given_up
from wmdd_ray.spine.run import OpenWorker, StageRun

# Actors that may die in a row, at work or while they start, before any unit is finished.
_MAX_LOST = 32
_LOOK_EVERY_S = 5.0
# The last is what Ray's memory monitor ends a worker by.
_LOSSES = (ActorDiedError, ActorUnavailableError, OutOfMemoryError)

Part = tuple[float, str, str, dict[str, float]]
"""How far a `UnitActor` is: the fraction of the unit under way that is done, a note, the unit, and the values that it told last."""


def fan_out(
    stage: StageRun,
    actor_class: ActorClass,
    arguments: tuple[Any, ...],
    units: Sequence[str],
    *,
    wide: Width,
    max_actors: int,
    first_actors: int = 0,
    on_done: Callable[[str], None],
    on_wait: Callable[[list[Part]], None] | None = None,
) -> None:
    """Call `work(unit)` on actors for every unit, and `on_done` with each that is done.

    The pool starts with one actor a CPU of the cluster and keeps as many waiting for resources as are at work, so
    that an autoscaler sees the demand and a cluster of fixed size is not flooded with a thousand waiting actors. Units
    go out in the order given, one at a time an actor. A unit whose actor died is tried again on another.

    `wide` is what an actor needs: when nothing is at work, it is waited for a node that has it, as long as `await_room` does.
    `first_actors` are asked for at once; 0 is one a CPU that the cluster has now, or all when it has none yet. `on_wait` is called
    now and then with what `UnitActor`s say of the units under way.

    Raises:
        WmddError: A unit failed, or ended its actor `MAX_ATTEMPTS` times at one point, or the nodes have no room any more.
    """
    pool = Pool(stage, actor_class, arguments, deque(units), max_actors, first_actors, on_done)
    looked = time.monotonic()
    try:
        while pool.waiting or pool.working:
            if not pool.working:  # an autoscaler sees the actors that wait
                await_room(stage, replace(wide, num_workers=1))
            pool.grow()
            pool.take_next(_LOOK_EVERY_S)
            if on_wait and time.monotonic() - looked >= _LOOK_EVERY_S:
                looked = time.monotonic()
                on_wait(pool.progress())
    finally:
        pool.end()


class Pool:
    """Actors that start, wait for work and work, and the units that are left; `fan_out` says how."""

    def __init__(
        self,
        stage: StageRun,
        actor_class: ActorClass,
        arguments: tuple[Any, ...],
        units: deque[str],
        max_actors: int,
        first_actors: int,
        on_done: Callable[[str], None],
    ) -> None:
        self._stage, self._on_done = stage, on_done
        self._actor_class: Any = actor_class
        self._arguments = arguments
        self._max_actors = max_actors
        # A cluster without any CPU is one that will be as large as what is asked for.
        self._first = first_actors or int(ray.cluster_resources().get("CPU", 0)) or max_actors
        self.waiting = units
        self._takes: Counter[str] = Counter()
        self._deaths = Deaths()
        self._fractions: dict[str, float] = {}
        self._nodes: dict[ActorHandle, str] = {}
        self._starting: dict[Any, ActorHandle] = {}
        self.working: dict[Any, tuple[ActorHandle, str, float]] = {}
        self._lost = 0

    def grow(self) -> None:
        """Start actors, as many as are at work, or so many as the cluster has CPUs."""
        wanted = len(self.waiting) + len(self.working)
        most = min(self._max_actors, wanted, max(self._first, 2 * len(self._nodes)))
        while len(self._nodes) + len(self._starting) < most:
            actor = self._actor_class.remote(*self._arguments)
            self._starting[actor.ready.remote()] = actor

    def progress(self) -> list[Part]:
        """Return the `progress` of every `UnitActor` at work that answers within a second."""
        refs = [actor.progress.remote() for actor, _, _ in self.working.values()]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=1.0) if refs else ([], [])
        try:
            parts: list[Part] = ray.get(ready)
        except RayError:  # it is told by what they were at
            return []
        self._fractions |= {unit: fraction for fraction, _, unit, _ in parts}
        return parts

    def take_next(self, timeout_s: float) -> None:
        """Take the next answer, if one comes in time: of an actor that has started, or of one that has done a unit, or died."""
        ready, _ = ray.wait([*self.working, *self._starting], timeout=timeout_s)
        for ref in ready:
            self._take(ref)

    def _take(self, ref: Any) -> None:
        if ref in self._starting:
            actor = self._starting.pop(ref)
            try:
                self._nodes[actor] = ray.get(ref)
                self._give(actor)
            except _LOSSES as error:
                self._lose(actor, error)
            except RayError as error:
                raise told(error, "a new worker") from error
            return
        actor, unit, began = self.working.pop(ref)
        about = self._about(actor, unit)
        try:
            ray.get(ref)
        except _LOSSES as error:
            if self._deaths.count(unit, self._fractions.pop(unit, 0.0)) >= MAX_ATTEMPTS:
                self._stage.event("unit_failed", **about, reason=last_line(error))
                raise unit_given_up(unit, f"by {last_line(error)}") from error
            self._stage.event("unit_retried", **about, reason=last_line(error))
            self.waiting.appendleft(unit)
            self._lose(actor, error)
            return
        except RayError as error:
            cause = told(error, f"unit {unit}")
            self._stage.event("unit_failed", **about, reason=str(cause))
            raise cause from error
        self._lost = 0
        self._stage.event("unit_done", **about, seconds=round(time.monotonic() - began, 3))
        self._on_done(unit)
        self._give(actor)

    def end(self) -> None:
        for actor in (*self._nodes, *self._starting.values()):
            ray.kill(actor)

    def _give(self, actor: ActorHandle) -> None:
        if not self.waiting:
            del self._nodes[actor]
            ray.kill(actor)
            return
        unit = self.waiting.popleft()
        self._takes[unit] += 1
        self._stage.event("unit_started", **self._about(actor, unit))
        self.working[actor.work.remote(unit)] = (actor, unit, time.monotonic())

    def _lose(self, actor: ActorHandle, error: RayError) -> None:
        cause = root_cause(error)
        if isinstance(cause, WmddError):  # of its constructor, which no other actor would spare
            raise cause from error
        self._nodes.pop(actor, None)
        # One that cannot be reached may come back, and nobody would give it work.
        ray.kill(actor)
        self._lost += 1
        if self._lost >= _MAX_LOST:
            raise WmddError(
                f"{self._stage.stage.name}: {self._lost} actors died in a row, at last by {last_line(error)}; finished units are "
                "kept: look at the workers' logs and run the same command again"
            ) from error

    def _about(self, actor: ActorHandle, unit: str) -> dict[str, Any]:
        return {"unit": unit, "node": self._nodes[actor], "attempt": self._takes[unit]}


def told(error: RayError, where: str) -> WmddError:
    """Return the deliberate error inside what an actor raised, or one that says where something else went wrong."""
    cause = root_cause(error)
    if isinstance(cause, WmddError):
        return cause
    return WmddError(f"{where}: {last_line(cause)}; --verbose shows the workers' log")


class UnitActor:
    """An isolated worker: keeps what `open_worker` loads, and does a unit a call."""

    def __init__(self, open_worker: OpenWorker, cpus: int, gpus: float) -> None:
        keep_freed_memory()
        torch.set_num_threads(cpus)
        self._cpus = cpus
        self._do_unit = open_worker(device_for(gpus))
        self._unit = ""
        self._progress: Part = (0.0, "", "", {})

    def ready(self) -> str:
        """Return the node's name once the worker can work."""
        return socket.gethostname()

    def work(self, unit: str) -> None:
        torch.set_num_threads(self._cpus)  # of this thread: the actor has two
        self._unit = unit
        self._do_unit(unit, self._report)
        self._progress = (0.0, "", "", {})

    def progress(self) -> Part:
        """Return how far this worker is."""
        return self._progress

    def _report(self, fraction: float, note: str = "", **values: float) -> None:
        self._progress = (min(fraction, 0.999), note, self._unit, values)
