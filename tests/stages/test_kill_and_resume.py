"""A run that is killed at any point goes on from there, and nobody can tell afterwards."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.stages import tiny
from tests.stages.tiny import ROOM_OF, STAGES, FinishedRun
from wmdd_ray.units import images

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def ray_address(ray_local: None) -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def test_a_run_killed_once_in_each_stage_keeps_finished_units_and_ends_with_the_same_bytes(
    finished_run: FinishedRun, ray_address: str, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    for stage in STAGES:
        room = ROOM_OF[stage]
        before = tiny.markers(out)
        # On Ray where its streams and groups are left alone by the driver's death; each start of them takes seconds.
        executor = "train" if stage in ("features", "recover") else "auto"
        options = ("--executor", executor)
        killed = tiny.forked(out, *options, ray_address=ray_address, die_in=stage, log=log)
        assert killed.exitcode == -signal.SIGKILL, log.read_text()
        assert not (out / room / "stage.json").exists(), stage
        assert (out / room / "plan.json").exists(), stage
        finished = tiny.markers(out, room)
        most = tiny.UNITS[stage]
        assert len(finished) < most
        assert finished or most == 1
        # What was finished before this run, among it the killed stage's units, was not touched.
        after = tiny.markers(out)
        assert {key: after[key] for key in before} == before
    before = tiny.markers(out)
    ended = tiny.forked(out, "--executor", "auto", ray_address=ray_address, log=log)
    assert ended.exitcode == 0, log.read_text()
    after = tiny.markers(out)
    assert {key: after[key] for key in before} == before
    assert len(after) == sum(tiny.UNITS.values())
    tiny.assert_same_payloads(out, finished_run.payloads)


def test_a_group_killed_between_two_steps_goes_on_from_its_last_stored_step(
    finished_run: FinishedRun, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher", "features", "barycenters")
    options = ("--until", "recover", "--recover.checkpoint-s", "1e-9")
    log = tmp_path / "log"
    killed = tiny.forked(out, *options, ray_address=ray_address, die_at_step=7, log=log)
    assert killed.exitcode == -signal.SIGKILL, log.read_text()
    assert any((out / "images/partial/g00000").glob("state-?.safetensors"))
    assert tiny.markers(out, "images") == {}

    steps: list[str] = []
    count = images.Checkpoints.maybe

    def counted(self: images.Checkpoints, get_state: object) -> None:
        steps.append(self._folder.split("/")[1])
        count(self, get_state)

    monkeypatch.setattr(images.Checkpoints, "maybe", counted)
    assert tiny.job(out, *options) == 0
    assert [steps.count(f"g{i:05d}") for i in range(5)] == [12 - 7, 12, 12, 12, 12]
    assert not (out / "images/partial").exists() or not any((out / "images/partial").iterdir())
    tiny.assert_same_payloads(out, finished_run.payloads, "images")


def test_a_request_to_terminate_ends_the_job_at_once_with_143(
    finished_run: FinishedRun, ray_address: str, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher", "features")
    log = tmp_path / "log"
    options = {"ray_address": ray_address, "die_in": "barycenters", "log": log}
    ended = tiny.forked(out, **options, die_by=signal.SIGTERM)
    assert ended.exitcode == 128 + signal.SIGTERM, log.read_text()
    assert "Traceback" not in log.read_text()
    assert 1 <= len(tiny.markers(out, "barycenters")) < 10
