"""The job as a person meets it: one command, what it prints, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.exceptions import RayError

from jobs import distill, endings, prepare, train_diffusion
from jobs.endings import Terminated
from jobs.evaluation import options
from tests.stages import tiny
from tests.stages.tiny import ROOMS, FinishedRun
from wmdd_ray.errors import ConfigError, LostRaceError
from wmdd_ray.executors import cluster
from wmdd_ray.store.filesystem import Store

slow = pytest.mark.slow


@slow
def test_one_command_leaves_every_room_committed(finished_run: FinishedRun) -> None:
    for stage, room in tiny.ROOM_OF.items():
        commit = json.loads((finished_run.out / room / "stage.json").read_text())
        assert commit["stage"] == stage
        assert len(commit["units"]) == tiny.UNITS[stage]
        assert commit["seconds"] > 0
    assert json.loads((finished_run.out / "run.json").read_text())["config"]["ipc"] == 4


@slow
def test_the_summary_names_the_data_set_its_size_and_all_four_rows(
    finished_run: FinishedRun,
) -> None:
    said = finished_run.typed.stdout
    assert f"distilled set   {finished_run.out}/dataset\n" in said
    assert "40 images" in said and "for 1437 real images" in said
    rows = [line for line in said.splitlines() if line.startswith("| (")]
    assert [row[2:5] for row in rows] == ["(a)", "(b)", "(c)", "(d)"]
    assert [row.split("|")[2].strip() for row in rows] == ["40", "40", "40", "1437"]
    assert all(" ± " in row and row.endswith("| 2 |") for row in rows)
    for stage in tiny.STAGES:
        assert f"\n{stage}" in said


@slow
def test_without_a_terminal_a_run_writes_plain_lines_of_progress(
    finished_run: FinishedRun,
) -> None:
    first, *lines = finished_run.typed.stderr.splitlines()
    assert first == f"writing to {finished_run.out}"
    assert not any("\r" in line or "\x1b" in line for line in lines)
    foreign = [line for line in lines if line and line.split()[0] not in tiny.STAGES]
    # Ray's C++ logs past every setting of Python's logging.
    assert [line for line in foreign if not re.match(r"\[.*\] \w+\.cc:\d+: ", line)] == []


@slow
def test_the_preview_shows_every_class_and_is_not_blank(finished_run: FinishedRun) -> None:
    with Image.open(finished_run.out / "dataset" / "preview.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 200
    # Ten rows of classes: every tenth of the height has dark and bright pixels.
    for row in np.array_split(pixels, 10):
        assert np.ptp(row) > 150


@slow
def test_the_card_reports_the_results(finished_run: FinishedRun) -> None:
    card = (finished_run.out / "dataset" / "README.md").read_text()
    rows = [line for line in finished_run.typed.stdout.splitlines() if line.startswith("| (")]
    assert all(row in card for row in rows)


@slow
def test_the_same_command_again_does_no_work_and_says_the_same(
    finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.markers(finished_run.out)
    assert len(before) == sum(tiny.UNITS.values())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where none is: it needs no Ray
    again = tiny.typed(finished_run.out)
    assert again.exit_code == 0, again.stderr
    assert tiny.markers(finished_run.out) == before
    assert again.stderr.count("found committed") == len(ROOMS)
    assert (
        again.stdout.partition("this run took")[0]
        == (finished_run.typed.stdout.partition("this run took")[0])
    )
    tiny.assert_same_payloads(finished_run.out, finished_run.payloads)


@slow
def test_a_dry_run_tells_what_is_committed_writes_nothing_and_starts_nothing(
    finished_run: FinishedRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("Ray was asked for"))
    assert tiny.job(tmp_path / "new", "--dry-run") == 0
    before = plan_rows(capsys.readouterr().out)
    assert not (tmp_path / "new").exists()
    assert list(before) == list(tiny.STAGES)
    assert "to do" in before["squeeze"]
    assert all("follows the rooms above" in before[stage] for stage in tiny.STAGES[1:])
    assert "0/20" in before["features"] and "0/8" in before["evaluate"]

    copied = tiny.copy_rooms(finished_run.out, tmp_path / "half", "teacher", "features")
    (copied / "features" / "stage.json").unlink()
    (copied / "features" / "units" / "c00003-0001-00000.json").unlink()
    held = sorted(copied.rglob("*"))
    assert tiny.job(copied, "--dry-run") == 0
    half = plan_rows(capsys.readouterr().out)
    assert sorted(copied.rglob("*")) == held
    assert "committed" in half["squeeze"] and "1/1" in half["squeeze"]
    assert "in part" in half["features"] and "19/20" in half["features"]
    assert "0/10" in half["barycenters"] and "committed" not in half["barycenters"]
    assert tiny.job(copied, "--dry-run", "--features.chunk-images", "50") == 0
    other = plan_rows(capsys.readouterr().out)
    assert "needs --overwrite" in other["features"] and "in part" not in other["features"]

    assert tiny.job(finished_run.out, "--dry-run", "--recover.iterations", "13") == 0
    changed = plan_rows(capsys.readouterr().out)
    assert "5/5" in changed["recover"] and "needs --overwrite" in changed["recover"]
    assert " committed " in changed["barycenters"]


def plan_rows(printed: str) -> dict[str, str]:
    lines = printed.splitlines()
    assert lines[0].startswith("plan for ")
    return {line.split()[0]: line for line in lines[2:]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "cifar"), "--recipe: expected one of digits, fashion_mnist"),
        (("--ipc", "0"), "--ipc: expected >= 1, got 0"),
        (("--from", "evaluate", "--until", "squeeze"), "--from evaluate comes after --until"),
    ],
)
def test_a_wrong_option_ends_with_2_and_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main(["--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ") and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ipc", "ten"), "--ipc: invalid literal for int() with base 10: 'ten'"),
        (("--recover.iterations", "-1"), "--recover.iterations: expected >= 0, got -1"),
    ],
)
def test_a_command_line_that_does_not_parse_ends_with_2_and_names_the_option(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        distill.main(list(options))
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        distill.main(["--recipe", "fashion_mnist", "--help-all"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--recover.bn-weight FLOAT Coefficient of the moment term, lambda of the paper" in shown
    assert (
        "--data STR Training images: `digits` (embedded), a path, or a URI. (default: fashion-mnist)"
        in shown
    )


def caused_by(cause: BaseException) -> SystemError:
    error = SystemError("CoreWorker.wait returned a result with an exception set")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LostRaceError("another run"), 3, "error: another run"),
        (KeyboardInterrupt(), 130, "interrupted; finished units are kept"),
        (Terminated(), 143, "terminated; finished units are kept"),
        # What Ray makes of a signal that comes inside its own code.
        (caused_by(Terminated()), 143, "terminated; finished units are kept"),
        (caused_by(KeyboardInterrupt()), 130, "interrupted; finished units are kept"),
        (RayError("it died\nof this"), 1, "error: the cluster failed: RayError: of this; finished"),
    ],
)
def test_an_end_has_its_exit_code_and_one_line(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(*jobs: distill.Job) -> int:
        raise error

    monkeypatch.setattr(distill, "distill", end)
    assert distill.main([]) == code
    told = capsys.readouterr().err.strip()
    assert told.startswith(text)
    assert "\n" not in told


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*jobs: distill.Job) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(distill, "distill", end)
    with pytest.raises(ZeroDivisionError):
        distill.main([])


def test_without_out_a_run_goes_where_the_cluster_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMDD_RAY_RUNS", "s3://bucket/runs/")
    assert (
        distill.default_out(distill.parse(["--ipc", "3"]).config) == "s3://bucket/runs/digits-ipc3"
    )


@pytest.mark.parametrize(
    "job",
    [
        distill.Job,
        train_diffusion.Job,
        partial(prepare.Job, source="digits"),
        partial(options.Job, uri="x"),
    ],
)
def test_a_submitted_job_writes_into_no_folder_that_is_thrown_away(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job(out="runs/mine").out == "runs/mine"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="--out runs/mine: expected a URI .* or an absolute path"):
        job(out="runs/mine")
    for out in ("s3://bucket/runs/mine", "/mnt/runs/mine"):
        assert job(out=out).out == out
    assert Path(endings.default_out("mine")).is_absolute()


def test_a_folder_with_files_of_somebody_else_is_refused_and_one_with_a_run_is_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.log").write_text("")
    endings.refuse_foreign_folder(Store(str(tmp_path)))
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(
        ConfigError, match="expected an empty folder or an earlier run, found .*photo.jpg"
    ):
        endings.refuse_foreign_folder(Store(str(tmp_path)))
    (tmp_path / "run.json").write_text("{}")
    endings.refuse_foreign_folder(Store(str(tmp_path)))
    endings.refuse_foreign_folder(Store("s3://bucket/run"))


@pytest.mark.parametrize(
    "left",
    [
        "taken.json",
        f"probe-{32 * 'a'}",
        f".probe-{32 * 'a'}.{32 * 'b'}.part",
        f".run.json.{32 * 'b'}.part",
    ],
)
def test_what_a_first_run_leaves_that_was_killed_before_its_record_is_its_own(
    left: str, tmp_path: Path
) -> None:
    Store(str(tmp_path)).put(left, b"")
    endings.refuse_foreign_folder(Store(str(tmp_path)))


@pytest.mark.parametrize(
    ("data", "out"),
    [
        ("s3://bucket/photos", "s3://bucket/photos/"),
        ("s3://bucket/run/images/set", "s3://bucket/run"),
        ("FOLDER/train", "FOLDER"),
        ("file://FOLDER/images", "FOLDER/"),
    ],
)
@pytest.mark.parametrize("option", ["--data", "--val-data"])
def test_an_output_that_would_write_where_real_images_lie_is_refused_before_anything_is_read(
    data: str, out: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = (uri.replace("FOLDER", str(tmp_path)) for uri in (data, out))
    typed = ["--recipe", "cifar10", "--data", str(tmp_path / "other"), "--out", out, option, data]
    for asked in ([], ["--dry-run"], ["--overwrite"]):
        assert distill.main([*typed, *asked]) == 2
        said = capsys.readouterr().err
        assert f"but the run would write where {option} {data} lies; give another --out" in said
    assert [*tmp_path.iterdir()] == []
