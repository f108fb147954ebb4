from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core.barycenter import solve_barycenter
from wmdd_ray.core.joint import label_costs, solve_joint
from wmdd_ray.core.transport import exact_plan, squared_distances_KN
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import Barycenter

EXACT = BarycenterConfig(solver="lloyd", label_weight=1.0, tol=0, max_iters=300)


def classes(*sizes: int, gap: float = 2.0, seed: int = 0) -> list[np.ndarray]:
    """Overlapping clouds in 6 dimensions, a step of `gap` apart along the first."""
    rng = np.random.default_rng(seed)
    clouds = [rng.standard_normal((n, 6)).astype(np.float32) for n in sizes]
    for label, cloud in enumerate(clouds):
        cloud[:, 0] += gap * label
    return clouds


def joint(
    features: list[np.ndarray],
    label_weight: float,
    *,
    num_atoms: int = 4,
    embedding_YE: np.ndarray | None = None,
    config: BarycenterConfig = EXACT,
) -> tuple[Barycenter, ...]:
    return solve_joint(
        features,
        np.eye(len(features)) if embedding_YE is None else embedding_YE,
        num_atoms,
        replace(config, label_weight=label_weight),
        seeds=range(len(features)),
        where=[f"class {label}" for label in range(len(features))],
    )


def lifted(
    features: list[np.ndarray], found: tuple[Barycenter, ...], label_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return images and atoms in the joint space, by unit vectors of the right length as embeddings."""
    # Unit vectors times s are 2 s^2 apart.
    price = label_costs(features, np.eye(len(features)), label_weight)[0, 1]
    e_YE = np.eye(len(features)) * np.sqrt(price / 2)
    images = [np.hstack([x, np.tile(e_YE[y], (len(x), 1))]) for y, x in enumerate(features)]
    atoms = [np.hstack([b.atoms_KD, np.tile(e_YE[y], (4, 1))]) for y, b in enumerate(found)]
    return np.concatenate(images), np.concatenate(atoms)


def test_with_a_large_label_weight_every_class_has_its_own_barycenter() -> None:
    features = classes(120, 80, 60)
    for label, found in enumerate(joint(features, 1e6)):
        alone = solve_barycenter(features[label], 4, EXACT, seed=label)
        np.testing.assert_allclose(found.atoms_KD, alone.atoms_KD, atol=1e-5)
        np.testing.assert_allclose(found.weights_K, alone.weights_K)
        assert found.cost == pytest.approx(alone.cost, rel=1e-6)


@pytest.mark.parametrize("label_weight", [0.0, 0.3, 2.0])
def test_the_cost_is_that_of_exact_transport_in_the_joint_space_and_falls(
    label_weight: float,
) -> None:
    features = classes(150, 40, 25)
    found = joint(features, label_weight)
    history = found[0].cost_history
    assert list(history) == sorted(history, reverse=True) and found[0].converged
    images, atoms = lifted(features, found, label_weight)
    cells = np.bincount(squared_distances_KN(atoms, images).argmin(axis=0), minlength=len(atoms))
    cost = exact_plan(cells / len(images), squared_distances_KN(atoms, images))[1]
    assert history[-1] == pytest.approx(cost, rel=1e-5)
    for label, one in enumerate(found):
        own = cells[4 * label : 4 * label + 4]
        np.testing.assert_allclose(one.weights_K, own / own.sum())


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_atoms_are_the_means_of_their_joint_cells(label_weight: float) -> None:
    features = classes(150, 40, 25)
    found = joint(features, label_weight)
    images, atoms = lifted(features, found, label_weight)
    cell_N = squared_distances_KN(atoms, images).argmin(axis=0)
    for k, atom in enumerate(atoms):
        if (cell_N == k).any():
            np.testing.assert_allclose(images[cell_N == k, :6].mean(axis=0), atom[:6], atol=1e-4)


def test_a_small_class_borrows_more_from_its_neighbor_the_less_labels_weigh() -> None:
    features = classes(400, 5, gap=1.0)
    own = features[1].mean(axis=0)
    moved = []
    for label_weight in (10.0, 0.5, 0.05):
        small = joint(features, label_weight)[1]
        moved.append(float(np.linalg.norm(small.weights_K @ small.atoms_KD - own)))
    assert moved[0] < 1e-4 < moved[1] < moved[2]


def test_classes_that_are_called_alike_share_atoms_and_others_do_not() -> None:
    features = classes(300, 6, 6, gap=0.5)
    # The second class's label is next to the first one's, and the third one's far away.
    embedding = np.array([[0.0], [0.1], [5.0]])
    _, near, far = joint(features, 1.0, embedding_YE=embedding)
    alone = [solve_barycenter(x, 4, EXACT, seed=y) for y, x in enumerate(features)]
    assert np.abs(near.atoms_KD - alone[1].atoms_KD).max() > 0.1
    np.testing.assert_allclose(far.atoms_KD, alone[2].atoms_KD, atol=1e-5)


def test_label_costs_are_in_units_of_the_spread_within_classes() -> None:
    features = classes(200, 100, 50)
    price = label_costs(features, np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), 2.0)
    spread = sum(float(((x - x.mean(axis=0)) ** 2).sum()) for x in features) / 350
    assert price[~np.eye(3, dtype=bool)].mean() == pytest.approx(2 * spread, rel=1e-5)
    assert price[0, 1] / price[0, 2] == pytest.approx(9 / 16)
    assert (np.diag(price) == 0).all()


def test_label_costs_are_squared_distances_and_take_no_room_for_differences() -> None:
    features, width = classes(*[4] * 60), 2000
    e_YE = np.random.default_rng(0).normal(size=(60, width)) + 3
    e_YE[7] = e_YE[3]
    tracemalloc.start()
    price_YY = label_costs(features, e_YE, 1.0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    squared_YY = ((e_YE[:, None] - e_YE) ** 2).sum(axis=2)
    np.testing.assert_allclose(
        price_YY / price_YY.mean(), squared_YY / squared_YY.mean(), rtol=1e-10, atol=1e-12
    )
    assert peak_bytes < 10 * e_YE.nbytes < 60 * e_YE.nbytes


def test_a_class_whose_atoms_nobody_wants_keeps_them_at_equal_weights() -> None:
    features = [np.zeros((50, 2), np.float32), np.full((4, 2), 0.0, np.float32)]
    found = joint(features, 0.0, embedding_YE=np.array([[0.0], [1.0]]))
    for one in found:
        assert np.isfinite(one.atoms_KD).all() and one.weights_K.sum() == pytest.approx(1)


def test_atoms_at_one_place_share_its_mass() -> None:
    pair = np.array([[0, 0], [0, 0], [0, 0], [4, 0]], np.float32)
    for one in joint([pair, pair + 100], 1e6):
        at_pair_K = one.atoms_KD[:, 0] % 100 < 1
        expected_K = np.where(at_pair_K, 0.75 / at_pair_K.sum(), 0.25 / (~at_pair_K).sum())
        np.testing.assert_allclose(one.weights_K, expected_K)


def test_one_class_is_its_own_barycenter() -> None:
    features = classes(50)
    (found,) = joint(features, 1.0)
    np.testing.assert_array_equal(
        found.atoms_KD, solve_barycenter(features[0], 4, EXACT, seed=0).atoms_KD
    )


@pytest.mark.parametrize(
    "embedding", [np.ones((2, 3)), np.full((2, 3), 0.1), np.full((2, 3), np.nan)]
)
def test_embeddings_that_tell_nothing_are_refused(embedding: np.ndarray) -> None:
    with pytest.raises(DataError, match="label-weight: expected label embeddings that are finite"):
        joint(classes(20, 20), 1.0, embedding_YE=embedding)


def test_options_that_a_joint_barycenter_has_no_use_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="solver: expected lloyd with --barycenters.label-weight"):
        BarycenterConfig(label_weight=1.0, solver="emd")
    with pytest.raises(ConfigError, match="margin-fraction: expected 0.0 with"):
        BarycenterConfig(solver="lloyd", label_weight=1.0, margin_fraction=0.5)
    with pytest.raises(ConfigError, match="label-weight: expected >= 0, got -1"):
        BarycenterConfig(label_weight=-1.0)
