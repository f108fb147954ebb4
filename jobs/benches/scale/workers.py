"""Two workers on this machine: what a start costs, and what a killed one costs.

Units sleep, so that the machine's two cores do not blur it: one of two workers gets SIGKILL in the middle of a unit.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from wmdd_ray.config import Resources
from wmdd_ray.executors.dispatch import do_units
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import DoUnit, Progress, Report, Run, Stage, StageRun, Work, run_pipeline
from wmdd_ray.store.filesystem import Store

from ..reporting import Row, spread
from .processes import in_a_process, local_ray

Executor = Literal["train", "actors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The start of two workers, and the cost of one that is killed."""

    executors: tuple[Executor, ...] = ("train", "actors")
    """One Ray Train group, or isolated actors."""
    kills: int = 2
    """Workers killed with each executor."""
    unit_s: float = 2.0
    """Length of a sleeping unit."""
    num_units: int = 20
    """Sleeping units of a run."""

    def rows(self) -> list[Row]:
        """Lose workers of each executor, in a process of its own and with it a Ray of its own."""
        rows: list[Row] = []
        for executor in self.executors:
            with tempfile.TemporaryDirectory() as folder:
                losses = in_a_process(lose_workers, self, executor, folder)
            rows += [{"what": what, "executor": executor, "value": v} for what, v in losses.items()]
        return rows


def lose_workers(options: Workers, executor: Executor, folder: str) -> dict[str, Any]:
    """Run sleeping units on two workers, kill one of them, and return what that cost; several times."""
    with local_ray(num_cpus=4):
        losses = [lose_one(options, executor, f"{folder}/{i}") for i in range(options.kills)]
    return {name: spread([one[name] for one in losses]) for name in losses[0]}


def lose_one(options: Workers, executor: Executor, folder: str) -> dict[str, float]:
    """Kill one of two workers in the middle of a unit and return the seconds until things were as before."""
    units = tuple(f"u{i:03d}" for i in range(options.num_units))
    diary = Path(folder) / "diary"
    diary.mkdir(parents=True)

    def work(stage: StageRun) -> dict[str, Any]:
        do_units(
            stage, units, partial(open_sleeper, diary=diary, room=stage.room, unit_s=options.unit_s)
        )
        return {}

    stage = Stage(
        name="sleep",
        room="sleep",
        version=1,
        inputs=(),
        reads_data=False,
        options=lambda config: {},
        plan=lambda stage: Work(units=units, estimated_bytes=0),
        work=work,
    )
    run = Run(
        store=Store(folder),
        config=recipe_of("digits", 10),
        resources=Resources(num_workers=2, executor=executor),
        open_source=lambda split: None,
        progress=lambda name: Progress(),
        connect=lambda: None,
    )
    killed: list[tuple[int, float]] = []
    killer = threading.Thread(target=kill_one, args=(diary, options.unit_s, killed), daemon=True)
    killer.start()
    started = time.time()
    run_pipeline(run, [stage])
    killer.join()
    return losses(read_diary(diary), started, *killed[0])


def kill_one(diary: Path, unit_s: float, killed: list[tuple[int, float]]) -> None:
    """Wait until both workers have finished two units, and kill one in the middle of its next."""
    while True:
        time.sleep(0.05)
        by_worker = read_diary(diary)
        ended = {pid: [e for e in entries if "ended" in e] for pid, entries in by_worker.items()}
        if len(ended) == 2 and all(len(entries) >= 2 for entries in ended.values()):
            pid, entries = next(iter(by_worker.items()))
            if "ended" not in entries[-1] and time.time() - entries[-1]["began"] > unit_s / 2:
                os.kill(pid, signal.SIGKILL)
                killed.append((pid, time.time()))
                return


def losses(
    diary: dict[int, list[dict[str, float]]], started: float, pid: int, at: float
) -> dict[str, float]:
    """Return what the diaries of all workers say about the start and the loss."""
    first = [pid for pid, entries in diary.items() if entries[0]["began"] < at]
    other = next(p for p in first if p != pid)
    came_after = [entries[0]["began"] for p, entries in diary.items() if p not in first]
    cut = [e for entries in diary.values() for e in entries if "ended" not in e]
    stopped = diary[other][-1]["beat"] if "ended" not in diary[other][-1] else float("nan")
    return {
        "start until the first unit, s": min(diary[p][0]["began"] for p in first) - started,
        "loss until a new worker works, s": min(came_after) - at,
        "loss until two work again, s": sorted([*came_after, at])[-1] - at,
        "loss until the other is stopped, s": max(0.0, stopped - at),
        "work done again, s": sum(e["beat"] - e["began"] for e in cut),
    }


def open_sleeper(device: torch.device, *, diary: Path, room: Room, unit_s: float) -> DoUnit:
    """Return a function that sleeps instead of working, and writes down when."""
    entries: list[dict[str, float]] = []
    path = diary / f"{os.getpid()}.json"

    def write() -> None:
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(entries))
        scratch.replace(path)

    def do_unit(unit: str, report: Report) -> None:
        attempt = room.begin_unit(unit)
        if attempt is None:
            return
        entry = {"began": time.time()}
        entries.append(entry)
        while (now := time.time()) < entry["began"] + unit_s:
            entry["beat"] = now
            write()
            report((now - entry["began"]) / unit_s, unit)
            time.sleep(0.1)
        room.commit_unit(unit, {f"{unit}.txt": unit.encode()}, attempt=attempt, seconds=unit_s)
        entry["ended"] = time.time()
        write()

    return do_unit


def read_diary(diary: Path) -> dict[int, list[dict[str, float]]]:
    """Return what every worker wrote down."""
    return {int(path.stem): json.loads(path.read_text()) for path in diary.glob("*.json")}
