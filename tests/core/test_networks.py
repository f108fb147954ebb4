from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.networks import (
    batch_norms,
    build_network,
    features_and_logits,
    labeler_of,
    last_linear,
    load_weights,
    network_of,
    required_batch_norms,
    weights_of,
)
from wmdd_ray.core.teacher_check import check_teacher
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import Teacher

SMALL = NetworkConfig(arch="convnet3", width=4)


def build(config: NetworkConfig = SMALL, **options: Any) -> nn.Module:
    options = {"num_classes": 5, "channels": 3, "image_size": 16} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(config, **options).eval()


def checked(network: nn.Module, needs_norms: bool = True) -> None:
    """Check a teacher of color images of 32 px."""
    check_teacher(network, channels=3, image_size=32, needs_norms=needs_norms)


def teacher_of(network: nn.Module) -> Teacher:
    return Teacher(
        arch="convnet3",
        width=4,
        small_stem=False,
        class_names=tuple("abcde"),
        image_size=16,
        resize=16,
        channels=3,
        mean_C=(0.5,) * 3,
        std_C=(0.25,) * 3,
        top1=0.9,
        weights=weights_of(network),
    )


@pytest.mark.parametrize("arch", ["convnet3", "resnet18", "resnet50", "mobilenet_v2", "vit_tiny"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("small_stem", [False, True])
def test_every_architecture_takes_gray_and_color_images_with_either_stem(
    arch: Any, channels: int, small_stem: bool
) -> None:
    config = NetworkConfig(arch=arch, width=4, small_stem=small_stem)
    network = build(config, channels=channels, image_size=32)
    features_BD, logits_BY = features_and_logits(network, torch.zeros(2, channels, 32, 32))
    assert logits_BY.shape == (2, 5)
    assert features_BD.shape == (2, last_linear(network).in_features)


@pytest.mark.parametrize(("arch", "usual_size"), [("resnet18", 8), ("mobilenet_v2", 16)])
def test_the_small_stem_keeps_the_resolution_up_to_the_first_block(
    arch: Any, usual_size: int
) -> None:
    sizes = {}
    for small_stem in (False, True):
        network = build(NetworkConfig(arch=arch, small_stem=small_stem), image_size=32)
        seen: list[torch.Size] = []
        batch_norms(network)[1].register_forward_hook(lambda *a, seen=seen: seen.append(a[2].shape))
        network(torch.zeros(1, 3, 32, 32))
        sizes[small_stem] = seen[0][-1]
    assert sizes == {False: usual_size, True: 32}


@pytest.mark.parametrize("arch", ["convnet3", "resnet18", "resnet50", "mobilenet_v2"])
def test_batch_norms_are_listed_in_forward_order(arch: Any) -> None:
    network = build(NetworkConfig(arch=arch, width=4), image_size=32)
    norms = batch_norms(network)
    called: list[nn.Module] = []
    for norm in norms:
        norm.register_forward_hook(lambda module, *_: called.append(module))
    network(torch.zeros(1, 3, 32, 32))
    assert [norms.index(module) for module in called] == list(range(len(norms)))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "vit_tiny"])
def test_small_gray_images_train_every_architecture(arch: Any) -> None:
    config = NetworkConfig(arch=arch, small_stem=True)
    network = build(config, channels=1, image_size=28).train()
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    network(images).logsumexp(dim=1).sum().backward()
    last_linear(network).weight.data.normal_(generator=torch.Generator().manual_seed(1))
    network(images).logsumexp(dim=1).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize(
    ("image_size", "patch"), [(8, 1), (16, 2), (28, 4), (32, 4), (64, 8), (224, 32), (37, 1)]
)
def test_the_vision_transformer_sees_about_seven_patches_a_side(
    image_size: int, patch: int
) -> None:
    network = build(NetworkConfig(arch="vit_tiny"), channels=1, image_size=image_size)
    proj = network.get_submodule("conv_proj")
    assert isinstance(proj, nn.Conv2d)
    assert proj.kernel_size == proj.stride == (patch, patch)
    # As torchvision draws the embedding of RGB patches: of standard deviation fan_in^-1/2, cut at 2 of ours.
    assert 0.8 < proj.weight.std().item() * patch < 1.2
    assert proj.bias is not None and not proj.bias.any()


def test_a_teacher_without_batch_norm_is_refused_by_the_name_of_the_option() -> None:
    vit = build(NetworkConfig(arch="vit_tiny"), image_size=32)
    assert batch_norms(vit) == []
    for refused in (required_batch_norms, checked):
        with pytest.raises(ConfigError, match=r"arch: .*VisionTransformer without.*moments none"):
            refused(vit)
    checked(vit, needs_norms=False)


def test_an_image_in_a_network_with_instance_norm_does_not_depend_on_its_company() -> None:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = build(NetworkConfig(arch="convnet3", width=4, norm="instance")).train()
    torch.testing.assert_close(network(images)[:2], network(images[:2]))
    network.eval()
    torch.testing.assert_close(network(images)[:2], network(images[:2] * 3), atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="BatchNorm"):
        required_batch_norms(network)


class Odd(nn.Module):
    """A network that keeps to no rule: what it does is told by its options."""

    def __init__(self, norm: nn.Module | None = None, calls: int = 1, scaled: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm is None else norm
        self.fc, self.calls, self.scaled = nn.Linear(4, 5), calls, scaled

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.conv(images)
        for _ in range(self.calls):
            values = self.norm(values)
        logits: torch.Tensor = self.fc(values.mean(dim=(2, 3)))
        return logits * 2 if self.scaled else logits


class Doubled(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("network", "lacks"),
    [
        (Odd(calls=0), "Odd, whose norm are passed never or more often"),
        (Odd(calls=2), "Odd, whose norm are passed never or more often"),
        (Odd(scaled=True), "logits are what its last Linear layer gives, got Odd"),
        (Odd(Doubled(4)), r"got .*Doubled, whose own forward pass"),
        (Odd(nn.BatchNorm2d(4, track_running_stats=False)), r"Odd.norm keeps no running moments"),
        (nn.Sequential(nn.Conv2d(3, 5, 32), nn.BatchNorm2d(5), nn.Flatten()), "last layer is Linear.*without any"),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Linear(32, 5)), "maps features of images"),
    ],
)  # fmt: skip
def test_what_a_teacher_lacks_is_told_before_it_is_trained(network: nn.Module, lacks: str) -> None:
    modes = [module.training for module in network.modules()]
    with pytest.raises(ConfigError, match=rf"--squeeze.network.arch: .*{lacks}"):
        checked(network)
    assert [module.training for module in network.modules()] == modes
    checked(Odd())


def test_features_are_the_differentiable_input_of_the_last_layer() -> None:
    network = build()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images.requires_grad_(True)
    features_BD, logits_BY = features_and_logits(network, images)
    torch.testing.assert_close(last_linear(network)(features_BD), logits_BY)
    (gradient,) = torch.autograd.grad(features_BD.sum(), images)
    assert gradient.abs().sum() > 0
    assert not last_linear(network)._forward_pre_hooks


def test_a_teacher_at_rest_comes_back_frozen_in_eval_mode_with_the_same_outputs() -> None:
    network = build()
    with torch.no_grad():
        for norm in batch_norms(network):
            norm.running_mean.add_(0.3)
    back = network_of(teacher_of(network))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(images), network(images))
    assert not any(m.training for m in back.modules())
    assert not any(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("arch", ["convnet3", "timm:swin_tiny_patch4_window7_224"])
def test_a_teacher_is_made_again_from_its_record_without_random_numbers(arch: str) -> None:
    size: dict[str, Any] = {"image_size": 32, "resize": 32}
    network = build(replace(SMALL, arch=arch), image_size=32)
    teacher = replace(teacher_of(network), arch=arch, **size)
    before = torch.get_rng_state()
    back = network_of(teacher)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Swin's table of relative positions is a buffer that is in no file.
    assert torch.equal(back(images), network(images))


def test_a_file_of_others_starts_no_code_that_is_not_imported_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "evil_nets.py").write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
        "from tests.core.test_networks import SMALL, build\n"
        "def net(**shape):\n    return build(SMALL, **shape)\n"
    )
    teacher = replace(teacher_of(build()), arch="evil_nets:net")
    with pytest.raises(ConfigError, match="evil_nets:net, which a file must not start"):
        labeler_of([teacher])
    assert not canary.exists()
    assert network_of(teacher, own_code=True)(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert canary.exists(), "the canary itself must sing"
    labeler_of([teacher])


def test_weights_are_copies() -> None:
    network = build()
    weights = weights_of(network)
    weights["fc.bias"][:] = 7
    assert not (last_linear(network).bias == 7).any()


def test_loading_names_missing_unexpected_and_mis_shaped_tensors() -> None:
    network = build()
    state = dict(network.state_dict())
    del state["bn1.weight"]
    state["head.bias"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(2, 2)
    with pytest.raises(DataError, match=r"weights of a\.pt .*1 missing: bn1\.weight") as caught:
        load_weights(network, state, "a.pt")
    assert "1 unexpected: head.bias" in str(caught.value)
    assert "fc.weight (2, 2) (expected (5, 16))" in str(caught.value)


def test_a_teacher_of_another_width_is_refused() -> None:
    with pytest.raises(DataError, match="check arch, width"):
        network_of(replace(teacher_of(build()), width=8))


def test_old_checkpoints_without_batch_counters_load() -> None:
    network, other = build(), build()
    state = network.state_dict()
    for name in [n for n in state if n.endswith("num_batches_tracked")]:
        del state[name]
    with torch.no_grad():
        last_linear(other).weight.zero_()
    load_weights(other, state, "old")
    assert torch.equal(last_linear(other).weight, last_linear(network).weight)


def test_half_precision_weights_are_loaded_as_float32() -> None:
    network = build()
    load_weights(network, {k: v.half() for k, v in network.state_dict().items()}, "half")
    assert last_linear(network).weight.dtype == torch.float32


def test_convnet3_refuses_images_that_it_cannot_halve_three_times() -> None:
    with pytest.raises(ConfigError, match="expected image_size >= 8 pixels, got 7"):
        build(image_size=7)


def test_weights_of_all_dtypes_survive_the_round_trip() -> None:
    weights = weights_of(build())
    assert weights["bn1.num_batches_tracked"].dtype == np.int64
    assert weights["conv1.weight"].dtype == np.float32
