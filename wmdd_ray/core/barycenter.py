"""The barycenter of one class: K weighted atoms nearest to its features in W2.

    min over atoms z_1..z_K and weights w in the simplex of W2^2( sum_j w_j delta(z_j), 1/N sum_n delta(x_n) )

With fixed weights 1/K this is balanced quantization (`uniform`, the default). With free weights it is optimal quantization,
which Lloyd's iteration descends exactly (`lloyd`; see `lloyd.py`); its atoms may stand for single images, and are far from
the class where each then counts 1/K. `emd` is the paper's alternation of
subgradient steps on the weights and Newton steps on the atoms. `sinkhorn` and `sliced` exchange the exact transport of
`uniform` for an entropic one and for one-dimensional ones. All return the exact W2^2 of what they return.

Legend: K atoms, N features, D feature width, P projections.

References:
    Liu et al. 2025, Dataset Distillation via the Wasserstein Metric, algorithm 1. Cuturi and Doucet 2014, Fast
    Computation of Wasserstein Barycenters. Duchi et al. 2008, Efficient projections onto the l1-ball. Bonneel et al.
    2015, Sliced and Radon Wasserstein barycenters of measures. Polyak and Juditsky 1992, averaging of iterates. Polyak
    1969, Minimization of unsmooth functionals (the step for a known minimum).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.lloyd import Cloud, descend, plus_plus, solve_lloyd
from wmdd_ray.core.transport import entropic_plan, exact_plan, one_thread, squared_distances_KN
from wmdd_ray.errors import DataError
from wmdd_ray.records import Barycenter

# Rounds of Lloyd that give `emd`, `sinkhorn` and `sliced` their first atoms.
_WARM_UP_ROUNDS = 5
# Share of the way that `sliced` goes: at 1 the noise of the directions adds 5 to 10 % to W2^2.
_SLICED_STEP = 0.1
# Most subgradient steps on the weights in one round of `emd`.
_WEIGHT_STEPS = 5


def solve_barycenter(
    features_ND: np.ndarray, num_atoms: int, config: BarycenterConfig, *, seed: int, where: str = ""
) -> Barycenter:
    """Return the barycenter of one class.

    One BLAS thread is used, so that the same features give the same bytes on every machine of a kind.

    Args:
        features_ND: float features of all images of the class.
        num_atoms: K, at most N.
        config: solver and its limits.
        seed: of the starts (random images, k-means++) and of random projections, >= 0.
        where: how messages call the class, such as 'class 7 ("tench")'.

    Returns:
        Atoms float32, weights float64, exact cost, cost by iteration, whether the iteration converged.

    Raises:
        DataError: fewer images than atoms, or features that are not finite.
    """
    where = where or "the class"
    if features_ND.ndim != 2 or features_ND.shape[1] == 0:
        raise DataError(
            f"{where}: expected features of shape (images, width), got {features_ND.shape}"
        )
    num_images = len(features_ND)
    if num_images < num_atoms:
        raise DataError(
            f"{where} has {num_images} images for {num_atoms} atoms; lower --ipc or drop the class"
        )
    if not np.isfinite(features_ND).all():
        bad = int((~np.isfinite(features_ND)).any(axis=1).sum())
        raise DataError(
            f"{where}: {bad} of {num_images} feature vectors are not finite; check the teacher's weights and the images"
        )
    rng = np.random.Generator(np.random.Philox(seed))
    with one_thread():
        scale = _scale_of(features_ND)
        if scale == 1:
            return _SOLVERS[config.solver](features_ND, num_atoms, config, rng)
        scaled = _SOLVERS[config.solver](
            features_ND.astype(np.float64) / scale, num_atoms, config, rng
        )
    return replace(
        scaled,
        atoms_KD=(scaled.atoms_KD.astype(np.float64) * scale).astype(np.float32),
        cost=scaled.cost * scale**2,
        cost_history=tuple(cost * scale**2 for cost in scaled.cost_history),
    )


def _scale_of(features_ND: np.ndarray) -> float:
    """Return the power of two by which features are divided: 1, unless float32 products would leave their range."""
    spread = float(np.abs(features_ND.astype(np.float64)).max())
    if spread == 0 or 2.0**-30 < spread < 2.0**30:
        return 1.0
    return 2.0 ** np.floor(np.log2(spread))


def nearest_images(atoms_KD: np.ndarray, features_ND: np.ndarray) -> np.ndarray:
    """Return K distinct rows of the features, one an atom, of least total squared distance (linear assignment)."""
    assert len(atoms_KD) <= len(features_ND), "more atoms than features"
    with one_thread():
        _, rows_K = linear_sum_assignment(squared_distances_KN(atoms_KD, features_ND))
    return rows_K


# Fixed weights ----------------------------------------------------------------------------------


def _start_of(features_ND: np.ndarray, num_atoms: int, rng: np.random.Generator) -> np.ndarray:
    cloud = Cloud(features_ND)
    atoms_KD, _, _ = descend(cloud, plus_plus(cloud, num_atoms, rng), _WARM_UP_ROUNDS, 0.0)
    return atoms_KD + cloud.center_D


def _uniform(
    features_ND: np.ndarray, num_atoms: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """Balanced quantization: exact plan for weights 1/K, then every atom to the mean of its mass (Cuturi, Doucet 2014).

    The first atoms are images drawn at random: atoms of equal mass lie as densely as the images do, and k-means++, which
    spreads them, costs more time than it saves rounds.
    """
    cloud = Cloud(features_ND)
    weights_K = np.full(num_atoms, 1.0 / num_atoms)
    starts = (rng.choice(len(cloud), num_atoms, replace=False) for _ in range(config.num_starts))
    first_atoms = (features_ND[rows_K].astype(np.float32) for rows_K in starts)
    ends = (_balanced(cloud, atoms_KD, weights_K, config) for atoms_KD in first_atoms)
    return min(ends, key=lambda one: one.cost)


def _balanced(
    cloud: Cloud, atoms_KD: np.ndarray, weights_K: np.ndarray, config: BarycenterConfig
) -> Barycenter:
    """Descend from float32 atoms for fixed weights. Every cost is that of the atoms as they are stored, and so is the last."""
    history: list[float] = []
    kept_KD, converged = atoms_KD, False
    while len(history) < config.max_iters and not converged:
        plan_KN, cost, _ = exact_plan(weights_K, cloud.exact_distances_KN(atoms_KD))
        if history and cost > history[-1]:
            converged = True  # within rounding: the atoms before are kept
            break
        converged = bool(history) and history[-1] - cost <= config.tol * history[-1]
        history.append(cost)
        kept_KD, atoms_KD = atoms_KD, _means(cloud, plan_KN, atoms_KD)
    return _as_found(kept_KD, weights_K, history, converged)


def _means(cloud: Cloud, plan_KN: np.ndarray, atoms_KD: np.ndarray) -> np.ndarray:
    """Return the mean of every atom's mass, float32: the Newton step of the cost. An atom without mass stays."""
    mass_K1 = plan_KN.sum(axis=1, keepdims=True)
    means_KD = csr_array(plan_KN) @ cloud.x64_ND / np.maximum(mass_K1, 1e-300) + cloud.center_D
    return np.where(mass_K1 > 0, means_KD.astype(np.float32), atoms_KD)


def _sinkhorn(
    features_ND: np.ndarray, num_atoms: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """As `uniform`, with an entropic plan (reg x mean squared distance): atoms are drawn towards the mean."""
    weights_K = np.full(num_atoms, 1.0 / num_atoms)
    x_ND = features_ND.astype(np.float64)
    atoms_KD = _start_of(features_ND, num_atoms, rng)
    history: list[float] = []
    converged = False
    for _ in range(config.max_iters):
        costs_KN = squared_distances_KN(atoms_KD, x_ND)
        reg = config.reg * float(costs_KN.mean())
        if reg == 0:
            converged = True
            break
        plan_KN = entropic_plan(weights_K, costs_KN, reg)
        history.append(float((plan_KN * costs_KN).sum()))
        atoms_KD = (plan_KN @ x_ND) / plan_KN.sum(axis=1, keepdims=True)
        if len(history) > 1 and abs(history[-2] - history[-1]) <= config.tol * history[-2]:
            converged = True
            break
    return _exact(atoms_KD, weights_K, features_ND, history, converged)


def _sliced(
    features_ND: np.ndarray, num_atoms: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """Weights 1/K; descent on D times the sliced W2^2, from the k-means start; the last half of the iterates is averaged.

    A round draws P orthonormal directions and moves every atom, along each, by a share of the way to the mean of its
    quantile interval. Cheap, but another objective: it wants atoms that spread as far as the images in every
    direction, while the W2 barycenter wants means. With far fewer atoms than clusters or dimensions W2^2 rises while
    the sliced one falls.
    """
    num_images, width = features_ND.shape
    x_ND = features_ND.astype(np.float64)
    atoms_KD = _start_of(features_ND, num_atoms, rng)
    quantiles_KN = _quantile_means(num_atoms, num_images)
    num_directions = min(config.num_projections, width)
    tail: list[np.ndarray] = []
    history: list[float] = []
    converged = False
    for step in range(config.max_iters):
        directions_DP = np.linalg.qr(rng.standard_normal((width, num_directions)))[0]
        sorted_NP = np.sort(x_ND @ directions_DP, axis=0)
        quantile_KP = quantiles_KN @ sorted_NP
        atoms_KP = atoms_KD @ directions_DP
        targets_KP = np.empty_like(atoms_KP)
        rank_KP = np.argsort(atoms_KP, axis=0, kind="stable")
        np.put_along_axis(targets_KP, rank_KP, quantile_KP, axis=0)
        move_KP = targets_KP - atoms_KP
        within = (sorted_NP**2).mean() - (quantile_KP**2).mean()
        squared_move = float((move_KP**2).mean())
        history.append(width * max(0.0, squared_move + float(within)))
        atoms_KD = atoms_KD + _SLICED_STEP * (move_KP @ directions_DP.T)
        if 2 * step >= config.max_iters - 1:
            tail.append(atoms_KD)
        if width * squared_move <= config.tol * history[-1]:
            converged, tail = True, [atoms_KD]
            break
    return _exact(
        np.mean(tail, axis=0), np.full(num_atoms, 1.0 / num_atoms), features_ND, history, converged
    )


def _quantile_means(num_atoms: int, num_images: int) -> np.ndarray:
    """Return the (K, N) matrix whose row j averages sorted values over the quantiles from j/K to (j+1)/K."""
    edges = np.arange(num_images + 1) / num_images
    low, high = (
        np.arange(num_atoms)[:, None] / num_atoms,
        (np.arange(num_atoms)[:, None] + 1) / num_atoms,
    )
    overlap_KN = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.maximum(overlap_KN, 0) * num_atoms


# The paper's alternation ------------------------------------------------------------------------


def _emd(
    features_ND: np.ndarray, num_atoms: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """Subgradient steps on the weights and one Newton step on the atoms a round, neither of which raises the cost.

    The dual potentials of the exact plan are a subgradient of W2^2 in the weights, and its minimum over them is known: the cost
    of the nearest-atom plan. So the steps are Polyak's, (cost - minimum) / |slope|^2, which on a cost that is piecewise linear
    come nearer by a factor each; they go on from round to round, and the best weights on the way count. Unlike the reference,
    the result is projected onto the simplex (not renormalized), and weights and atoms belong together.
    """
    cloud = Cloud(features_ND)
    atoms_KD = _start_of(features_ND, num_atoms, rng).astype(np.float32)
    weights_K = walking_K = np.full(num_atoms, 1.0 / num_atoms)
    history: list[float] = []
    kept_KD, converged = atoms_KD, False
    while len(history) < config.max_iters and not converged:
        costs_KN = cloud.exact_distances_KN(atoms_KD)
        plan_KN, cost, _ = exact_plan(weights_K, costs_KN)
        if history and cost > history[-1]:  # within rounding: the atoms stay where they were
            costs_KN = cloud.exact_distances_KN(atoms_KD := kept_KD)
            plan_KN, cost, _ = exact_plan(weights_K, costs_KN)
        least = float(costs_KN.min(axis=0).mean())
        best_K = weights_K
        for step in range(_WEIGHT_STEPS + 1):
            if cost - least <= config.tol * least:
                break
            # The best weights are numbers of images: the last step goes there.
            is_last = step == _WEIGHT_STEPS
            tried_K = _whole_images(walking_K, len(cloud)) if is_last else walking_K
            tried_KN, tried_cost, potentials_K = exact_plan(tried_K, costs_KN)
            if tried_cost < cost:
                best_K, plan_KN, cost = tried_K, tried_KN, tried_cost
            if not is_last:
                slope_K = potentials_K - potentials_K.mean()
                length = (tried_cost - least) / max(float(slope_K @ slope_K), 1e-300)
                walking_K = _onto_simplex(walking_K - length * slope_K)
        is_least = cost - least <= config.tol * least
        converged = is_least and bool(history) and history[-1] - cost <= config.tol * history[-1]
        history.append(cost)
        kept_KD, weights_K, atoms_KD = atoms_KD, best_K, _means(cloud, plan_KN, atoms_KD)
    return _as_found(kept_KD, weights_K, history, converged)


def _whole_images(weights_K: np.ndarray, num_images: int) -> np.ndarray:
    """Return the weights in whole images of sum 1: the largest remainders are rounded up."""
    images_K = num_images * weights_K
    whole_K = np.floor(images_K)
    up = np.argsort(whole_K - images_K, kind="stable")[: num_images - int(whole_K.sum())]
    whole_K[up] += 1
    return whole_K / num_images


def _onto_simplex(vector_K: np.ndarray) -> np.ndarray:
    """Return the nearest point of the simplex (Duchi et al. 2008, figure 1)."""
    sorted_K = np.sort(vector_K)[::-1]
    excess_K = np.cumsum(sorted_K) - 1
    last = np.flatnonzero(sorted_K * np.arange(1, len(vector_K) + 1) > excess_K)[-1]
    return np.maximum(vector_K - excess_K[last] / (last + 1), 0.0)


def _exact(
    atoms_KD: np.ndarray,
    weights_K: np.ndarray,
    features_ND: np.ndarray,
    history: list[float],
    converged: bool,
) -> Barycenter:
    """Return the stored atoms with their exact cost."""
    stored_KD = atoms_KD.astype(np.float32)
    _, cost, _ = exact_plan(weights_K, squared_distances_KN(stored_KD, features_ND))
    barycenter = _as_found(stored_KD, weights_K, [cost], converged)
    return replace(barycenter, cost_history=tuple(history), num_iters=len(history))


def _as_found(
    stored_KD: np.ndarray, weights_K: np.ndarray, history: list[float], converged: bool
) -> Barycenter:
    """Return atoms whose exact cost is the last of the history."""
    return Barycenter(
        atoms_KD=stored_KD,
        weights_K=weights_K / weights_K.sum(),
        cost=history[-1],
        cost_history=tuple(history),
        num_iters=len(history),
        converged=converged,
    )


_Solver = Callable[[np.ndarray, int, BarycenterConfig, np.random.Generator], Barycenter]
_SOLVERS: dict[str, _Solver] = {
    "lloyd": solve_lloyd,
    "uniform": _uniform,
    "emd": _emd,
    "sinkhorn": _sinkhorn,
    "sliced": _sliced,
}
