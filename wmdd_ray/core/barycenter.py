"""The barycenter of one class: K weighted atoms nearest to its features in W2.

    min over atoms z_1..z_K and weights w in the simplex of W2^2( sum_j w_j delta(z_j), 1/N sum_n delta(x_n) )

With free weights this is optimal quantization, which Lloyd's iteration descends exactly (`lloyd`, the default; see
`lloyd.py`). With fixed weights 1/K it is balanced quantization (`uniform`). `emd` is the paper's alternation of
subgradient steps on the weights and Newton steps on the atoms. `sinkhorn` and `sliced` exchange the exact transport of
`uniform` for an entropic one and for one-dimensional ones. All return the exact W2^2 of what they return.

Legend: K atoms, N features, D feature width, P projections.

References:
    Liu et al. 2025, Dataset Distillation via the Wasserstein Metric, algorithm 1. Cuturi and Doucet 2014, Fast
    Computation of Wasserstein Barycenters. Duchi et al. 2008, Efficient projections onto the l1-ball. Bonneel et al.
    2015, Sliced and Radon Wasserstein barycenters of measures. Polyak and Juditsky 1992, averaging of iterates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.lloyd import Cloud, descend, plus_plus, solve_lloyd
from wmdd_ray.core.transport import (
    entropic_plan,
    exact_plan,
    one_thread,
    squared_distances_KN,
)
from wmdd_ray.errors import DataError
from wmdd_ray.records import Barycenter

# Rounds of Lloyd that give `uniform`, `emd`, `sinkhorn` and `sliced` their first atoms.
_WARM_UP_ROUNDS = 5
# Share of the way that `sliced` goes: at 1 the noise of the directions adds 5 to 10 % to W2^2.
_SLICED_STEP = 0.1
# Subgradient steps on the weights in one round of `emd`.
_WEIGHT_STEPS = 5


def solve_barycenter(
    features_ND: np.ndarray, ipc: int, config: BarycenterConfig, *, seed: int, where: str = ""
) -> Barycenter:
    """Return the barycenter of one class.

    One BLAS thread is used, so that the same features give the same bytes on every machine of a kind.

    Args:
        features_ND: float features of all images of the class.
        ipc: K, at most N.
        config: solver and its limits.
        seed: of the k-means++ starts and random projections, >= 0.
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
    if num_images < ipc:
        raise DataError(
            f"{where} has {num_images} images but ipc is {ipc}; lower --ipc or drop the class"
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
            return _SOLVERS[config.solver](features_ND, ipc, config, rng)
        found = _SOLVERS[config.solver](features_ND.astype(np.float64) / scale, ipc, config, rng)
    return replace(
        found,
        atoms_KD=(found.atoms_KD.astype(np.float64) * scale).astype(np.float32),
        cost=found.cost * scale**2,
        cost_history=tuple(cost * scale**2 for cost in found.cost_history),
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


def _start_of(features_ND: np.ndarray, ipc: int, rng: np.random.Generator) -> np.ndarray:
    cloud = Cloud(features_ND)
    atoms_KD, _, _ = descend(cloud, plus_plus(cloud, ipc, rng), _WARM_UP_ROUNDS, 0.0)
    return atoms_KD + cloud.center_D


def _uniform(
    features_ND: np.ndarray, ipc: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """Balanced quantization: exact plan for weights 1/K, then every atom to the mean of its mass (Cuturi, Doucet 2014)."""
    weights_K = np.full(ipc, 1.0 / ipc)
    x_ND = features_ND.astype(np.float64)
    best: Barycenter | None = None
    for _ in range(config.num_starts):
        atoms_KD = _start_of(features_ND, ipc, rng)
        history: list[float] = []
        converged = False
        for _ in range(config.max_iters):
            plan_KN, cost, _ = exact_plan(weights_K, squared_distances_KN(atoms_KD, x_ND))
            history.append(cost)
            if len(history) > 1 and history[-2] - cost <= config.tol * history[-2]:
                converged = True
                break
            atoms_KD = ipc * (plan_KN @ x_ND)
        found = _exact(atoms_KD, weights_K, features_ND, history, converged)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return best


def _sinkhorn(
    features_ND: np.ndarray, ipc: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """As `uniform`, with an entropic plan (reg x mean squared distance): atoms are drawn towards the mean."""
    weights_K = np.full(ipc, 1.0 / ipc)
    x_ND = features_ND.astype(np.float64)
    atoms_KD = _start_of(features_ND, ipc, rng)
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
    features_ND: np.ndarray, ipc: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """Weights 1/K; descent on D times the sliced W2^2, from the k-means start; the last half of the iterates is averaged.

    A round draws P orthonormal directions and moves every atom, along each, by a share of the way to the mean of its
    quantile interval. Cheap, but another objective: it wants atoms that spread as far as the images in every
    direction, while the W2 barycenter wants means. With far fewer atoms than clusters or dimensions W2^2 rises while
    the sliced one falls.
    """
    num_images, width = features_ND.shape
    x_ND = features_ND.astype(np.float64)
    atoms_KD = _start_of(features_ND, ipc, rng)
    quantiles_KN = _quantile_means(ipc, num_images)
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
    return _exact(np.mean(tail, axis=0), np.full(ipc, 1.0 / ipc), features_ND, history, converged)


def _quantile_means(ipc: int, num_images: int) -> np.ndarray:
    """Return the (K, N) matrix whose row j averages sorted values over the quantiles from j/K to (j+1)/K."""
    edges = np.arange(num_images + 1) / num_images
    low, high = np.arange(ipc)[:, None] / ipc, (np.arange(ipc)[:, None] + 1) / ipc
    overlap_KN = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.maximum(overlap_KN, 0) * ipc


# The paper's alternation ------------------------------------------------------------------------


def _emd(
    features_ND: np.ndarray, ipc: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """Subgradient steps on the weights and one Newton step on the atoms a round; the best round is returned.

    The dual potentials of the exact plan are a subgradient of W2^2 in the weights. Unlike the reference, the step
    decreases, the result is projected onto the simplex (not renormalized), and weights and atoms belong together.
    """
    x_ND = features_ND.astype(np.float64)
    atoms_KD = _start_of(features_ND, ipc, rng)
    weights_K = np.full(ipc, 1.0 / ipc)
    best_atoms, best_weights, best_cost = atoms_KD, weights_K, np.inf
    history: list[float] = []
    steps = 0
    converged = False
    for _ in range(config.max_iters):
        costs_KN = squared_distances_KN(atoms_KD, x_ND)
        for _ in range(_WEIGHT_STEPS):
            plan_KN, cost, potentials_K = exact_plan(weights_K, costs_KN)
            if cost < best_cost:
                best_atoms, best_weights, best_cost = atoms_KD, weights_K, cost
            steps += 1
            slope_K = potentials_K - potentials_K.mean()
            scale = np.abs(slope_K).max()
            if scale == 0:
                break
            weights_K = _onto_simplex(weights_K - slope_K / (scale * ipc * np.sqrt(steps)))
        plan_KN, cost, _ = exact_plan(weights_K, costs_KN)
        history.append(cost)
        mass_K = plan_KN.sum(axis=1, keepdims=True)
        newton_KD = np.where(mass_K > 0, plan_KN @ x_ND / np.maximum(mass_K, 1e-300), atoms_KD)
        moved = float(((newton_KD - atoms_KD) ** 2 * mass_K).sum())
        atoms_KD = newton_KD
        if moved <= config.tol * max(cost, 1e-300):
            converged = True
            break
    found = _exact(atoms_KD, weights_K, features_ND, history, converged)
    kept = _exact(best_atoms, best_weights, features_ND, history, converged)
    return found if found.cost <= kept.cost else kept


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
    return Barycenter(
        atoms_KD=stored_KD,
        weights_K=weights_K / weights_K.sum(),
        cost=cost,
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
