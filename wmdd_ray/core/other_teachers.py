"""What the images of a class shall meet in teachers beside the first, measured on the class's real images.

Legend: K atoms, N real images of the class, D feature width of the first teacher, E of another, S BatchNorm channels.

References:
    Shao et al. 2024, G-VBSM (several teachers). Atoms there are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn

from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.moments import merge_moments, variance_S
from wmdd_ray.core.objective import TeacherTarget
from wmdd_ray.core.views import to_input
from wmdd_ray.records import Moments


def targets_in(
    networks: Sequence[nn.Module],
    images: Iterable[np.ndarray],
    features_ND: np.ndarray,
    atoms_KD: np.ndarray,
    *,
    mean_C: Sequence[float],
    std_C: Sequence[float],
) -> tuple[TeacherTarget, ...]:
    """Return the targets in each network, float64.

    Atom j is the mean of the features of those images that lie nearest to atom j in the first teacher; where there are
    none, the features of the image that it lies nearest to.

    Args:
        networks: the other teachers, in eval mode.
        images: the N images in batches, uint8 (B, H, W, C), in the order of `features_ND`.
        features_ND: their features in the first teacher.
        atoms_KD: the atoms there.
        mean_C: what the networks' input is centered by, in [0, 1].
        std_C: what it is divided by.
    """
    features: list[list[np.ndarray]] = [[] for _ in networks]
    moments: list[list[Moments]] = [[] for _ in networks]
    for images_BHWC in images:
        labels_B = np.zeros(len(images_BHWC), dtype=np.int64)
        for m, network in enumerate(networks):
            device = next(network.parameters()).device
            batch = to_input(images_BHWC, mean_C, std_C, device)
            features_BE, of_class = features_and_moments(
                network, batch, labels_B, batch_size=len(batch)
            )
            features[m].append(features_BE)
            moments[m].append(of_class[0])
    distance_NK = torch.cdist(torch.from_numpy(features_ND), torch.from_numpy(atoms_KD))
    cell_N, nearest_K = distance_NK.argmin(dim=1).numpy(), distance_NK.argmin(dim=0).numpy()
    targets = []
    for parts, of_parts in zip(features, moments, strict=True):
        merged = merge_moments(of_parts)
        targets.append(
            TeacherTarget(
                atoms_KD=_means(np.concatenate(parts).astype(np.float64), cell_N, nearest_K),
                mean_S=merged.mean_S,
                var_S=variance_S(merged),
            )
        )
    return tuple(targets)


def _means(features_NE: np.ndarray, cell_N: np.ndarray, nearest_K: np.ndarray) -> np.ndarray:
    means_KE = features_NE[nearest_K]
    for j in np.unique(cell_N):
        means_KE[j] = features_NE[cell_N == j].mean(axis=0)
    return means_KE
