"""`--data FOLDER` with nothing else, as a person types it: what is chosen, told, recorded and kept."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import distill, doctor, evaluate, own_data
from jobs.evaluation import options
from tests.store.written_sources import write_parquet, write_webdataset
from wmdd_ray.product.pages.facts import command_of, read_run
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.store.documents import seal
from wmdd_ray.store.filesystem import Store

Said = pytest.CaptureFixture[str]
CLASSES = ("ant", "bee", "cat")
TINY = (
    "--ipc", "1", "--executor", "here", "--until", "squeeze", "--squeeze.epochs", "1", "--squeeze.network.width", "4",
    "--squeeze.min-top1", "0.01",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of twelve color pictures of 40 px, no held-out part."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "my photos" / name).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
            image.save(tmp_path / "my photos" / name / f"{i:02d}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my photos"


def test_a_folder_of_color_images_is_distilled_in_color_at_its_size(
    photos: Path, capsys: Said
) -> None:
    assert distill.main(["--data", str(photos), "--ipc", "1", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("auto: ")]
    assert [line.split()[1] for line in lines] == ["size", "color", "teacher", "images", "held"]
    assert "32 px: 40 px is the median shorter side of 36 sampled images" in lines[0]
    assert "[--source.image-size --source.resize]" in lines[0]
    assert "color, mean 0." in lines[1]
    assert (
        "convnet3 of width 128, 200 epochs in batches of 16, flips: as recipe cifar10" in lines[2]
    )
    assert "20% of each class: cut off by a hash" in lines[4]
    assert said[5] == "plan for runs/my-photos-ipc1" or said[5].endswith("/runs/my-photos-ipc1")
    assert not any(line.startswith("warning") for line in said)


def test_what_is_typed_wins_and_the_rest_follows_from_it(photos: Path) -> None:
    typed = ("--source.image-size", "64", "--source.channels", "1", "--squeeze.no-flip")
    job = distill.parse(["--data", str(photos), *typed, "--val-fraction", "0.5"])
    config = job.config
    assert (config.source.image_size, config.source.resize, config.source.channels) == (64, 64, 1)
    assert len(config.source.mean) == 1
    assert config.squeeze.network.arch == "resnet18"
    assert (config.squeeze.flip, config.recover.flip, config.val_fraction) == (False, True, 0.5)
    assert "with your --source.image-size" in job.told[0]
    assert "no flips: with your --squeeze.no-flip; else" in job.told[2]
    assert "50% of each class: with your --val-fraction" in job.told[4]


def test_the_recipes_by_name_and_the_digits_are_as_they_were(photos: Path) -> None:
    assert distill.parse(["--ipc", "3"]).config.recipe == "digits"
    assert distill.parse(["--data", "digits"]).config.recipe == "digits"
    named = distill.parse(["--data", str(photos), "--recipe", "tiny_imagenet"])
    assert (named.config.source.image_size, named.auto, named.told) == (64, None, ())


def test_a_published_teacher_brings_its_input(photos: Path) -> None:
    job = distill.parse(["--data", str(photos), "--teacher", "torchvision:resnet18"])
    source = job.config.source
    assert (source.image_size, source.resize, source.mean) == (224, 256, (0.485, 0.456, 0.406))
    assert job.config.squeeze.network.arch == "resnet18"
    assert "224 px: as torchvision:resnet18 was trained" in job.told[0]


def test_help_looks_at_no_images(capsys: Said) -> None:
    with pytest.raises(SystemExit) as ended:
        distill.main(["--data", "/nowhere/at/all", "--help"])
    assert ended.value.code == 0 and "--help-source" in capsys.readouterr().out


@pytest.mark.slow  # all stages
def test_the_set_names_no_machine_and_is_evaluated_on_the_images_that_were_cut_off(
    photos: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "zaphods-machine")
    quick = [
        *TINY[:4], *TINY[6:], "--recover.iterations", "2", "--relabel.epochs", "2", "--evaluate.epochs", "2",
        "--evaluate.num-seeds", "1", "--evaluate.network.width", "4", "--evaluate.labels", "soft",
        "--evaluate.baselines", "random_real",
    ]  # fmt: skip
    assert distill.main(["--data", str(photos), *quick]) == 0
    said = capsys.readouterr().out
    assert "24 files seen" not in said and "36 files seen = 30 read + 6 passed over" in said
    asked = options.parse(
        ["runs/my-photos-ipc1", "--data", str(photos), "--baselines", "random_real"], None
    )
    run = evaluate.open_run(asked)
    assert (asked.config.val_fraction, asked.config.data) == (0.2, str(photos))
    assert (run.source("real").num_images, run.source("val").num_images) == (30, 6)
    elsewhere = options.parse(["runs/my-photos-ipc1", "--val-data", str(photos)], None)
    assert elsewhere.config.val_fraction is None
    # Below the folder of a user, by whose name pytest calls it.
    made = [path for path in Path("runs/my-photos-ipc1/dataset").rglob("*") if path.is_file()]
    assert {"stage.json", "manifest.json", "README.md"} <= {path.name for path in made}
    for path in made:
        for name in ("zaphods-machine", str(photos.parent), str(Path.home())):
            assert name.encode() not in path.read_bytes(), (name, path)
    assert b"zaphods-machine" in Path("runs/my-photos-ipc1/teacher/stage.json").read_bytes()
    followed = options.parse(["runs/my-photos-ipc1", "--follow-data"], None)
    assert followed.config.data == str(photos)


def test_auto_without_data_is_refused(capsys: Said) -> None:
    assert distill.main(["--recipe", "auto"]) == 2
    assert "auto with --data" in capsys.readouterr().err


def test_a_resumed_run_takes_what_was_measured_from_its_record(
    photos: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--data", str(photos), *TINY]
    assert distill.main(command) == 0
    first = capsys.readouterr().out
    record = json.loads(Path("runs/my-photos-ipc1/run.json").read_text())
    assert record["auto"]["measured"]["shorter_side"] == 40
    with monkeypatch.context() as patched:
        patched.setattr(own_data, "measure", lambda *_, **__: pytest.fail("measured again"))
        # Another machine, with a GPU: what was chosen stays.
        patched.setattr("torch.cuda.is_available", lambda: True)
        assert distill.main([*command, "--executor", "here"]) == 0
        again = capsys.readouterr()
        assert "found committed" in again.err
        assert again.out.splitlines()[:5] == first.splitlines()[:5]
        (photos / "ant" / "new.png").write_bytes((photos / "ant" / "00.png").read_bytes())
        assert distill.main(command) == 2
        assert "another version of its input data" in capsys.readouterr().err
    command_again = shlex.split(
        command_of(read_run(Store("runs/my-photos-ipc1"), PIPELINE, None)).replace("\\\n", " ")
    )
    assert f"--data {photos}" in " ".join(command_again)
    assert "--squeeze.epochs" in command_again and "--recover.iterations" not in command_again
    # Asked for another size, it looks again.
    other = distill.parse([*command, "--source.image-size", "28", "--ipc", "1"])
    assert other.auto is not None and other.auto.measured.num_images == 37


@pytest.mark.parametrize(
    ("address", "typed", "cluster", "driver", "expected"),
    [
        ("head:6379", (), 8.0, False, True),  # a driver without a GPU
        ("head:6379", (), 0.0, True, False),  # one that has the only GPU, on workers without
        ("head:6379", ("--num-workers", "0"), 8.0, False, False),
        ("head:6379", ("--executor", "here"), 0.0, True, True),
        ("head:6379", ("--gpus-per-worker", "1"), 0.0, False, True),  # nodes that are still to come
        ("", (), 8.0, False, False),
        ("", (), 0.0, True, True),
    ],
)
def test_a_gpu_is_one_that_the_workers_have(
    address: str, typed: tuple[str, ...], cluster: float, driver: bool, expected: bool, photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    joined: list[object] = []
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("torch.cuda.is_available", lambda: driver)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": cluster})
    monkeypatch.setattr("wmdd_ray.executors.cluster.connect", lambda out, **_: joined.append(out))
    job = distill.parse(["--data", str(photos), *typed])
    assert job.auto is not None and job.auto.has_gpu == expected
    assert ("and a GPU" in job.told[2]) == expected
    assert joined == ([None] if address and not typed else [])


def test_what_prepare_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    store = Store(str(tmp_path / "prepared"))
    for split in ("train", "validation"):
        write_parquet(store, split)
    found = {
        "shorter_side": 64, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        "train": {"class_counts": [8, 8, 8]}, "validation": {"num_images": 24},
    }  # fmt: skip
    store.put("prepared.json", seal(found))
    monkeypatch.setattr(own_data, "measure", lambda *_, **__: pytest.fail("measured"))
    job = distill.parse(["--data", store.uri, "--out", str(tmp_path / "run")])
    assert (job.config.source.image_size, job.config.source.mean) == (64, (0.1, 0.2, 0.3))
    assert "all images (prepared.json)" in job.told[0]
    store.put("prepared.json", seal({**found, "validation": {"num_images": 0}}))
    assert distill.main(["--data", store.uri, "--out", str(tmp_path / "run")]) == 4
    assert "--val-fraction 0.05" in capsys.readouterr().err


def test_tar_shards_without_held_out_images_are_cut_and_stay_so_on_resume(
    tmp_path: Path, capsys: Said
) -> None:
    write_webdataset(Store(str(tmp_path / "rows")))
    typed = ["--data", str(tmp_path / "rows"), *TINY, "--out", str(tmp_path / "run")]
    assert distill.main(typed) == 0
    said = capsys.readouterr().out
    assert "for 3 classes of 8 images" in said and "held out  20% of each class: cut off" in said
    commit = (tmp_path / "run/teacher/stage.json").read_bytes()
    typed[typed.index("squeeze")] = "features"
    assert distill.main(typed) == 0
    assert "18 images + 0 bad + 6 members passed over" in capsys.readouterr().out
    assert (tmp_path / "run/teacher/stage.json").read_bytes() == commit
    facts = read_run(Store(str(tmp_path / "run")), PIPELINE, None)
    assert facts.metrics("features")["class_counts"] == [6, 6, 6]


def test_a_class_smaller_than_ipc_is_refused_with_what_helps(photos: Path, capsys: Said) -> None:
    (photos / "ant" / "notes.pdf").write_bytes(b"x")
    assert distill.main(["--data", str(photos), *TINY[2:], "--ipc", "1", "--dry-run"]) == 0
    assert (
        "training images: 1 files passed over [1 x .pdf in ant/ (no image: ant/notes.pdf)]"
        in capsys.readouterr().out
    )
    for asked in (["--dry-run"], []):
        assert distill.main(["--data", str(photos), *TINY[2:], "--ipc", "11", *asked]) == 4
        said = capsys.readouterr()
        assert 'class 0 ("ant") has 10 images but ipc is 11; lower --ipc' in said.err
        assert "plan for" not in said.out


@pytest.mark.parametrize("write", [write_parquet, write_webdataset])
def test_of_rows_and_samples_too_it_is_refused_before_a_teacher_is_trained(
    write: Callable[[Store], None], tmp_path: Path, capsys: Said
) -> None:
    write(Store(str(tmp_path / "rows")))
    asked = [
        "--data",
        str(tmp_path / "rows"),
        *TINY[2:],
        "--ipc",
        "7",
        "--out",
        str(tmp_path / "r"),
    ]
    assert distill.main(asked) == 4
    assert 'class 0 ("ant") has 6 images but ipc is 7; lower --ipc' in capsys.readouterr().err
    assert not (tmp_path / "r/teacher/units").exists()


def test_the_plan_and_the_doctor_warn_of_a_recipe_for_other_images(
    photos: Path, capsys: Said
) -> None:
    wrong = [
        *("--data", str(photos), "--val-fraction", "0.2", "--recipe", "digits", "--ipc", "1"),
        *("--source.format", "auto", "--out", "run"),
    ]
    assert distill.main([*wrong, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "warning: images of 40 px shrink to 16 px, 1/2; leave --recipe out, or set" in said
    assert "warning: colors are dropped; set --source.channels 3" in said
    assert doctor.main([*wrong, "--no-cluster"]) == 0
    said = capsys.readouterr().out
    assert "train: images of 40 px shrink to 16 px, 1/2" in said
    assert "2 warnings" in said


def test_the_doctor_says_of_images_that_cannot_be_measured_why_and_nothing_of_a_recipe(
    tmp_path: Path, capsys: Said
) -> None:
    (tmp_path / "set" / "ant").mkdir(parents=True)
    (tmp_path / "set" / "ant" / "note.txt").write_text("x")
    typed = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "run"), "--no-cluster"]
    assert doctor.main(typed) == 4
    said = capsys.readouterr().out
    assert "recipe auto, not chosen" in said and "cifar10" not in said.partition(", --data")[0]
    assert said.count("FAIL") == 1 and "FAIL     auto " in said
    assert "skipped  plan         needs data" in said


def test_the_doctor_tells_what_auto_chose(photos: Path, capsys: Said) -> None:
    assert doctor.main(["--data", str(photos), "--ipc", "1", "--no-cluster", "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert said.count("ok       auto ") == 5
    assert "train: 30 images" in said and "val: 6 images" in said
    assert "ready to run, 0 warnings" in said


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("/a/tiny-imagenet-200", "tiny-imagenet-200"),
        ("/a/tiny-imagenet-200/", "tiny-imagenet-200"),
        ("/a/my photos/train", "my-photos"),
        ("s3://bucket/sets/flowers", "flowers"),
        ("s3://bucket", "bucket"),
        ("s3://b/sets/x/train-{000..012}.tar", "x"),
        ("/a/labels.csv", "labels"),
        ("/", "data"),
    ],
)
def test_a_run_is_named_after_its_data(data: str, name: str) -> None:
    assert own_data.name_of(data) == name
