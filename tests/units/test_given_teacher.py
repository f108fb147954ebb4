"""Teachers that are given: published weights come with their input, and another is refused by the names of its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs import distill
from wmdd_ray.config import NetworkConfig, SourceConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units import given_teacher
from wmdd_ray.units.given_teacher import check_names, given_network
from wmdd_ray.units.teacher import commit_teacher

NAMES = tuple(f"{label:04d}" for label in range(1000))


def test_the_input_of_published_weights_is_the_default_of_a_run_with_them() -> None:
    source = distill.parse(["--teacher", "timm:vit_tiny_patch16_224", "--ipc", "1"]).config.source
    assert (source.image_size, source.resize, source.interpolation) == (224, 248, "bicubic")
    assert (source.channels, source.mean, source.std) == (3, (0.5,) * 3, (0.5,) * 3)
    chosen = ["--teacher", "torchvision:swin_t", "--source.resize", "256"]
    assert distill.parse(chosen).config.source.resize == 256
    assert distill.parse(["--ipc", "1"]).config.source == recipe_of("digits", 1, "best").source


def test_another_input_than_that_of_published_weights_is_refused_before_their_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(given_teacher, "download", lambda _: pytest.fail("downloaded"))
    config = recipe_of("imagenet1k", 10, "best")
    with pytest.raises(ConfigError) as caught:
        given_network(config, "torchvision:ResNet50_Weights.IMAGENET1K_V2", NAMES)
    assert str(caught.value) == (
        "--teacher torchvision:ResNet50_Weights.IMAGENET1K_V2: these weights expect --source.resize 232 (is 256)"
    )
    gray = replace(config, source=SourceConfig(channels=1, mean=(0.5,), std=(0.5,)))
    with pytest.raises(ConfigError, match=r"--source.mean 0.5 0.5 0.5 \(is 0.5\), --source.std"):
        given_network(gray, "timm:vit_tiny_patch16_224", NAMES)


def test_a_committed_teacher_of_another_input_is_refused_by_the_names_of_the_options(
    tmp_path: Path,
) -> None:
    config = recipe_of("digits", 1)
    shape = config.source.shape
    network = build_network(config.squeeze.network, num_classes=1000, **shape)
    room = Room(Store(str(tmp_path)), "teacher", "run")
    attempt = room.begin("teacher")
    assert attempt is not None
    commit_teacher(attempt, config, config.squeeze.network, network, NAMES, 0.9, {})
    about = {"stage": "squeeze", "version": 1, "fingerprint": "f", "options": {}, "inputs": {}}
    room.commit(
        StageCommit(
            **about,
            units=room.read_units(["teacher"]),
            metrics={},
            seconds=1.0,
            host="",
            run="run",
            finished="",
        )
    )
    given_network(config, str(tmp_path), NAMES)
    other = replace(config.source, mean=(0.25,), exif_orientation=False)
    with pytest.raises(
        ConfigError,
        match=r"expect --source.mean \S+ \(is 0.25\), --source.exif-orientation True \(is False\)",
    ):
        given_network(replace(config, source=other), str(tmp_path), NAMES)


def test_published_weights_fill_the_network_of_their_own_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    resnet = build_network(
        NetworkConfig(arch="resnet18"), num_classes=1000, channels=3, image_size=224
    )
    monkeypatch.setattr(given_teacher, "download", lambda _: resnet.state_dict())
    about, network = given_network(recipe_of("imagenet1k", 10, "best"), spec, NAMES)
    assert about == NetworkConfig(arch="resnet18")
    torch.testing.assert_close(network.state_dict(), resnet.state_dict(), rtol=0, atol=0)


def test_published_weights_of_other_classes_are_refused_before_their_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(given_teacher, "download", lambda _: pytest.fail("downloaded"))
    config = recipe_of("imagenet1k", 10, "best")
    with pytest.raises(DataError, match="its 1000 classes are not the data's 999; train it on"):
        given_network(config, "torchvision:resnet18", NAMES[1:])
    about, network = given_network(config, "torchvision:resnet18", NAMES, fetch=False)
    assert about.arch == "resnet18" and network.get_submodule("fc").out_features == 1000


def test_a_teacher_s_class_names_are_compared_as_they_look_and_told_apart_where_they_differ() -> (
    None
):
    composed, apart = ("bee", "\xe9clair"), ("bee", "e\u0301clair")
    check_names(composed, apart, "RUN")
    with pytest.raises(
        DataError, match=r"class 1: \('\u0435clair' \(\\u0435clair\)\) against \('eclair'\)"
    ):
        check_names(("bee", "\u0435clair"), ("bee", "eclair"), "RUN")
    with pytest.raises(DataError, match=r"its 1 classes .*2, first at class 1: \(\) against"):
        check_names(composed[:1], apart, "RUN")


def given(path: Path, *, width: int = 32, num_classes: int = 10) -> None:
    config = NetworkConfig(arch="convnet3", width=width)
    network = build_network(config, num_classes=num_classes, channels=1, image_size=16)
    save_file(network.state_dict(), path)


def test_a_checkpoint_in_the_root_folder_is_looked_for_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="found none of them .no such file"):
        given_network(recipe_of("digits", 10, "best"), "/elsewhere.pt", NAMES[:10])


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("garbage", 4, "expected safetensors, or a torch file with tensors only"),
        ("missing", 2, "or a checkpoint file, found none of them (no such file)"),
        ("folder", 2, "or a checkpoint file, found none of them (cannot read "),
        ("wide", 4, "do not fit the network: "),
        ("classes", 4, "do not fit the network: 2 of another shape: "),
        ("vit", 2, "expected a teacher with BatchNorm2d layers"),
    ],
)
def test_a_dry_run_says_of_a_given_teacher_what_the_run_says(
    kind: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / f"{kind}.safetensors"
    typed = ["--ipc", "1", "--executor", "here", "--teacher", str(spec)]
    typed += ["--out", str(tmp_path / "run"), "--until", "squeeze"]
    if kind == "garbage":
        spec.write_bytes(b"<!DOCTYPE html>")
    elif kind == "folder":
        spec.mkdir()
    elif kind == "vit":
        arch = NetworkConfig(arch="vit_tiny")
        network = build_network(arch, num_classes=10, channels=1, image_size=16)
        save_file(network.state_dict(), spec)
        typed += ["--squeeze.network.arch", "vit_tiny"]
    elif kind != "missing":
        given(spec, **({"width": 16} if kind == "wide" else {"num_classes": 9}))
    errors = []
    for dry in (["--dry-run"], []):
        assert distill.main([*typed, *dry]) == code
        errors.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert errors[0] == errors[1] and said in errors[0]


def test_a_dry_run_needs_a_given_teacher_until_it_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "good.safetensors"
    given(spec)
    typed = ["--ipc", "1", "--executor", "here", "--teacher", str(spec), "--squeeze.min-top1"]
    typed += ["0.01", "--squeeze.no-check-class-order", "--out", str(tmp_path / "run")]
    assert distill.main([*typed, "--dry-run"]) == 0
    assert distill.main([*typed, "--until", "squeeze"]) == 0
    spec.unlink()
    assert distill.main([*typed, "--dry-run"]) == 0
    capsys.readouterr()
    assert distill.main([*typed, "--squeeze.min-top1", "0.02", "--dry-run", "--overwrite"]) == 2
    assert "found none of them" in capsys.readouterr().err
