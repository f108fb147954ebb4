"""One pass over real images in files: classes mixed, images broken, classes too small."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import S3Uri
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.store.written_sources import parquet_of
from wmdd_ray.config import DistillConfig
from wmdd_ray.core.networks import last_linear, network_of
from wmdd_ray.core.selection import margin_of
from wmdd_ray.records import ClassBarycenter
from wmdd_ray.spine.run import Room
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units import atoms
from wmdd_ray.units.teacher import TEACHER_KEY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

NAMES = tuple("0123456789")


def encoded(image_HW: np.ndarray, format: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.rint(image_HW * 15.9375).astype(np.uint8)).save(sink, format)
    return sink.getvalue()


def embedded(out: str | Path, data: str, teacher: FinishedRun, *options: str) -> int:
    """Run squeeze, which takes a trained teacher over, and features on image files."""
    given = ("--data", data, "--val-data", "digits", "--source.format", "auto")
    return tiny.job(out, *given, "--teacher", str(teacher.out), "--until", "features", *options)


def solved(
    out: str | Path,
    into: Path,
    config: DistillConfig | None = None,
    last_layer: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[ClassBarycenter]:
    """Return the barycenters of a run's features, solved in this process."""
    room = Room(Store(str(into)), "barycenters")
    actor = atoms.ClassSolver(
        room, Room(Store(str(out)), "features"), NAMES, config or tiny.config(), last_layer
    )
    for label in range(10):
        actor.work(atoms.unit_of(label))
    files = {
        entry.key: entry for m in room.read_units(room.finished()).values() for entry in m.files
    }
    return [atoms.read_barycenter(room, files, label) for label in range(10)]


def test_atoms_by_margin_lie_nearer_to_the_other_classes_than_those_of_the_whole_class(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    teacher = codecs.decode_teacher((finished_run.out / "teacher" / TEACHER_KEY).read_bytes())
    linear = last_linear(network_of(teacher, torch.device("cpu")))
    last_layer = (linear.weight.detach().numpy(), linear.bias.detach().numpy())
    config = tiny.config("--barycenters.margin-fraction", "0.5")
    for found in solved(finished_run.out, tmp_path / "half", config, last_layer):
        margin_K = margin_of(found.barycenter.atoms_KD, *last_layer, found.label)
        assert margin_K[2:].mean() < margin_K[:2].mean()


def test_margin_atoms_go_through_the_stage(finished_run: FinishedRun, tmp_path: Path) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher", "features")
    option = ("--barycenters.margin-fraction", "0.5")
    assert tiny.job(out, *option, "--until", "barycenters") == 0
    key = "barycenters/classes/00003.safetensors"
    found = codecs.decode_class_barycenter((out / key).read_bytes())
    plain = codecs.decode_class_barycenter((finished_run.out / key).read_bytes())
    # Half of the mass is at the margin, so the whole class is farther away.
    assert found.barycenter.cost > plain.barycenter.cost
    np.testing.assert_allclose(found.barycenter.weights_K[2:].sum(), 0.5)


def test_features_of_mixed_files_on_s3_give_the_same_barycenters_whether_regrouped_or_not(
    finished_run: FinishedRun, s3_server: S3Uri, tmp_path: Path
) -> None:
    digits = load_digits()
    pngs = [encoded(image, "PNG") for image in digits.images[:400]]
    data = Store(s3_server()).child("digits")
    for i in range(2):
        rows = slice(200 * i, 200 * (i + 1))
        content = parquet_of(pngs[rows], digits.target[rows].tolist(), NAMES)
        data.put(f"data/train-0000{i}-of-00002.parquet", content)
    solutions = []
    for regroup in ("never", "always"):
        out = s3_server()
        assert embedded(out, data.uri, finished_run, "--features.regroup", regroup) == 0
        commit = Room(Store(out), "features").committed()
        assert commit.metrics["num_images"] == 400
        assert commit.metrics["class_counts"] == np.bincount(digits.target[:400]).tolist()
        classes = {f"class-{label:05d}" for label in range(10)}
        assert classes & commit.units.keys() == (classes if regroup == "always" else set())
        # Every file mixes the classes: this is what regrouping is for.
        chunks = [m for unit, m in commit.units.items() if unit not in classes]
        assert all(len(m.metrics["label_counts"]) == 10 for m in chunks)
        solutions.append(solved(out, tmp_path / regroup))
    for apart, together in zip(*solutions, strict=True):
        assert apart.nearest_keys == together.nearest_keys
        assert apart.random_keys == together.random_keys
        for name in ("atoms_KD", "weights_K"):
            np.testing.assert_array_equal(
                getattr(apart.barycenter, name), getattr(together.barycenter, name)
            )
        for name in ("count_L", "mean_S", "m2_S"):
            np.testing.assert_allclose(
                getattr(apart.moments, name), getattr(together.moments, name), rtol=1e-9
            )


def test_broken_images_are_counted_named_and_skipped_up_to_a_limit_and_small_classes_are_refused(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load_digits()
    data = Store(str(tmp_path / "digits"))
    for label in range(10):
        images = digits.images[digits.target == label][: 4 if label == 7 else 6]
        for i, image in enumerate(images):
            content = encoded(image, "JPEG")
            broken = (label, i) in ((7, 1), (9, 5))
            data.put(f"train/{label}/{i}.jpg", content[: len(content) // 2] if broken else content)
    out = tmp_path / "run"

    assert embedded(out, data.uri, finished_run, "--source.max-bad-images", "1") == 4
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "train/7/1.jpg" in error or "train/9/5.jpg" in error
    assert "--source.max-bad-images" in error
    assert not (out / "features/stage.json").exists()

    assert embedded(out, data.uri, finished_run, "--overwrite", "--ipc", "4") == 4
    assert 'class 7 ("7") has 3 images but ipc is 4; lower --ipc' in capsys.readouterr().err
    assert not (out / "features/stage.json").exists()

    # Fewer a class: all units are found finished.
    before = tiny.markers(out, "features")
    assert embedded(out, data.uri, finished_run, "--ipc", "3") == 0
    assert tiny.markers(out, "features") == before
    metrics = json.loads((out / "features/stage.json").read_text())["metrics"]
    assert metrics["class_counts"] == [6] * 7 + [3, 6, 5]
    first, second = sorted(metrics["bad_images"])
    assert "train/7/1.jpg" in first and "train/9/5.jpg" in second
