"""What images meet in teachers beside the first: means of cells, and moments, of the same images in another order of batches."""

from __future__ import annotations

import numpy as np
import torch

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.other_teachers import targets_in
from wmdd_ray.core.views import to_input

COLOR = {"mean_C": (0.5,), "std_C": (0.25,)}


def test_atoms_are_means_of_the_first_teachers_cells_and_moments_those_of_all_images() -> None:
    torch.manual_seed(0)
    network = build_network(
        NetworkConfig(arch="convnet3", width=4), num_classes=2, channels=1, image_size=8
    ).eval()
    rng = np.random.default_rng(0)
    images_NHWC = rng.integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    # On a line: cells {0, 1, 2}, {3, 4, 5, 6} and, of an atom that is nearest to nothing, the image that it lies nearest to.
    features_ND = np.array([[0], [1], [2], [10], [11], [12], [13]], dtype=np.float32)
    atoms_KD = np.array([[1], [11], [5.6]], dtype=np.float32)
    (target,) = targets_in(
        [network], [images_NHWC[:4], images_NHWC[4:]], features_ND, atoms_KD, **COLOR
    )
    inputs = to_input(images_NHWC, COLOR["mean_C"], COLOR["std_C"], torch.device("cpu"))
    own_NE, moments = features_and_moments(network, inputs, np.zeros(7, int), batch_size=7)
    expected_KE = np.stack([own_NE[:3].mean(axis=0), own_NE[3:].mean(axis=0), own_NE[2]])
    np.testing.assert_allclose(target.atoms_KD, expected_KE, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target.mean_S, moments[0].mean_S, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target.var_S, variance_S(moments[0]), rtol=1e-5, atol=1e-6)
