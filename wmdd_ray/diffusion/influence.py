"""How much training on a sample does what training on its class does, and which way to move the sample for more of it (IGD).

A small classifier of latents, the surrogate, is trained on real ones and kept as it was after a few epochs. At each of these
checkpoints theta_e a sample z of class y has the loss gradient g_e(z) = grad_theta l(theta_e; z, y), and its influence is
    mean_e cos(g_e(z), mean of g_e over real latents of y),
in [-1, 1]: a descent step of the surrogate on z is, to first order, that share of the best one of its length for its class.

The surrogate normalizes by instance, so that a sample's gradient does not depend on a batch, and everything is float32. Every
random choice is keyed by (seed, epoch), so training continues at an epoch's boundary from the state alone.

Legend: N latents of all classes, M of one class, E checkpoints, P parameters, B batch, D = C H W values of a latent, Y classes.

References:
    Chen et al. 2025, Influence-Guided Diffusion for Dataset Distillation, ICLR (IGD). Pruthi et al. 2020, TracIn (influence by
    gradients at checkpoints). Gidaris and Komodakis 2018 (ConvNet-3, where IGD has a ConvNet-6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.batches import in_memory_batches, steps_of
from wmdd_ray.core.networks import build_network, load_weights, weights_of
from wmdd_ray.core.optimizer import (
    State,
    load_training_state,
    make_optimizer,
    take_step,
    training_state,
)
from wmdd_ray.diffusion.guidance import gradient_at
from wmdd_ray.errors import DataError

LEAST_SIDE = 8
"""Least side of a latent: ConvNet-3 halves it three times."""

_NETWORK = NetworkConfig(arch="convnet3", width=128, norm="instance")
# Peak rate of SGD, cosine to 0, Nesterov's momentum and decay of the ConvNet of DatasetCondensation.
_RATE, _MOMENTUM, _WEIGHT_DECAY = 0.01, 0.9, 5e-4
# Latents whose gradients are taken in one pass.
_PART = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassInfluence:
    """A class as the surrogate sees it: its label, its latents' shape, and their mean loss gradient at each checkpoint.

    The networks are those of `surrogate_of`; `gradients_EP` holds float32 vectors (P,) on their device.
    """

    networks: Sequence[nn.Module]
    label: int
    shape_CHW: tuple[int, int, int]
    gradients_EP: Sequence[Tensor]


def surrogate_parameters(num_classes: int, shape_CHW: tuple[int, int, int]) -> int:
    """Return P, the parameters of a surrogate."""
    with torch.device("meta"):
        return sum(p.numel() for p in _build(num_classes, shape_CHW).parameters())


def train_surrogate(
    latents_NCHW: np.ndarray,
    labels_N: np.ndarray,
    *,
    num_classes: int,
    checkpoints: Sequence[int],
    seed: int,
    device: torch.device | str,
    batch_size: int = 128,
    state: State | None = None,
    on_epoch: Callable[[int, float, Callable[[], State]], None] | None = None,
) -> State:
    """Return the weights of a classifier of latents at some epochs of its training, as `surrogate_of` takes them.

    `checkpoints` ascend: 0 is before the first epoch, and the last one ends the training, with the rate at 0. `on_epoch` is called
    as on_epoch(epochs done, mean loss, get_state) after each; from what `get_state` gave the result is that of a training that
    never stopped.

    Raises:
        DataError: The loss is not finite.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = _build(num_classes, latents_NCHW.shape[1:]).to(device)
    optimizer = make_optimizer(
        network, "sgd", learning_rate=_RATE, weight_decay=_WEIGHT_DECAY, momentum=_MOMENTUM
    )
    kept: State = {}
    done = 0
    if state is not None:
        done = int(state["epoch"])
        kept = {name: array for name, array in state.items() if name.startswith("at")}
        load_training_state(network, optimizer, state)

    def keep() -> None:
        if done in checkpoints:
            kept.update({_key(done, name): array for name, array in weights_of(network).items()})

    def get_state() -> State:
        return training_state(network, optimizer) | {"epoch": np.array(done)} | kept

    if state is None:
        keep()
    steps, last = steps_of(len(labels_N), batch_size), checkpoints[-1]
    for epoch in range(done, last):
        total = torch.zeros((), device=device)
        batches = in_memory_batches(
            latents_NCHW, labels_N, batch_size=batch_size, seed=seed, epoch=epoch
        )
        for step, (latents_BCHW, labels_B) in enumerate(batches):
            loss = F.cross_entropy(network(latents_BCHW.to(device).float()), labels_B.to(device))
            take_step(optimizer, loss, _RATE, epoch * steps + step, last * steps)
            total += loss.detach()
        mean_loss = float(total) / steps
        if not np.isfinite(mean_loss):
            raise DataError(
                f"recover: the loss of the surrogate for --recover.diffusion.influence-weight is {mean_loss} in epoch {epoch}; "
                "check the model's weights and its VAE, or set the weight to 0"
            )
        done = epoch + 1
        keep()
        if on_epoch is not None:
            on_epoch(done, mean_loss, get_state)
    return kept


def surrogate_of(
    weights: State,
    checkpoints: Sequence[int],
    *,
    num_classes: int,
    shape_CHW: tuple[int, int, int],
    device: torch.device | str,
) -> tuple[nn.Module, ...]:
    """Return the surrogate as it was at each checkpoint; what `train_surrogate` returned is `weights`.

    Raises:
        DataError: The weights do not fit.
    """
    networks = []
    for epoch in checkpoints:
        prefix = _key(epoch, "")
        with torch.device("meta"):
            network = _build(num_classes, shape_CHW)
        network.to_empty(device=device)
        own = {
            name.removeprefix(prefix): torch.tensor(array)
            for name, array in weights.items()
            if name.startswith(prefix)
        }
        load_weights(network, own, f"the surrogate after epoch {epoch}")
        networks.append(network)
    return tuple(networks)


def class_influence(
    networks: Sequence[nn.Module], latents_MCHW: Tensor, label: int
) -> ClassInfluence:
    """Return what the influence on a class is measured by: the mean loss gradient of its real latents at each checkpoint."""
    gradients = []
    for network in networks:
        parts = [
            _loss_gradient(network, part, label) * len(part) for part in latents_MCHW.split(_PART)
        ]
        gradients.append(torch.stack(parts).sum(dim=0).detach() / len(latents_MCHW))
    _, c, h, w = latents_MCHW.shape
    return ClassInfluence(
        networks=networks, label=label, shape_CHW=(c, h, w), gradients_EP=gradients
    )


def influence(current_D: Tensor, of: ClassInfluence) -> Tensor:
    """Return the influence of a sample on its class, in [-1, 1], differentiable in the sample."""
    current_1CHW = current_D.view(1, *of.shape_CHW)
    cosines_E = [
        _cosine(_loss_gradient(network, current_1CHW, of.label, twice=True), mean_P)
        for network, mean_P in zip(of.networks, of.gradients_EP, strict=True)
    ]
    return torch.stack(cosines_E).mean()


def influence_direction(current_D: Tensor, of: ClassInfluence) -> Tensor:
    """Return the direction of the gradient of `influence` in the sample, float32 (D,); along it the influence grows.

    Its root mean square is 1 whatever D, the latents' scale and the surrogate are, or 0 where the gradient is 0.
    """
    gradient_D = gradient_at(lambda at_D: influence(at_D, of), current_D)
    largest = gradient_D.abs().max()
    if largest == 0:
        return gradient_D
    # Small gradients have squares below the smallest float.
    gradient_D = gradient_D / largest
    return gradient_D / gradient_D.square().mean().sqrt()


def _build(num_classes: int, shape_CHW: Sequence[int]) -> nn.Module:
    channels, side, _ = shape_CHW
    assert side >= LEAST_SIDE, f"latents of {side} values a side"
    return build_network(_NETWORK, num_classes=num_classes, channels=channels, image_size=side)


def _key(epoch: int, name: str) -> str:
    return f"at{epoch:05d}.{name}"


def _loss_gradient(
    network: nn.Module, latents_BCHW: Tensor, label: int, *, twice: bool = False
) -> Tensor:
    """Return the gradient (P,) of the mean cross-entropy in all parameters, differentiable in the latents if `twice`."""
    with torch.enable_grad():
        logits_BY = network(latents_BCHW)
        labels_B = torch.full((len(latents_BCHW),), label, device=logits_BY.device)
        loss = F.cross_entropy(logits_BY, labels_B)
        parts = torch.autograd.grad(loss, list(network.parameters()), create_graph=twice)
        return torch.cat([part.flatten() for part in parts])


def _cosine(one_P: Tensor, other_P: Tensor) -> Tensor:
    """Return the cosine of the angle between two vectors of any length; 0 where one of them is 0."""

    def at_most_one(x_P: Tensor) -> Tensor:
        # A trained surrogate is sure of most samples: squares of such gradients would be below the smallest float.
        largest = x_P.detach().abs().max()
        return x_P / torch.where(largest > 0, largest, 1)

    return F.cosine_similarity(at_most_one(one_P), at_most_one(other_P), dim=0)
