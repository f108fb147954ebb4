"""Classifiers by name: ours, torchvision's, timm's and the user's own, with random weights.

Legend: B batch, C color channels, H W pixels, Y classes, L layers in the order of the forward pass.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.small_networks import convnet, resnetap10, stem, vit_tiny
from wmdd_ray.errors import ConfigError

_CONVNET = re.compile(r"convnet([1-9][0-9]?)")
_OWN_CODE = re.compile(r"(?!timm:)([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
# Known to give logits at every size, so that nothing has to be tried out.
_KNOWN = ("resnet18", "resnet50", "mobilenet_v2")


def build_network(
    config: NetworkConfig, *, num_classes: int, channels: int, image_size: int
) -> nn.Module:
    """Return a classifier with random weights, drawn from torch's default generator (seed it before).

    `config.arch` is `convnetN` (N blocks), `resnetap10`, `vit_tiny`, a classifier of torchvision, `timm:NAME`, or
    `module:function` of the user's own: trusted code, that is imported and called with the keyword arguments
    `num_classes`, `channels` and `image_size`, and returns a module which maps (B, C, H, W) to logits (B, Y).

    `small_stem` keeps the resolution of small images up to the first block: where the first convolution is strided,
    a 3x3 stride-1 one takes its place, and if the next layer that makes images smaller is a max-pool, that is dropped.
    Networks whose first convolution is not strided, or cuts the image into patches, have no such stem and ignore it.

    The input has `channels` C, 1 or 3, and sides of `image_size` pixels.

    Raises:
        ConfigError: there is no such architecture, it cannot take such images, or has a stem of another kind.
    """
    if (network := _our_own(config, num_classes, channels, image_size)) is not None:
        return network
    arch, own_channels = config.arch, channels
    check_name(arch)
    with _named_errors(f"{arch} for images of {channels} x {image_size} x {image_size} px"):
        if arch.startswith("timm:"):
            network = _of_timm(arch.removeprefix("timm:"), num_classes, channels, image_size)
        elif _OWN_CODE.fullmatch(arch):
            network = _of_the_users(arch, num_classes, channels, image_size)
        else:
            network = _of_torchvision(arch, num_classes, image_size)
            own_channels = 3
        # MobileNetV2 always had a new one, and other random numbers would make another network.
        if config.small_stem or channels != own_channels or arch == "mobilenet_v2":
            small, redraw = config.small_stem, arch == "mobilenet_v2"
            _replace_stem(network, own_channels, channels, image_size, small=small, redraw=redraw)
        if arch in _KNOWN:
            return network
        logits_BY, _ = _trial(network, channels, image_size)
    shape = tuple(logits_BY.shape) if isinstance(logits_BY, Tensor) else type(logits_BY).__name__
    if shape != (2, num_classes):
        raise ConfigError(
            f"arch {arch}: expected a classifier that maps 2 images to logits of shape (2, {num_classes}), got {shape}"
        )
    return network


def check_name(arch: str, option: str = "arch") -> None:
    """Raise a ConfigError that begins with `option` when there is no such architecture; the user's own code is imported."""
    own = _OWN_CODE.fullmatch(arch)
    if is_ours(arch):
        return
    if own is not None:
        try:
            getattr(importlib.import_module(own[1]), own[2])
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{option} {arch}: expected module:function of your own code, which is imported (from PYTHONPATH, on every node) "
                f"and run: {error}"
            ) from error
    elif arch.startswith("timm:"):
        try:
            import timm
        except ImportError as error:
            raise ConfigError(
                f"{option} {arch}: pip install timm, which it needs: {error}"
            ) from error
        name = arch.removeprefix("timm:")
        if not timm.is_model(name):
            raise ConfigError(
                f"{option} {arch}: expected a name among timm.list_models(){_near(name, timm.list_models())}"
            )
    else:
        # Here, because it brings the compiler: 1.8 s of every process that needs no network of its.
        from torchvision import models

        known = models.list_models(module=models)
        if arch not in known:
            near = _near(arch, [*known, "convnet3", "resnetap10", "vit_tiny"])
            raise ConfigError(
                f"{option} {arch}: expected convnetN (N blocks), resnetap10, vit_tiny, a classifier of torchvision, timm:NAME, or "
                f"module:function of your own (code that you trust: it is run){near}"
            )


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; near to it: {', '.join(near)}" if near else ""


def is_ours(arch: str) -> bool:
    """Return whether an architecture is built by this project alone, and so has no state but its weights."""
    return arch in ("resnetap10", "vit_tiny", *_KNOWN) or _CONVNET.fullmatch(arch) is not None


def refuse_foreign_code(arch: str, where: str) -> None:
    """Refuse an architecture `module:function` that a file of others names, unless that module is imported already."""
    own = _OWN_CODE.fullmatch(arch)
    if own is not None and own[1] not in sys.modules:
        raise ConfigError(
            f"{where}: its network is code of its author's, {arch}, which a file must not start; if you have that module and trust "
            f"it, import {own[1]} before"
        )


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Turn what a network raises while it is built or tried into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    # Libraries and the user's own code may raise anything; all of it means that this network cannot be had.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"arch {what}: {type(error).__name__}: {reason}; choose another architecture, image size or number of channels"
        ) from error


def _our_own(
    config: NetworkConfig, num_classes: int, channels: int, image_size: int
) -> nn.Module | None:
    if match := _CONVNET.fullmatch(config.arch):
        return convnet(int(match[1]), config, num_classes, channels, image_size)
    if config.arch == "resnetap10":
        return resnetap10(config, num_classes, channels, image_size)
    if config.arch == "vit_tiny":
        return vit_tiny(num_classes, channels, image_size)
    return None


def _of_torchvision(arch: str, num_classes: int, image_size: int) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif arch.startswith("vit_"):
        options = {"image_size": image_size}
    elif arch.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    return models.get_model(arch, weights=None, num_classes=num_classes, **options)


def _of_timm(name: str, num_classes: int, channels: int, image_size: int) -> nn.Module:
    import timm

    card = timm.get_pretrained_cfg(name)
    size: dict[str, Any] = {}
    if card is not None and card.fixed_input_size:
        size = {"img_size": image_size}
    return timm.create_model(name, num_classes=num_classes, in_chans=channels, **size)


def _of_the_users(arch: str, num_classes: int, channels: int, image_size: int) -> nn.Module:
    module, _, function = arch.partition(":")
    build = getattr(importlib.import_module(module), function)
    network = build(num_classes=num_classes, channels=channels, image_size=image_size)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"arch {arch}: expected a function that returns a torch.nn.Module, got {type(network).__name__}"
        )
    return network


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Keep a network in eval mode; on leaving, each of its modules is in its own mode again."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Passed(NamedTuple):
    """A convolution or pooling that images have passed, with their sides before and after."""

    name: str
    layer: nn.Module
    before: int
    after: int


def _trial(network: nn.Module, channels: int, image_size: int) -> tuple[Any, list[_Passed]]:
    """Return what a network makes of two black images in eval mode, and the layers L that they pass; leaves no trace."""
    passed_L: list[_Passed] = []

    def passes(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        passed_L.append(_Passed(name, layer, inputs[0].shape[-1], output.shape[-1]))

    handles = [
        layer.register_forward_hook(partial(passes, name))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
    ]
    weight = next(network.parameters())
    try:
        with torch.no_grad(), evaluating(network):
            images = torch.zeros(2, channels, image_size, image_size, device=weight.device)
            return network(images), passed_L
    finally:
        for handle in handles:
            handle.remove()


def _replace_stem(
    network: nn.Module,
    own_channels: int,
    channels: int,
    image_size: int,
    *,
    small: bool,
    redraw: bool,
) -> None:
    """Give a network, built for `own_channels`, a first convolution of `channels`, and a small stem if it has a large one."""
    _, passed_L = _trial(network, own_channels, image_size)
    first = passed_L[0] if passed_L else None
    # A subclass pads or scales in its own way, which another layer in its place would not.
    if first is None or type(first.layer) is not nn.Conv2d or first.before != image_size:
        layer = "none" if first is None else f"{type(first.layer).__name__} {first.name}"
        advice = "leave small_stem out" if small else f"take images of {own_channels} channels"
        raise ConfigError(
            f"{type(network).__name__}: expected a plain Conv2d that sees the image first, to put another in its place, got "
            f"{layer}; {advice}"
        )
    conv = first.layer
    if small and 1 < conv.stride[0] < conv.kernel_size[0]:
        # What is pooled to a point is a side branch, as in squeeze-and-excitation.
        later_L = [p for p in passed_L[1:] if p.before > 1]
        next_ = next((p for p in later_L if min(p.before, p.after) < first.after), None)
        if next_ is not None and next_.before < first.after:
            raise ConfigError(
                f"{type(network).__name__}: its small_stem cannot be had, for between {first.name} and {next_.name} something that "
                "is no layer makes the images smaller; leave it out"
            )
        network.set_submodule(first.name, stem(conv, channels, stride=1, kernel=3))
        if next_ is not None and isinstance(next_.layer, nn.MaxPool2d):
            network.set_submodule(next_.name, nn.Identity())
    elif redraw or channels != own_channels:
        new = stem(conv, channels, conv.stride[0], conv.kernel_size[0])
        network.set_submodule(first.name, new)
