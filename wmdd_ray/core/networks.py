"""Classifiers: filled with weights, and opened up (features, BatchNorm layers).

Legend: B batch, C color channels, H W pixels, D feature width (input of the last Linear layer), Y classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.architectures import build_network as build_network
from wmdd_ray.core.architectures import is_ours, refuse_foreign_code
from wmdd_ray.core.checkpoints import first_names, unwrapped
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import Teacher


def empty_network(
    config: NetworkConfig,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return a network on `device` whose weights are yet to be loaded; draws no random numbers of torch's."""
    shape = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
    if is_ours(config.arch):
        with torch.device("meta"):
            network = build_network(config, **shape)
        return network.to_empty(device=device)
    # Others may compute buffers that are in no file of weights.
    with torch.random.fork_rng(devices=[]):
        return build_network(config, **shape).to(device)


def last_linear(network: nn.Module) -> nn.Linear:
    """Return the layer that maps features to logits.

    Raises:
        ConfigError: there is none, as in a SqueezeNet: it can be a student, but no teacher.
    """
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"--squeeze.network.arch: expected a teacher whose last layer is Linear, of whose inputs barycenters are taken, got "
            f"{type(network).__name__} without any; choose another architecture for the teacher"
        )
    return linear[-1]


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Return all BatchNorm2d layers in the order of registration, which is that of the forward pass in our networks.

    Raises:
        ConfigError: one does something else than normalize by its running moments, and than timm's BatchNormAct2d.
    """
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        if norm.running_mean is None:
            raise ConfigError(
                f"--squeeze.network.arch: {type(network).__name__}.{name} keeps no running moments, which a teacher is "
                "normalized by; choose another architecture for the teacher"
            )
        norm_activation(norm)
    return list(norms.values())


def norm_activation(norm: nn.BatchNorm2d) -> nn.Module | None:
    """Return what a BatchNorm layer applies to its output: nothing, or the drop and activation of timm's BatchNormAct2d.

    Raises:
        ConfigError: a subclass with a forward pass that we do not know.
    """
    forward = type(norm).forward
    if forward is nn.BatchNorm2d.forward:
        return None
    if forward.__module__.startswith("timm.") and forward.__qualname__ == "BatchNormAct2d.forward":
        return nn.Sequential(cast(nn.Module, norm.drop), cast(nn.Module, norm.act))
    raise ConfigError(
        f"--squeeze.network.arch: expected a teacher with BatchNorm2d layers of torch or BatchNormAct2d layers of timm, got "
        f"{type(norm).__module__}.{type(norm).__name__}, whose own forward pass the moments would pass over; choose another"
    )


def required_batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Return what `batch_norms` does; a ConfigError when there are none, as in a Vision Transformer."""
    norms = batch_norms(network)
    if not norms:
        raise ConfigError(
            "--squeeze.network.arch: expected a teacher with BatchNorm2d layers, whose moments the images are made to match, got "
            f"{type(network).__name__} without any; choose another architecture, or --recover.moments none, which makes images "
            "without them"
        )
    return norms


def features_and_logits(network: nn.Module, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return (features_BD, logits_BY), both differentiable; features are the input of the last Linear layer."""
    caught: list[tuple[Tensor, Tensor]] = []
    handle = last_linear(network).register_forward_hook(
        lambda _, args, output: caught.append((args[0], output))
    )
    try:
        logits_BY = network(images_BCHW)
    finally:
        handle.remove()
    if len(caught) != 1 or caught[0][1].data_ptr() != logits_BY.data_ptr():
        raise ConfigError(
            f"--squeeze.network.arch: expected a teacher whose logits are what its last Linear layer gives, got "
            f"{type(network).__name__}, where they are something else; choose another architecture for the teacher"
        )
    return caught[0][0], logits_BY


def network_of(
    teacher: Teacher, device: torch.device | str = "cpu", *, own_code: bool = False
) -> nn.Module:
    """Return the teacher as a frozen network in eval mode on `device`; draws no random numbers.

    Its kernels are in channels-last format: 1.1 to 1.8 times the images per second on CPU, with gradients to pixels or without.
    `own_code` says that an architecture `module:function` is imported: true of a run's own teachers, not of those that come with
    data of others.

    Raises:
        ConfigError: the architecture cannot be built here.
        DataError: the stored weights do not fit the stored architecture.
    """
    if not own_code:
        refuse_foreign_code(teacher.arch, "the teacher of this data set")
    config = NetworkConfig(arch=teacher.arch, width=teacher.width, small_stem=teacher.small_stem)
    shape = {
        "num_classes": teacher.num_classes,
        "channels": teacher.channels,
        "image_size": teacher.image_size,
    }
    weights = {k: torch.tensor(v) for k, v in teacher.weights.items()}
    if is_ours(config.arch):
        # Before there is memory for a network of any width that the teacher's file may declare.
        with torch.device("meta"):
            weights = fitting_weights(build_network(config, **shape), weights, "the teacher")
    network = empty_network(config, **shape, device=device)
    load_weights(network, weights, "the teacher")
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


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


def labeler_of(
    teachers: Sequence[Teacher], device: torch.device | str = "cpu", *, own_code: bool = False
) -> nn.Module:
    """Return a frozen network in eval mode that gives the mean of the teachers' logits; of one teacher, that teacher.

    The mean of logits is the geometric mean of the teachers' probabilities.
    """
    networks = [network_of(teacher, device, own_code=own_code) for teacher in teachers]
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
    # Where the network itself begins all its names with what is taken off a file's.
    full = dict(zip(unwrapped(list(own)), own, strict=True))
    # A plain dict: an OrderedDict's `_metadata` would make torch refuse old checkpoints.
    given = {
        name if name in own else full.get(name, name): tensor for name, tensor in state.items()
    }
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
