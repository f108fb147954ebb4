"""Lloyd's iteration: exact block descent on the barycenter's objective when the weights are free.

    min over atoms z_1..z_K and weights w in the simplex of W2^2( sum_j w_j delta(z_j), 1/N sum_n delta(x_n) )

Given atoms, the best weights are the masses of their Voronoi cells and the best plan moves every feature to its nearest
atom; given the cells, the best atoms are their means. Neither step can raise the cost.

Legend: K atoms, N features, D feature width, C candidates.

References:
    Lloyd 1982, Least squares quantization in PCM. Arthur and Vassilvitskii 2007, k-means++.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.transport import squared_distances_KN
from wmdd_ray.records import Barycenter


def solve_lloyd(
    features_ND: np.ndarray, num_atoms: int, config: BarycenterConfig, rng: np.random.Generator
) -> Barycenter:
    """Solve by exact block descent with free weights, from k-means++ starts; the start with the lowest cost wins.

    Features are float, finite, in any unit; K is `num_atoms`, at most N. Weights are shares of the atoms' cells, costs those after
    every iteration in squared feature units.

    References:
        Lloyd 1982; Arthur and Vassilvitskii 2007, k-means++ with the greedy choice among candidates.
    """
    cloud = Cloud(features_ND)
    starts = (plus_plus(cloud, num_atoms, rng) for _ in range(config.num_starts))
    ends = (descend(cloud, start_KD, config.max_iters, config.tol) for start_KD in starts)
    return min((_with_voronoi_weights(cloud, *end) for end in ends), key=lambda one: one.cost)


class Cloud:
    """Centered features: float32 for the matrix products, float64 for means and costs."""

    def __init__(self, features_ND: np.ndarray) -> None:
        self.original_ND = features_ND
        self.center_D = features_ND.mean(axis=0, dtype=np.float64)
        self.x64_ND = features_ND.astype(np.float64) - self.center_D
        self.x_ND = self.x64_ND.astype(np.float32)
        self.squared64_N = (self.x64_ND * self.x64_ND).sum(axis=1)
        self.squared64 = float((self.x64_ND * self.x64_ND).sum())
        self.squared_N = np.einsum("nd,nd->n", self.x_ND, self.x_ND)

    def __len__(self) -> int:
        return len(self.x_ND)

    def distances_NK(self, atoms_KD: np.ndarray) -> np.ndarray:
        """Return squared distances, float32, to centered atoms."""
        atoms = atoms_KD.astype(np.float32)
        distances = self.x_ND @ (-2 * atoms.T)
        distances += np.einsum("kd,kd->k", atoms, atoms)
        distances += self.squared_N[:, None]
        return np.maximum(distances, 0, out=distances)

    def exact_distances_KN(self, atoms_KD: np.ndarray) -> np.ndarray:
        """Return squared distances, float64, to atoms that are not centered."""
        z = atoms_KD.astype(np.float64) - self.center_D
        distances = (-2 * z) @ self.x64_ND.T
        distances += (z * z).sum(axis=1)[:, None]
        distances += self.squared64_N
        return np.maximum(distances, 0.0, out=distances)

    def cells(self, cell_N: np.ndarray, num_atoms: int) -> csr_array:
        """Return the (K, N) indicator of an assignment: its product with the features sums every cell."""
        order_N = np.argsort(cell_N, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(cell_N, minlength=num_atoms))])
        return csr_array((np.ones(len(cell_N)), order_N, starts), shape=(num_atoms, len(cell_N)))


def plus_plus(cloud: Cloud, num_atoms: int, rng: np.random.Generator) -> np.ndarray:
    """Return K distinct rows as first atoms: greedy k-means++, the best of 2 + log K candidates each time."""
    num_candidates = 2 + int(np.log(num_atoms))
    chosen = [int(rng.integers(len(cloud)))]
    closest_N = cloud.distances_NK(cloud.x_ND[chosen])[:, 0]
    closest_N[chosen] = 0
    for _ in range(1, num_atoms):
        mass_N = np.cumsum(closest_N, dtype=np.float64)
        if mass_N[-1] <= 0:
            # Only copies of chosen points are left: any unused row will do.
            chosen.append(int(np.setdiff1d(np.arange(len(cloud)), chosen)[0]))
            continue
        candidates = np.searchsorted(mass_N, rng.random(num_candidates) * mass_N[-1], side="right")
        candidates = np.minimum(candidates, len(cloud) - 1)
        closer_NC = np.minimum(cloud.distances_NK(cloud.x_ND[candidates]), closest_N[:, None])
        best = int(closer_NC.sum(axis=0, dtype=np.float64).argmin())
        chosen.append(int(candidates[best]))
        closest_N = closer_NC[:, best].copy()
        # Rounding leaves a point at a small distance from itself.
        closest_N[chosen] = 0
    return cloud.x64_ND[chosen]


def descend(
    cloud: Cloud, atoms_KD: np.ndarray, max_iters: int, tol: float
) -> tuple[np.ndarray, list[float], bool]:
    """Run Lloyd's iteration; return centered atoms, the cost after every round, and whether it converged.

    The cost of a round is exact for its cells and their means: (sum_n |x_n|^2 - sum_j n_j |z_j|^2) / N. A round that
    does not lower it by more than `tol`, relatively, ends the descent; one that raises it (rounding) is undone.
    """
    num_atoms = len(atoms_KD)
    history: list[float] = []
    cell_N: np.ndarray | None = None
    for _ in range(max_iters):
        distances_NK = cloud.distances_NK(atoms_KD)
        new_cell_N = distances_NK.argmin(axis=1)
        _fill_empty_cells(new_cell_N, distances_NK, num_atoms)
        if cell_N is not None and np.array_equal(new_cell_N, cell_N):
            return atoms_KD, history, True
        cell_N = new_cell_N
        count_K = np.bincount(cell_N, minlength=num_atoms)
        sums_KD = cloud.cells(cell_N, num_atoms) @ cloud.x64_ND
        means_KD = np.where(
            count_K[:, None] > 0, sums_KD / np.maximum(count_K, 1)[:, None], atoms_KD
        )
        explained = float((count_K * (means_KD * means_KD).sum(axis=1)).sum())
        cost = max(0.0, (cloud.squared64 - explained) / len(cloud))
        if history and cost > history[-1]:
            return atoms_KD, history, True
        history.append(cost)
        atoms_KD = means_KD
        if len(history) > 1 and history[-2] - cost <= tol * history[-2]:
            return atoms_KD, history, True
    return atoms_KD, history, False


def _fill_empty_cells(cell_N: np.ndarray, distances_NK: np.ndarray, num_atoms: int) -> None:
    """Give every empty cell the point that is farthest from its atom and not alone in its cell, in place."""
    count_K = np.bincount(cell_N, minlength=num_atoms)
    empty = np.flatnonzero(count_K == 0)
    if len(empty) == 0:
        return
    own_N = distances_NK[np.arange(len(cell_N)), cell_N]
    for point in np.argsort(-own_N, kind="stable"):
        if len(empty) == 0 or own_N[point] <= 0:
            return
        if count_K[cell_N[point]] > 1:
            count_K[cell_N[point]] -= 1
            cell_N[point], empty = empty[0], empty[1:]


def _with_voronoi_weights(
    cloud: Cloud, atoms_KD: np.ndarray, history: list[float], converged: bool
) -> Barycenter:
    """Return atoms as they are stored, with the masses of their cells: then the nearest-atom plan is optimal.

    A descent that was stopped early can leave an atom that is nearest to nothing. It goes to the feature that is
    farthest from its atom, which lowers the cost and gives it a weight.
    """
    stored_KD = (atoms_KD + cloud.center_D).astype(np.float32)
    cell_N, squared_N = _nearest_atoms(cloud, stored_KD)
    for _ in range(len(stored_KD)):
        empty = np.flatnonzero(np.bincount(cell_N, minlength=len(stored_KD)) == 0)
        if len(empty) == 0 or squared_N.max() == 0:
            break
        stored_KD[empty[0]] = cloud.original_ND[squared_N.argmax()]
        cell_N, squared_N = _nearest_atoms(cloud, stored_KD)
    count_K = np.bincount(cell_N, minlength=len(stored_KD)).astype(np.float64)
    share_with_copies(count_K, stored_KD)
    return Barycenter(
        atoms_KD=stored_KD,
        weights_K=count_K / len(cloud),
        cost=float(squared_N.mean()),
        cost_history=tuple(history),
        num_iters=len(history),
        converged=converged,
    )


def _nearest_atoms(cloud: Cloud, stored_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every feature's nearest atom, and the squared distance to it without the rounding of a product form."""
    cell_N = squared_distances_KN(stored_KD, cloud.original_ND).argmin(axis=0)
    offsets_ND = cloud.original_ND.astype(np.float64) - stored_KD[cell_N]
    return cell_N, np.einsum("nd,nd->n", offsets_ND, offsets_ND)


def share_with_copies(count_K: np.ndarray, atoms_KD: np.ndarray) -> None:
    """Split the mass of atoms at one place evenly between them, in place: the same cost, and no empty copy."""
    if (count_K > 0).all():
        return
    _, group_K = np.unique(atoms_KD, axis=0, return_inverse=True)
    group_K = group_K.reshape(-1)
    size = np.bincount(group_K)
    mass = np.bincount(group_K, weights=count_K)
    count_K[:] = mass[group_K] / size[group_K]
