"""What a network must have to be a teacher, told by one pass before hours of training."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from wmdd_ray.core.architectures import evaluating
from wmdd_ray.core.checkpoints import first_names
from wmdd_ray.core.networks import (
    batch_norms,
    features_and_logits,
    last_linear,
    required_batch_norms,
)
from wmdd_ray.core.taps import check_taps
from wmdd_ray.errors import ConfigError


def check_teacher(network: nn.Module, *, channels: int, image_size: int, needs_norms: bool) -> None:
    """Refuse, before hours of training, a network that cannot be a teacher; one pass of two black images tells.

    The input has `channels` C and sides of `image_size` pixels. `needs_norms` says that moments of BatchNorm layers are used.

    Raises:
        ConfigError: it lacks BatchNorm2d layers or a last Linear layer, or does not use them in one place each, or gradients
            do not pass its tapped BatchNorm2d layers.
    """
    norms = required_batch_norms(network) if needs_norms else batch_norms(network)
    names = {id(module): name for name, module in network.named_modules()}
    calls: Counter[int] = Counter()
    handles = [n.register_forward_hook(lambda norm, *_: calls.update([id(norm)])) for n in norms]
    weight = last_linear(network).weight
    images = torch.zeros(2, channels, image_size, image_size, device=weight.device)
    try:
        with torch.no_grad(), evaluating(network):
            features_BD, logits_BY = features_and_logits(network, images)
    finally:
        for handle in handles:
            handle.remove()
    several = [names[id(norm)] for norm in norms if calls[id(norm)] != 1]
    if several:
        raise ConfigError(
            f"--squeeze.network.arch: expected a teacher whose BatchNorm2d layers are each passed once, got "
            f"{type(network).__name__}, whose {first_names(several)} are passed never or more often; choose another architecture"
        )
    if features_BD.ndim != 2 or logits_BY.shape != (2, weight.shape[0]):
        raise ConfigError(
            f"--squeeze.network.arch: expected a teacher whose last Linear layer maps features of images (2, D) to logits, got "
            f"{type(network).__name__}, whose layer {names[id(last_linear(network))]} maps {tuple(features_BD.shape)} where the "
            f"logits are {tuple(logits_BY.shape)}; choose another architecture"
        )
    if needs_norms:
        with evaluating(network):
            check_taps(network, images)
