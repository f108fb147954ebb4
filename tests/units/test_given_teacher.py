"""Teachers that are given: published weights come with their input, and another is refused by the names of its options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jobs import distill
from wmdd_ray.config import NetworkConfig, SourceConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.units import given_teacher
from wmdd_ray.units.given_teacher import given_network

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
