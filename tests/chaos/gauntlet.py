"""The job under a killer: seeded victims at seeded moments of every stage, until it ends as an undisturbed one.

What a run has done is read from its storage alone, for that is what outlives every kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.chaos.two_nodes import TwoNodes
from tests.stages import tiny
from tests.stages.tiny import ROOM_OF, STAGES
from wmdd_ray.store.filesystem import Store

import psutil  # isort: skip

MODES: dict[str, tuple[str, ...]] = {
    "driver": ("--num-workers", "0"),
    "group": ("--num-workers", "1", "--executor", "train"),
    "actors": ("--num-workers", "1", "--executor", "actors"),
}
"""How the workers of a run are executed; none of it changes a byte."""

WEIGHTS = {"worker": 7, "keeper": 2, "driver": 5, "node": 3, "terminate": 2, "head": 1}
"""Victims and their chances. A worker does units; a keeper is an actor that holds something for them, Ray's or ours."""

Plan = dict[str, list[str]]
"""Stage -> the victims that it has left, in order."""

# Seconds from a sign of progress to the kill: most units of the tiny pipeline take about one.
_DELAYS_S = (0.0, 0.0, 0.1, 0.3, 0.6, 1.0, 2.0)
# Chance that a sign of progress is let pass, so that a stage comes forward between two kills.
_PASSES = 0.3
# Chance that no sign is waited for: the kill comes while a run starts, or in the middle of a unit.
_EARLY = 0.15
_EARLY_S = (0.5, 4.0)
_NO_PROGRESS_S = 240.0
_TERMINATED_S = 20.0
_HEAD_LOST_S = 60.0
# On one clock; but a unit that is begun looks for its marker a moment after it looks at the clock.
_SAME_MOMENT_S = 1.0
_KEEPERS = (
    "ray::UnitQueue", "ray::TrainController", "ray::SynchronizationActor", "ray::DatasetManager", "ray::PreemptionWatcher",
    "ray::PlacementGroupCleaner", "ray::ActorLocationTracker", "ray::_",
)  # fmt: skip
# Those beside the driver that hold a stage together: without them the driver ends, to be typed again.
_KEYSTONES = ("ray::UnitQueue", "ray::TrainController")


@dataclass(kw_only=True)
class Kill:
    """One kill: whom, when and where, whether the driver ends by it, and the seconds until the run went on."""

    victim: str
    name: str
    mode: str
    stage: str
    at: float
    ends_driver: bool
    time: str
    recovery_s: float = 0.0


class Record:
    """What storage shows of a run, and what it showed before."""

    def __init__(self, uri: str) -> None:
        self.store = Store(uri)
        self._first: dict[str, bytes] = {}

    def stage(self) -> str:
        """Return the stage that is worked on."""
        for stage, room in ROOM_OF.items():
            if not self.store.exists(f"{room}/stage.json"):
                return stage
        return STAGES[-1]

    def progress(self, stage: str) -> dict[str, int]:
        """Return what a unit of the stage that begins, is begun again or is finished changes; no marker is lost."""
        room = ROOM_OF[stage]
        found = self.store.list(room)
        lost = [k for k in self._first if k.startswith(f"{room}/") and k not in found]
        assert not lost, f"units lost: {lost}"
        for key in found:
            if "/units/" in key and key not in self._first:
                self._first[key] = self.store.get(key)
        kinds = ("/units/", "/attempts/", "/plan.json")
        return {key: size for key, size in found.items() if any(kind in key for kind in kinds)}

    def check(self) -> int:
        """Check that no finished unit was touched or begun again, and nothing unfinished is left; count what was redone."""
        found = self.store.list()
        left = [key for key in found if {"partial", "train"} & set(key.split("/"))]
        assert not left, f"left behind: {left}"
        markers = {key: self.store.get(key) for key in found if "/units/" in key}
        changed = [key for key, content in self._first.items() if markers.get(key) != content]
        assert not changed, f"lost or done again: {changed}"
        redone = 0
        for key, content in markers.items():
            attempts = json.loads(self.store.get(key.replace("/units/", "/attempts/")))["attempts"]
            finished = datetime.fromisoformat(json.loads(content)["finished"])
            began = [datetime.fromisoformat(attempt["began"]) for attempt in attempts]
            late = (max(began) - finished).total_seconds()
            assert late < _SAME_MOMENT_S, f"{key}: begun again {late:.1f} s after it was finished"
            redone += len(attempts) - 1
        return redone


@dataclass
class Gauntlet:
    """Runs of the tiny job, one after another, each killed in every stage until it ends by itself.

    Args:
        cluster: Two running nodes.
        folder: Where logs go.
        payloads: What an undisturbed run made.
        seed: Of victims and moments.
    """

    cluster: TwoNodes
    folder: Path
    payloads: dict[str, Any]
    seed: int
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    redone: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._pending: list[Kill] = []
        self._in_life: Counter[str] = Counter()
        self._struck: set[str] = set()

    def plan(self, per_stage: int) -> Plan:
        """Draw so many victims for each stage."""
        names, chances = list(WEIGHTS), list(WEIGHTS.values())
        return {stage: self._random.choices(names, chances, k=per_stage) for stage in STAGES}

    def run(self, uri: str, mode: str, plan: Plan) -> None:
        """Run the job and kill what the plan names, type it again until it ends well, and check what it made."""
        self.runs += 1
        self._struck.clear()
        log = self.folder / f"run-{self.runs}.log"
        record = Record(uri)
        driver = self._type(uri, mode, log)
        try:
            while True:
                early = self._random.random() < _EARLY and bool(plan[record.stage()])
                patience_s = self._random.uniform(*_EARLY_S) if early else None
                moved = self._wait_for_progress(driver, record, patience_s, log)
                if driver.exitcode == 0 or (driver.is_alive() and moved):
                    self._note_recovery()
                if driver.exitcode == 0:
                    break
                if driver.exitcode is not None:
                    self._assert_may_end(driver, log)
                    driver = self._type(uri, mode, log)
                else:
                    self._maybe_kill(plan, mode, moved, record, driver, log)
        finally:
            driver.kill()
        self.redone += record.check()
        tiny.assert_same_payloads(uri, self.payloads)
        self._assert_nothing_runs()

    def summary(self) -> dict[str, Any]:
        """Return what is told about all kills; that no unit was lost and no byte differs, every run has asserted."""
        seconds = [kill.recovery_s for kill in self.kills]
        counts = {
            f"by_{name}": dict(Counter(getattr(kill, name) for kill in self.kills))
            for name in ("victim", "stage", "mode")
        }
        recovery = {"median": statistics.median(seconds), "max": max(seconds)}
        return {
            "seed": self.seed,
            "runs": self.runs,
            "kills": len(self.kills),
            **counts,
            "lost_units": 0,
            "different_bytes": 0,
            "units_begun_again": self.redone,
            "recovery_s": {name: round(value, 1) for name, value in recovery.items()},
        }

    def _type(self, uri: str, mode: str, log: Path) -> ForkServerProcess:
        self.cluster.start()
        self._in_life.clear()
        return tiny.started(uri, *MODES[mode], ray_address=self.cluster.address, log=log)

    def _wait_for_progress(
        self, driver: ForkServerProcess, record: Record, patience_s: float | None, log: Path
    ) -> bool:
        """Wait until a unit begins or is finished, or a stage begins; False when the driver or the patience ends first."""
        began = time.monotonic()
        stage = record.stage()
        seen = record.progress(stage)
        while driver.is_alive():
            waited_s = time.monotonic() - began
            assert waited_s < _NO_PROGRESS_S, f"{stage}: no progress for long; {_tail(log)}"
            if record.stage() != stage or record.progress(stage) != seen:
                return True
            if patience_s is not None and waited_s > patience_s:
                return False
            time.sleep(0.05)
        driver.join()
        return False

    def _maybe_kill(
        self,
        plan: Plan,
        mode: str,
        moved: bool,
        record: Record,
        driver: ForkServerProcess,
        log: Path,
    ) -> None:
        """Kill the next victim of the stage, now or a moment later, or let this sign pass."""
        stage = record.stage()
        victims = plan[stage]
        # A driver that has only just begun ends by SIGTERM like any process.
        if not victims or (victims[0] == "terminate" and not moved):
            return
        if stage in self._struck:
            if self._random.random() < _PASSES:
                return
            time.sleep(self._random.choice(_DELAYS_S))
        if self._kill(victims[0], mode, stage, driver, log):
            victims.pop(0)
            self._struck.add(stage)
            self.cluster.start()

    def _note_recovery(self) -> None:
        for kill in self._pending:
            kill.recovery_s = time.monotonic() - kill.at
            self.kills.append(kill)
            print(
                f"{kill.time}  kill {len(self.kills):>3}  run {self.runs:>2} {kill.mode:<7} {kill.stage:<12} "
                f"{kill.victim:<10} went on after {kill.recovery_s:5.1f} s  {kill.name}",
                flush=True,
            )
        self._pending.clear()

    def _kill(
        self, victim: str, mode: str, stage: str, driver: ForkServerProcess, log: Path
    ) -> bool:
        """Kill a victim of a kind, if there is one."""
        assert driver.pid is not None
        at, clock = time.monotonic(), f"{datetime.now():%H:%M:%S}"
        ends_driver = victim in ("driver", "terminate", "head")
        if victim == "driver":
            name = f"process {driver.pid} and its group"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.join(_TERMINATED_S)
            assert not driver.is_alive(), "the driver outlived SIGKILL"
        elif victim == "terminate":
            name = _terminate(driver, log)
        elif victim == "node":
            name = f"{self.cluster.kill_node()} processes of the worker node"
        elif victim == "head":
            killed = self.cluster.kill_head()
            driver.join(_HEAD_LOST_S)
            assert not driver.is_alive(), f"the driver outlived its head by a minute; {_tail(log)}"
            took = time.monotonic() - at
            name = f"{killed} processes; driver ended with {driver.exitcode} after {took:.1f} s"
        else:
            name = self._kill_process(keeper=victim == "keeper")
            ends_driver = name.startswith(_KEYSTONES)
        if name:
            self._in_life[victim] += 1
            kill = Kill(
                victim=victim, name=name, mode=mode, stage=stage, at=at, ends_driver=ends_driver, time=clock
            )  # fmt: skip
            self._pending.append(kill)
        return bool(name)

    def _kill_process(self, *, keeper: bool) -> str:
        found = [(process.pid, _name(process), process) for process in self.cluster.workers()]
        found = [row for row in found if row[1] and row[1].startswith(_KEEPERS) == keeper]
        if not found:
            return ""
        _, name, chosen = self._random.choice(sorted(found, key=lambda row: row[0]))
        try:
            chosen.kill()
        except psutil.NoSuchProcess:
            return ""
        return name

    def _assert_may_end(self, driver: ForkServerProcess, log: Path) -> None:
        """Check that it was a kill which ended the driver: a lost worker or node is nothing to end for."""
        if any(kill.ends_driver for kill in self._pending):
            return
        # Unless the same unit lost its worker time and again, which is what a user has to hear about.
        given_up = re.search(r"ended its worker \d times", _tail(log))
        lost = self._in_life["worker"] + self._in_life["node"]
        assert given_up and lost >= 3, f"exit code {driver.exitcode}; {_tail(log)}"

    def _assert_nothing_runs(self) -> None:
        deadline = time.monotonic() + 30
        while left := [*self.cluster.workers(), *self.cluster.orphans()]:
            assert time.monotonic() < deadline, f"still there after the run: {left}"
            time.sleep(0.2)


def _terminate(driver: ForkServerProcess, log: Path) -> str:
    assert driver.pid is not None
    at = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(driver.pid, signal.SIGTERM)
    driver.join(_TERMINATED_S)
    took = time.monotonic() - at
    assert not driver.is_alive(), f"still there {took:.0f} s after SIGTERM; {_tail(log)}"
    # It may have ended by itself, well, in the same moment.
    assert driver.exitcode in (0, 128 + signal.SIGTERM), (driver.exitcode, _tail(log))
    return f"ended {took:.1f} s after the signal" if driver.exitcode else ""


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()[:60]
    return ""


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""


def tell(summary: dict[str, Any]) -> None:
    """Print the summary, and keep it where WMDD_CHAOS_OUT says."""
    text = json.dumps(summary, indent=2)
    print(text, flush=True)
    if "WMDD_CHAOS_OUT" in os.environ:
        Path(os.environ["WMDD_CHAOS_OUT"]).write_text(text + "\n")
