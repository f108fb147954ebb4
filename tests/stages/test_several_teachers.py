"""Labels by several teachers (LIA): trained, resumed, given, shipped, and used for baselines as for the distilled set."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import evaluate as evaluate_job
from jobs import export
from jobs.evaluation.own_set import committed_teachers
from tests.stages import tiny
from wmdd_ray.config import RelabelConfig
from wmdd_ray.core.networks import labeler_of, network_of
from wmdd_ray.core.soft_labels import label_views
from wmdd_ray.core.views import to_input
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.errors import ConfigError, WmddError
from wmdd_ray.product.export import export as export_set
from wmdd_ray.stages import evaluate, relabel, squeeze
from wmdd_ray.units import teacher as training
from wmdd_ray.units.teacher import units_of
from wmdd_ray.units.training_sets import _stored_labels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

# fmt: off
TWO = (
    "--relabel.teacher-schedule", "2", "2", "9", "3", "--recover.iterations", "1", "--relabel.epochs", "2",
    "--squeeze.epochs", "2", "--evaluate.epochs", "2", "--evaluate.num-seeds", "1",
    "--evaluate.baselines", "random_real",
)
# fmt: on


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, ray_local: object) -> Path:
    """Return a finished run of two teachers; nobody writes into it."""
    out = tmp_path_factory.mktemp("two")
    assert tiny.job(out, *TWO) == 0
    return out


def test_images_of_others_are_labeled_by_all_teachers_of_a_run_as_its_own_are(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_set(str(two / "dataset"), str(tmp_path / "images"), "imagefolder")
    asked = (
        *("--teacher", str(two), "--data", "digits", "--recipe", "digits", "--seeds", "1"),
        *("--labels", "soft", "--evaluate.network.width", "8", "--evaluate.epochs", "2"),
    )
    out = tmp_path / "out"
    where = ("--out", str(out), "--num-workers", "0")
    assert evaluate_job.main([str(tmp_path / "images"), *asked, *where]) == 0
    found = json.loads((out / "results.json").read_text())
    student = "results/distilled-soft-s000.json"
    mine, own = (
        json.loads((of / student).read_text()) for of in (out / "convnet3", two / "evaluation")
    )
    # Such a student guesses one class; by the first teacher alone its next guesses are others.
    assert (mine["top1"], mine["top5"]) == (own["top1"], own["top5"])
    top1 = json.loads((two / "teacher/stage.json").read_text())["metrics"]["teachers_top1"]
    assert found["teacher"]["labelers_top1"] == top1 and len(top1) == 2
    assert "teachers        2, top-1 " in capsys.readouterr().out


def teacher_bytes(out: Path) -> list[bytes]:
    paths = sorted((out / "teacher").glob("teacher*.safetensors"), key=lambda path: len(path.name))
    return [path.read_bytes() for path in paths]


def test_the_number_of_teachers_follows_the_schedule_and_one_leaves_no_trace() -> None:
    config = tiny.config(*TWO)
    assert (config.ipc, config.num_teachers) == (4, 2)
    assert [config.relabel.teachers_at(ipc) for ipc in (1, 2, 8, 9, 50)] == [1, 2, 2, 3, 3]
    assert units_of(config) == ("teacher", "teacher-1")
    one, other = tiny.config(), tiny.config("--relabel.teacher-schedule", "5", "3")
    for stage in (squeeze, relabel):
        assert stage.options(one) == stage.options(other)
        assert "teachers" not in json.dumps(stage.options(one))
        assert "teachers" in json.dumps(stage.options(tiny.config("--relabel.teachers", "2")))
    # As many by a number as by a schedule are the same labels.
    fixed = tiny.config("--relabel.teachers", "2")
    scheduled = tiny.config("--relabel.teacher-schedule", "4", "2")
    assert relabel.options(fixed) == relabel.options(scheduled)


def test_a_transport_term_that_is_off_leaves_no_trace_in_the_evaluation() -> None:
    told = evaluate.options(tiny.config("--evaluate.sinkhorn-iterations", "3"))
    assert told == evaluate.options(tiny.config())
    assert "sinkhorn" not in json.dumps(told)
    on = evaluate.options(tiny.config("--evaluate.sinkhorn-weight", "0.1"))["evaluate"]
    assert (on["sinkhorn_weight"], on["sinkhorn_iterations"]) == (0.1, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": 0}, "--relabel.teachers: expected >= 1, got 0"),
        ({"teacher_schedule": ((10, 2), (1, 4))}, "--relabel.teacher-schedule: expected .* rising"),
        ({"teacher_schedule": ((1, 0),)}, "--relabel.teacher-schedule: expected .* both >= 1"),
    ],
)
def test_a_number_of_teachers_that_is_none_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RelabelConfig(**options)


def test_labels_are_the_mean_logits_of_all_teachers_and_the_data_set_ships_them(two: Path) -> None:
    first, second = teacher_bytes(two)
    assert first != second
    dataset = DistilledDataset(str(two / "dataset"))
    teachers = dataset.teachers()
    assert len(teachers) == 2 and len(list((two / "dataset").glob("teacher*"))) == 2
    top1 = [teacher.top1 for teacher in teachers]
    assert dataset.manifest["teachers_top1"] == top1 and dataset.manifest["teacher_top1"] == top1[0]
    card = (two / "dataset/README.md").read_text()
    assert f"mean logits of it and 1 more (top-1 {100 * top1[1]:.1f} %)" in card
    views, found_VY = dataset.label_epoch(1)
    images = dataset.stored_images()
    each = [label_views(network_of(t), images, views, 16, 256) for t in teachers]

    def relative(logits_VY: np.ndarray) -> np.ndarray:
        return np.asarray(logits_VY - logits_VY.max(axis=1, keepdims=True))

    np.testing.assert_allclose(found_VY, relative((each[0] + each[1]) / 2), rtol=2e-3, atol=2e-3)
    assert abs(found_VY - relative(each[0])).max() > 0.1


def test_baselines_are_labeled_by_the_same_teachers(two: Path) -> None:
    dataset = DistilledDataset(str(two / "dataset"))
    config = tiny.config(*TWO)
    # The distilled images in the place of real ones have the labels that are stored.
    label_epoch = _stored_labels(dataset.images, dataset.teachers(), config, torch.device("cpu"))
    found_VY, expected_VY = label_epoch(0)[1], dataset.label_epoch(0)[1]
    assert found_VY is not None
    np.testing.assert_allclose(found_VY, expected_VY, rtol=2e-3, atol=2e-3)


def test_online_labels_are_those_that_would_be_stored(two: Path, tmp_path: Path) -> None:
    out = tiny.copy_rooms(two, tmp_path, "teacher", "features", "barycenters", "images")
    assert tiny.job(out, *TWO, "--relabel.labels", "online", "--until", "assemble") == 0
    stored, online = (DistilledDataset(str(run / "dataset")) for run in (two, out))
    (_, expected_VY), (_, found_VY) = (dataset.label_epoch(1) for dataset in (stored, online))
    relative_VY = found_VY - found_VY.max(axis=1, keepdims=True)
    np.testing.assert_allclose(relative_VY, expected_VY, rtol=2e-3, atol=2e-3)
    item = stored[3][1] - online[3][1]
    assert float((item - item.mean()).abs().max()) < 0.01


def test_exported_labels_are_the_mean_logits_too(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    to = ("--out", str(out), "--format", "imagefolder", "--labels", "soft")
    assert export.main([str(two / "dataset"), *to]) == 0
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    dataset = DistilledDataset(str(two / "dataset"))
    images = to_input(dataset.images, dataset.mean_C, dataset.std_C, torch.device("cpu"))
    expected_NY = labeler_of(dataset.teachers())(images).numpy()
    found_NY = np.array([line["logits"] for line in lines])
    np.testing.assert_allclose(found_NY, expected_NY, rtol=1e-4, atol=1e-4)


def test_images_are_made_by_two_teachers_in_turn_and_labeled_by_one(
    two: Path, tmp_path: Path
) -> None:
    made = []
    for options in (TWO, (*TWO, "--relabel.teacher-schedule", "2", "1", "--recover.teachers", "2")):
        out = tmp_path / str(len(made))
        tiny.copy_rooms(two, out, "teacher", "features", "barycenters")
        # The second step is the second teacher's.
        assert tiny.job(out, *options, "--recover.iterations", "2", "--until", "assemble") == 0
        made.append(DistilledDataset(str(out / "dataset")))
    by_one, in_turn = made
    assert not np.array_equal(by_one.images, in_turn.images)
    assert len(in_turn.teachers()) == 1 and "teachers_top1" not in in_turn.manifest
    labelers = [committed_teachers(str(tmp_path / run)) for run in ("0", "1")]
    assert [found and found[1] for found in labelers] == [2, 1]


def test_a_run_with_another_number_of_teachers_is_refused(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.job(two, *TWO, "--relabel.teacher-schedule", "2", "3") == 2
    assert "teachers=2 (this run asks for 3)" in capsys.readouterr().err


def test_several_teachers_are_taken_from_a_run_that_has_them(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--teacher", str(two), "--until", "squeeze")
    assert tiny.job(tmp_path / "run", *options, "--relabel.teachers", "2") == 0
    assert teacher_bytes(tmp_path / "run") == teacher_bytes(two)
    capsys.readouterr()
    assert tiny.job(tmp_path / "more", *options, "--relabel.teachers", "3") == 2
    error = capsys.readouterr().err
    assert f"--teacher {two}: expected a run with the 3 teachers" in error
    assert "at ipc 4, found a run with 2" in error
    weights = {
        k: torch.tensor(v) for k, v in DistilledDataset(f"{two}/dataset").teacher().weights.items()
    }
    torch.save(weights, tmp_path / "t.pt")
    one = ("--teacher", str(tmp_path / "t.pt"), "--until", "squeeze")
    assert tiny.job(tmp_path / "file", *one, "--relabel.teachers", "2") == 2
    assert "expected a run with the 2 teachers" in capsys.readouterr().err


def test_a_second_teacher_that_was_cut_goes_on_and_the_first_is_not_trained_again(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = training.train_classifier
    began: list[int] = []

    @functools.wraps(train)
    def cut(*args: object, on_epoch: Callable[[int, float], None], **options: object) -> None:
        def on_epoch_or_cut(epoch: int, loss: float) -> None:
            on_epoch(epoch, loss)
            if len(began) == 2 and epoch == 0:
                raise WmddError("cut here")

        began.append(options["start_epoch"])
        train(*args, on_epoch=on_epoch_or_cut, **options)

    monkeypatch.setattr(training, "Checkpoints", tiny.WaitingCheckpoints)
    monkeypatch.setattr(training, "train_classifier", cut)
    monkeypatch.setattr(training, "_STATE_EVERY_S", -1.0)
    options = (*TWO, "--until", "squeeze")
    assert tiny.job(tmp_path, *options) == 1
    assert any((tmp_path / "teacher/partial/teacher-1").glob("state-?.safetensors"))
    assert tiny.job(tmp_path, *options) == 0
    assert began == [0, 0, 1]
    assert teacher_bytes(tmp_path) == teacher_bytes(two)
    metrics = json.loads((tmp_path / "teacher/stage.json").read_text())["metrics"]
    assert len(metrics["teachers_top1"]) == 2 and metrics["top1"] == metrics["teachers_top1"][0]
    # The first is the one of a run without others.
    assert tiny.job(tmp_path / "one", "--squeeze.epochs", "2", "--until", "squeeze") == 0
    assert teacher_bytes(tmp_path / "one") == teacher_bytes(two)[:1]
