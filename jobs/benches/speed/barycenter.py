"""Solvers of one class's barycenter, against WMDD's reference."""

from __future__ import annotations

import statistics
import time
from typing import Literal, cast, get_args

import numpy as np

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.barycenter import solve_barycenter
from wmdd_ray.core.transport import exact_cost, one_thread

from ..reporting import Row, report, spread

Solver = Literal["lloyd", "uniform", "emd", "sinkhorn", "sliced"]


def barycenter(
    ipc: tuple[int, ...] = (10, 50, 100),
    solvers: tuple[Solver, ...] = get_args(Solver),
    repeats: int = 3,
    reference: bool = True,
    out: str | None = None,
) -> None:
    """Solvers on a synthetic class, 1300 x 512, from one start: processor seconds on one thread, and exact W2^2.

    Args:
        ipc: Numbers of atoms.
        solvers: Solvers to measure.
        repeats: Classes, each with its own seed; every solver solves each once.
        reference: Also measure WMDD's reference: as its script runs it, with equal weights, and with learned ones.
        out: JSON file to write.
    """

    def solve(solver: str, features_ND: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, ...]:
        if solver in references:
            with one_thread():
                return references[solver](features_ND, k, np.random.default_rng(seed))
        config = BarycenterConfig(solver=cast(Solver, solver), num_starts=1)
        solved = solve_barycenter(features_ND, k, config, seed=seed)
        return solved.atoms_KD, solved.weights_K

    references = {"reference": reference_uniform, "reference_weighted": reference_alternation}
    solve("uniform", synthetic_class(0)[:100], 5, 0)
    names = [*(references if reference else []), *solvers]
    classes = [synthetic_class(seed) for seed in range(repeats)]
    rows: list[Row] = []
    for k in ipc:
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for seed, features_ND in enumerate(classes):
            for name in names:
                started = time.process_time()
                atoms_KD, weights_K = solve(name, features_ND, k, seed)
                spent = time.process_time() - started
                measured[name].append((spent, exact_cost(atoms_KD, weights_K, features_ND)))
        base_s, base_cost = np.median(measured[names[0]], axis=0).tolist()
        for name in names:
            seconds, costs = np.array(measured[name]).T.tolist()
            row = {"ipc": k, "solver": name, "cpu_s": spread(seconds), "w2_squared": spread(costs)}
            row[f"times_faster_than_{names[0]}"] = base_s / statistics.median(seconds)
            row["cost_ratio"] = statistics.median(costs) / base_cost
            rows.append(row)
    report(rows, {"num_images": 1300, "width": 512, "modes": 20, "threads": 1}, out)


def synthetic_class(seed: int) -> np.ndarray:
    """Return (1300, 512) non-negative features in 20 clusters, norms about 27 to 32: like those of a ResNet-18."""
    rng = np.random.default_rng(seed)
    centers = 0.4 + 0.655 * rng.gamma(1.0, size=(20, 512))
    cluster_N = rng.choice(20, size=1300, p=rng.dirichlet(np.full(20, 5.0)))
    noise = rng.normal(scale=0.41, size=(1300, 512))
    return np.maximum(centers[cluster_N] + noise, 0).astype(np.float32)


def reference_uniform(
    features_ND: np.ndarray, ipc: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return atoms and weights as the script of WMDD's authors has them: POT's free support from normal atoms, equal weights."""
    import ot

    x_ND = features_ND.astype(np.float64)
    share_N = np.full(len(x_ND), 1 / len(x_ND))
    start_KD = rng.standard_normal((ipc, x_ND.shape[1]))
    weights_K = np.full(ipc, 1 / ipc)
    return ot.lp.free_support_barycenter([x_ND], [share_N], start_KD, b=weights_K), weights_K


def reference_alternation(
    features_ND: np.ndarray, ipc: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return atoms and weights by WMDD's reference with learned weights, written anew from a description of it.

    From standard normal atoms, ten rounds: weights by at most 100 mirror steps of rate 10 from uniform, along the dual
    potentials of the exact plan for costs divided by their maximum; then 0.2 of the way to POT's free-support barycenter
    for these weights. Distances come from a matrix product, faster than the reference's broadcasting.
    """
    import ot

    x_ND = features_ND.astype(np.float64)
    share_N = np.full(len(x_ND), 1 / len(x_ND))
    atoms_KD = rng.standard_normal((ipc, x_ND.shape[1]))
    weights_K = np.full(ipc, 1 / ipc)
    for _ in range(10):
        costs_KN = ot.dist(atoms_KD, x_ND)
        costs_KN /= costs_KN.max()
        learned_K = np.full(ipc, 1 / ipc)
        for _ in range(100):
            _, log = ot.emd(learned_K, share_N, costs_KN, log=True)
            before_K, learned_K = learned_K, learned_K * np.exp(-10 * log["u"])
            learned_K /= learned_K.sum()
            if np.abs(learned_K - before_K).sum() < 1e-9:
                break
        moved, weights_K = float(np.linalg.norm(learned_K - weights_K)), learned_K
        if moved < 1e-6:
            break
        target_KD = ot.lp.free_support_barycenter([x_ND], [share_N], atoms_KD, b=weights_K)
        atoms_KD = 0.8 * atoms_KD + 0.2 * target_KD
    return atoms_KD, weights_K
