from __future__ import annotations

import io
import pickle
import re
import urllib.error
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
import torchvision

from wmdd_ray.config import Arch, NetworkConfig
from wmdd_ray.core.checkpoints import read_checkpoint, torchvision_weights
from wmdd_ray.core.networks import build_network, load_weights
from wmdd_ray.errors import ConfigError, DataError

STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Canary:
    """Unpickled by a careless reader, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "content",
    [
        safetensors.torch.save(STATE),
        saved(STATE),
        saved({"state_dict": STATE, "epoch": 3}),
        saved({"model": STATE, "optimizer": {"lr": 0.1}}),
        saved({f"module.{k}": v for k, v in STATE.items()}),
        saved({"model_state_dict": {f"module._orig_mod.{k}": v for k, v in STATE.items()}}),
    ],
    ids=["safetensors", "plain", "state_dict", "model", "data parallel", "compiled"],
)
def test_every_usual_way_to_save_weights_is_read(content: bytes) -> None:
    state = read_checkpoint(content, "a file")
    assert sorted(state) == sorted(STATE)
    for name, tensor in STATE.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("as_torch_file", [False, True])
def test_a_pickle_with_code_is_refused_and_never_run(tmp_path: Path, as_torch_file: bool) -> None:
    canary = tmp_path / "canary"
    content = {"state_dict": STATE, "extra": Canary(canary)}
    data = saved(content) if as_torch_file else pickle.dumps(content)
    with pytest.raises(
        DataError, match="checkpoint evil.pt: expected safetensors, or a torch file"
    ):
        read_checkpoint(data, "evil.pt")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary itself must sing"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint",
        saved(STATE)[:-200],
        safetensors.torch.save(STATE)[:-4],
        b"\xff" * 7 + b"\x7f{",
    ],
    ids=["empty", "text", "cut torch file", "cut safetensors", "absurd header length"],
)
def test_damaged_bytes_are_a_data_error(content: bytes) -> None:
    with pytest.raises(DataError, match="cannot be read as such"):
        read_checkpoint(content, "a file")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([torch.ones(1)], "got list"),
        ({}, "an empty mapping"),
        ({"a": torch.ones(1), "epoch": 3}, "a mapping with 'epoch': int"),
    ],
)
def test_files_without_weights_are_a_data_error(content: object, got: str) -> None:
    with pytest.raises(DataError, match=re.escape(got)):
        read_checkpoint(saved(content), "a file")


def test_a_prefix_is_kept_when_only_some_names_have_it() -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(read_checkpoint(saved(state), "a file")) == ["module.a", "b"]


@pytest.mark.parametrize(
    ("name", "arch", "resize"),
    [
        ("resnet18", "resnet18", 256),
        ("ResNet18_Weights.IMAGENET1K_V1", "resnet18", 256),
        ("ResNet50_Weights.IMAGENET1K_V2", "resnet50", 232),
        ("mobilenet_v2", "mobilenet_v2", 232),
    ],
)
def test_published_weights_bring_all_that_a_teacher_needs(
    monkeypatch: pytest.MonkeyPatch, name: str, arch: Arch, resize: int
) -> None:
    network = build_network(NetworkConfig(arch=arch), num_classes=1000, channels=3, image_size=224)
    asked: list[dict[str, Any]] = []

    def download(_: object, **options: Any) -> dict[str, torch.Tensor]:
        asked.append(options)
        return network.state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", download)
    found, state, class_names, mean, std, got_resize, crop = torchvision_weights(name)
    assert (found, got_resize, crop) == (arch, resize, 224)
    assert (mean, std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert class_names[:2] == ("tench", "goldfish")
    assert len(class_names) == 1000
    assert asked == [{"progress": False, "check_hash": True, "weights_only": True}]
    load_weights(network, state, name)


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")]
)
def test_a_failed_download_is_a_data_error_that_names_the_address(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", download)
    with pytest.raises(DataError, match=r"https://download.*resnet18.*cannot be downloaded"):
        torchvision_weights("resnet18")


@pytest.mark.parametrize("name", ["resnet19", "vgg16", "ResNet18_Weights.NONE", ""])
def test_unknown_published_weights_are_a_config_error_with_the_choices(name: str) -> None:
    with pytest.raises(
        ConfigError, match="expected one of resnet18, ResNet18_Weights.IMAGENET1K_V1"
    ):
        torchvision_weights(name)


def test_torchvision_has_weights_of_every_architecture_but_our_own() -> None:
    with pytest.raises(ConfigError) as caught:
        torchvision_weights("")
    for arch in set(get_args(Arch)) - {"convnet3", "vit_tiny"}:
        assert arch in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refused_pickle_is_refused_for_the_class_that_it_wants(zipped: bool) -> None:
    sink = io.BytesIO()
    torch.save({"a": Fraction(1, 2)}, sink, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError) as refused:
        read_checkpoint(sink.getvalue(), "a file")
    assert "GLOBAL fractions.Fraction was not an allowed global by default)" in str(refused.value)
    assert "two options" not in str(refused.value) and "\x1b" not in str(refused.value)
