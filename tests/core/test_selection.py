from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.barycenter import solve_barycenter
from wmdd_ray.core.selection import herding, margin_of, solve_with_margin
from wmdd_ray.core.transport import exact_cost
from wmdd_ray.errors import ConfigError, DataError

HALF = BarycenterConfig(margin_fraction=0.5)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_each_step_of_herding_is_the_best_of_all_single_steps(seed: int) -> None:
    features = normal(40, 6, seed=seed) + 3
    chosen: list[int] = []
    mean = features.astype(np.float64).mean(axis=0)
    for step in range(15):
        distance = [
            np.inf
            if n in chosen
            else np.linalg.norm(mean - features[[*chosen, n]].astype(np.float64).mean(axis=0))
            for n in range(40)
        ]
        chosen.append(int(np.argmin(distance)))
        assert herding(features, step + 1).tolist() == chosen


def test_herding_meets_the_mean_better_than_chance_and_ends_with_all_rows() -> None:
    features = normal(200, 8)
    mean = features.mean(axis=0)
    rng = np.random.default_rng(1)
    gap = np.linalg.norm(features[herding(features, 10)].mean(axis=0) - mean)
    chance = [
        np.linalg.norm(features[rng.choice(200, 10, replace=False)].mean(axis=0) - mean)
        for _ in range(100)
    ]
    assert gap < min(chance)
    assert sorted(herding(features, 200).tolist()) == list(range(200))


def test_a_common_offset_does_not_change_what_herding_chooses() -> None:
    features = normal(50, 4).astype(np.float64)
    np.testing.assert_array_equal(herding(features + 1e4, 20), herding(features, 20))


def test_the_margin_is_the_own_logit_minus_the_largest_other() -> None:
    features = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 5.0]])
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    bias = np.array([0.5, 0.0, -1.0])
    # Logits: [1.5, 0, 1], [0.5, 2, 1], [-0.5, 5, 2].
    np.testing.assert_allclose(margin_of(features, weight, bias, 0), [0.5, -1.5, -5.5])
    np.testing.assert_allclose(margin_of(features, weight, bias, 1), [-1.5, 1.0, 3.0])


def test_without_a_margin_atom_the_barycenter_is_the_plain_one() -> None:
    features = normal(60, 5)
    for fraction in (0.0, 0.1):
        config = BarycenterConfig(margin_fraction=fraction)
        expected = solve_barycenter(features, 4, config, seed=2)
        got = solve_with_margin(features, normal(60), 4, config, seed=2)
        assert got.atoms_KD.tobytes() == expected.atoms_KD.tobytes()
        assert got.weights_K.tobytes() == expected.weights_K.tobytes()
        assert got.cost == expected.cost


def test_margin_atoms_are_the_barycenter_of_the_quarter_nearest_to_the_boundary() -> None:
    features = normal(80, 3)
    margin = features[:, 0].astype(np.float64)
    found = solve_with_margin(features, margin, 6, HALF, seed=2)
    near = features[margin <= np.sort(margin)[19]]
    expected = [solve_barycenter(x, 3, HALF, seed=2) for x in (features, near)]
    np.testing.assert_array_equal(found.atoms_KD, np.concatenate([e.atoms_KD for e in expected]))
    weights = np.concatenate([0.5 * e.weights_K for e in expected])
    np.testing.assert_allclose(found.weights_K, weights)
    np.testing.assert_allclose(found.cost, exact_cost(found.atoms_KD, weights, features))
    assert found.num_iters == len(found.cost_history)
    assert found.converged == all(e.converged for e in expected)


def test_parts_weigh_as_much_as_they_have_atoms() -> None:
    config = replace(HALF, margin_fraction=0.3)
    found = solve_with_margin(normal(50, 3), normal(50, seed=1), 10, config, seed=0)
    np.testing.assert_allclose(found.weights_K[-3:].sum(), 0.3)
    np.testing.assert_allclose(found.weights_K.sum(), 1)


def test_all_atoms_can_be_margin_atoms_even_when_a_quarter_is_fewer() -> None:
    config = BarycenterConfig(margin_fraction=1.0)
    features, margin = normal(8, 3), np.arange(8.0)
    found = solve_with_margin(features, margin, 5, config, seed=0)
    order = np.lexsort(found.atoms_KD.T)
    np.testing.assert_allclose(
        found.atoms_KD[order], features[:5][np.lexsort(features[:5].T)], atol=1e-5
    )


def test_fewer_images_than_atoms_are_an_error_that_names_the_class() -> None:
    with pytest.raises(DataError, match="class 7 has 3 images for 4 atoms"):
        solve_with_margin(normal(3, 2), normal(3), 4, HALF, seed=0, where="class 7")


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_margin_fraction_outside_the_unit_interval_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"--barycenters.margin-fraction: .*\[0, 1\]"):
        BarycenterConfig(margin_fraction=fraction)


def test_selection_does_without_torch() -> None:
    code = "import sys, wmdd_ray.core.selection; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
