"""Classifiers: how they are built, filled with weights, and opened up (features, BatchNorm layers).

Legend: B batch, C color channels, H W pixels, D feature width (input of the last Linear layer), Y classes.

References:
    Gidaris and Komodakis 2018 (ConvNet-3; BatchNorm in place of the literature's InstanceNorm in teachers, because the method
    matches BatchNorm moments). He et al. 2016 (ResNet). Sandler et al. 2018 (MobileNetV2). Dosovitskiy
    et al. 2021 (Vision Transformer, here a narrow one for small images).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.config import Arch, NetworkConfig
from wmdd_ray.core.checkpoints import first_names, read_checkpoint, torchvision_weights
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import Teacher

__all__ = [
    "batch_norms",
    "build_network",
    "features_and_logits",
    "labeler_of",
    "last_linear",
    "load_weights",
    "network_of",
    "read_checkpoint",
    "torchvision_weights",
    "weights_of",
]


def build_network(
    config: NetworkConfig, *, num_classes: int, channels: int, image_size: int
) -> nn.Module:
    """Return a classifier with random weights, drawn from torch's default generator (seed it before).

    `small_stem` puts a 3x3 stride-1 first convolution in place of the strided one, and drops the ResNets'
    max-pool; ConvNet-3 and the Vision Transformer have no stem and ignore it.

    Args:
        config: architecture, width and stem.
        num_classes: Y, outputs of the last Linear layer.
        channels: C of the input, 1 or 3.
        image_size: side of the square input, pixels; at least 8 for ConvNet-3, which halves it three times.

    Raises:
        ConfigError: the image is too small for the architecture.
    """
    if config.arch == "convnet3":
        return _convnet3(config, num_classes, channels, image_size)
    if config.arch == "vit_tiny":
        return _vit_tiny(num_classes, channels, image_size)
    # Here, because it brings the compiler: 1.8 s of every process that needs no network of its.
    from torchvision import models

    network: Any = models.get_model(config.arch, weights=None, num_classes=num_classes)
    if config.arch == "mobilenet_v2":
        stem = network.features[0]
        stem[0] = _stem(stem[0], channels, 1 if config.small_stem else 2, stem[0].kernel_size[0])
        return cast(nn.Module, network)
    if config.small_stem:
        network.conv1 = _stem(network.conv1, channels, stride=1, kernel=3)
        network.maxpool = nn.Identity()
    elif channels != network.conv1.in_channels:
        network.conv1 = _stem(network.conv1, channels, stride=2, kernel=7)
    return cast(nn.Module, network)


class _InstanceNorm(nn.InstanceNorm2d):
    """torch's, whose output keeps the input's memory format; torch's own is always contiguous, and slows all layers after it."""

    def forward(self, input: Tensor) -> Tensor:
        formed = input.is_contiguous(memory_format=torch.channels_last)
        output = super().forward(input)
        return output.contiguous(memory_format=torch.channels_last) if formed else output


def _convnet3(config: NetworkConfig, num_classes: int, channels: int, image_size: int) -> nn.Module:
    width, side = config.width, image_size // 8
    if side < 1:
        raise ConfigError(
            f"convnet3 halves the image three times: expected image_size >= 8 pixels, got {image_size}; "
            "raise --source.image-size or choose another --squeeze.network.arch"
        )
    network = nn.Sequential()
    for block in range(3):
        conv = nn.Conv2d(channels if block == 0 else width, width, 3, padding=1, bias=False)
        network.add_module(f"conv{block + 1}", conv)
        if config.norm == "batch":
            network.add_module(f"bn{block + 1}", nn.BatchNorm2d(width))
        else:
            network.add_module(f"in{block + 1}", _InstanceNorm(width, affine=True))
        network.add_module(f"relu{block + 1}", nn.ReLU(inplace=True))
        network.add_module(f"pool{block + 1}", nn.AvgPool2d(2))
    network.add_module("flatten", nn.Flatten())
    network.add_module("fc", nn.Linear(width * side * side, num_classes))
    return network


def _vit_tiny(num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Return a Vision Transformer on about 7 x 7 patches: 4 x 4 px of 28, 8 x 8 of 64, 32 x 32 of 224."""
    divisors = [d for d in range(1, image_size + 1) if image_size % d == 0]
    patch = min(divisors, key=lambda d: abs(d - image_size / 7))
    from torchvision import models

    network = models.VisionTransformer(
        image_size=image_size,
        patch_size=patch,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=256,
        num_classes=num_classes,
    )
    if channels != 3:
        # Torchvision's embeds RGB only; this one is initialized as torchvision does.
        network.conv_proj = nn.Conv2d(channels, 128, patch, patch)
        nn.init.trunc_normal_(network.conv_proj.weight, std=(channels * patch**2) ** -0.5)
        nn.init.zeros_(cast(nn.Parameter, network.conv_proj.bias))
    return network


def _stem(old: nn.Conv2d, channels: int, stride: int, kernel: int) -> nn.Conv2d:
    """Return a first convolution of the same width as `old`, initialized as torchvision does."""
    new = nn.Conv2d(channels, old.out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new


def last_linear(network: nn.Module) -> nn.Linear:
    """Return the layer that maps features to logits."""
    found = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert found, "network without a Linear layer"
    return found[-1]


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Return all BatchNorm2d layers in the order of the forward pass (= registration order in our networks).

    Raises:
        ConfigError: there are none, as in a Vision Transformer: it can be a student, but no teacher of ours.
    """
    found = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    if not found:
        raise ConfigError(
            "--squeeze.network.arch: expected a teacher with BatchNorm layers, whose moments the images are made to match, "
            f"got {type(network).__name__} without any; choose another architecture for the teacher"
        )
    return found


def features_and_logits(network: nn.Module, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return (features_BD, logits_BY), both differentiable; features are the input of the last Linear layer."""
    caught: list[Tensor] = []
    handle = last_linear(network).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        logits_BY = network(images_BCHW)
    finally:
        handle.remove()
    return caught[0], logits_BY


def network_of(teacher: Teacher, device: torch.device | str = "cpu") -> nn.Module:
    """Return the teacher as a frozen network in eval mode on `device`; draws no random numbers.

    Raises:
        DataError: the stored weights do not fit the stored architecture.
    """
    config = NetworkConfig(
        arch=cast(Arch, teacher.arch), width=teacher.width, small_stem=teacher.small_stem
    )
    with torch.device("meta"):
        network = build_network(
            config,
            num_classes=teacher.num_classes,
            channels=teacher.channels,
            image_size=teacher.image_size,
        )
    # Before there is memory for a network of any width that the teacher's file may declare.
    state = fitting_weights(
        network, {k: torch.tensor(v) for k, v in teacher.weights.items()}, "the teacher"
    )
    network.to_empty(device=device)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


class _MeanLogits(nn.Module):
    """The mean of the logits of several networks."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        total = self.networks[0](images_BCHW).float()
        for network in self.networks[1:]:
            total = total + network(images_BCHW).float()
        return cast(Tensor, total / len(self.networks))


def labeler_of(teachers: Sequence[Teacher], device: torch.device | str = "cpu") -> nn.Module:
    """Return a frozen network in eval mode that gives the mean of the teachers' logits; of one teacher, that teacher.

    The mean of logits is the geometric mean of the teachers' probabilities.
    """
    networks = [network_of(teacher, device) for teacher in teachers]
    return networks[0] if len(networks) == 1 else _MeanLogits(networks).eval()


def weights_of(network: nn.Module) -> dict[str, np.ndarray]:
    """Return a copy of all parameters and buffers as arrays, by state-dict name."""
    return {k: v.detach().cpu().numpy().copy() for k, v in network.state_dict().items()}


def load_weights(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy `state` into `network`; a DataError, as of `fitting_weights`, when it does not fit."""
    network.load_state_dict(fitting_weights(network, state, where))


def fitting_weights(
    network: nn.Module, state: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Return `state` as `network` takes it; every tensor must be there, expected, and of the right shape.

    A missing `num_batches_tracked` counts as 0: checkpoints older than that buffer lack it, and eval mode does
    not use it.

    Raises:
        DataError: names up to three missing, unexpected and mis-shaped tensors of `where`.
    """
    own = network.state_dict()
    given = dict(
        state
    )  # a plain dict: an OrderedDict's `_metadata` would make torch refuse old checkpoints
    for name in own:
        if name.endswith("num_batches_tracked") and name not in given:
            given[name] = torch.tensor(0)
    both = [name for name in own if name in given]
    faults = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} (expected {tuple(own[name].shape)})"
            for name in both
            if given[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"{len(v)} {k}: {first_names(v)}" for k, v in faults.items() if v)
        raise DataError(
            f"weights of {where} do not fit the network: {text}; check arch, width, small_stem, image_size, "
            "channels and the number of classes"
        )
    return given
