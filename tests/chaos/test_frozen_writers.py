"""A driver is frozen in a unit, on a machine of other arithmetic; another does the stage, and the frozen one wakes and writes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jobs import distill
from tests.stages import tiny
from wmdd_ray.spine.rooms import Room, UnitMarker
from wmdd_ray.store.filesystem import Store

HERE = ("--executor", "here")
# Where torch computes. Barycenters are solved by numpy, labels are rounded, and assemble copies.
UNLIKE = ("squeeze", "features", "recover", "evaluate")


def frozen_driver(arguments: list[str], room: str, told: str) -> None:
    """Run the job on an old processor, and stop this process when it has computed its first unit of a room."""
    # Before torch computes anything; read when it first does.
    os.environ.update(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    commit_unit = Room.commit_unit

    def stopped(self: Room, unit: str, payloads: Mapping[str, bytes], **about: Any) -> UnitMarker:
        if self.name == room and not Path(told).exists():
            sums = {key: hashlib.sha256(content).hexdigest() for key, content in payloads.items()}
            Path(told).write_text(json.dumps({"unit": unit, "sums": sums}))
            os.kill(os.getpid(), signal.SIGSTOP)
        return commit_unit(self, unit, payloads, **about)

    with open(f"{told}.log", "wb", buffering=0) as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    with mock.patch.object(Room, "commit_unit", stopped):
        sys.exit(distill.main(arguments))


def await_stop(pid: int) -> None:
    """Return when all threads of a process are stopped."""
    ends = time.monotonic() + 300
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < ends, "the driver was not stopped"
        time.sleep(0.05)


@pytest.mark.chaos_long
def test_a_frozen_driver_of_other_bytes_harms_no_stage_that_another_did_meanwhile(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    for stage, name in tiny.ROOM_OF.items():
        options, told = (*HERE, "--until", stage), tmp_path / stage
        arguments = [*tiny.OPTIONS, "--out", str(out), *options]
        zombie = tiny.forkserver().Process(target=frozen_driver, args=(arguments, name, str(told)))
        zombie.start()
        assert zombie.pid is not None
        try:
            await_stop(zombie.pid)
            assert tiny.job(out, *options) == 0
            room = Room(Store(str(out)), name)
            commit = room.committed()
            committed = {
                entry.key: room.read(entry)
                for marker in commit.units.values()
                for entry in marker.files
            }
            os.kill(zombie.pid, signal.SIGCONT)
            zombie.join(300)
            said = Path(f"{told}.log").read_text()
            assert zombie.exitcode == 3, said
            assert "what it holds is whole" in said
        finally:
            zombie.kill()
            zombie.join()
        late = json.loads(told.read_text())
        winner = {entry.key: entry.sha256 for entry in commit.units[late["unit"]].files}
        assert late["sums"].keys() == winner.keys()
        assert stage not in UNLIKE or late["sums"] != winner, stage
        assert room.committed() == commit
        assert {
            entry.key: room.read(entry) for m in commit.units.values() for entry in m.files
        } == committed, stage
    assert tiny.job(out, *HERE) == 0
