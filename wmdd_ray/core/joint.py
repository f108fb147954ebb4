"""The barycenter of images and labels together: all classes at once, in the space of features and label embeddings.

    min over atoms z_ck and weights w of W2^2( sum_ck w_ck delta(z_ck, e_c), 1/N sum_n delta(x_n, e_y(n)) )

The label part of an atom stays the embedding of its class. An image may then be transported to an atom of another class at
the price of the squared distance between the two classes' embeddings: what looks alike and is called alike shares atoms, and a
class of few images borrows from its neighbors. With a large price each class keeps to itself, which is the barycenter of
`barycenter.py`. The descent is Lloyd's, over all atoms.

Legend: Y classes, K atoms of a class, N images of a class, D feature width, E embedding width.

References:
    Liu et al. 2025 (WMDD) transports P(X) class by class. Courty et al. 2017, Joint distribution optimal transportation for domain
    adaptation (the cost in both spaces). Alvarez-Melis and Fusi 2020, Geometric dataset distances via optimal transport.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.barycenter import solve_barycenter
from wmdd_ray.core.lloyd import share_with_copies
from wmdd_ray.core.transport import exact_cost, one_thread
from wmdd_ray.errors import DataError
from wmdd_ray.records import Barycenter

# Images whose distances to all atoms are in memory at once.
_BLOCK = 4096
# Squared differences of equal embeddings, in units of their squared length.
_ROUNDING = 1e-14


def solve_joint(
    features: Sequence[np.ndarray],
    embedding_YE: np.ndarray,
    num_atoms: int,
    config: BarycenterConfig,
    *,
    seeds: Sequence[int],
    where: Sequence[str],
) -> tuple[Barycenter, ...]:
    """Return the barycenter of every class, solved together.

    Args:
        features: of all images, one (N, D) array a class.
        embedding_YE: of the classes' labels, in any unit: the rows of the teacher's last layer, for example.
        num_atoms: K, at most the images of the smallest class.
        config: limits of the descent, and `label_weight`: the mean squared distance of two classes' embeddings, in units of
            the mean squared distance of a feature from the mean of its class.
        seeds: of each class's first atoms, which are its own barycenter.
        where: how messages call each class.

    Returns:
        Atoms, and the masses of their joint cells as weights, with sum 1 a class (even where its atoms got none). The cost is
        W2^2 to the class's own features; the history that of the joint objective.

    Raises:
        DataError: as `solve_barycenter`; or embeddings that are not finite or all the same.
    """
    assert config.label_weight is not None, "a joint barycenter has a label weight"
    assert len(features) == len(embedding_YE) == len(seeds) == len(where), "one of each a class"
    alone = [
        solve_barycenter(x_ND, num_atoms, config, seed=seed, where=at)
        for x_ND, seed, at in zip(features, seeds, where, strict=True)
    ]
    if len(features) == 1:
        return tuple(alone)
    with one_thread():
        price_YY = label_costs(features, embedding_YE, config.label_weight)
        atoms_YKD = np.stack([one.atoms_KD for one in alone]).astype(np.float64)
        history: list[float] = []
        converged = False
        for _ in range(config.max_iters):
            means_YKD, _, cost = _round(features, atoms_YKD, price_YY)
            if history and cost > history[-1]:
                converged = True  # within rounding
                break
            history.append(cost)
            if len(history) > 1 and history[-2] - cost <= config.tol * history[-2]:
                converged = True
                break
            atoms_YKD = means_YKD
        stored_YKD = atoms_YKD.astype(np.float32)
        _, mass_YK, _ = _round(features, stored_YKD.astype(np.float64), price_YY)
        for mass_K, stored_KD in zip(mass_YK, stored_YKD, strict=True):
            share_with_copies(mass_K, stored_KD)
        total_Y1 = mass_YK.sum(axis=1, keepdims=True)
        weights_YK = np.where(total_Y1 > 0, mass_YK / np.maximum(total_Y1, 1), 1 / num_atoms)
        return tuple(
            Barycenter(
                atoms_KD=atoms_KD,
                weights_K=weights_K,
                cost=exact_cost(atoms_KD, weights_K, x_ND),
                cost_history=tuple(history),
                num_iters=len(history),
                converged=converged,
            )
            for x_ND, atoms_KD, weights_K in zip(features, stored_YKD, weights_YK, strict=True)
        )


def label_costs(
    features: Sequence[np.ndarray], embedding_YE: np.ndarray, label_weight: float
) -> np.ndarray:
    """Return the price of a unit of mass from an image of one class to an atom of another, float64 (Y, Y), 0 on the diagonal.

    Its mean over different classes is `label_weight` times the mean squared distance of a feature from its class's mean.
    """
    e_YE = embedding_YE.astype(np.float64)
    squared_Y = (e_YE * e_YE).sum(axis=1)
    # Not the differences themselves: (Y, Y, E) of 10,000 classes is hundreds of gigabytes.
    squared_YY = np.maximum(squared_Y[:, None] + squared_Y - 2 * (e_YE @ e_YE.T), 0)
    np.fill_diagonal(squared_YY, 0)
    num_classes = len(e_YE)
    mean = squared_YY.sum() / (num_classes * (num_classes - 1))
    if not np.isfinite(mean) or mean <= _ROUNDING * squared_Y.mean():
        raise DataError(
            "--barycenters.label-weight: expected label embeddings that are finite and differ between classes, and the "
            "teacher's last layer has none; check the teacher"
        )
    spread = sum(float(((x - x.mean(axis=0, dtype=np.float64)) ** 2).sum()) for x in features)
    within = spread / sum(len(x) for x in features)
    return label_weight * within / mean * squared_YY


def _round(
    features: Sequence[np.ndarray], atoms_YKD: np.ndarray, price_YY: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the means of the joint cells (an empty one keeps its atom), the cells' masses, and the mean cost before."""
    num_classes, num_atoms, width = atoms_YKD.shape
    atoms = atoms_YKD.reshape(-1, width)
    center_D = atoms.mean(axis=0)
    z = atoms - center_D
    squared = (z * z).sum(axis=1)
    sums, mass, cost = np.zeros_like(z), np.zeros(len(z)), 0.0
    for label, x_ND in enumerate(features):
        price = squared + np.repeat(price_YY[label], num_atoms)
        for first in range(0, len(x_ND), _BLOCK):
            x = x_ND[first : first + _BLOCK].astype(np.float64) - center_D
            costs = price - 2 * (x @ z.T)
            cell_N = costs.argmin(axis=1)
            cost += float(costs[np.arange(len(x)), cell_N].sum() + (x * x).sum())
            ones = np.ones(len(x))
            sums += csr_array((ones, (cell_N, np.arange(len(x)))), shape=(len(z), len(x))) @ x
            mass += np.bincount(cell_N, minlength=len(z))
    means = np.where(mass[:, None] > 0, sums / np.maximum(mass, 1)[:, None], z) + center_D
    shape = (num_classes, num_atoms)
    num_images = sum(len(x_ND) for x_ND in features)
    return means.reshape(*shape, width), mass.reshape(shape), max(0.0, cost) / num_images
