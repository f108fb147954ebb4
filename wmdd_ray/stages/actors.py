"""Units of work on a pool of Ray actors that grows with the cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from wmdd_ray.errors import WmddError
from wmdd_ray.stages.cluster import root_cause

MAX_ATTEMPTS = 3


def fan_out(
    actor_class: ActorClass,
    arguments: tuple[Any, ...],
    units: Sequence[str],
    *,
    max_actors: int,
    on_done: Callable[[str, Any], None],
) -> None:
    """Call `work(unit)` on actors for every unit, and hand each result to `on_done` in order of completion.

    The pool starts with one actor a CPU of the cluster and keeps as many waiting for resources as are at work, so
    that an autoscaler sees the demand and a cluster of fixed size is not flooded with a thousand waiting actors. Units
    go out in the order given, one at a time an actor. A unit whose actor died is tried again on another.

    Args:
        actor_class: A `ray.remote` class with a method `work(unit)` and `ready()`.
        arguments: Constructor arguments of every actor.
        units: Unit ids, most expensive first.
        max_actors: Most actors.
        on_done: Called in the driver.

    Raises:
        WmddError: A unit failed deliberately, or ended its actor `MAX_ATTEMPTS` times.
    """
    waiting = deque(units)
    attempts: dict[str, int] = {}
    actors: set[ActorHandle] = set()
    starting: dict[Any, ActorHandle] = {}
    working: dict[Any, tuple[ActorHandle, str]] = {}
    first = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def grow() -> None:
        target = min(
            max_actors, len(waiting) + len(working), max(first, 2 * (len(actors) - len(starting)))
        )
        while len(actors) < target:
            actor = actor_class.remote(*arguments)
            actors.add(actor)
            starting[actor.ready.remote()] = actor

    def give(actor: ActorHandle) -> None:
        if waiting:
            unit = waiting.popleft()
            working[actor.work.remote(unit)] = (actor, unit)
        else:
            actors.discard(actor)
            ray.kill(actor)

    try:
        while waiting or working:
            grow()
            done, _ = ray.wait([*working, *starting], num_returns=1)
            ref = done[0]
            if ref in starting:
                actor = starting.pop(ref)
                try:
                    ray.get(ref)
                except RayError as error:
                    raise root_cause(error) from error
                give(actor)
                continue
            actor, unit = working.pop(ref)
            try:
                on_done(unit, ray.get(ref))
            except (ActorDiedError, ActorUnavailableError) as error:
                actors.discard(actor)
                attempts[unit] = attempts.get(unit, 0) + 1
                if attempts[unit] >= MAX_ATTEMPTS:
                    raise WmddError(
                        f"unit {unit} ended its actor {MAX_ATTEMPTS} times (killed, or out of memory): {error}; "
                        "finished units are kept: run the same command again on workers with more memory"
                    ) from error
                waiting.appendleft(unit)
                continue
            except RayError as error:
                raise root_cause(error) from error
            give(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
