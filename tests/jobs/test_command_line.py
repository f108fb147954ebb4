from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import command_line, distill, evaluate, export, prepare, report, train_diffusion
from wmdd_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
JOBS = {
    "distill": distill,
    "evaluate": evaluate,
    "export": export,
    "prepare": prepare,
    "report": report,
    "train_diffusion": train_diffusion,
}


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        distill.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_first_page_of_help_fits_a_screen_and_names_the_others(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    page = shown(["--help"], capsys)
    assert len(page.splitlines()) <= 45
    assert all(f"│ --{name}" in page for name in distill._FIRST.split())
    assert page.count("│ --") == len(distill._FIRST.split())
    assert "--help-recover" in page and page.endswith("--help-all\n")


def test_help_of_a_stage_and_of_all_show_what_the_first_page_leaves_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recover, everything = (shown([f"--help-{name}"], capsys) for name in ("recover", "all"))
    assert "--recover.iterations" in recover and "--recover.diffusion.eta" in recover
    assert "--squeeze" not in recover and recover in everything
    assert "--relabel.views.flip" in everything and "--max-actors" in everything


@pytest.mark.parametrize("name", JOBS)
def test_every_job_shows_its_first_options_and_no_job_names_one_that_it_has_not(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        JOBS[name].main(["--help"])
    page = capsys.readouterr().out
    first = vars(
        sys.modules.get("jobs.evaluation.options") if name == "evaluate" else JOBS[name]
    ).get("_FIRST")
    assert all(f"│ --{option}" in page for option in (first or "out").split())


def test_an_unknown_section_of_help_is_answered_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert distill.main(["--help-recovery"]) == 2
    assert "--help-recovery: expected --help or one of --help-source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--ip", "3"], "--ip: there is no such option; did you mean --ipc?"),
        (["--iterations", "3"], "did you mean --recover.iterations?"),
        (["--num_worker=3"], "--num-worker: there is no such option; did you mean --num-workers?"),
        (["--recover.iteration", "500"], "did you mean --recover.iterations?"),
        (["--ipc", "x", "--sed", "1"], "--sed: there is no such option; did you mean --seed?"),
    ],
)
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(
    typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main(typed) == 2
    assert f"{meant} --help-all shows every option" in capsys.readouterr().err


def test_what_was_mistyped_is_told_before_what_is_missing_for_it() -> None:
    with pytest.raises(ConfigError, match="--ot: there is no such option; did you mean --out"):
        command_line.parse(export.Job, ["--ot", "x"], description="")


@pytest.mark.parametrize("options", [["--help-all"], ["--dry-run", "--out", "OUT"]])
def test_a_reader_that_leaves_early_is_no_error(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "jobs/distill.py", *options]
    command = [str(tmp_path / "run") if word == "OUT" else word for word in command]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_exit_code_is_that_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    for main, code in ((lambda _: 4, 4), (lambda _: None, None), (lambda _: sys.exit(3), 3)):
        with pytest.raises(SystemExit) as ended:
            command_line.run(main)
        assert ended.value.code == code
