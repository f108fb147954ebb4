"""The kinds of victims, and how each of them dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.chaos.two_nodes import TwoNodes

import psutil  # isort: skip

WEIGHTS = {"worker": 7, "keeper": 2, "driver": 5, "node": 3, "terminate": 2, "head": 1}
"""Victims and their chances. A worker does units; a keeper is an actor that holds something for them, Ray's or ours."""

_KEEPERS = (
    "ray::UnitQueue", "ray::TrainController", "ray::SynchronizationActor", "ray::DatasetManager", "ray::PreemptionWatcher",
    "ray::PlacementGroupCleaner", "ray::ActorLocationTracker", "ray::_",
)  # fmt: skip
# Those beside the driver that hold a stage together: without them the driver ends, to be typed again.
_KEYSTONES = ("ray::UnitQueue", "ray::TrainController")
_TERMINATED_S = 20.0
_HEAD_LOST_S = 60.0


@dataclass(kw_only=True)
class Kill:
    """One kill: whom, when and where, whether the driver ends by it, and the seconds until the run went on."""

    victim: str
    name: str
    mode: str
    stage: str
    ends_driver: bool
    clock: str
    at: float
    recovery_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.clock}  {self.mode:<7} {self.stage:<12} {self.victim:<10} went on after {self.recovery_s:5.1f} s  {self.name}"
        )  # fmt: skip


class Killer:
    """Kills on a cluster; which of several processes, its random numbers say."""

    def __init__(self, cluster: TwoNodes, draw: random.Random) -> None:
        self._cluster = cluster
        self._random = draw

    def kill(
        self, victim: str, mode: str, stage: str, driver: ForkServerProcess, log: Path
    ) -> Kill | None:
        """Kill a victim of a kind, if there is one."""
        at, clock = time.monotonic(), f"{datetime.now():%H:%M:%S}"
        if victim == "driver":
            name = _kill_group(driver)
        elif victim == "terminate":
            name = _terminate(driver, log)
        elif victim == "node":
            name = f"{self._cluster.kill_node()} processes of the worker node"
        elif victim == "head":
            name = self._kill_head(driver, log)
        else:
            name = self._kill_process(keeper=victim == "keeper")
        if not name:
            return None
        ends_driver = victim in ("driver", "terminate", "head") or name.startswith(_KEYSTONES)
        return Kill(
            victim=victim, name=name, mode=mode, stage=stage, ends_driver=ends_driver, clock=clock, at=at
        )  # fmt: skip

    def _kill_head(self, driver: ForkServerProcess, log: Path) -> str:
        at = time.monotonic()
        killed = self._cluster.kill_head()
        driver.join(_HEAD_LOST_S)
        assert not driver.is_alive(), f"the driver outlived its head by a minute; {tail(log)}"
        took_s = time.monotonic() - at
        return f"{killed} processes; driver ended with {driver.exitcode} after {took_s:.1f} s"

    def _kill_process(self, *, keeper: bool) -> str:
        found = [(process.pid, _name(process), process) for process in self._cluster.workers()]
        found = [row for row in found if row[1] and row[1].startswith(_KEEPERS) == keeper]
        if not found:
            return ""
        _, name, chosen = self._random.choice(sorted(found, key=lambda row: row[0]))
        try:
            chosen.kill()
        except psutil.NoSuchProcess:
            return ""
        return name


def _kill_group(driver: ForkServerProcess) -> str:
    assert driver.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.join(_TERMINATED_S)
    assert not driver.is_alive(), "the driver outlived SIGKILL"
    return f"process {driver.pid} and its group"


def _terminate(driver: ForkServerProcess, log: Path) -> str:
    assert driver.pid is not None
    at = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(driver.pid, signal.SIGTERM)
    driver.join(_TERMINATED_S)
    took_s = time.monotonic() - at
    assert not driver.is_alive(), f"still there {took_s:.0f} s after SIGTERM; {tail(log)}"
    # It may have ended by itself, well, in the same moment.
    assert driver.exitcode in (0, 128 + signal.SIGTERM), (driver.exitcode, tail(log))
    return f"ended {took_s:.1f} s after the signal" if driver.exitcode else ""


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()[:60]
    return ""


def tail(log: Path) -> str:
    """Return the last lines of a driver's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""
