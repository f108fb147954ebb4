"""When each unit of work was under way, out of the events of all runs and the markers of finished units."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from wmdd_ray.spine.rooms import UnitMarker

State = Literal["done", "slow", "retried", "failed", "cut"]

# More than this many bars nobody tells apart: the long ones and those that went wrong are kept.
_MOST_BARS = 1500
# A unit is a straggler when it took so many times as long as the middle one of its kind, and not a blink. Of one kind
# are units of a stage whose ids differ in numbers only.
_SLOW = 2.0
_SLOW_S = 1.0
_SLOW_UNITS = 3
# What is left of the time between two runs, as a share of the time in which something ran.
_GAP = 0.015


@dataclass(kw_only=True)
class Session:
    """One driver process. `exit_code` is None when its log has no end: killed, or still at work. Times in s since 1970."""

    run: str
    begin: float
    end: float
    exit_code: int | None = None
    ended: bool = False


@dataclass(kw_only=True)
class Bar:
    """One attempt at a unit. `state` slow is done, but a straggler; cut ended with its driver. Times in s since 1970."""

    stage: str
    unit: str
    node: str
    attempt: int
    begin: float
    end: float
    state: State
    reason: str = ""


@dataclass(kw_only=True)
class Timeline:
    """All sessions and bars, and how many bars of each stage are left out."""

    sessions: list[Session] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)


def timeline_of(
    events: Iterable[Mapping[str, Any]], markers: Mapping[str, Mapping[str, UnitMarker]]
) -> Timeline:
    """Return what happened when, of events in order of time, as `read_events` returns them.

    `markers`, stage -> finished units, stand in for events that a kill lost.
    """
    sessions: dict[str, Session] = {}
    bars: list[Bar] = []
    begun: dict[tuple[str, str, str], Bar] = {}

    def close(bar: Bar, end: float, state: State, reason: str = "") -> None:
        bar.end, bar.state, bar.reason = max(bar.begin, end), state, reason
        bars.append(bar)

    for event in events:
        run, at, kind = str(event.get("run", "")), _seconds(event.get("at")), event.get("event")
        if at is None:
            continue
        session = sessions.setdefault(run, Session(run=run, begin=at, end=at))
        session.end = max(session.end, at)
        if kind == "run_ended":
            session.ended, session.exit_code = True, int(_finite(event.get("exit_code"), 1))
        if kind not in ("unit_started", "unit_done", "unit_retried", "unit_failed"):
            continue
        key = (run, str(event.get("stage")), str(event.get("unit")))
        bar = begun.pop(key, None)
        if kind == "unit_started":
            if bar is not None:
                close(bar, at, "retried", "begun again")
            begun[key] = _bar(event, at)
            continue
        if bar is None:
            # Stages that stream their data tell of a unit only when it is done.
            bar = _bar(event, at - _finite(event.get("seconds"), 0.0))
        states: dict[str, State] = {"unit_done": "done", "unit_retried": "retried"}
        close(bar, at, states.get(str(kind), "failed"), str(event.get("reason") or ""))
    for (run, _, _), bar in begun.items():
        close(bar, sessions[run].end, "cut", "its driver ended")
    bars += _unlogged(bars, markers)
    _mark_slow(bars)
    bars.sort(key=lambda bar: (bar.begin, bar.end))
    kept, left_out = _fewer(bars)
    return Timeline(
        sessions=sorted(sessions.values(), key=lambda s: s.begin), bars=kept, left_out=left_out
    )


class Axis:
    """Time without the pauses between runs: seconds in which something ran, from 0."""

    def __init__(self, timeline: Timeline) -> None:
        """Join what overlaps; what lies between is cut to a sliver."""
        spans = [(s.begin, s.end) for s in timeline.sessions]
        spans += [(bar.begin, bar.end) for bar in timeline.bars]
        self._spans: list[tuple[float, float, float]] = []
        merged: list[list[float]] = []
        for begin, end in sorted(spans):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        gap = _GAP * sum(end - begin for begin, end in merged)
        at = 0.0
        for i, (begin, end) in enumerate(merged):
            if i:
                at += min(gap, begin - merged[i - 1][1])
            self._spans.append((begin, end, at))
            at += end - begin
        self.length = at
        self.active_s = sum(end - begin for begin, end in merged)

    def __call__(self, seconds: float) -> float:
        """Return the place of a time (s since 1970) that lies inside a session or a bar."""
        for begin, end, at in reversed(self._spans):
            if seconds >= begin:
                return at + min(seconds, end) - begin
        return 0.0


def lanes(bars: list[Bar]) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Return a row for each bar in which it overlaps no other, and (stage, first row, number of rows) of each stage."""
    rows = [0] * len(bars)
    blocks: list[tuple[str, int, int]] = []
    first = 0
    for stage in dict.fromkeys(bar.stage for bar in bars):
        free: list[float] = []
        for i, bar in enumerate(bars):
            if bar.stage != stage:
                continue
            # Rounded clocks of two machines overlap by a blink.
            row = next((r for r, end in enumerate(free) if end <= bar.begin + 1e-3), len(free))
            free[row : row + 1] = [bar.end]
            rows[i] = first + row
        blocks.append((stage, first, len(free)))
        first += len(free)
    return rows, blocks


def _bar(event: Mapping[str, Any], begin: float) -> Bar:
    return Bar(
        stage=str(event.get("stage")),
        unit=str(event.get("unit")),
        node=str(event.get("node") or ""),
        attempt=int(_finite(event.get("attempt"), 1)),
        begin=begin,
        end=begin,
        state="done",
    )


def _unlogged(bars: list[Bar], markers: Mapping[str, Mapping[str, UnitMarker]]) -> list[Bar]:
    """Return the bars of finished units that no event tells of."""
    logged = {(bar.stage, bar.unit) for bar in bars if bar.state == "done"}
    bars_left = []
    for stage, units in markers.items():
        for unit, marker in units.items():
            end = _seconds(marker.finished)
            if (stage, unit) in logged or end is None:
                continue
            bars_left.append(
                Bar(
                    stage=stage,
                    unit=unit,
                    node=marker.host,
                    attempt=marker.attempt,
                    begin=end - marker.seconds,
                    end=end,
                    state="done",
                    reason="told by its marker, not by an event",
                )
            )
    return bars_left


def _mark_slow(bars: list[Bar]) -> None:
    kinds: dict[tuple[str, str], list[Bar]] = {}
    for bar in bars:
        if bar.state == "done":
            kinds.setdefault((bar.stage, re.sub(r"\d+", "", bar.unit)), []).append(bar)
    for done in kinds.values():
        middle = statistics.median(bar.end - bar.begin for bar in done)
        for bar in done:
            slow = bar.end - bar.begin > max(_SLOW * middle, middle + _SLOW_S)
            if slow and len(done) >= _SLOW_UNITS:
                bar.state = "slow"


def _fewer(bars: list[Bar]) -> tuple[list[Bar], dict[str, int]]:
    """Return at most `_MOST_BARS`, in their order, and how many of each stage are not among them."""
    if len(bars) <= _MOST_BARS:
        return bars, {}
    order = sorted(
        range(len(bars)), key=lambda i: (bars[i].state == "done", bars[i].begin - bars[i].end)
    )
    kept = set(order[:_MOST_BARS])
    left_out: dict[str, int] = {}
    for i, bar in enumerate(bars):
        if i not in kept:
            left_out[bar.stage] = left_out.get(bar.stage, 0) + 1
    return [bars[i] for i in sorted(kept)], left_out


def _seconds(at: object) -> float | None:
    try:
        return datetime.fromisoformat(str(at)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _finite(value: object, otherwise: float) -> float:
    """Return the number that an event should have there; `otherwise` when it is none that a clock could have told."""
    if isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e9:
        return value
    return otherwise
