"""Any distilled set, tested: ours and somebody else's, by the same students as a run's own."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import fsspec
import numpy as np
import pytest
import s3fs
import safetensors.numpy
import torch

from jobs import evaluate
from jobs.evaluation import options as asked
from jobs.evaluation.results import optimizers
from jobs.own_data import Auto
from tests.conftest import S3Uri
from tests.manifests import manifest_of
from tests.stages.tiny import FinishedRun
from tests.store.written_sources import write_parquet
from tests.test_dataset import IPC, SIZE, set_by_column, write_dataset
from tests.units.test_auto import MEASURED
from wmdd_ray.config import (
    DistillConfig,
    EvaluateConfig,
    RelabelConfig,
    SourceConfig,
    ViewConfig,
)
from wmdd_ray.core.views import draw_views
from wmdd_ray.errors import ArtifactError, ConfigError, DataError
from wmdd_ray.executors.metrics import RayMetrics
from wmdd_ray.product.export import export
from wmdd_ray.robustness import units as attacking
from wmdd_ray.robustness.attacks import Attacked
from wmdd_ray.robustness.units import draw_sample, slices_of
from wmdd_ray.store import documents
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.sources import load_images, open_source
from wmdd_ray.telling.trackers import Number
from wmdd_ray.units.auto import choose
from wmdd_ray.units.given_set import Given, GivenSets
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.real_images import random_real
from wmdd_ray.units.training_sets import Input

# The student of the tiny run, in the driver.
STUDENT = (
    "--students", "convnet3", "--evaluate.network.width", "8", "--evaluate.epochs", "2",
    "--evaluate.all-real-epochs", "1", "--num-workers", "0",
)  # fmt: skip
SOURCE = SourceConfig(image_size=16, resize=16, channels=1, mean=(0.5,), std=(0.5,))


def typed(uri: Path | str, out: Path | str, *options: str) -> int:
    return evaluate.main([str(uri), "--out", str(out), *STUDENT, *options])


def results(out: Path | str) -> dict[str, Any]:
    return documents.read_sealed(Store(str(out)), "results.json")


def top1(out: Path | str) -> dict[tuple[str, str], list[float]]:
    return {(row["row"], row["labels"]): row["top1"] for row in results(out)["table"]}


def of_run(finished_run: FinishedRun, row: str) -> list[float]:
    """Return the accuracies of the run's own students."""
    folder = finished_run.out / "evaluation" / "results"
    return [json.loads(p.read_text())["top1"] for p in sorted(folder.glob(f"{row}-soft-*"))]


@pytest.fixture(scope="module")
def told() -> list[Number]:
    """What Ray's metrics are told while the set of `ours` is tested."""
    return []


@pytest.fixture(scope="module")
def ours(
    finished_run: FinishedRun,
    ray_local: None,
    tmp_path_factory: pytest.TempPathFactory,
    told: list[Number],
) -> Path:
    """The tiny run's set, tested with every row."""
    out = tmp_path_factory.mktemp("ours") / "out"
    rows = ("--seeds", "2", "--labels", "soft,hard", "--baselines", "random_real,all_real")
    with mock.patch.object(RayMetrics, "log", lambda self, numbers: told.extend(numbers)):
        assert typed(finished_run.out, out, *rows) == 0
    return out


@pytest.mark.slow
def test_ray_s_metrics_are_told_how_far_a_test_is(ours: Path, told: list[Number]) -> None:
    done = [number.value for number in told if number.metric == "units_done"]
    assert done == sorted(done) and done[-1] == 2 * 2 * 3
    assert {number.stage for number in told} == {"convnet3"}


@pytest.fixture(scope="module")
def folder(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's images as somebody else would hand them on: class folders."""
    out = tmp_path_factory.mktemp("foreign") / "images"
    export(str(finished_run.out / "dataset"), str(out), "imagefolder")
    return out


@pytest.mark.slow
def test_students_of_our_sets_are_those_of_the_run_itself(
    ours: Path, finished_run: FinishedRun
) -> None:
    found = top1(ours)
    assert found["distilled", "soft"] == of_run(finished_run, "distilled")
    assert found["all_real", "soft"] == of_run(finished_run, "all_real")
    assert found.keys() == {
        (row, labels) for row in ("distilled", "random_real", "all_real") for labels in ("soft", "hard")
    }  # fmt: skip


@pytest.mark.slow
def test_results_are_sealed_with_recipe_teacher_versions_seeds_and_recall_per_class(
    ours: Path, finished_run: FinishedRun
) -> None:
    found = results(ours)
    assert found["seeds"] == [0, 1]
    assert found["set"]["ours"] and found["set"]["uri"] == f"{finished_run.out}/dataset"
    assert 0.3 < found["teacher"]["top1"] <= 1
    student = found["students"]["convnet3"]
    assert student["student"]["network"]["width"] == 8
    assert student["versions"]["torch"] == torch.__version__.partition("+")[0]
    val = open_source("digits", SOURCE, split="val")
    loaded = load_images(val, SOURCE, 1 << 24)
    assert loaded is not None
    share_Y = np.bincount(loaded[1], minlength=10) / len(loaded[1])
    for row in found["table"]:
        assert row["student"] == "convnet3"
        assert row["top1_mean"] == pytest.approx(np.mean(row["top1"]))
        # Weighted by its images, the recall of the classes is the accuracy.
        assert np.dot(share_Y, row["recall_per_class"]) == pytest.approx(row["top1_mean"], abs=1e-3)
    content = (ours / "results.json").read_bytes()
    assert documents.unseal(content, "results.json") == found


def test_the_optimizer_that_is_told_is_the_one_of_the_labels() -> None:
    recipe = EvaluateConfig(optimizer="muon", learning_rate=0.01)
    assert optimizers(recipe) == "muon at 0.01 for soft labels, adamw at 0.001 for hard labels"
    assert optimizers(replace(recipe, labels=("hard",))) == "adamw at 0.001"
    assert optimizers(EvaluateConfig()) == "adamw at 0.001"


@pytest.mark.slow
def test_the_same_command_again_prints_the_table_and_trains_nobody(
    ours: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (ours / "convnet3").rglob("*.json")
    }
    rows = ("--seeds", "2", "--labels", "soft", "hard", "--baselines", "random_real", "all_real")
    assert typed(finished_run.out / "dataset", ours, *rows) == 0
    said = capsys.readouterr()
    assert "found committed" in said.err
    assert "| images | passes | top-1 %, soft labels | top-1 %, hard labels | seeds |" in said.out
    assert "| convnet3 | (a) distilled set | 40 | 2 |" in said.out
    assert "| convnet3 | (d) all real images | 1437 | 1 |" in said.out
    assert "after the last epoch; mean ± standard deviation over 2 seeds" in said.out
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (ours / "convnet3").rglob("*.json")}
    assert after == before


@pytest.mark.slow
def test_other_options_are_refused_by_name(
    ours: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(finished_run.out, ours, "--seeds", "3", "--labels", "soft") == 2
    error = capsys.readouterr().err
    assert "evaluate.num_seeds=2 (this run asks for 3)" in error and "--overwrite" in error


@pytest.mark.slow
def test_an_interrupted_test_trains_the_missing_students_alone(
    ours: Path, finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = shutil.copytree(ours, tmp_path / "out")
    for lost in (
        "stage.json",
        "units/distilled-soft-s001.json",
        "results/distilled-soft-s001.json",
    ):
        (out / "convnet3" / lost).unlink()
    (out / "results.json").unlink()
    kept = out / "convnet3" / "units" / "distilled-soft-s000.json"
    before = kept.read_bytes()
    rows = ("--seeds", "2", "--labels", "soft,hard", "--baselines", "random_real,all_real")
    assert typed(finished_run.out, out, *rows) == 0
    assert top1(out) == top1(ours)
    assert kept.read_bytes() == before


@pytest.mark.slow
def test_images_of_others_with_the_same_teacher_have_the_students_of_the_set_they_are_from(
    folder: Path, ours: Path, finished_run: FinishedRun, tmp_path: Path
) -> None:
    rows = ("--seeds", "2", "--baselines", "random_real", "--data", "digits", "--recipe", "digits")
    assert typed(folder, tmp_path / "out", "--teacher", str(finished_run.out), *rows) == 0
    found, expected = top1(tmp_path / "out"), top1(ours)
    assert found == {key: expected[key] for key in found} and len(found) == 4
    teacher = results(tmp_path / "out")["teacher"]
    assert teacher["uri"] == str(finished_run.out)
    assert teacher["top1"] == results(ours)["teacher"]["top1"]


# Long enough that a student with its classes exchanged would fail.
LONG = ("--seeds", "1", "--evaluate.epochs", "60")
HARD = (
    *LONG, "--recipe", "digits", "--source.image-size", "16", "--source.resize", "16",
)  # fmt: skip


@pytest.fixture(scope="module")
def hard(
    finished_run: FinishedRun, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Accuracies of a student with the hard labels of the tiny run's set."""
    out = tmp_path_factory.mktemp("hard") / "out"
    assert typed(finished_run.out, out, *LONG, "--labels", "hard") == 0
    found = top1(out)["distilled", "hard"]
    assert found[0] > 0.4
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["webdataset", "huggingface"])
def test_images_of_others_have_hard_labels_without_a_teacher_in_every_format(
    layout: Any, hard: list[float], finished_run: FinishedRun, tmp_path: Path
) -> None:
    export(str(finished_run.out / "dataset"), str(tmp_path / "set"), layout)
    assert typed(tmp_path / "set", tmp_path / "out", *HARD, "--val-data", "digits") == 0
    assert top1(tmp_path / "out") == {("distilled", "hard"): hard}
    assert results(tmp_path / "out")["teacher"] is None


@pytest.mark.slow
def test_classes_of_other_names_are_refused_by_name_and_taken_in_order_when_told_so(
    folder: Path, hard: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = tmp_path / "renamed"
    for label in range(10):
        shutil.copytree(folder / str(label), renamed / f"new{label:03d}")
    assert typed(renamed, tmp_path / "out", *HARD, "--data", "digits") == 4
    assert "'new000'" in capsys.readouterr().err
    in_order = (*HARD, "--data", "digits", "--classes", "order")
    assert typed(renamed, tmp_path / "out", *in_order) == 0
    assert top1(tmp_path / "out")["distilled", "hard"] == hard
    shutil.rmtree(renamed / "new009")
    assert typed(renamed, tmp_path / "other", *in_order) == 4
    assert "expected 10 classes as the held-out images have, found 9" in capsys.readouterr().err


@pytest.mark.slow
def test_set_and_results_may_lie_in_object_storage(
    finished_run: FinishedRun, ray_local: None, s3_server: S3Uri
) -> None:
    uri = s3_server()
    for path in (finished_run.out / "dataset").rglob("*"):
        if path.is_file():
            key = path.relative_to(finished_run.out).as_posix()
            Store(uri).put(key, path.read_bytes())
    assert typed(uri, f"{uri}/tested", "--seeds", "1", "--labels", "soft") == 0
    expected = of_run(finished_run, "distilled")[:1]
    assert top1(f"{uri}/tested") == {("distilled", "soft"): expected}


def test_images_of_others_may_lie_where_only_the_options_of_the_bucket_lead(
    s3_server: S3Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3_server()
    write_parquet(Store(uri))
    fs, root = fsspec.core.url_to_fs(uri)
    for path in fs.find(root):
        fs.chmod(path, acl="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    anonymous = "--source.bucket.anonymous"
    try:
        with pytest.raises(ArtifactError, match="no credentials were found"):
            asked.parse([uri, *HARD], None)
        job = asked.parse([uri, anonymous, *HARD, "--data", uri], None)
        assert (job.own, evaluate.open_run(job).source("train").num_images) == (None, 24)
        with pytest.raises(DataError, match="expected a distilled set .* found nothing there"):
            asked.parse([f"{uri}/nowhere", anonymous, *HARD], None)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("option", ["--source.image-size", "--source.image_size"])
def test_a_side_is_the_input_of_images_of_others_however_the_option_is_written(
    option: str, tmp_path: Path
) -> None:
    write_parquet(Store(str(tmp_path)))
    source = asked.parse([str(tmp_path), option, "64", *LONG], None).config.source
    assert (source.image_size, source.resize) == (64, 64)


def test_real_images_of_our_sets_are_read_by_the_run_s_options_and_others_by_typed_ones(
    tmp_path: Path,
) -> None:
    run = set_by_column(tmp_path)
    own = asked.parse([run, "--follow-data"], None).config
    assert (own.source.label_column, own.source.layout) == ("diagnosis", "*/{class}")
    changed = asked.parse([run, "--follow-data", "--source.label_column", "label"], None).config
    assert (changed.source.label_column, changed.source.layout) == ("label", "*/{class}")
    for place in ("--data", "--val-data"):
        given = [run, place, own.data]
        with pytest.raises(
            ConfigError,
            match=rf"^{place}: .*label-column 'diagnosis' .*layout '\*/\{{class\}}' .*so the labels",
        ):
            asked.parse(given, None)
        with pytest.raises(ConfigError, match=r"expected --source.layout [^:]* or another value"):
            asked.parse([*given, "--source.label-column", "diagnosis"], None)
        typed = ["--source.label-column=diagnosis", "--source.layout="]
        source = asked.parse([*given, *typed], None).config.source
        assert (source.label_column, source.layout) == ("diagnosis", "")


@pytest.mark.parametrize("has_gpu", [False, True])
def test_students_of_an_automatic_run_are_those_that_it_chose(
    has_gpu: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(tmp_path / "run")
    provenance = {**manifest_of()["provenance"], "recipe": "auto"}
    source = {**manifest_of()["source"], "uri": "digits"}
    write_dataset(f"{uri}/dataset", provenance=provenance, source=source)
    record = Auto(typed=cast(Any, SimpleNamespace()), measured=MEASURED, has_gpu=has_gpu).record()
    told = {"config": {"evaluate": {"network": {"arch": "os:system"}}}, "auto": record}
    Store(uri).put("run.json", documents.dump_json(told))
    chosen = choose(MEASURED, has_gpu, IPC, image_size=SIZE)[0].evaluate
    job = asked.parse([uri], None)
    assert job.config.evaluate == replace(chosen, baselines=())
    assert job.students == (chosen.network.arch,) == ("convnet3",)
    assert asked.parse([uri, "--evaluate.network.width", "9"], None).config.evaluate.network == (
        replace(chosen.network, width=9)
    )
    assert not caplog.records
    named = asked.parse([uri, "--recipe", "digits"], None).config.evaluate
    assert named.network.width == 32 != chosen.network.width
    for broken in (b"{}", b"x", b'{"auto": {"measured": {}, "has_gpu": 1}}', None):
        Store(uri).delete("run.json") if broken is None else Store(uri).put("run.json", broken)
        caplog.clear()
        job = asked.parse([uri], None)
        assert job.config.evaluate.epochs == EvaluateConfig().epochs
        assert "recipe auto chose its students by what run.json beside" in caplog.text


# What the field tests its sets with: CNNs deep, narrow and small, and networks of attention.
STUDENTS = (
    "resnet50", "resnet101", "mobilenet_v2", "vit_tiny", "timm:vit_small_patch16_224", "swin_t", "convnext_tiny", "convnet6",
    "resnetap10",
)  # fmt: skip


@pytest.mark.slow
def test_the_students_of_the_literature_are_trained_and_tested_at_64_pixels(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(0, 256, (64, 64, 3))
                pixels = ((noise + color) // 2).astype(np.uint8)
                (folder / f"{i}.png").write_bytes(encode_png(pixels))
    arguments = [
        str(tmp_path / "train"), "--val-data", str(tmp_path / "val"), "--out", str(tmp_path / "out"),
        "--recipe", "tiny_imagenet", "--students", *STUDENTS, "--seeds", "1", "--evaluate.epochs", "2",
        "--evaluate.optimizer", "adamw", "--executor", "here",
    ]  # fmt: skip
    assert evaluate.main(arguments) == 0
    table = results(tmp_path / "out")["table"]
    assert [row["student"] for row in table] == list(STUDENTS)
    assert all(top1 in (0, 0.5, 1) for row in table for top1 in row["top1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--students", "resnet18,resnet19"),
            "--students resnet19: expected convnetN (N blocks), resnetap10,",
        ),
        (("--labels", "medium"), "--labels: expected names among soft, hard"),
        (
            ("--baselines", "nearest_real"),
            "--baselines: expected names among random_real, all_real",
        ),
        (("--teacher", "runs/x"), "brings its own teacher and labels"),
        (("--source.mean", "0.5"), "--source.mean: expected (0."),
        (("--attacks", "pdg"), "--attacks: expected names among pgd, square, autoattack, cw, mim"),
        (("--attacks", "pgd", "--eps", "8"), "--eps: expected fractions between 0 and 1, as 8/255"),
        (("--source.image-size", "8"), "--source.image-size: expected 16"),
        (("--evaluate.epochs", "7"), "at most the 6 stored label epochs"),
        (("--val-data", "s3://user:secret@bucket/x"), "a URI without a password"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: tuple[str, ...], told: str, finished_run: FinishedRun, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert typed(finished_run.out, tmp_path / "out", *options) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--labels", "soft"), 2, "pass --teacher"),
        (("--baselines", "all_real"), 2, "expected --data"),
        ((), 4, "pass held-out images as --val-data"),
        (("--data", "/nowhere/at/all"), 4, "/nowhere/at/all"),
    ],
)
def test_what_a_foreign_set_does_not_bring_is_asked_for(
    options: tuple[str, ...], code: int, told: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert typed(folder, tmp_path / "out", *options) == code
    assert told in capsys.readouterr().err


# Long enough that the student is right about some images.
ATTACKED = (
    "--seeds", "1", "--labels", "soft", "--evaluate.epochs", "60", "--eps", "4/255,32/255",
    "--attack-images", "25",
)  # fmt: skip


@pytest.fixture(scope="module")
def attacked(
    finished_run: FinishedRun, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A student of the tiny run's set, under two attacks."""
    out = tmp_path_factory.mktemp("attacked") / "out"
    assert typed(finished_run.out, out, *ATTACKED, "--attacks", "pgd,mim") == 0
    return out


@pytest.mark.slow
def test_students_are_attacked_on_as_many_images_of_each_class_and_the_results_are_sealed(
    attacked: Path,
) -> None:
    found = results(attacked)["attacks"]
    assert (found["images"], found["images_asked"], found["contradictions"]) == (25, 25, [])
    sample = safetensors.numpy.load_file(attacked / "attacked" / "images.safetensors")
    assert sorted(np.bincount(sample["labels_N"], minlength=10).tolist()) == [2] * 5 + [3] * 5
    loaded = load_images(open_source("digits", SOURCE, split="val"), SOURCE, 1 << 24)
    assert loaded is not None
    label_of = {image.tobytes(): label for label, image in zip(loaded[1], loaded[2], strict=True)}
    drawn = [label_of[image.tobytes()] for image in sample["images_NHWC"]]
    assert drawn == sample["labels_N"].tolist()
    rows = found["table"]
    assert [row["eps"] for row in rows] == ["4/255", "32/255"]
    for row in rows:
        assert (row["student"], row["row"], row["labels"]) == ("convnet3", "distilled", "soft")
        assert row["worst"]["mean"] <= min(row["pgd"]["mean"], row["mim"]["mean"])
        assert row["pgd"]["mean"] <= row["clean"]["mean"] and len(row["pgd"]["values"]) == 1
    assert rows[1]["worst"]["mean"] < rows[0]["worst"]["mean"]
    # The accuracy without an attack is that of the stored student.
    flags = json.loads(
        (attacked / "convnet3-pgd-4of255/images/distilled-soft-s000-000.json").read_text()
    )
    assert np.mean(flags["clean"]) == rows[0]["clean"]["mean"]
    assert abs(rows[0]["clean"]["mean"] - top1(attacked)["distilled", "soft"][0]) < 0.3


@pytest.mark.slow
def test_another_attack_or_a_lost_unit_leaves_what_is_there_alone(
    attacked: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(attacked, tmp_path / "out")
    lost = out / "convnet3-mim-4of255"
    before = (lost / "images" / "distilled-soft-s000-000.json").read_bytes()
    for key in ("stage.json", "units/distilled-soft-s000-000.json", "images/distilled-soft-s000-000.json"):  # fmt: skip
        (lost / key).unlink()
    kept = {
        p: p.stat().st_mtime_ns
        for room in ("convnet3", "attacked", "convnet3-pgd-4of255", "convnet3-mim-32of255")
        for p in (out / room).rglob("*.json")
    }
    assert typed(finished_run.out, out, *ATTACKED, "--attacks", "pgd", "mim", "cw") == 0
    assert (lost / "images" / "distilled-soft-s000-000.json").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    old, new = (results(o)["attacks"]["table"] for o in (attacked, out))
    for one, other in zip(old, new, strict=True):
        assert one == {name: value for name, value in other.items() if not name.startswith("cw")}
        assert other["cw"]["mean"] <= other["clean"]["mean"]
    said = capsys.readouterr().out
    assert "| student | trained on | labels | eps | clean | PGD-100 | CW (L2) | MIM | worst case |" in said  # fmt: skip
    assert "25 held-out images" in said


@pytest.mark.slow
def test_without_attacks_nothing_is_told_of_them(ours: Path) -> None:
    assert "attacks" not in results(ours)
    assert sorted(p.name for p in (ours / "convnet3" / "students").iterdir())[:1] == [
        "all_real-hard-s000.safetensors"
    ]


@pytest.mark.slow
def test_contradicting_results_are_kept_and_marked(
    attacked: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def misled(
        name: str, network: object, images: np.ndarray, *_: object, **__: object
    ) -> Attacked:
        """An AutoAttack that finds nothing."""
        right = np.ones(len(images), dtype=bool)
        return Attacked(
            clean_N=right, robust_N=right, change_N=np.zeros(len(images)), notes=("no gradient",)
        )

    out = shutil.copytree(attacked, tmp_path / "out")
    monkeypatch.setattr(attacking, "attack", misled)
    assert typed(finished_run.out, out, *ATTACKED, "--attacks", "pgd,mim,autoattack") == 0
    found = results(out)["attacks"]
    told = {(c["what"], c["eps"]): c["suspect"] for c in found["contradictions"]}
    assert told["AutoAttack exceeds PGD-100", "32/255"] is True
    assert found["library_notes"] == {
        "no gradient": ["convnet3 distilled-soft-s000 autoattack"] * 2
    }
    worst = [row["worst"]["mean"] for row in found["table"]]
    assert worst == [row["worst"]["mean"] for row in results(attacked)["attacks"]["table"]]
    said = capsys.readouterr().out
    assert "100.0 ± 0.0 !" in said
    assert (
        "! AutoAttack exceeds PGD-100 at eps 32/255 in" in said and "believe the worst case" in said
    )


def test_a_sample_takes_all_of_small_classes_and_some_classes_where_there_are_more_than_images() -> (
    None
):
    val = Listed.of(open_source("digits", SOURCE, split="val"), SOURCE)
    _, few_N = draw_sample(val, 3, seed=1)
    _, all_N = draw_sample(val, 10_000, seed=1)
    assert len(set(few_N.tolist())) == 3
    assert len(all_N) == sum(1 for _, labels_N in val.chunks() for _ in labels_N)
    first, second = (draw_sample(val, 30, seed=seed)[0] for seed in (1, 2))
    np.testing.assert_array_equal(first, draw_sample(val, 30, seed=1)[0])
    assert (first != second).any()


@pytest.mark.parametrize("arguments", [[], ["--seeds", "3", "runs/x"]])
def test_the_uri_comes_first(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(arguments) == 2
    assert "expected the URI of a distilled set before all options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--attacks", "pgd", "--eps", ","),
            "--eps: expected at least one budget, as 8/255, got ','",
        ),
        (("--attacks", "pgd", "--eps"), "--eps: expected at least one budget, as 8/255, got ''"),
        (("--eps", "1/255,2/255,8/255"), "--eps: expected --attacks beside it"),
        (("--attack-images", "1000"), "--attack-images: expected --attacks beside it"),
        (
            ("--labels", "hard", "--evaluate.sinkhorn-weight", "0.3"),
            "--evaluate.sinkhorn-weight: expected 0 without soft labels",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused_with_the_one_they_contradict(
    options: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set/0").mkdir(parents=True)
    (tmp_path / "set/0/a.png").write_bytes(encode_png(np.zeros((8, 8, 1), np.uint8)))
    assert typed(tmp_path / "set", tmp_path / "out", "--val-data", "digits", *options) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_name_with_dataset_in_it_has_its_own_default_place() -> None:
    assert asked.default_out("s3://b/runs/fm-ipc10/dataset") == "runs/evaluate-fm-ipc10"
    assert asked.default_out("/data/other people/sre2l/") == "runs/evaluate-other-people-sre2l"


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real digits of every class in a tar shard, which can only be read through."""
    root = tmp_path_factory.mktemp("tars")
    loaded = load_images(open_source("digits", SOURCE, split="train"), SOURCE, 1 << 24)
    assert loaded is not None
    with tarfile.open(root / "train-0.tar", "w") as archive:
        for i in range(0, len(loaded[1]), 7):
            members = {"png": encode_png(loaded[2][i]), "cls": str(loaded[1][i]).encode()}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{i:05d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return root


@pytest.mark.parametrize("packed", [False, True], ids=["by key", "in passing"])
def test_random_real_images_are_of_their_class_distinct_and_the_same_for_a_seed(
    packed: bool, tars: Path
) -> None:
    source = open_source(str(tars) if packed else "digits", SOURCE, split="train")
    real = Listed.of(source, SOURCE)
    loaded = load_images(source, SOURCE, 1 << 24)
    assert loaded is not None
    label_of = {image.tobytes(): label for label, image in zip(loaded[1], loaded[2], strict=True)}
    classes_N = np.array([3, 3, 3, 0, 7, 7, 0])
    found = random_real(real, classes_N, seed=5)
    assert [label_of[image.tobytes()] for image in found] == classes_N.tolist()
    assert len({image.tobytes() for image in found}) == len(found)
    np.testing.assert_array_equal(found, random_real(real, classes_N, seed=5))
    assert (found != random_real(real, classes_N, seed=6)).any()
    with pytest.raises(DataError, match=r'class 3 \("3"\) has \d+ readable images, the distilled'):
        random_real(real, np.full(5000, 3), seed=5)


def test_whole_images_get_the_views_of_all_tiles_in_as_many_more_passes() -> None:
    stored = [draw_views(16, 8, ViewConfig(), seed=1, epoch=e) for e in range(2)]
    given = Given(
        images=np.zeros((16, 4, 4, 1), dtype=np.uint8),
        classes_N=np.repeat([0, 1], 8),
        weights_N=np.ones(16),
        tiles=2,
        stored=lambda epoch: (stored[epoch], None),
        label_epochs=2,
    )
    config = DistillConfig(relabel=RelabelConfig(epochs=300))
    shown = Input(2, 1, 8, (0.5,), (0.5,))
    sets = GivenSets(given, shown, None, None, config, torch.device("cpu"))
    seen = [sets._views(epoch) for epoch in range(8)]
    assert all(sorted(views.image_V.tolist()) == [0, 1, 2, 3] for views in seen)
    assert all(set(views.partner_V.tolist()) <= {0, 1, 2, 3} for views in seen)
    for epoch in range(2):
        crops = np.concatenate([views.crop_V4 for views in seen[4 * epoch : 4 * epoch + 4]])
        assert sorted(crops.tolist()) == sorted(stored[epoch].crop_V4.tolist())


@pytest.mark.parametrize(("side", "images"), [(16, 250), (32, 250), (64, 62), (224, 25)])
def test_the_slices_of_attacked_images_are_a_partition_and_smaller_for_larger_images(
    side: int, images: int
) -> None:
    config = DistillConfig(source=SourceConfig(image_size=side, resize=side))
    slices = slices_of(1001, config)
    assert [i for part in slices for i in range(1001)[part]] == list(range(1001))
    assert slices[0] == slice(0, images)
