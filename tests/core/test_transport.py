from __future__ import annotations

import numpy as np
import ot
from numpy.testing import assert_allclose, assert_array_less
from threadpoolctl import threadpool_info

from wmdd_ray.core.transport import (
    entropic_plan,
    exact_cost,
    exact_plan,
    one_thread,
    squared_distances_KN,
)


def random_weights(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(count))


def test_squared_distances_are_those_of_every_pair() -> None:
    rng = np.random.default_rng(0)
    atoms, features = rng.normal(size=(4, 7)), rng.normal(size=(9, 7)).astype(np.float32)
    pairs = ((atoms[:, None].astype(np.float64) - features) ** 2).sum(axis=2)
    assert_allclose(squared_distances_KN(atoms, features), pairs, rtol=1e-12)


def test_squared_distances_keep_their_digits_far_from_the_origin() -> None:
    rng = np.random.default_rng(0)
    atoms, features = rng.normal(size=(4, 7)) + 1e6, rng.normal(size=(9, 7)) + 1e6
    pairs = ((atoms[:, None] - features) ** 2).sum(axis=2)
    assert_allclose(squared_distances_KN(atoms, features), pairs, rtol=1e-9)


def test_squared_distances_are_never_negative() -> None:
    features = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    distances = squared_distances_KN(features, features)
    assert distances.min() >= 0
    assert_allclose(np.diag(distances), 0, atol=1e-12)


def test_cost_of_translated_features_is_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(6, 3))
    shift = np.array([1.0, -2.0, 0.5])
    cost = exact_cost(features + shift, np.full(6, 1 / 6), features)
    assert_allclose(cost, (shift**2).sum(), rtol=1e-12)


def test_cost_on_the_line_is_that_of_sorted_quantiles() -> None:
    rng = np.random.default_rng(3)
    weights, atoms, features = random_weights(5, 1), rng.normal(size=5), rng.normal(size=12)
    # Both quantile functions are constant between the union of their jumps.
    a, x = np.argsort(atoms), np.sort(features)
    edges_a, edges_x = np.cumsum(weights[a])[:-1], np.arange(1, 12) / 12
    edges = np.sort(np.concatenate([[0, 1], edges_a, edges_x]))
    middle, length = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    gap = atoms[a][np.searchsorted(edges_a, middle)] - x[np.searchsorted(edges_x, middle)]
    expected = (length * gap**2).sum()
    assert_allclose(exact_cost(atoms[:, None], weights, features[:, None]), expected, rtol=1e-10)


def test_plan_has_the_weights_and_equal_shares_as_marginals() -> None:
    rng = np.random.default_rng(0)
    weights = random_weights(5, 0)
    costs = squared_distances_KN(rng.normal(size=(5, 3)), rng.normal(size=(40, 3)))
    plan, cost, _ = exact_plan(weights, costs)
    assert plan.min() >= 0
    assert_allclose(plan.sum(axis=1), weights, atol=1e-12)
    assert_allclose(plan.sum(axis=0), 1 / 40, atol=1e-12)
    assert_allclose((plan * costs).sum(), cost, rtol=1e-12)
    assert_allclose(cost, ot.emd2(weights, np.full(40, 1 / 40), costs), rtol=1e-10)


def test_potentials_are_a_subgradient_of_the_cost_in_the_weights() -> None:
    rng = np.random.default_rng(0)
    costs = squared_distances_KN(rng.normal(size=(5, 3)), rng.normal(size=(40, 3)))
    weights = random_weights(5, 0)
    _, cost, potentials = exact_plan(weights, costs)
    for seed in range(1, 20):
        other = random_weights(5, seed)
        tangent = cost + potentials @ (other - weights)
        assert_array_less(tangent, exact_plan(other, costs)[1] + 1e-12)


def test_potentials_are_finite_for_an_atom_without_weight() -> None:
    rng = np.random.default_rng(0)
    costs = squared_distances_KN(rng.normal(size=(3, 2)), rng.normal(size=(10, 2)))
    plan, _, potentials = exact_plan(np.array([0.5, 0.0, 0.5]), costs)
    assert np.isfinite(potentials).all()
    assert_allclose(plan[1], 0)


def test_large_problem_is_solved_to_the_optimum() -> None:
    """The dual value of the potentials bounds the cost from below, so equality proves both optimal."""
    rng = np.random.default_rng(0)
    weights = random_weights(100, 0)
    costs = squared_distances_KN(rng.normal(size=(100, 3)), rng.normal(size=(1300, 3)))
    _, cost, potentials = exact_plan(weights, costs)
    dual = weights @ potentials + (costs - potentials[:, None]).min(axis=0).mean()
    assert_allclose(cost, dual, rtol=1e-10)


def test_entropic_plan_meets_its_marginals_and_nears_the_exact_plan() -> None:
    rng = np.random.default_rng(0)
    weights = np.full(4, 0.25)
    costs = squared_distances_KN(rng.normal(size=(4, 3)), rng.normal(size=(24, 3)))
    _, best, _ = exact_plan(weights, costs)
    excess = []
    for reg in (1.0, 0.1):
        plan = entropic_plan(weights, costs, reg)
        assert_allclose(plan.sum(axis=1), weights, atol=1e-3)
        assert_allclose(plan.sum(axis=0), 1 / 24, atol=1e-3)
        excess.append((plan * costs).sum() - best)
    assert -1e-3 < excess[1] < 0.1 * best
    assert excess[1] < excess[0]


def test_linear_algebra_uses_one_thread_inside_the_context() -> None:
    with one_thread():
        assert {pool["num_threads"] for pool in threadpool_info()} == {1}
