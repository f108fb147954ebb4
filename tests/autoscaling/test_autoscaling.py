"""The job on a cluster of a head only: machines come when a stage asks for them, may be lost, and go when it is done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

from tests.autoscaling import fake_gpus
from tests.conftest import S3Uri
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.store.filesystem import Store

# With its processes ends what they started, and `ray stop` of others does not reach them.
OWN_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def refused_namespace() -> str:
    """Return why this machine gives us no process namespace of our own; empty where it does."""
    try:
        tried = subprocess.run([*OWN_PROCESSES, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else ""


# Under CI a machine that gives none fails the tests: a skip there would prove nothing, green.
REFUSED = "" if os.environ.get("CI") else refused_namespace()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REFUSED), reason=f"no process namespace of our own: {REFUSED}"),
]


@dataclass(frozen=True)
class Diary:
    """What happened in the fake cloud, in order."""

    entries: list[dict[str, Any]]

    def said(self) -> str:
        return "\n".join(entry["said"] for entry in self.entries if "said" in entry)

    def exit_code(self) -> int:
        (code,) = (entry["exit"] for entry in self.entries if "exit" in entry)
        return code

    def nodes(self) -> list[dict[str, int]]:
        """Return the numbers of worker nodes by type, whenever they changed."""
        return [entry["nodes"] for entry in self.entries if "nodes" in entry]

    def most_nodes(self, stage: str) -> Counter[str]:
        """Return the most nodes of each type while a stage was under way."""
        most: Counter[str] = Counter()
        now: Counter[str] = Counter()
        under_way = False
        for entry in self.entries:
            if "nodes" in entry:
                now = Counter(entry["nodes"])
            if re.match(rf"{stage} +[\d.]+/", entry.get("said", "")):
                under_way = "done in" not in entry["said"]
            if under_way:
                most |= now
        return most

    def losses(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if "lost" in entry]


def in_fake_cloud(command: list[str], *losses: dict[str, Any], timeout_s: float) -> Diary:
    """Run a command on a cluster that starts with a head, has up to two nodes of each type, and keeps none idle."""
    plan = {"nodes_a_type": 2, "idle_s": 3.0, "command": command, "losses": losses}
    process = subprocess.Popen(
        [*OWN_PROCESSES, sys.executable, "-m", "tests.autoscaling.fake_cloud", json.dumps(plan)],
        cwd=tiny.ROOT,
        env={
            **os.environ,
            "PYTHONWARNINGS": "default",
            HOOK: f"{fake_gpus.__name__}.compute_on_the_cpu",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        written, errors = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors[-4000:]
    # Between its lines Ray may write some of its own.
    return Diary([json.loads(line) for line in written.splitlines() if line.startswith('{"at"')])


def with_rooms(source: Path, uri: str, *rooms: str) -> str:
    """Copy committed rooms to a bucket."""
    here, there = Store(str(source)), Store(uri)
    for room in rooms:
        for key in here.list(room):
            there.put(key, here.get(key))
    return uri


# fmt: off
OPTIONS = (
    "--from", "barycenters", "--until", "recover",
    "--max-actors", "2", "--num-workers", "1", "--gpus-per-worker", "1",
)
# fmt: on


# 55 s on an idle machine.
def test_a_head_alone_grows_for_barycenters_and_recover_and_shrinks_to_itself(
    finished_run: FinishedRun, s3_server: S3Uri
) -> None:
    out = with_rooms(finished_run.out, s3_server(), "teacher", "features")
    diary = in_fake_cloud(tiny.command(out, *OPTIONS), timeout_s=240)
    assert diary.exit_code() == 0, diary.said()
    assert diary.nodes()[0] == {"cpu": 0, "gpu": 0}
    solving, recovering = diary.most_nodes("barycenters"), diary.most_nodes("recover")
    assert solving["cpu"] >= 1
    assert solving["gpu"] == 0  # barycenters leave the GPU machines alone
    assert recovering["gpu"] >= 1
    assert diary.nodes()[-1] == {"cpu": 0, "gpu": 0}
    tiny.assert_same_payloads(out, finished_run.payloads, "barycenters", "images")


# fmt: off
LONG = (
    "--barycenters.num-starts", "2000",
    "--recover.iterations", "400", "--recover.images-per-group", "4", "--num-workers", "2",
)
# fmt: on


# 2 to 3 min each.
@pytest.mark.chaos
@pytest.mark.chaos_long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("executor", ["train", "actors"])
def test_a_machine_lost_in_a_stage_costs_the_units_it_worked_on_and_another_comes(
    finished_run: FinishedRun, s3_server: S3Uri, tmp_path: Path, executor: str
) -> None:
    undisturbed = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher", "features")
    typed = tiny.typed(undisturbed, "--from", "barycenters", "--until", "recover", *LONG)
    assert typed.exit_code == 0, typed.stderr

    out = with_rooms(finished_run.out, s3_server(), "teacher", "features")
    diary = in_fake_cloud(
        tiny.command(out, *OPTIONS, *LONG, "--executor", executor),
        {"room": f"{out}/barycenters", "units": 2, "node_type": "cpu"},
        {"room": f"{out}/images", "units": 2, "node_type": "gpu"},
        timeout_s=600,
    )
    assert diary.exit_code() == 0, diary.said()
    assert [loss["lost"]["node_type"] for loss in diary.losses()] == ["cpu", "gpu"], diary.said()
    for loss in diary.losses():
        room = Store(loss["lost"]["room"])
        assert 2 <= len(loss["markers"]) < 10
        # Each marker names its run, attempt, host and time: written once, it was not written again.
        assert {key: room.get(key).decode() for key in loss["markers"]} == loss["markers"]
    events = events_of(out)
    for stage in ("barycenters", "recover"):
        begun = Counter(
            event["unit"]
            for event in events
            if event["event"] == "unit_started" and event["stage"] == stage
        )
        assert len(begun) == 10
        assert 1 <= begun.total() - 10 <= 2  # what its two workers were at
    assert diary.nodes()[-1] == {"cpu": 0, "gpu": 0}
    tiny.assert_same_payloads(out, tiny.payloads(undisturbed), "barycenters", "images")


def events_of(out: str) -> list[dict[str, Any]]:
    store = Store(out)
    lines = [line for key in store.list("events") for line in store.get(key).splitlines()]
    return [json.loads(line) for line in lines]
