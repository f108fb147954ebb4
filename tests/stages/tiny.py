"""The pipeline in seconds: options, ways to run the job, and what two runs are compared by.

`job` runs it in this process on the session's Ray, `forked` in a process that can be killed, and `command` is
what a user types. All three write the same bytes.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from jobs import distill
from wmdd_ray.config import DistillConfig
from wmdd_ray.core.optimizer import State
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.store.filesystem import Store
from wmdd_ray.telling.progress import StageLine

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("teacher", "features", "barycenters", "images", "labels", "dataset", "evaluation")
STAGES = ("squeeze", "features", "barycenters", "recover", "relabel", "assemble", "evaluate")
ROOM_OF = dict(zip(STAGES, ROOMS, strict=True))
UNITS = {
    "squeeze": 1,
    "features": 20,
    "barycenters": 10,
    "recover": 5,
    "relabel": 3,
    "assemble": 6,
    "evaluate": 8,
}
"""Finished units of each stage of the tiny pipeline."""

# fmt: off
OPTIONS = (
    "--recipe", "digits",
    "--ipc", "4",
    "--squeeze.network.width", "8",
    "--squeeze.epochs", "3",
    "--features.chunk-images", "100",  # two chunks a class
    "--recover.iterations", "12",
    "--recover.images-per-group", "8",  # two classes a group
    "--relabel.epochs", "6",
    "--relabel.precision", "fp16",
    "--relabel.epochs-per-unit", "2",
    "--evaluate.network.width", "8",
    "--evaluate.epochs", "2",
    "--evaluate.num-seeds", "2",
    "--evaluate.all-real-epochs", "1",
    "--evaluate.labels", "soft",
    # One computing thread and one actor: on two cores more of them only cost their start.
    "--cpus-per-worker", "1",
    "--max-actors", "1",
    # Ray also for what a laptop's driver would do by itself.
    "--executor", "train",
)
# fmt: on


def config(*options: str) -> DistillConfig:
    """Return the tiny configuration, changed by options."""
    return distill.parse([*OPTIONS, *options]).config


def job(out: Path | str, *options: str) -> int:
    """Run the tiny job in this process and return its exit code."""
    return distill.main([*OPTIONS, "--out", str(out), *options])


def command(out: Path | str, *options: str) -> list[str]:
    """Return what a user types."""
    return [sys.executable, "jobs/distill.py", *OPTIONS, "--out", str(out), *options]


@dataclass(frozen=True)
class Typed:
    """A run as a user types it, in a process and on a Ray of its own."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float


def typed(out: Path | str, *options: str) -> Typed:
    """Type the command and wait for its end."""
    started = time.monotonic()
    process = subprocess.Popen(
        command(out, *options),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Typed(process.returncode, stdout, stderr, time.monotonic() - started)


@functools.cache
def forkserver() -> ForkServerContext:
    """Return a server that has imported the job once, so that a killable driver costs no import of torch and Ray."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "wmdd_ray.stages.pipeline"])
    return context


def forked(
    out: Path | str,
    *options: str,
    ray_address: str,
    log: Path,
    die_in: str = "",
    die_by: int = signal.SIGKILL,
    die_at_step: int = 0,
) -> ForkServerProcess:
    """Run the tiny job in a process of its own on the Ray at `ray_address`, and return the ended process.

    Args:
        out: Root of the run.
        options: Further options.
        ray_address: A running Ray, so that no run has to start one.
        log: Where standard output and error go.
        die_in: Stage in which the process group gets the signal `die_by` as soon as one unit is
            finished, or, where the stage has only one, as soon as it began.
        die_by: The signal.
        die_at_step: Step of the first group of `recover` after which it gets SIGKILL.
    """
    process = started(
        str(out),
        *options,
        ray_address=ray_address,
        log=log,
        death=(die_in, die_by, die_at_step),
    )
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"the job did not end; {log.read_text()}")
    return process


def started(
    out: str,
    *options: str,
    ray_address: str,
    log: Path,
    death: tuple[str, int, int] = ("", signal.SIGKILL, 0),
) -> ForkServerProcess:
    """Start the tiny job in a process, and a process group, of its own on the Ray at `ray_address`."""
    arguments = [*OPTIONS, "--out", out, *options]
    process = forkserver().Process(target=_driver, args=(arguments, ray_address, str(log), *death))
    process.start()
    return process


def _driver(
    arguments: list[str], ray_address: str, log: str, die_in: str, die_by: int, die_at_step: int
) -> None:
    from wmdd_ray.units import images

    os.setsid()
    os.environ["RAY_ADDRESS"] = ray_address
    with open(log, "ab", buffering=0) as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)

    class DeadlyLine(StageLine):
        """Kills the process group, which leaves no time for anything, at a known place."""

        def __init__(self, name: str) -> None:
            super().__init__(name)
            self._deadly = name == die_in

        def start(self, total: int | None, done: float) -> None:
            super().start(total, done)
            if self._deadly and total == 1:
                os.killpg(0, die_by)

        def update(self, done: float, note: str = "") -> None:
            super().update(done, note)
            if self._deadly and done >= 1:
                os.killpg(0, die_by)

    mock.patch.object(distill, "StageLine", DeadlyLine).start()

    class DeadlyCheckpoints(images.Checkpoints):
        """Kills the process group after a known step."""

        steps = 0

        def maybe(self, get_state: Any) -> None:
            super().maybe(get_state)
            if die_at_step and self._pending is not None:
                self._pending.result()  # each step's state arrives before the next one
            self.steps += 1
            if self.steps == die_at_step:
                os.killpg(0, signal.SIGKILL)

    mock.patch.object(images, "Checkpoints", DeadlyCheckpoints).start()
    sys.exit(distill.main(arguments))


@dataclass(frozen=True)
class FinishedRun:
    """The undisturbed run that others are compared with; nobody writes into it."""

    out: Path
    typed: Typed
    payloads: dict[str, Any]


def copy_rooms(source: Path, out: Path, *rooms: str) -> Path:
    """Copy committed rooms to another run."""
    for room in rooms:
        shutil.copytree(source / room, out / room)
    return out


def payloads(out: Path | str) -> dict[str, Any]:
    """Return key -> content of everything that a run made, without the seconds that it took.

    Plans, attempts, markers and commits are about the making; results carry seconds; manifest and card carry the
    revision of the source, which may move while the tests run.
    """
    store = Store(str(out))
    found: dict[str, Any] = {}
    for key in store.list():
        room, _, name = key.partition("/")
        if room not in ROOMS or name in ("plan.json", "stage.json"):
            continue
        if name.startswith(("units/", "attempts/")):
            continue
        content = store.get(key)
        # Of an attempt that found another one's bytes, which hold its seconds, at the key.
        key = re.sub(r"\.[0-9a-f]{16}(?=\.[a-z]+$)", "", key)
        if name.startswith("results/"):
            found[key] = {k: v for k, v in json.loads(content).items() if k != "seconds"}
        elif name == "manifest.json":
            manifest = json.loads(content)
            del manifest["provenance"]["git_revision"], manifest["checksum"]
            found[key] = manifest
        elif name == "README.md":
            found[key] = re.sub(rb"wmdd_ray revision \S+", b"", content)
        else:
            found[key] = content
    return found


def assert_same_payloads(out: Path | str, expected: dict[str, Any], *rooms: str) -> None:
    """Assert that a run made what another made, in all rooms or in some."""
    found = payloads(out)
    if rooms:
        found, expected = (
            {k: v for k, v in side.items() if k.partition("/")[0] in rooms}
            for side in (found, expected)
        )
    assert found.keys() == expected.keys()
    differing = [key for key in expected if found[key] != expected[key]]
    assert not differing, f"other bytes in {differing}"


def markers(out: Path, *rooms: str) -> dict[str, tuple[bytes, list[int]]]:
    """Return marker of a finished unit -> (content, times of the last change of it and of its files).

    The times tell a unit that was done again, although it wrote the same.
    """
    found = {}
    for room in rooms or ROOMS:
        for path in sorted((out / room / "units").rglob("*.json")):
            content = path.read_bytes()
            entries = json.loads(content)["files"]
            files = [out / room / entry.get("at", entry["key"]) for entry in entries]
            times = [file.stat().st_mtime_ns for file in (path, *files)]
            # Without the space of a room that was taken over.
            found[f"{room}/units/{path.name}"] = content, times
    return found


class WaitingCheckpoints(Checkpoints):
    """Has each state arrive before the training goes on, or is cut: the next is not stored while one is on its way."""

    def maybe(self, get_state: Callable[[], State]) -> None:
        super().maybe(get_state)
        assert self._pending is not None
        self._pending.result()
