"""Which real images, and which part of a class, stand for it. No torch: barycenter actors stay small.

Legend: N images, K chosen images or atoms, D feature width, Y classes.

References:
    Welling 2009, Herding dynamical weights to learn. Rebuffi et al. 2017, iCaRL, algorithm 4 (herding of features).
"""

from __future__ import annotations

import math

import numpy as np

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.barycenter import solve_barycenter
from wmdd_ray.core.transport import exact_cost, one_thread
from wmdd_ray.records import Barycenter

# Share of a class's images that counts as its margin.
_MARGIN_SHARE = 0.25


def herding(features_ND: np.ndarray, k: int) -> np.ndarray:
    """Return k distinct rows whose running mean stays nearest to the mean of all, in the order they are chosen.

    Step i takes the row that brings the mean of i rows nearest to the mean of all (greedy, the first of equals).
    """
    assert 0 < k <= len(features_ND), f"{k} of {len(features_ND)} features"
    with one_thread():
        x_ND = features_ND.astype(np.float64)
        x_ND -= x_ND.mean(axis=0)
        squared_N = np.einsum("nd,nd->n", x_ND, x_ND)
        sum_D = np.zeros(x_ND.shape[1])
        chosen: list[int] = []
        for _ in range(k):
            # |sum + x|^2 without the part that all rows share.
            distance_N = squared_N + 2 * (x_ND @ sum_D)
            distance_N[chosen] = np.inf
            chosen.append(int(distance_N.argmin()))
            sum_D += x_ND[chosen[-1]]
    return np.array(chosen)


def margin_of(
    features_ND: np.ndarray, weight_YD: np.ndarray, bias_Y: np.ndarray, label: int
) -> np.ndarray:
    """Return each feature's margin, float64 (N,): the teacher's logit of `label` minus the largest of the others.

    Args:
        features_ND: inputs of the teacher's last layer.
        weight_YD: weights of that layer; at least two classes.
        bias_Y: its biases.
        label: the class of all the features.
    """
    with one_thread():
        logits_NY = features_ND.astype(np.float64) @ weight_YD.astype(np.float64).T + bias_Y
    own_N = logits_NY[:, label].copy()
    logits_NY[:, label] = -np.inf
    margin_N: np.ndarray = own_N - logits_NY.max(axis=1)
    return margin_N


def solve_with_margin(
    features_ND: np.ndarray,
    margin_N: np.ndarray,
    num_atoms: int,
    config: BarycenterConfig,
    *,
    seed: int,
    where: str = "",
) -> Barycenter:
    """Return the barycenter of a class of which some atoms stand for its margin alone.

    round(margin_fraction K) atoms, the last ones, are the barycenter of the quarter of the images with the smallest
    margin; the others are that of all images. Each part has the share of the mass that it has of the atoms. The cost is
    W2^2 of them all to the whole class; the history is that of the one solver and then of the other. `margin_N` is from
    `margin_of`; the other arguments are those of `solve_barycenter`.

    Raises:
        DataError: as `solve_barycenter`.
    """
    num_margin = round(config.margin_fraction * num_atoms)
    if num_margin == 0 or len(features_ND) < num_atoms:
        return solve_barycenter(features_ND, num_atoms, config, seed=seed, where=where)
    num_near = max(num_margin, math.ceil(_MARGIN_SHARE * len(features_ND)))
    near_ND = features_ND[np.sort(np.argsort(margin_N, kind="stable")[:num_near])]
    near = solve_barycenter(near_ND, num_margin, config, seed=seed, where=where)
    parts, shares = [near], [num_margin / num_atoms]
    if num_margin < num_atoms:
        whole = solve_barycenter(
            features_ND, num_atoms - num_margin, config, seed=seed, where=where
        )
        parts, shares = [whole, near], [1 - num_margin / num_atoms, num_margin / num_atoms]
    atoms_KD = np.concatenate([part.atoms_KD for part in parts])
    weights_K = np.concatenate(
        [share * part.weights_K for share, part in zip(shares, parts, strict=True)]
    )
    with one_thread():
        cost = exact_cost(atoms_KD, weights_K, features_ND)
    history = tuple(c for part in parts for c in part.cost_history)
    return Barycenter(
        atoms_KD=atoms_KD,
        weights_K=weights_K,
        cost=cost,
        cost_history=history,
        num_iters=len(history),
        converged=all(part.converged for part in parts),
    )
