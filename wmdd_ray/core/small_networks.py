"""The dataset distillation literature's own networks, with random weights.

References:
    Gidaris and Komodakis 2018 (ConvNet, four blocks there; BatchNorm in place of the dataset distillation literature's
    InstanceNorm in teachers, because the method matches BatchNorm moments). He et al. 2016 (ResNet). Kim et al. 2022, IDC
    (ResNetAP-10). Dosovitskiy et al. 2021 (Vision Transformer, here a narrow one for small images).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.instance_norm import InstanceNorm
from wmdd_ray.errors import ConfigError


def convnet(
    depth: int, config: NetworkConfig, num_classes: int, channels: int, image_size: int
) -> nn.Module:
    """Return `depth` blocks of 3x3 convolution, normalization, ReLU and 2x2 average pooling, and a linear layer.

    Raises:
        ConfigError: the image is smaller than 2^depth pixels.
    """
    width, side = config.width, image_size // 2**depth
    if side < 1:
        raise ConfigError(
            f"{config.arch} halves the image {depth} times: expected image_size >= {2**depth} pixels, got {image_size}; "
            "raise --source.image-size or choose another arch"
        )
    network = nn.Sequential()
    for block in range(1, depth + 1):
        conv = nn.Conv2d(channels if block == 1 else width, width, 3, padding=1, bias=False)
        network.add_module(f"conv{block}", conv)
        network.add_module(
            f"{'bn' if config.norm == 'batch' else 'in'}{block}", _norm(config)(width)
        )
        network.add_module(f"relu{block}", nn.ReLU(inplace=True))
        network.add_module(f"pool{block}", nn.AvgPool2d(2))
    network.add_module("flatten", nn.Flatten())
    network.add_module("fc", nn.Linear(width * side * side, num_classes))
    return network


def resnetap10(
    config: NetworkConfig, num_classes: int, channels: int, image_size: int
) -> nn.Module:
    """Return a ResNet of one basic block a stage, with average pooling in place of every stride.

    The stem is a 3x3 convolution up to 64 px and with `small_stem`, one with 2x2 pooling up to 128 px, and a 7x7 convolution
    with 4x4 pooling above (IDC).
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    network = ResNet(
        BasicBlock, [1, 1, 1, 1], num_classes=num_classes, norm_layer=cast(Any, _norm(config))
    )
    for stage in (network.layer2, network.layer3, network.layer4):
        block = cast(Any, stage[0])
        block.conv1.stride = block.downsample[0].stride = (1, 1)
        block.conv2 = nn.Sequential(nn.AvgPool2d(2), block.conv2)
        block.downsample.insert(1, nn.AvgPool2d(2))
    small, large = config.small_stem or image_size <= 64, image_size > 128
    network.conv1 = stem(network.conv1, channels, stride=1, kernel=7 if large and not small else 3)
    network.maxpool = cast(
        Any, nn.Identity() if small else nn.AvgPool2d(4) if large else nn.AvgPool2d(2)
    )
    return network


def _norm(config: NetworkConfig) -> Callable[[int], nn.Module]:
    return nn.BatchNorm2d if config.norm == "batch" else InstanceNorm


def vit_tiny(num_classes: int, channels: int, image_size: int) -> nn.Module:
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


def stem(old: nn.Conv2d, channels: int, stride: int, kernel: int) -> nn.Conv2d:
    """Return a first convolution of the same width as `old`, initialized as torchvision does."""
    padding = old.padding if kernel == old.kernel_size[0] else kernel // 2
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel,
        stride,
        padding=cast(Any, padding),
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new
