"""Features in a plane, for people to look at.

Legend: N real images, K atoms or images of a class, D feature width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.decomposition import PCA

# A class's cloud has its shape with so many points, and a page of many classes stays small.
_MOST_POINTS = 400
_FIT_POINTS = 5000


def project(
    real_ND: np.ndarray, atoms_KD: np.ndarray, reached_KD: np.ndarray | None
) -> dict[str, Any]:
    """Return x and y of (some) real features, the atoms and the reached features, by PCA of the real features.

    PCA rather than t-SNE or UMAP: it is linear, so that distances in the page are never larger than in feature space
    and an atom lies where it belongs, although it took no part in the fit.

    Returns:
        `real`, `atoms` and `reached` (None without features): [x, y], two lists of numbers; `explained`: the share of
        the real features' variance along x and along y; `num_real`: N.
    """
    step = -(-len(real_ND) // _FIT_POINTS)
    fitted_ND = real_ND[::step].astype(np.float64)
    # A class of equal images has no components; PCA would divide by its variance of zero.
    flat = not np.ptp(fitted_ND, axis=0).any()
    components = 0 if flat else min(2, *fitted_ND.shape)
    mean_D, axes_2D, explained = (
        fitted_ND.mean(axis=0),
        np.zeros((2, real_ND.shape[1])),
        np.zeros(2),
    )
    if components:
        pca = PCA(components, svd_solver="randomized", random_state=0).fit(fitted_ND)
        axes_2D[:components] = pca.components_
        explained[:components] = pca.explained_variance_ratio_

    def place(features_ND: np.ndarray) -> list[list[float]]:
        xy_N2 = (features_ND.astype(np.float64) - mean_D) @ axes_2D.T
        return [[float(f"{v:.4g}") for v in column] for column in xy_N2.T]

    shown = np.unique(np.linspace(0, len(real_ND) - 1, _MOST_POINTS).round().astype(int))
    return {
        "real": place(real_ND[shown]),
        "atoms": place(atoms_KD),
        "reached": None if reached_KD is None else place(reached_KD),
        "explained": [round(float(share), 4) for share in explained],
        "num_real": len(real_ND),
    }
