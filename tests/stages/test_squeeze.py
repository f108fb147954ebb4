"""Teachers: trained here, or given; never built on unmeasured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.store.written_sources import tar_of
from wmdd_ray.core.networks import build_network
from wmdd_ray.errors import WmddError
from wmdd_ray.records import Teacher
from wmdd_ray.spine.run import Room
from wmdd_ray.stages import squeeze
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.units import teacher as training
from wmdd_ray.units.teacher import read_teacher

pytestmark = pytest.mark.usefixtures("ray_local")
slow = pytest.mark.slow

UNTIL = ("--until", "squeeze")
# At the tiny run's ipc of 4 a weight of 1.
CURVED = (
    "--squeeze.curvature-weight", "0.4", "--squeeze.curvature-ipc-power", "1",
    "--squeeze.curvature-step", "1",
)  # fmt: skip
OF_TODAY = (
    "--squeeze.optimizer", "muon", "--squeeze.learning-rate", "0.01", "--squeeze.warmup-epochs", "1",
    "--squeeze.ema-decay", "0.9", "--squeeze.shift-px", "1",
)  # fmt: skip
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def teacher(finished_run: FinishedRun) -> Teacher:
    return read_teacher(Room(Store(str(finished_run.out)), "teacher"))


@pytest.fixture
def state(teacher: Teacher) -> State:
    return {name: torch.from_numpy(array.copy()) for name, array in teacher.weights.items()}


def imported(out: Path, spec: Path | str, *options: str) -> int:
    return tiny.job(out, "--teacher", str(spec), *UNTIL, *options)


def assert_taken_over(out: Path, teacher: Teacher) -> None:
    """Assert that a run's teacher has the weights of `teacher` and the top-1 that was measured then."""
    found = read_teacher(Room(Store(str(out)), "teacher"))
    assert (found.arch, found.width, found.class_names) == (
        teacher.arch,
        teacher.width,
        teacher.class_names,
    )
    assert found.top1 == teacher.top1 > 0.5
    np.testing.assert_equal(found.weights, teacher.weights)


@pytest.mark.parametrize("folder", ["", "/teacher"])
def test_a_teacher_is_taken_from_another_run_whatever_network_the_options_name(
    folder: str, finished_run: FinishedRun, teacher: Teacher, tmp_path: Path
) -> None:
    spec = f"{finished_run.out}{folder}"
    assert imported(tmp_path / "run", spec, "--squeeze.network.width", "16") == 0
    assert_taken_over(tmp_path / "run", teacher)


def save_nested(state: State, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [("t.safetensors", save_file), ("t.pt", torch.save), ("t.pth.tar", save_nested)],
)
def test_a_teacher_is_taken_from_a_checkpoint_file(
    name: str,
    save: Callable[[State, Path], None],
    state: State,
    teacher: Teacher,
    tmp_path: Path,
) -> None:
    save(state, tmp_path / name)
    assert imported(tmp_path / "run", tmp_path / name) == 0
    assert_taken_over(tmp_path / "run", teacher)


def test_a_teacher_at_chance_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = tiny.config()
    untrained = build_network(
        config.squeeze.network, num_classes=10, channels=1, image_size=config.source.image_size
    )
    torch.save(untrained.state_dict(), tmp_path / "t.pt")
    assert imported(tmp_path / "run", tmp_path / "t.pt") == 4
    error = capsys.readouterr().err
    assert f"{tmp_path}/t.pt: top-1 0." in error
    assert "on 360 held-out images, expected at least 0.300 (chance is 0.100)" in error
    assert not (tmp_path / "run/teacher/stage.json").exists()


def test_a_teacher_with_two_exchanged_classes_is_refused_and_they_are_named(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exchanged = torch.tensor([0, 1, 2, 6, 4, 5, 3, 7, 8, 9])
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][exchanged]
    torch.save(state, tmp_path / "t.pt")
    assert imported(tmp_path / "run", tmp_path / "t.pt") == 4
    error = capsys.readouterr().err
    assert "2 of 10 are exchanged" in error
    assert 'class 3 ("3") is its class 6, class 6 ("6") is its class 3' in error
    assert not (tmp_path / "run/teacher/stage.json").exists()
    assert imported(tmp_path / "run", tmp_path / "t.pt", "--squeeze.no-check-class-order") == 0
    assert 0.3 < read_teacher(Room(Store(str(tmp_path / "run")), "teacher")).top1 < 0.85


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--squeeze.network.width", "16"), "bn1.bias (8,) (expected (16,))"),
        (("--squeeze.network.arch", "resnet18"), "layer1.0.bn1.bias"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_name_of_a_layer(
    option: tuple[str, str],
    message: str,
    state: State,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(state, tmp_path / "t.pt")
    assert imported(tmp_path / "run", tmp_path / "t.pt", *option) == 4
    error = capsys.readouterr().err
    assert f"weights of --teacher {tmp_path}/t.pt do not fit" in error
    assert message in error
    assert not (tmp_path / "run/teacher/stage.json").exists()


def test_a_teacher_that_is_nowhere_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(tmp_path / "run", tmp_path / "missing.pt") == 2
    error = capsys.readouterr().err
    assert f"--teacher {tmp_path}/missing.pt: expected a committed teacher" in error


@pytest.mark.parametrize("curved", [False, True], ids=["plain", "with everything"])
def test_training_that_was_cut_goes_on_from_its_last_stored_epoch_with_the_same_bytes(
    curved: bool, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*UNTIL, *((*CURVED, *OF_TODAY) if curved else ()))
    whole = finished_run.out
    if curved:
        whole = tmp_path / "whole"
        assert tiny.job(whole, *options) == 0
    train = training.train_classifier
    began: list[int] = []

    @functools.wraps(train)
    def cut(*args: object, on_epoch: Callable[[int, float], None], **options: object) -> None:
        def on_epoch_or_cut(epoch: int, loss: float) -> None:
            on_epoch(epoch, loss)
            if len(began) == 1 and epoch == 1:
                raise WmddError("cut here")

        began.append(options["start_epoch"])
        train(*args, on_epoch=on_epoch_or_cut, **options)

    monkeypatch.setattr(training, "Checkpoints", tiny.WaitingCheckpoints)
    monkeypatch.setattr(training, "train_classifier", cut)
    monkeypatch.setattr(training, "_STATE_EVERY_S", -1.0)
    out = tmp_path / "run"
    assert tiny.job(out, *options) == 1
    assert any((out / "teacher/partial/teacher").glob("state-?.safetensors"))
    assert tiny.job(out, *options) == 0
    assert began == [0, 2]
    assert list((out / "teacher/partial").rglob("*")) == []
    plain = finished_run.out / "teacher/teacher.safetensors"
    there = (whole / "teacher/teacher.safetensors").read_bytes()
    assert (out / "teacher/teacher.safetensors").read_bytes() == there
    assert curved == (there != plain.read_bytes())
    cut_metrics, metrics = (
        json.loads((run / "teacher/stage.json").read_text())["metrics"] for run in (out, whole)
    )
    assert cut_metrics["losses"] == metrics["losses"]
    assert ("curvatures" in metrics) == curved
    if curved:
        assert (
            cut_metrics["curvatures"] == metrics["curvatures"] and len(metrics["curvatures"]) == 3
        )
        assert metrics["curvature_weight"] == 1.0  # of ipc 4, by the power


def test_a_teacher_without_curvature_is_the_one_of_before_there_was_such_an_option() -> None:
    plain = tiny.config()
    told = squeeze.options(plain)["squeeze"]
    assert not [name for name in told if name.startswith("curvature")]
    unused = tiny.config("--squeeze.curvature-step", "1", "--squeeze.curvature-form", "loss")
    assert squeeze.options(unused) == squeeze.options(plain)


def test_a_teacher_without_the_options_of_today_is_the_one_of_before_there_were_such() -> None:
    plain, modern = (squeeze.options(tiny.config(*added))["squeeze"] for added in ((), OF_TODAY))
    later = {"optimizer": "muon", "warmup_epochs": 1.0, "ema_decay": 0.9, "shift_px": 1}
    assert modern == plain | later | {"learning_rate": 0.01}
    assert not plain.keys() & later.keys()


def test_teachers_of_one_effective_weight_are_one_teacher() -> None:
    by_power = squeeze.options(tiny.config(*CURVED))
    outright = ("--squeeze.curvature-weight", "1.0", "--squeeze.curvature-step", "1")
    assert by_power == squeeze.options(tiny.config(*outright))
    other_ipc = squeeze.options(tiny.config(*CURVED, "--ipc", "1"))
    assert other_ipc["squeeze"]["curvature_weight"] == pytest.approx(4.0)


@slow
def test_shards_that_are_streamed_teach_one_teacher_on_any_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wmdd_ray.executors import data_parallel

    warnings: list[str] = []
    # Not by caplog: an earlier run in this process can have disabled the logger.
    monkeypatch.setattr(data_parallel.logger, "warning", lambda text, *a: warnings.append(text % a))
    digits = load_digits()
    source = Store(str(tmp_path / "digits"))
    for number, (split, rows) in enumerate(
        [*(("train", range(k, 900, 3)) for k in range(3)), ("val", range(900, 1300))]
    ):
        members = [
            (f"{row:04d}.{ending}", content)
            for row in rows
            for ending, content in (
                ("cls", b"%d" % digits.target[row]),
                ("png", encode_png(np.uint8(digits.images[row] * 15)[:, :, None])),
            )
        ]
        source.put(f"{split}-{number:03d}.tar", tar_of(members))
    source.put("classes.txt", b"0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n")
    options = (
        *UNTIL, "--data", source.uri, "--source.format", "auto", "--squeeze.memory-limit-gib", "1e-5",
    )  # fmt: skip
    whole, parts = options, (*options, "--squeeze.batch-parts", "2")

    def made(name: str, *options: str) -> bytes:
        assert tiny.job(tmp_path / name, *options) == 0
        return (tmp_path / name / "teacher/teacher.safetensors").read_bytes()

    one = made("here", *whole, "--executor", "here")
    # Decoded by tasks, on the CPU that is left; then by the workers, which have both.
    assert made("one", *whole, "--num-workers", "2") == one
    (warning,) = warnings
    assert warning.startswith("1 of 2 workers train: --squeeze.batch-parts 2 lets all of them")
    two = made("here-parts", *parts, "--executor", "here", "--cpus-per-worker", "2")
    assert made("two", *parts, "--num-workers", "2") == two
    assert one != two and read_teacher(Room(Store(str(tmp_path / "two")), "teacher")).top1 > 0.5
    assert tiny.job(tmp_path / "two", *options) == 2, "another number of parts is another plan"
    assert tiny.job(tmp_path / "four", *options, "--squeeze.batch-parts", "4") == 2


def test_a_teacher_of_whole_batches_is_the_one_of_before_there_were_parts() -> None:
    whole, parts = (
        squeeze.options(tiny.config("--squeeze.batch-parts", n))["squeeze"] for n in "12"
    )
    assert parts == whole | {"batch_parts": 2} and "batch_parts" not in whole
    assert "memory_limit_gib" not in whole
    assert squeeze.options(tiny.config("--squeeze.memory-limit-gib", "1"))["squeeze"] != whole
