"""Entropic optimal transport between two batches of outputs, as a loss. The barycenters' solver `sinkhorn` is in `transport.py`.

Legend: B outputs of the first batch, M of the second, C values of an output (classes).

References:
    Cuturi 2013, Sinkhorn Distances. Genevay et al. 2016, Stochastic Optimization for Large-scale Optimal Transport (the
    semi-dual that is returned here). Cui et al. 2025, arXiv 2512.00308, OT-based logit matching (the loss that it serves).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def l1_costs(first_BC: Tensor, second_MC: Tensor) -> Tensor:
    """Return |x_i - y_j|_1 / C, the mean over the values of an output, float32 (B, M).

    Without a tensor of B x M x C, and in float32 inside autocast too.
    """
    width = first_BC.shape[1]
    return torch.cdist(first_BC.float(), second_MC.float(), p=1) / width


def sinkhorn_distance(
    costs_BM: Tensor, *, regularization: float | Tensor, iterations: int
) -> Tensor:
    """Return the entropic cost of moving one uniform batch to another, differentiable in the costs.

    W = min_P <P, C> + reg KL(P | uniform), with row sums 1/B and column sums 1/M, by its semi-dual

        W = max_g 1/M sum_j g_j - reg/B sum_i log 1/M sum_j exp((g_j - C_ij) / reg).

    `iterations` of Sinkhorn's algorithm find g, without a graph; the returned value has one. By the envelope theorem its
    gradient in C is the plan, so nothing has to be unrolled. What the iterations leave undone makes the value a lower bound,
    whose gradient is exactly the plan of that g: rows sum to 1/B always, columns to about 1/M. All of it is
    in the log domain and in float32, so that no regularization over- or underflows.

    Like every entropic cost it is not zero between equal batches, and smaller than the exact cost plus reg log min(B, M).

    Args:
        costs_BM: finite costs, float32 or float64.
        regularization: reg, > 0, in units of the costs; a scalar tensor is taken as a constant.
        iterations: >= 1; each is two passes over the costs.
    """
    g_M = _potential(costs_BM.detach(), regularization, iterations)
    softmin_B = _softmin(costs_BM, g_M, regularization, dim=1)
    return g_M.mean() + softmin_B.mean()


def _potential(costs_BM: Tensor, regularization: float | Tensor, iterations: int) -> Tensor:
    """Return the second batch's potential g after Sinkhorn's alternation from 0."""
    g_M = costs_BM.new_zeros(costs_BM.shape[1])
    for _ in range(iterations):
        f_B = _softmin(costs_BM, g_M, regularization, dim=1)
        g_M = _softmin(costs_BM, f_B[:, None], regularization, dim=0)
    return g_M


def _softmin(
    costs_BM: Tensor, potential: Tensor, regularization: float | Tensor, *, dim: int
) -> Tensor:
    """Return -reg log mean exp((potential - C) / reg) over a dimension."""
    count = math.log(costs_BM.shape[dim])
    exponent = (potential - costs_BM) / regularization
    return -regularization * (torch.logsumexp(exponent, dim=dim) - count)
