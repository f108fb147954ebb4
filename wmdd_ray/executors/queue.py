"""The units of a stage that are left, who works on which, and the loop of a worker. No Ray: it lives in the driver or an actor."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from wmdd_ray.errors import WmddError
from wmdd_ray.executors.causes import last_line
from wmdd_ray.spine.rooms import MAX_ATTEMPTS, unit_given_up
from wmdd_ray.spine.run import DoUnit, Report

logger = logging.getLogger(__name__)


class Queue(Protocol):
    """What a worker calls of a `UnitQueue`, wherever it lives."""

    def join(self, rank: int, world: int, node: str = "") -> None:
        """Enter a group of workers."""

    def take(self, rank: int) -> str | None:
        """Return the next unit."""

    def report(
        self, unit: str, fraction: float, note: str, values: dict[str, float] | None = None
    ) -> None:
        """Note how far a unit is."""

    def fail(self, unit: str, error: WmddError) -> None:
        """Stop because of a deliberate error."""


class Deaths:
    """How often each unit ended its worker without having come further than ever before."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._furthest: dict[str, float] = {}

    def count(self, unit: str, fraction: float) -> int:
        """Count a worker that died when so much of the unit was done; return how many did since it came further."""
        if fraction > self._furthest.get(unit, 0.0):
            self._counts[unit], self._furthest[unit] = 0, fraction
        self._counts[unit] += 1
        return self._counts[unit]


class UnitQueue:
    """The units that are left, and who works on which. Rebuilt by running again: it holds nothing of its own.

    Args:
        units: Unfinished unit ids, in the order to hand them out (most expensive first).
        on_change: Called with (units done, note) after every report; in the driver only.
        on_event: Called as on_event(event, **about); in the driver only. Elsewhere events wait for `drain`.

    Attributes:
        waiting: The units that nobody has begun; a pool of actors beside the driver takes from them too.
    """

    def __init__(
        self,
        units: Sequence[str],
        on_change: Callable[[float, str], None] | None = None,
        on_event: Callable[..., None] | None = None,
    ) -> None:
        self.waiting = deque(units)
        self._taken: dict[str, tuple[int, float]] = {}
        self._nodes: dict[int, str] = {}
        self._takes: Counter[str] = Counter()
        self._deaths = Deaths()
        self._fractions: dict[str, float] = {}
        self._done = 0
        self._note = ""
        self._error: WmddError | None = None
        self._events: list[dict[str, Any]] = []
        self._on_change, self._on_event = on_change, on_event

    def join(self, rank: int, world: int, node: str = "") -> None:
        """Enter as `rank` of a group of `world`. What this rank, or one beyond the group, had taken before is free again."""
        for unit, (holder, _) in list(self._taken.items()):
            if holder == rank or holder >= world:
                self._event("unit_retried", unit, reason="its group of workers was started again")
                del self._taken[unit]
                self._fractions.pop(unit, None)
                self.waiting.appendleft(unit)
        self._nodes[rank] = node

    def take(self, rank: int) -> str | None:
        """Return the next unit, or None when nothing is left to begin."""
        if self._error or not self.waiting:
            return None
        unit = self.waiting.popleft()
        self._taken[unit] = (rank, time.monotonic())
        self._takes[unit] += 1
        self._event("unit_started", unit)
        return unit

    def report(
        self, unit: str, fraction: float, note: str, values: dict[str, float] | None = None
    ) -> None:
        """Note the fraction of a unit that is done, 1 finishes it, and hand on the values that it tells."""
        if values:
            self._event("unit_told", unit, values=values)
        if fraction >= 1:
            if unit in self._taken:
                seconds = time.monotonic() - self._taken[unit][1]
                self._event("unit_done", unit, seconds=round(seconds, 3))
            self._taken.pop(unit, None)
            self._fractions.pop(unit, None)
            self._done += 1
        else:
            self._fractions[unit] = fraction
        self._note = note or self._note
        if self._on_change:
            self._on_change(*self.progress())

    def fail(self, unit: str, error: WmddError) -> None:
        """Stop handing out units because of a deliberate error."""
        self._event("unit_failed", unit, reason=str(error))
        self._error = self._error or error

    def lose(self, reasons: dict[int, str]) -> None:
        """Note that ranks died, by themselves and not with their group; their units have so many attempts at one point."""
        for unit, (holder, _) in self._taken.items():
            if holder not in reasons:
                continue
            if self._deaths.count(unit, self._fractions.get(unit, 0.0)) >= MAX_ATTEMPTS:
                self.fail(unit, unit_given_up(unit, f"by {reasons[holder]}"))

    def progress(self) -> tuple[float, str]:
        """Return (units done, with the fractions under way; last note)."""
        return self._done + sum(self._fractions.values()), self._note

    def error(self) -> WmddError | None:
        """Return the first deliberate error."""
        return self._error

    def drain(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def _event(self, event: str, unit: str, **about: Any) -> None:
        holder = self._taken.get(unit, (-1, 0.0))[0]
        about |= {"unit": unit, "node": self._nodes.get(holder, ""), "attempt": self._takes[unit]}
        if self._on_event:
            self._on_event(event, **about)
        else:
            self._events.append({"event": event, **about})


def work_through(queue: Queue, do_unit: DoUnit, *, rank: int = 0, world: int = 1) -> None:
    """Do one unit of the queue after another, until none is left or one fails; the queue holds the error."""
    queue.join(rank, world, socket.gethostname())
    while (unit := queue.take(rank)) is not None:
        try:
            do_unit(unit, reporter(queue, unit))
        except WmddError as error:
            queue.fail(unit, error)
            return
        except Exception as error:
            # Not let through to Ray Train, which would start the group again for a fault that comes back every time.
            failure = WmddError(f"unit {unit}: {last_line(error)}; --verbose shows where")
            failure.__cause__ = error
            logger.info("unit %s", unit, exc_info=True)
            queue.fail(unit, failure)
            return
        queue.report(unit, 1.0, "")


def reporter(queue: Queue, unit: str) -> Report:
    """Return a report function that speaks at most twice a second: units may step thousands of times a second.

    Values at the end of an epoch are not dropped because of a note just before.
    """
    last = {True: time.monotonic(), False: time.monotonic()}

    def report(fraction: float, note: str = "", **values: float) -> None:
        has_values = bool(values)
        if time.monotonic() - last[has_values] >= 0.5:
            last[has_values] = time.monotonic()
            queue.report(unit, min(fraction, 0.999), note, values)

    return report
