"""What leads the sample of a diffusion model to where its class still has room.

Samples of a class come one after another. OT guidance measures the transport between those there are, with the current
one among them, and real latents of the class; its gradient in the current sample points from what the earlier samples
already cover to what they do not. The deviation term of IGD pushes the sample away from the nearest earlier one; its
influence term, which needs a network of its own, is in diffusion/influence.py.

All are returned in units of their own direction, so that a weight means the same for any latent and any number of
samples: the paper gives neither its weight's value nor its scale.

Legend: n samples of a class so far with the current one, M real latents, D values of a latent.

References:
    Cui et al. 2025, arXiv 2512.00308 (OTG). Chen et al. 2025, Influence-Guided Diffusion (IGD). Cuturi 2013, Sinkhorn Distances.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wmdd_ray.core.sinkhorn import l1_costs, sinkhorn_distance


def mean_spacing(real_MD: Tensor) -> float:
    """Return the mean l1 distance, a value of a latent, between two different ones; 1 where there is only one or none differ."""
    num_real = len(real_MD)
    if num_real < 2:
        return 1.0
    total = float(l1_costs(real_MD, real_MD).sum())
    return total / (num_real * (num_real - 1)) or 1.0


def transport_distance(
    samples_nD: Tensor, real_MD: Tensor, *, regularization: float, iterations: int
) -> Tensor:
    """Return the entropic transport distance between two uniform sets, float32, differentiable; the cost is l1_costs'."""
    costs_nM = l1_costs(samples_nD, real_MD)
    return sinkhorn_distance(costs_nM, regularization=regularization, iterations=iterations)


def transport_direction(
    current_D: Tensor,
    earlier_nD: Tensor,
    real_MD: Tensor,
    *,
    regularization: float,
    iterations: int,
) -> Tensor:
    """Return n D times the gradient of `transport_distance` in the current sample, float32 (D,), each value in [-1, 1].

    The current sample carries a mass of 1/n and a value of it 1/D of its cost: without these factors the value is the
    mean, over the real latents that the plan assigns to the sample, of the sign of sample minus latent.

    Args:
        current_D: the sample; of a noisy one, what the model predicts of its end.
        earlier_nD: the class's finished samples, n - 1 of them.
        real_MD: a batch of the class's real latents.
        regularization: entropic, > 0, in units of the costs (values of a latent).
        iterations: Sinkhorn iterations.
    """

    def distance(current_D: Tensor) -> Tensor:
        samples_nD = torch.cat([earlier_nD.float(), current_D[None]])
        return transport_distance(
            samples_nD, real_MD, regularization=regularization, iterations=iterations
        )

    return gradient_at(distance, current_D) * (len(earlier_nD) + 1) * current_D.numel()


def deviation_direction(current_D: Tensor, earlier_nD: Tensor) -> Tensor:
    """Return |z| sqrt(D) times the gradient of max_i cos(z, y_i) in the current sample z; 0 without earlier ones.

    Its root mean square is the sine of the angle between them, so at most 1. Against it the sample leaves the nearest.
    """
    if len(earlier_nD) == 0:
        return torch.zeros_like(current_D, dtype=torch.float32)

    def nearest(current_D: Tensor) -> Tensor:
        return torch.cosine_similarity(current_D[None], earlier_nD.float(), dim=1).max()

    length = torch.linalg.vector_norm(current_D.float())
    return gradient_at(nearest, current_D) * length * current_D.numel() ** 0.5


def gradient_at(function: Callable[[Tensor], Tensor], at_D: Tensor) -> Tensor:
    """Return the gradient of a scalar function, computed in float32 whatever the precision around it is."""
    with torch.enable_grad(), torch.autocast(at_D.device.type, enabled=False):
        at_D = at_D.detach().float().requires_grad_(True)
        (gradient_D,) = torch.autograd.grad(function(at_D), at_D)
    return gradient_D
