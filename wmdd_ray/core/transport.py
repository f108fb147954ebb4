"""Optimal transport, exact and entropic, between a small weighted point set and the features of a class.

POT's letters a, b, M (two weight vectors, a cost matrix) stay inside this module.

Legend: K atoms, N features, D feature width.

References:
    Flamary et al. 2021, POT. Bonneel et al. 2011, Displacement interpolation (POT's network simplex).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

# POT imports every array library that it finds; with torch an actor takes 348 MB instead of 168 MB.
for _backend in ("PYTORCH", "JAX", "TENSORFLOW", "CUPY"):
    os.environ.setdefault(f"POT_BACKEND_DISABLE_{_backend}", "1")

import numpy as np  # noqa: E402
import ot  # noqa: E402
from threadpoolctl import ThreadpoolController  # noqa: E402

# 100 x 1300 takes under 10,000. Past its limit (100,000 by default) POT warns and returns a plan that is not optimal.
_MAX_PIVOTS = 10_000_000


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> Any:
    """Return a context in which BLAS uses one thread, so that sums are in the same order on every machine."""
    return _controller().limit(limits=1)


def squared_distances_KN(atoms_KD: np.ndarray, features_ND: np.ndarray) -> np.ndarray:
    """Return |z_j - x_n|^2, float64 (K, N), by one matrix product on centered data."""
    center_D = features_ND.mean(axis=0, dtype=np.float64)
    z = atoms_KD.astype(np.float64) - center_D
    x = features_ND.astype(np.float64) - center_D
    squared = (z * z).sum(axis=1)[:, None] + (x * x).sum(axis=1) - 2 * (z @ x.T)
    return np.maximum(squared, 0.0)


def exact_plan(weights_K: np.ndarray, costs_KN: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Solve min_T <T, C> with row sums w and column sums 1/N.

    Args:
        weights_K: float64, non-negative, sum 1.
        costs_KN: float64 cost of moving feature n to atom j.

    Returns:
        (plan_KN, cost, potentials_K). The dual potentials of the rows are a subgradient of the cost in the weights.
    """
    num_features = costs_KN.shape[1]
    uniform_N = np.full(num_features, 1.0 / num_features)
    # The simplex wants equal masses to the last bit.
    row_mass_K = weights_K / weights_K.sum()
    # POT's tolerances are absolute: below about 1e-12 it would call any plan optimal.
    scale = float(costs_KN.max()) or 1.0
    plan, log = ot.emd(row_mass_K, uniform_N, costs_KN / scale, numItermax=_MAX_PIVOTS, log=True)
    assert log["warning"] is None, log["warning"]
    return plan, float(log["cost"]) * scale, np.asarray(log["u"]) * scale


def exact_cost(atoms_KD: np.ndarray, weights_K: np.ndarray, features_ND: np.ndarray) -> float:
    """Return W2^2 between the weighted atoms and the uniformly weighted features, in squared feature units.

    Args:
        atoms_KD: support points.
        weights_K: their masses, float64, non-negative, sum 1.
        features_ND: features, 1/N each.
    """
    return exact_plan(weights_K, squared_distances_KN(atoms_KD, features_ND))[1]


def entropic_plan(weights_K: np.ndarray, costs_KN: np.ndarray, reg: float) -> np.ndarray:
    """Return the plan of min_T <T, C> - reg * H(T) with the marginals of `exact_plan` (Sinkhorn, log domain).

    Args:
        weights_K: float64, non-negative, sum 1.
        costs_KN: float64 cost of moving feature n to atom j.
        reg: weight of the entropy H, > 0, in units of the costs.
    """
    num_features = costs_KN.shape[1]
    uniform_N = np.full(num_features, 1.0 / num_features)
    plan = ot.bregman.sinkhorn_log(
        weights_K, uniform_N, costs_KN, reg, numItermax=300, stopThr=1e-5, warn=False
    )
    return np.asarray(plan)
