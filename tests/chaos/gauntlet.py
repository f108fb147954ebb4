"""The job under a killer: seeded victims at seeded moments of every stage, until it ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.chaos.killer import WEIGHTS, Kill, Killer, tail
from tests.chaos.record import Record
from tests.chaos.two_nodes import TwoNodes
from tests.stages import tiny
from tests.stages.tiny import ROOMS, STAGES

MODES: dict[str, tuple[str, ...]] = {
    "driver": ("--num-workers", "0"),
    "group": ("--num-workers", "1", "--executor", "train"),
    "actors": ("--num-workers", "1", "--executor", "actors"),
}
"""How the workers of a run are executed; none of it changes a byte."""

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


class Gauntlet:
    """Runs of the tiny job, one after another, each killed in every stage until it ends by itself.

    Args:
        cluster: Two running nodes.
        folder: Where logs go.
        payloads: What an undisturbed run made.
        seed: Of victims and moments.
    """

    def __init__(
        self, cluster: TwoNodes, folder: Path, payloads: dict[str, Any], seed: int
    ) -> None:
        self.kills: list[Kill] = []
        self.runs = 0
        self._cluster, self._folder, self._payloads, self._seed = cluster, folder, payloads, seed
        self._random = random.Random(seed)
        self._killer = Killer(cluster, self._random)
        self._begun_again = 0
        # Kills that the run has not gone on from yet; kills since the command was typed; stages struck in this run.
        self._pending: list[Kill] = []
        self._in_life: Counter[str] = Counter()
        self._struck: set[str] = set()

    def plan(self, per_stage: int) -> Plan:
        """Draw so many victims for each stage."""
        names, chances = list(WEIGHTS), list(WEIGHTS.values())
        return {stage: self._random.choices(names, chances, k=per_stage) for stage in STAGES}

    def run(self, uri: str, mode: str, plan: Plan, until: str = STAGES[-1]) -> None:
        """Run the job and kill what the plan names, type it again until it ends well, and check what it made."""
        self.runs += 1
        self._struck.clear()
        log = self._folder / f"run-{self.runs}.log"
        record = Record(uri)
        driver = self._type(uri, mode, until, log)
        try:
            while True:
                early = self._random.random() < _EARLY and bool(plan.get(record.stage()))
                patience_s = self._random.uniform(*_EARLY_S) if early else None
                moved = _wait_for_progress(driver, record, patience_s, log)
                if driver.exitcode == 0 or (driver.is_alive() and moved):
                    self._note_recovery()
                if driver.exitcode == 0:
                    break
                if driver.exitcode is not None:
                    self._assert_may_end(driver, log)
                    driver = self._type(uri, mode, until, log)
                else:
                    self._maybe_kill(plan, mode, moved, record, driver, log)
        finally:
            driver.kill()
        self._begun_again += record.check()
        tiny.assert_same_payloads(uri, self._payloads, *ROOMS[: STAGES.index(until) + 1])
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
            "seed": self._seed,
            "runs": self.runs,
            "kills": len(self.kills),
            **counts,
            "lost_units": 0,
            "different_bytes": 0,
            "units_begun_again": self._begun_again,
            "recovery_s": {name: round(value, 1) for name, value in recovery.items()},
        }

    def _type(self, uri: str, mode: str, until: str, log: Path) -> ForkServerProcess:
        self._cluster.start()
        self._in_life.clear()
        options = (*MODES[mode], "--until", until)
        return tiny.started(uri, *options, ray_address=self._cluster.address, log=log)

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
        victims = plan.get(stage, [])
        # A driver that has only just begun ends by SIGTERM like any process.
        if not victims or (victims[0] == "terminate" and not moved):
            return
        if stage in self._struck:
            if self._random.random() < _PASSES:
                return
            time.sleep(self._random.choice(_DELAYS_S))
        kill = self._killer.kill(victims[0], mode, stage, driver, log)
        if kill is not None:
            victims.pop(0)
            self._struck.add(stage)
            self._pending.append(kill)
            self._in_life[kill.victim] += 1
            self._cluster.start()

    def _note_recovery(self) -> None:
        for kill in self._pending:
            kill.recovery_s = time.monotonic() - kill.at
            self.kills.append(kill)
            print(f"kill {len(self.kills):>3}  run {self.runs:>2}  {kill}", flush=True)
        self._pending.clear()

    def _assert_may_end(self, driver: ForkServerProcess, log: Path) -> None:
        """Check that it was a kill which ended the driver: a lost worker or node is nothing to end for."""
        assert driver.exitcode != 0
        if any(kill.ends_driver for kill in self._pending):
            return
        # Unless the same unit lost its worker time and again, which is what a user has to hear about.
        given_up = re.search(r"ended its worker \d times", tail(log))
        lost = self._in_life["worker"] + self._in_life["node"]
        assert given_up and lost >= 3, f"exit code {driver.exitcode}; {tail(log)}"

    def _assert_nothing_runs(self) -> None:
        """Check that the run left no process but those that Ray keeps for as long as its cluster."""
        deadline = time.monotonic() + 30
        while left := [*self._cluster.workers(kept=False), *self._cluster.orphans()]:
            assert time.monotonic() < deadline, f"still there after the run: {left}"
            time.sleep(0.2)


def _wait_for_progress(
    driver: ForkServerProcess, record: Record, patience_s: float | None, log: Path
) -> bool:
    """Wait until a unit begins or is finished, or a stage begins; False when the driver or the patience ends first."""
    began = time.monotonic()
    stage = record.stage()
    seen = record.progress(stage)
    while driver.is_alive():
        waited_s = time.monotonic() - began
        assert waited_s < _NO_PROGRESS_S, f"{stage}: nothing for {waited_s:.0f} s; {tail(log)}"
        if record.stage() != stage or record.progress(stage) != seen:
            return True
        if patience_s is not None and waited_s > patience_s:
            return False
        time.sleep(0.05)
    driver.join()
    return False


def tell(summary: dict[str, Any]) -> None:
    """Print the summary, and keep it where WMDD_CHAOS_OUT says."""
    text = json.dumps(summary, indent=2)
    print(text, flush=True)
    if "WMDD_CHAOS_OUT" in os.environ:
        Path(os.environ["WMDD_CHAOS_OUT"]).write_text(text + "\n")
