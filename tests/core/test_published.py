"""Weights that others publish: by their metadata alone, for nothing is downloaded in tests."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
from typing import Any

import pytest
import timm
import torch
import torchvision

from wmdd_ray.config import NetworkConfig, SourceConfig
from wmdd_ray.core.networks import build_network, load_weights
from wmdd_ray.core.published import download, published
from wmdd_ray.errors import ConfigError, DataError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OWN_SCALING = ("googlenet", "inception_v3")
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("spec", "arch", "color", "sides", "interpolation"),
    [
        ("torchvision:resnet18", "resnet18", IMAGENET, (256, 224), "bilinear"),
        ("torchvision:ResNet18_Weights.IMAGENET1K_V1", "resnet18", IMAGENET, (256, 224), "bilinear"),
        ("torchvision:ResNet50_Weights.IMAGENET1K_V2", "resnet50", IMAGENET, (232, 224), "bilinear"),
        ("torchvision:mobilenet_v2", "mobilenet_v2", IMAGENET, (232, 224), "bilinear"),
        ("torchvision:swin_t", "swin_t", IMAGENET, (232, 224), "bicubic"),
        ("torchvision:EfficientNet_B3_Weights.IMAGENET1K_V1", "efficientnet_b3", IMAGENET, (320, 300), "bicubic"),
        ("timm:resnet50.a1_in1k", "timm:resnet50.a1_in1k", IMAGENET, (235, 224), "bicubic"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", HALF, (248, 224), "bicubic"),
    ],
)  # fmt: skip
def test_published_weights_bring_the_input_that_they_were_trained_with(
    spec: str, arch: str, color: Any, sides: tuple[int, int], interpolation: str
) -> None:
    about = published(spec)
    assert (about.arch, about.mean_C, about.std_C) == (arch, *color)
    assert (about.resize, about.crop, about.interpolation) == (*sides, interpolation)
    gray = SourceConfig(image_size=28, channels=1, mean=(0.5,), std=(0.5,), max_bad_images=3)
    source = about.source(gray)
    assert (source.resize, source.image_size, source.channels) == (*sides, 3)
    assert (source.mean, source.std, source.max_bad_images) == (*color, 3)


def test_torchvisions_own_preset_and_our_reading_agree_for_all_its_weights() -> None:
    models = torchvision.models
    for arch in models.list_models(module=models):
        for entry in models.get_model_weights(arch) if arch not in OWN_SCALING else ():
            preset: Any = entry.transforms()
            about = published(f"torchvision:{entry}")
            assert (about.arch, about.weights) == (arch, entry)
            assert [about.crop] == preset.crop_size and [about.resize] == preset.resize_size


def test_weights_are_downloaded_checked_and_fit_their_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build_network(
        NetworkConfig(arch="resnet18"), num_classes=1000, channels=3, image_size=224
    )
    asked: list[dict[str, Any]] = []

    def get_state_dict(_: object, **options: Any) -> dict[str, torch.Tensor]:
        asked.append(options)
        return network.state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    load_weights(network, download("torchvision:resnet18"), "resnet18")
    assert asked == [{"progress": False, "check_hash": True, "weights_only": True}]


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")]
)
def test_a_failed_download_is_a_data_error_that_names_the_address(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(DataError, match=r"https://download.*resnet18.*cannot be downloaded"):
        download("torchvision:resnet18")
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(DataError, match=r"arch timm:resnet18.a1_in1k"):
        download("timm:resnet18.a1_in1k")


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("torchvision:resnet19", "near to it: resnet1"),
        ("torchvision:ResNet18_Weights.NONE", "ResNet18_Weights.IMAGENET1K_V1"),
        ("torchvision:", "near to it: none"),
        ("torchvision:inception_v3", "near to it: "),
        ("timm:resnet50.a9_in1k", r"resnet50.\w+_in1k"),
        ("timm:hf-hub:somebody/something", "timm.list_pretrained"),
        ("timm:vit_base_patch16_clip_quickgelu_224.nothing", "near to it: "),
        ("timm:vit_base_patch16_siglip_224.webli", "without a last layer"),
        ("timm:coat_lite_medium_384.in1k", "crop mode squash"),
    ],
)
def test_unknown_published_weights_are_a_config_error_that_names_what_is_near(
    spec: str, near: str
) -> None:
    with pytest.raises(ConfigError, match=rf"--teacher {spec}.*{near}"):
        published(spec)


def test_nothing_of_timm_is_loaded_unless_it_is_asked_for() -> None:
    lines = (
        "import sys",
        "from wmdd_ray.config import NetworkConfig",
        "from wmdd_ray.core import networks, published",
        "published.published('torchvision:resnet18')",
        "networks.build_network(NetworkConfig(arch='resnet18'), num_classes=2, channels=1, image_size=32)",
        "assert 'torchvision' in sys.modules and 'timm' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
