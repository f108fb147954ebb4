"""What running again means: changed options, --overwrite, --from, --until, damaged rooms, another width."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.stages import tiny
from tests.stages.tiny import ROOMS, FinishedRun

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def copied(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the finished run to do harm to."""
    return shutil.copytree(finished_run.out, tmp_path / "run")


def everything(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_changed_option_is_refused_by_name_with_both_values_and_nothing_is_touched(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(copied)
    assert tiny.job(copied, "--recover.iterations", "13", "--recover.bn-weight", "20") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {copied}/images was made with recover.bn_weight=1.0")
    assert "recover.bn_weight=1.0 (this run asks for 20.0)" in error
    assert "recover.iterations=12 (this run asks for 13)" in error
    assert "--overwrite" in error and "another --out" in error
    assert everything(copied) == before


def test_overwrite_replaces_the_room_and_those_after_and_leaves_earlier_rooms(
    copied: Path, finished_run: FinishedRun
) -> None:
    before = tiny.markers(copied)
    assert tiny.job(copied, "--recover.iterations", "13", "--overwrite") == 0
    after = tiny.markers(copied)
    assert after.keys() == before.keys()
    for key in before:
        kept = key.split("/")[0] in ("teacher", "features", "barycenters")
        assert (after[key] == before[key]) == kept, key
    tiny.assert_same_payloads(copied, finished_run.payloads, "teacher", "features", "barycenters")
    found = tiny.payloads(copied)
    for key in ("images/classes/00000.safetensors", "labels/labels/e00000-00001-s0000.parquet"):
        assert found[key] != finished_run.payloads[key]


def test_from_with_overwrite_makes_the_room_and_those_after_again_with_the_same_bytes(
    copied: Path, finished_run: FinishedRun
) -> None:
    before = tiny.markers(copied)
    assert tiny.job(copied, "--from", "relabel", "--until", "assemble", "--overwrite") == 0
    after = tiny.markers(copied)
    changed = {key.split("/")[0] for key in before if after.get(key) != before[key]}
    assert changed == {"labels", "dataset"}
    tiny.assert_same_payloads(copied, finished_run.payloads, *ROOMS[:5], "evaluation")


def test_until_ends_after_its_stage_and_from_goes_on_there(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *ROOMS[:3])
    assert tiny.job(out, "--from", "relabel") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --from relabel needs a committed images/ for these options")
    assert tiny.job(out, "--until", "recover") == 0
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted((*ROOMS[:4], "events"))
    assert tiny.job(out, "--from", "relabel", "--until", "relabel") == 0
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted((*ROOMS[:5], "events"))
    tiny.assert_same_payloads(out, finished_run.payloads, *ROOMS[:5])


def test_a_changed_byte_in_a_committed_room_stops_the_stage_that_reads_it(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *ROOMS[:4])
    damaged = out / "images/classes/00003.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert tiny.job(out, "--until", "relabel") == 5
    assert "images/classes/00003.safetensors" in capsys.readouterr().err
    assert not (out / "labels/stage.json").exists()


def test_three_actors_solve_the_same_barycenters_as_one(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher", "features")
    assert tiny.job(out, "--until", "barycenters", "--max-actors", "3") == 0
    tiny.assert_same_payloads(out, finished_run.payloads, "barycenters")
