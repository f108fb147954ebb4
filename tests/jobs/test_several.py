"""Runs that share a teacher and its features: `--ipc 1 2` in one command, and `--features RUN`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jobs import distill, doctor, evaluate, report
from tests.stages import tiny
from wmdd_ray import api
from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.taken import runs_in
from wmdd_ray.store.documents import seal
from wmdd_ray.store.filesystem import Store

slow = pytest.mark.slow
HERE = ("--executor", "here", "--evaluate.num-seeds", "1")
OWN = ("barycenters", "images", "labels", "dataset", "evaluation")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ipc; nobody writes into it."""
    out = tmp_path_factory.mktemp("several") / "run"
    assert tiny.job(out, *HERE, "--ipc", "1", "2") == 0
    return out


@pytest.fixture
def copied(several: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(several, tmp_path / "copied"))


@slow
def test_several_ipc_share_teacher_features_and_the_students_of_all_real_images(
    several: Path, tmp_path: Path
) -> None:
    for room in ("teacher", "features"):
        units = json.loads((several / room / "stage.json").read_text())["units"]
        assert {marker["attempt"] for marker in units.values()} == {1}
        assert not list(several.glob(f"ipc*/{room}"))
    trained = json.loads((several / "ipc1/evaluation/stage.json").read_text())["units"]
    taken = json.loads((several / "ipc2/evaluation/stage.json").read_text())["units"]
    told = {u: m["metrics"].get("taken_from") for u, m in taken.items()}
    assert told.pop("all_real-soft-s000") == str(several / "ipc1")
    assert set(told.values()) == {None}
    files = [units["all_real-soft-s000"]["files"][0]["sha256"] for units in (trained, taken)]
    assert files[0] == files[1]

    assert tiny.job(tmp_path / "alone", *HERE, "--ipc", "2") == 0
    expected = tiny.payloads(tmp_path / "alone")
    tiny.assert_same_payloads(several, expected, "teacher", "features")
    tiny.assert_same_payloads(several / "ipc2", expected, *OWN)
    plans = [
        json.loads((run / "evaluation" / "plan.json").read_text())["fingerprint"]
        for run in (several / "ipc2", tmp_path / "alone")
    ]
    assert plans[0] == plans[1]


@slow
def test_a_killed_run_of_several_ipc_goes_on_where_it_was(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = tiny.command(out, *HERE, "--ipc", "1", "2")
    process = subprocess.Popen(command, cwd=tiny.ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("ipc2/images/units/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "ipc2/dataset/manifest.json").exists()
    before = {run: tiny.markers(run) for run in (out, out / "ipc1", out / "ipc2")}
    assert len(before[out]) == 21 and len(before[out / "ipc2"]) >= 11
    assert tiny.job(out, *HERE, "--ipc", "1", "2") == 0
    for run, markers in before.items():
        assert markers.items() <= tiny.markers(run).items()
    for run in ("", "ipc1", "ipc2"):
        tiny.assert_same_payloads(out / run, tiny.payloads(several / run))


@slow
def test_the_plan_and_the_summary_have_all_ipc_once(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.job(several, *HERE, "--ipc", "1", "2", "--dry-run") == 0
    plan = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in plan] == [*tiny.STAGES, *tiny.STAGES[2:]]
    assert plan[2][1] == "ipc1/barycenters/" and plan[-1][1] == "ipc2/evaluation/"
    assert {row[2] for row in plan} == {"committed"}
    assert tiny.job(several, *HERE, "--ipc", "1", "2") == 0
    said = capsys.readouterr().out
    assert said.count("this run took") == said.count("teacher's top-1") == 1
    rows = re.findall(r"^\| (\d+) \| (\d+) \|", said, flags=re.MULTILINE)
    assert rows == [("1", "10"), ("2", "20")]
    assert tiny.job(tmp_path / "new", *HERE, "--ipc", "1", "2", "--dry-run") == 0
    assert not (tmp_path / "new").exists()


@slow
def test_another_ipc_and_another_run_take_what_is_there(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.markers(copied)
    assert tiny.job(copied, *HERE, "--ipc", "3", "1", "--until", "recover") == 0
    assert tiny.markers(copied) == before
    assert [run.uri.rpartition("/")[2] for run in runs_in(Store(str(copied)))] == [
        "ipc1",
        "ipc2",
        "ipc3",
    ]
    # The teacher of one of the runs was another one, by its bytes alone.
    path = copied / "ipc1/dataset/stage.json"
    commit = json.loads(path.read_text())
    del commit["checksum"]
    commit["units"]["teacher"]["files"][0]["sha256"] = "0" * 64
    path.write_bytes(seal(commit))
    other = copied.parent / "other"
    # Images made otherwise: nothing of the teacher or of the students of all real images is done again.
    options = (*HERE, "--ipc", "1", "--recover.iterations", "5", "--features", str(copied))
    assert tiny.job(other, *options) == 0
    assert not (other / "teacher").exists()
    units = Room(Store(str(other)), "evaluation").committed().units
    assert units["all_real-soft-s000"].metrics["taken_from"] == str(copied / "ipc2")
    capsys.readouterr()
    assert report.main([str(other), "--follow-data"]) == 0
    page = (other / "report.html").read_text()
    assert f"--features {copied}" in page and "top-1" in page
    assert report.main([str(other)]) == 0
    assert "is not read because a run says so" in (other / "report.html").read_text()


@slow
def test_students_of_all_real_images_that_would_be_others_are_trained(copied: Path) -> None:
    other = copied.parent / "other"
    options = ("--evaluate.learning-rate", "0.01", "--features", str(copied))
    assert tiny.job(other, *HERE, "--ipc", "1", *options) == 0
    units = Room(Store(str(other)), "evaluation").committed().units
    assert not any("taken_from" in marker.metrics for marker in units.values())


@slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--squeeze.epochs", "4"), "squeeze.epochs=3 (this run asks for 4)"),
        (("--source.image-size", "12"), "source.image_size=16 (this run asks for 12)"),
        (("--features.chunk-images", "50"), "features/ was made with features.chunk_images=100"),
        (("--val-fraction", "0.2"), "another version of its input data"),
        (("--teacher", "x.pt"), "teacher=None (this run asks for 'x.pt')"),
    ],
)
def test_features_of_others_are_refused_with_the_reason(
    several: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = (*HERE, "--features", str(several), *options)
    assert tiny.job(tmp_path / "run", *command) == 2
    error = capsys.readouterr().err
    assert f"--features {several}: its " in error and message in error
    assert not (tmp_path / "run").exists()


@slow
def test_features_are_held_to_the_teacher_that_lies_beside_them(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied.parent / "other"
    options = (*HERE, "--ipc", "2", "--features", str(copied), "--until", "barycenters")
    assert tiny.job(other, *options) == 0
    assert tiny.job(other, *HERE, "--ipc", "2") == 2
    assert f"was begun with the features of {copied}" in capsys.readouterr().err
    path = copied / "teacher" / "stage.json"
    commit = json.loads(path.read_text())
    del commit["checksum"]
    commit["units"]["teacher"]["files"][0]["sha256"] = "0" * 64
    path.write_bytes(seal(commit))
    assert tiny.job(copied.parent / "new", *options) == 2
    assert "expected features of the teacher that lies there" in capsys.readouterr().err
    path = copied / "features" / "stage.json"
    features = json.loads(path.read_text())
    del features["checksum"], features["metrics"]["teacher_sha256"]  # as they were made before
    path.write_bytes(seal(features))
    assert tiny.job(other, *options) == 2
    assert "was begun with another teacher than that of" in capsys.readouterr().err
    assert tiny.job(copied.parent / "none", *HERE, "--features", str(copied.parent)) == 2
    assert "found no teacher/stage.json there" in capsys.readouterr().err
    assert tiny.job(copied, *HERE, "--features", str(other)) == 2
    assert "without a teacher/ or features/ of its own" in capsys.readouterr().err


@slow
def test_what_takes_a_run_names_the_runs_in_a_folder_of_several(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert report.main([str(several / "ipc2"), "--out", str(page)]) == 0
    assert '"teacher_top1":0.' in page.read_text()
    for command in (report.main, evaluate.main):
        assert command([str(several)]) == 2
        assert f"{several}/ipc1" in capsys.readouterr().err
    out = str(tmp_path / "by")
    given = ("--teacher", str(several / "ipc1"), "--until", "squeeze", "--squeeze.min-top1", "0.1")
    assert tiny.job(out, *HERE, *given) == 0


def test_several_ipc_that_need_several_teachers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--ipc 1 10: expected one teacher for all, got squeeze"):
        distill.parse_all(
            [
                *("--ipc", "1", "10", "--squeeze.curvature-weight", "1"),
                *("--squeeze.curvature-ipc-power", "1"),
            ]
        )


def test_each_ipc_has_the_options_of_its_recipe_and_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WMDD_RAY_RUNS", "s3://bucket/runs")
    words = ["--recipe", "fashion_mnist", "--ipc", "1", "10", "--seed", "3"]
    one, ten = distill.parse_all(words)
    assert (one.config.recover.tiles, ten.config.recover.tiles) == (2, 1)
    assert one.config.seed == ten.config.seed == 3
    root = "s3://bucket/runs/fashion_mnist-ipc1-10"
    assert (one.out, ten.out, ten.features) == (f"{root}/ipc1", f"{root}/ipc10", root)
    assert distill.root_of(one) == root
    job, unmeasured = doctor._parsed(words, ask_cluster=False)
    assert (job.config.ipc, unmeasured) == (10, None)
    alone = distill.parse_all(["--ipc", "10"])
    assert len(alone) == 1 and alone[0] == distill.parse(["--ipc", "10"])


def test_the_function_takes_several_ipc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = api.distill(ipc=(1, 2), out=str(tmp_path / "run"), dry_run=True)
    assert run.uri == str(tmp_path / "run")
    assert "ipc2/dataset/" in capsys.readouterr().out
