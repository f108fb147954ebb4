"""Units of work on a pool of Ray actors that grows with the cluster: a lost actor costs the unit that it worked on."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from wmdd_ray.errors import WmddError
from wmdd_ray.executors.causes import last_line, root_cause
from wmdd_ray.spine.rooms import MAX_ATTEMPTS, unit_given_up
from wmdd_ray.spine.run import StageRun

# Actors that may die in a row, at work or while they start, before any unit is finished.
_MAX_LOST = 32
_LOOK_EVERY_S = 5.0


def fan_out(
    stage: StageRun,
    actor_class: ActorClass,
    arguments: tuple[Any, ...],
    units: Sequence[str],
    *,
    max_actors: int,
    first_actors: int = 0,
    on_done: Callable[[str, Any], None],
    on_wait: Callable[[list[ActorHandle]], None] | None = None,
) -> None:
    """Call `work(unit)` on actors for every unit, and hand each result to `on_done` in order of completion.

    The pool starts with one actor a CPU of the cluster and keeps as many waiting for resources as are at work, so
    that an autoscaler sees the demand and a cluster of fixed size is not flooded with a thousand waiting actors. Units
    go out in the order given, one at a time an actor. A unit whose actor died is tried again on another.

    Args:
        stage: The stage; its events tell what happened.
        actor_class: A `ray.remote` class with a method `work(unit)`, and `ready()`, which returns the node's name.
        arguments: Constructor arguments of every actor.
        units: Unit ids, most expensive first.
        max_actors: Most actors.
        first_actors: Actors to ask for at once; 0 is one a CPU that the cluster has now, or all when it has none yet.
        on_done: Called in the driver with unit and result.
        on_wait: Called now and then with the actors at work.

    Raises:
        WmddError: A unit failed, or ended its actor `MAX_ATTEMPTS` times.
    """
    waiting = deque(units)
    deaths: Counter[str] = Counter()
    nodes: dict[ActorHandle, str] = {}
    starting: dict[Any, ActorHandle] = {}
    working: dict[Any, tuple[ActorHandle, str, float]] = {}
    # A cluster without any CPU is one that will be as large as what is asked for.
    first = first_actors or int(ray.cluster_resources().get("CPU", 0)) or max_actors
    lost, looked = 0, time.monotonic()

    def grow() -> None:
        most = min(max_actors, len(waiting) + len(working), max(first, 2 * len(nodes)))
        while len(nodes) + len(starting) < most:
            actor = actor_class.remote(*arguments)
            starting[actor.ready.remote()] = actor

    def give(actor: ActorHandle) -> None:
        if not waiting:
            del nodes[actor]
            ray.kill(actor)
            return
        unit = waiting.popleft()
        about = {"unit": unit, "node": nodes[actor], "attempt": deaths[unit] + 1}
        stage.event("unit_started", **about)
        working[actor.work.remote(unit)] = (actor, unit, time.monotonic())

    def lose(actor: ActorHandle, error: RayError) -> None:
        nonlocal lost
        nodes.pop(actor, None)
        # One that cannot be reached may come back, and nobody would give it work.
        ray.kill(actor)
        lost += 1
        if lost >= _MAX_LOST:
            raise WmddError(
                f"{stage.stage.name}: {lost} actors died in a row, at last by {last_line(error)}; finished units are kept: look "
                "at the workers' logs and run the same command again"
            ) from error

    try:
        while waiting or working:
            grow()
            done, _ = ray.wait([*working, *starting], num_returns=1, timeout=_LOOK_EVERY_S)
            if on_wait and time.monotonic() - looked >= _LOOK_EVERY_S:
                looked = time.monotonic()
                on_wait([actor for actor, _, _ in working.values()])
            if not done:
                continue
            ref = done[0]
            if ref in starting:
                actor = starting.pop(ref)
                try:
                    nodes[actor] = ray.get(ref)
                    give(actor)
                except (ActorDiedError, ActorUnavailableError) as error:
                    lose(actor, error)
                except RayError as error:
                    raise _told(error, "a new worker") from error
                continue
            actor, unit, began = working.pop(ref)
            about = {"unit": unit, "node": nodes[actor], "attempt": deaths[unit] + 1}
            try:
                result = ray.get(ref)
            except (ActorDiedError, ActorUnavailableError) as error:
                deaths[unit] += 1
                if deaths[unit] >= MAX_ATTEMPTS:
                    stage.event("unit_failed", **about, reason=last_line(error))
                    raise unit_given_up(unit, f"by {last_line(error)}") from error
                stage.event("unit_retried", **about, reason=last_line(error))
                waiting.appendleft(unit)
                lose(actor, error)
                continue
            except RayError as error:
                told = _told(error, f"unit {unit}")
                stage.event("unit_failed", **about, reason=str(told))
                raise told from error
            lost = 0
            stage.event("unit_done", **about, seconds=round(time.monotonic() - began, 3))
            on_done(unit, result)
            give(actor)
    finally:
        for actor in (*nodes, *starting.values()):
            ray.kill(actor)


def _told(error: RayError, where: str) -> WmddError:
    """Return the deliberate error inside what an actor raised, or one that says where something else went wrong."""
    cause = root_cause(error)
    if isinstance(cause, WmddError):
        return cause
    return WmddError(f"{where}: {last_line(cause)}; --verbose shows the workers' log")
