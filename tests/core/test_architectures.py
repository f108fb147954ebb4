"""Architectures by name: ours, torchvision's, timm's and the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from wmdd_ray.config import EvaluateConfig, NetworkConfig, RecoverConfig, ViewConfig
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.networks import batch_norms, build_network, last_linear
from wmdd_ray.core.synthesis import ClassTarget, recover_group
from wmdd_ray.core.teacher_check import check_teacher
from wmdd_ray.core.training import train_student
from wmdd_ray.core.views import draw_views
from wmdd_ray.errors import ConfigError
from wmdd_ray.records import ClassImages

STUDENTS = (
    *("resnet50", "resnet101", "mobilenet_v2", "swin_t", "convnext_tiny", "convnet6"),
    *("resnetap10", "timm:vit_tiny_patch16_224", "timm:vit_small_patch16_224"),
)


def build(arch: str, **options: Any) -> nn.Module:
    shape: dict[str, Any] = {"num_classes": 5, "channels": 3, "image_size": 32}
    shape |= {name: options.pop(name) for name in tuple(options) if name in shape}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(NetworkConfig(arch=arch, **{"width": 4} | options), **shape)


def sides(network: nn.Module, image_size: int = 32) -> list[int]:
    """Return the sides of what the layers with kernels give, in the order of the forward pass."""
    seen: list[int] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            module.register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
    network.eval()(torch.zeros(1, 3, image_size, image_size))
    return seen


@pytest.mark.parametrize("arch", STUDENTS)
def test_networks_of_the_literature_train_as_students(arch: str) -> None:
    side = 64 if arch == "convnet6" else 32
    network = build(arch, image_size=side, small_stem=True)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.normal(size=(2, 3, side, side)), dtype=torch.float32)
    views = draw_views(2, side, ViewConfig(), seed=0, epoch=0)
    logits = rng.normal(size=(2, 5)).astype(np.float32)
    losses: list[float] = []
    train_student(
        network,
        images,
        lambda _: (views, logits),
        None,
        EvaluateConfig(batch_size=2),
        epochs=1,
        image_size=side,
        seed=0,
        on_epoch=lambda _, loss, __: losses.append(loss),
    )
    assert np.isfinite(losses).all() and len(losses) == 1
    still = [n for n, p in network.named_parameters() if torch.equal(p, before[n])]
    # A bias before a normalization has no gradient; nor has what a residual branch scales by zero, at first.
    assert len(still) < len(before) / 4, still


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v2"])
def test_the_first_networks_are_torchvisions_with_the_stem_of_old_to_the_bit(
    arch: str, small_stem: bool, channels: int
) -> None:
    network = build(arch, small_stem=small_stem, channels=channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected: Any = models.get_model(arch, weights=None, num_classes=5)
        first = expected.features[0][0] if arch == "mobilenet_v2" else expected.conv1
        kernel = 3 if small_stem else first.kernel_size[0]
        stride = 1 if small_stem else 2
        new = nn.Conv2d(channels, first.out_channels, kernel, stride, kernel // 2, bias=False)
        if small_stem or channels == 1 or arch == "mobilenet_v2":
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            if arch == "mobilenet_v2":
                expected.features[0][0] = new
            else:
                expected.conv1 = new
        if small_stem and arch != "mobilenet_v2":
            expected.maxpool = nn.Identity()
    assert repr(network) == repr(expected)
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert network.training


@pytest.mark.parametrize(
    ("arch", "usual", "small"),
    [
        ("resnet34", [16, 8, 8], [32, 32, 32]),
        ("densenet121", [16, 8, 8], [32, 32, 32]),
        ("shufflenet_v2_x0_5", [16, 8, 4], [32, 16, 16]),
        ("regnet_x_400mf", [16, 8, 16], [32, 16, 32]),
        ("timm:resnet18", [16, 8, 8], [32, 32, 32]),
        ("timm:resnet26d", [16, 16, 16, 8], [32, 32, 32, 32]),
        ("timm:efficientnet_b0", [16, 16, 1, 1, 16], [32, 32, 1, 1, 32]),
        ("timm:mobilenetv2_100", [16, 16, 16], [32, 32, 32]),
    ],
)
def test_a_small_stem_keeps_the_resolution_where_the_first_convolution_is_strided(
    arch: str, usual: list[int], small: list[int]
) -> None:
    assert sides(build(arch))[: len(usual)] == usual
    assert sides(build(arch, small_stem=True))[: len(small)] == small


@pytest.mark.parametrize("arch", ["swin_t", "timm:convnext_atto", "timm:vit_tiny_patch16_224"])
def test_networks_without_a_strided_stem_are_the_same_with_a_small_one(arch: str) -> None:
    plain, small = build(arch), build(arch, small_stem=True)
    torch.testing.assert_close(plain.state_dict(), small.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["swin_t", "timm:vit_tiny_patch16_224", "densenet121"])
def test_any_network_takes_gray_images(arch: str) -> None:
    network = build(arch, channels=1).eval()
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_a_convnet_of_n_blocks_halves_the_image_n_times() -> None:
    assert sides(build("convnet5")) == [32, 16, 8, 4, 2]
    with pytest.raises(ConfigError, match=r"convnet6 halves the image 6 times: .*>= 64 pixels"):
        build("convnet6")


@pytest.mark.parametrize(
    ("image_size", "small_stem", "first"),
    [(64, False, [64, 64, 64]), (96, False, [96, 48]), (224, False, [224, 56]), (96, True, [96, 96])],
)  # fmt: skip
def test_resnetap10_pools_where_a_resnet_strides(
    image_size: int, small_stem: bool, first: list[int]
) -> None:
    network = build("resnetap10", image_size=image_size, small_stem=small_stem)
    assert all(m.stride == (1, 1) for m in network.modules() if isinstance(m, nn.Conv2d))
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 1 + 8 + 3
    seen = sides(network, image_size)
    assert seen[: len(first)] == first
    # The last block's two convolutions, and its shortcut before the pooling.
    assert seen[-3:] == [first[-1] // 4, first[-1] // 8, first[-1] // 4]
    # The literature counts 4.9 million parameters of ResNet-10 without its classifier.
    counted = sum(p.numel() for n, p in network.named_parameters() if not n.startswith("fc"))
    assert abs(counted / 4.9e6 - 1) < 0.01
    check_teacher(network, channels=3, image_size=image_size, needs_norms=True)


@pytest.mark.parametrize("arch", ["convnet4", "resnetap10"])
def test_instance_norm_is_to_be_had_of_our_own_networks_alone(arch: str) -> None:
    assert batch_norms(build(arch, norm="instance")) == []
    with pytest.raises(
        ConfigError, match="--norm: expected batch, the only one that convnext_tiny"
    ):
        build("convnext_tiny", norm="instance")


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet19", {}, r"arch resnet19: expected convnetN .*you trust: it is run.*near to it: resnet1"),
        ("convnet0", {}, r"near to it: .*convnet3"),
        ("fcn_resnet50", {}, "a classifier of torchvision"),
        ("quantized_resnet50", {}, "a classifier of torchvision"),
        ("timm:resnet19", {}, r"timm.list_models\(\); near to it: resnet1"),
        ("timm:hf-hub:somebody/something", {}, r"timm.list_models\(\)"),
        ("vit_b_32", {"image_size": 48}, "arch vit_b_32 for images of 3 x 48 x 48 px: .*indivisible by patch"),
        ("inception_v3", {}, "arch inception_v3 for images of 3 x 32 x 32 px: RuntimeError"),
        ("timm:tf_efficientnet_b0", {"small_stem": True}, "Conv2dSame conv_stem; leave small_stem out"),
        ("no_such_module:net", {}, "no_such_module:net: expected module:function of your own code"),
        ("torch.nn:no_such", {}, "has no attribute 'no_such'"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_had_is_a_config_error_with_the_reason(
    arch: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(arch, **options)


def test_a_vision_transformer_is_a_teacher_without_the_moment_term() -> None:
    network = build("vit_tiny", channels=1, image_size=16).eval()
    check_teacher(network, channels=1, image_size=16, needs_norms=False)
    nn.init.normal_(last_linear(network).weight, std=0.1)
    labels_N = np.repeat([0, 1], 3)
    images = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    features_ND, moments = features_and_moments(network, images, labels_N, batch_size=4)
    assert features_ND.shape == (6, 128)
    assert [moments[label].mean_S.shape for label in (0, 1)] == [(0,), (0,)]
    nothing = np.zeros(0)
    targets = [
        ClassTarget(
            label=label,
            atoms_KD=features_ND[labels_N == label][:2],
            weights_K=np.full(2, 0.5),
            mean_S=nothing,
            var_S=nothing,
        )
        for label in (0, 1)
    ]

    def recovered(moments: Any) -> list[ClassImages]:
        config = RecoverConfig(iterations=20, moments=moments, start="noise", roll_px=0)
        color: dict[str, Any] = {"channels": 1, "mean_C": (0.5,), "std_C": (0.25,)}
        return recover_group(network, targets, config, image_size=16, seed=0, device="cpu", **color)

    curves = [images.curves["feature"] for images in recovered("none")]
    assert all(curve[-1] < 0.8 * curve[0] for curve in curves), curves
    for wanted in ("per_class", "global"):
        with pytest.raises(ConfigError, match="VisionTransformer without any.*moments none"):
            recovered(wanted)


OWN = """
import torch
from torch import nn

def net(*, num_classes, channels, image_size):
    return nn.Sequential(nn.Conv2d(channels, 4, 5, 2, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))

def even(*, num_classes, channels, image_size):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 1, 1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))

def wrong_classes(*, num_classes, channels, image_size):
    return net(num_classes=num_classes + 1, channels=channels, image_size=image_size)

def dictionary(**shape):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(**shape)
        def forward(self, images):
            return {"logits": self.inner(images)}
    return Wrapped()

def number(**shape):
    return 3

def hidden_pool(*, num_classes, channels, image_size):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, num_classes, 1)
        def forward(self, images):
            return self.two(torch.max_pool2d(self.one(images), 2)).mean(dim=(2, 3))
    return Hidden()

def broken(**shape):
    raise KeyError("no such thing")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    (tmp_path / "own_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, **options: build(f"own_nets:{name}", **options)


def test_a_function_of_the_users_own_makes_the_network(own: Callable[..., nn.Module]) -> None:
    network = own("net", channels=1)
    assert network.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    check_teacher(network, channels=1, image_size=32, needs_norms=True)
    assert sides(own("net"))[0] == 16
    assert sides(own("net", small_stem=True))[0] == 32
    assert sides(own("even", small_stem=True)) == [32, 16], "a stem that is not strided stays"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wrong_classes", {}, r"own_nets:wrong_classes: .*logits of shape \(2, 5\), got \(2, 6\)"),
        ("dictionary", {}, r"logits of shape \(2, 5\), got dict"),
        ("number", {}, "a function that returns a torch.nn.Module, got int"),
        ("broken", {}, "own_nets:broken for images of 3 x 32 x 32 px: KeyError: 'no such thing'"),
        ("hidden_pool", {"small_stem": True}, "between one and two something that is no layer"),
    ],
)
def test_a_function_of_the_users_own_that_makes_no_classifier_is_refused(
    own: Callable[..., nn.Module], name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        own(name, **options)
