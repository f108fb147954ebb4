from __future__ import annotations

from itertools import combinations, permutations
from typing import get_args, get_type_hints

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from threadpoolctl import threadpool_info, threadpool_limits

from wmdd_ray.config import BarycenterConfig
from wmdd_ray.core import barycenter, lloyd
from wmdd_ray.core.barycenter import nearest_images, solve_barycenter
from wmdd_ray.core.transport import exact_cost
from wmdd_ray.errors import DataError
from wmdd_ray.records import Barycenter

SOLVERS = get_args(get_type_hints(BarycenterConfig)["solver"])
# Atoms are stored in float32, whose rounding is at most 2^-24 = 5.96e-8 of a value.
ROUNDED = 6e-8
EPS = np.finfo(np.float64).eps
SHARES = np.array([0.5, 0.3, 0.15, 0.05])


def config_of(solver: str, **options: float) -> BarycenterConfig:
    """Return a configuration that is quick enough for a test."""
    return BarycenterConfig(
        solver=solver, **({"max_iters": 8 if solver == "sinkhorn" else 40} | options)
    )


def solve(
    features_ND: np.ndarray, ipc: int, solver: str = "lloyd", seed: int = 0, **options: float
) -> Barycenter:
    return solve_barycenter(features_ND, ipc, config_of(solver, **options), seed=seed)


def clusters(seed: int, distance: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Return 80 features in 4 clusters with shares 1/2 to 1/20, and the cluster of each."""
    rng = np.random.default_rng(seed)
    label_N = rng.permutation(np.repeat(np.arange(4), (80 * SHARES).round().astype(int)))
    centers = distance * np.eye(4, 6) + 1
    return (centers[label_N] + rng.normal(size=(80, 6))).astype(np.float32), label_N


def cloud(seed: int, num: int = 60, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=(num, width)).astype(np.float32)


def cost_rounding(features_ND: np.ndarray) -> float:
    """Return a float64 rounding of the largest cost there can be: an atom within the features is at most 2 max |x| from any."""
    return float(EPS * 4 * (features_ND.astype(np.float64) ** 2).sum(axis=1).max())


def atom_rounding(features_ND: np.ndarray) -> float:
    """Return what a cost gains when atoms that are means are rounded to float32: the square of the shift, no first order."""
    return float(ROUNDED**2 * (features_ND.astype(np.float64) ** 2).sum(axis=1).max())


def assert_cost_is_exact(found: Barycenter, features_ND: np.ndarray) -> None:
    """Compare with POT on distances that are summed pair by pair."""
    offsets = found.atoms_KD[:, None].astype(np.float64) - features_ND.astype(np.float64)
    uniform_N = np.full(len(features_ND), 1 / len(features_ND))
    expected = ot.emd2(found.weights_K, uniform_N, (offsets**2).sum(axis=2))
    assert_allclose(found.cost, expected, rtol=0, atol=cost_rounding(features_ND))


# Known answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_barycenter_of_one_atom_is_the_mean(solver: str) -> None:
    features = cloud(0)
    found = solve(features, 1, solver)
    exact = features.astype(np.float64)
    assert_array_equal(found.atoms_KD[0], exact.mean(axis=0).astype(np.float32))
    assert_array_equal(found.weights_K, [1.0])
    tolerance = cost_rounding(features) + atom_rounding(features)
    assert_allclose(found.cost, exact.var(axis=0).sum(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", ["lloyd", "uniform", "emd", "sliced"])
def test_as_many_atoms_as_images_are_the_images(solver: str) -> None:
    features = cloud(1, num=12)
    found = solve(features, 12, solver)
    order = np.lexsort(found.atoms_KD.T), np.lexsort(features.T)
    assert_array_equal(found.atoms_KD[order[0]], features[order[1]])
    assert_array_equal(found.weights_K, 1 / 12)
    assert found.cost <= cost_rounding(features)


@pytest.mark.parametrize("seed", range(5))
def test_separated_clusters_return_their_means_and_shares(seed: int) -> None:
    features, label_N = clusters(seed)
    found = solve(features, 4, seed=seed)
    order = np.argsort(-found.weights_K)
    exact = features.astype(np.float64)
    means = np.stack([exact[label_N == k].mean(axis=0) for k in range(4)])
    assert_array_equal(found.weights_K[order], SHARES)
    assert_array_equal(found.atoms_KD[order], means.astype(np.float32))
    assert found.converged


def test_emd_also_finds_the_shares_of_separated_clusters() -> None:
    features, _ = clusters(0)
    found = solve(features, 4, "emd", max_iters=200)
    # Its weights come by steps that shrink, and are right to the image of the 80.
    assert_array_equal((80 * np.sort(found.weights_K)[::-1]).round(), 80 * SHARES)


@pytest.mark.parametrize("seed", range(5))
def test_emd_returns_the_means_and_shares_of_clusters_far_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label_N = np.repeat(np.arange(4), [20, 40, 60, 80])
    noise = 0.02 * rng.normal(size=(200, 4))
    features = (100 * np.eye(4)[label_N] + noise).astype(np.float32)
    found = solve(features, 4, "emd", seed=seed)
    order = np.argsort(found.weights_K)
    # Whole images, divided by a sum of four: a rounding a weight.
    assert_allclose(found.weights_K[order], [0.1, 0.2, 0.3, 0.4], rtol=4 * EPS)
    exact = features.astype(np.float64)
    means = np.stack([exact[label_N == k].mean(axis=0) for k in range(4)])
    assert_array_equal(found.atoms_KD[order], means.astype(np.float32))
    within = ((exact - means[label_N]) ** 2).sum(axis=1).mean()
    tolerance = cost_rounding(features) + atom_rounding(features)
    assert_allclose(found.cost, within, rtol=0, atol=tolerance)
    assert found.converged


@pytest.mark.parametrize("images", [[2, 3, 5], [1, 1, 8]])
def test_weights_that_are_whole_images_stay(images: list[int]) -> None:
    weights = np.array(images) / 10
    assert_array_equal(barycenter._whole_images(weights, 10), weights)


def test_weights_in_whole_images_are_the_nearest_that_sum_to_one() -> None:
    found = barycenter._whole_images(np.array([0.17, 0.17, 0.66]), 10)
    assert_array_equal(found, [0.2, 0.2, 0.6])


def test_uniform_splits_a_large_cluster_instead() -> None:
    features, label_N = clusters(0)
    found = solve(features, 4, "uniform")
    assert_array_equal(found.weights_K, 0.25)
    # Half of the mass lies in the first cluster, so half of the atoms do.
    assert (found.atoms_KD[:, 0] > 25).sum() == 2


def test_default_atoms_of_equal_weight_are_nearer_to_heavy_tailed_features_than_lloyds() -> None:
    """Lloyd gives the few images of the tail atoms of their own, which at 1/K stand for more than there are."""
    features = np.random.default_rng(0).lognormal(sigma=1.5, size=(400, 8)).astype(np.float32)
    equal_K = np.full(20, 1 / 20)
    default = solve_barycenter(features, 20, BarycenterConfig(), seed=0)
    assert_allclose(default.weights_K, equal_K, rtol=20 * EPS)  # divided by a sum of 20
    free = solve(features, 20, "lloyd")
    random = features[np.random.default_rng(1).choice(400, 20, replace=False)]
    assert free.cost < default.cost < 0.2 * exact_cost(free.atoms_KD, equal_K, features)
    assert default.cost < exact_cost(random, equal_K, features)


def test_best_of_many_starts_is_the_optimal_quantization_of_a_line() -> None:
    features = np.sort(np.random.default_rng(0).gamma(1.0, size=(14, 1)), axis=0)

    def cost_of(cuts: tuple[int, ...]) -> float:
        return (
            sum(float(((cell - cell.mean()) ** 2).sum()) for cell in np.split(features, cuts)) / 14
        )

    best = min(cost_of(cuts) for cuts in combinations(range(1, 14), 2))
    tolerance = cost_rounding(features) + atom_rounding(features)
    assert_allclose(solve(features, 3, num_starts=50).cost, best, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("solver", ["uniform", "emd", "sinkhorn", "sliced"])
def test_no_solver_beats_lloyd_on_clustered_features(solver: str, seed: int) -> None:
    features, _ = clusters(seed)
    tolerance = cost_rounding(features) + atom_rounding(features)
    assert solve(features, 4, seed=seed).cost <= solve(features, 4, solver, seed).cost + tolerance


# What every solver keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("ipc", [2, 7, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_reported_cost_is_the_exact_transport_cost(solver: str, ipc: int) -> None:
    for features in (cloud(2), clusters(2)[0]):
        found = solve(features, ipc, solver)
        assert_cost_is_exact(found, features)
        assert found.num_iters == len(found.cost_history) > 0


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 2**63 - 1), num=st.integers(1, 25), share=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_weights_are_a_distribution(solver: str, seed: int, num: int, share: float) -> None:
    features = cloud(seed, num, width=3)
    found = solve(features, max(1, round(share * num)), solver, seed, max_iters=3)
    assert found.weights_K.min() >= 0
    assert_allclose(found.weights_K.sum(), 1, rtol=25 * EPS)  # a rounding a weight
    assert np.isfinite(found.atoms_KD).all()
    assert found.cost >= 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("solver", ["lloyd", "uniform", "emd"])
def test_cost_never_increases(solver: str, seed: int) -> None:
    features = cloud(seed, num=200)
    found = solve(features, 12, solver, seed, tol=0.0, max_iters=60)
    assert len(found.cost_history) > 3
    assert np.all(np.diff(found.cost_history) <= cost_rounding(features))
    tolerance = cost_rounding(features) + atom_rounding(features)
    assert found.cost <= found.cost_history[-1] + tolerance
    # Lloyd's history is that of atoms which are not rounded yet.
    assert solver == "lloyd" or found.cost == found.cost_history[-1]


def test_more_starts_never_raise_the_cost() -> None:
    features = cloud(5, num=100)
    costs = [solve(features, 10, num_starts=n).cost for n in (1, 3, 10)]
    assert costs[0] >= costs[1] >= costs[2]
    assert costs[0] > costs[2]


def test_atom_that_is_nearest_to_nothing_moves_to_the_farthest_feature() -> None:
    features = np.array([[0.0], [1.0], [10.0], [20.0]], np.float32)
    around = lloyd.Cloud(features)
    atoms = np.array([[0.5], [10.0], [500.0]]) - around.center_D
    found = lloyd._with_voronoi_weights(around, atoms, [], False)
    assert_array_equal(found.atoms_KD[:, 0], [0.5, 10.0, 20.0])
    assert_array_equal(found.weights_K, [0.5, 0.25, 0.25])
    assert found.cost == 0.125


def test_empty_cell_takes_a_feature_while_descending() -> None:
    around = lloyd.Cloud(np.array([[0.0], [1.0], [10.0], [20.0]], np.float32))
    atoms = np.array([[0.5], [10.0], [500.0]]) - around.center_D
    found, history, converged = lloyd.descend(around, atoms, 10, 0.0)
    assert_array_equal(found + around.center_D, [[0.5], [10.0], [20.0]])
    assert_array_equal(history, 0.125)
    assert converged


@given(seed=st.integers(0, 2**32), shift=st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_shifted_features_give_shifted_atoms(seed: int, shift: list[float]) -> None:
    features = cloud(seed, num=20, width=3).astype(np.float64)
    here, there = solve(features, 4, seed=seed), solve(features + shift, 4, seed=seed)
    # Half a step of float32, in which atoms are stored, below 1024 and below 16. At a mean the cost feels its square
    # alone, in 3 columns.
    half_steps = 2.0**-15 + 2.0**-21
    assert_allclose(there.atoms_KD, here.atoms_KD + shift, rtol=0, atol=half_steps)
    assert_array_equal(there.weights_K, here.weights_K)
    assert_allclose(there.cost, here.cost, rtol=0, atol=3 * half_steps**2)


@given(seed=st.integers(0, 2**32), power=st.integers(-10, 10))
@settings(max_examples=25, deadline=None)
def test_scaled_features_scale_the_cost_by_the_square(seed: int, power: int) -> None:
    features = cloud(seed, num=20, width=3).astype(np.float64)
    # By a power of two, which rounds nothing; by 0.001 the atoms of seed 125 come in another order.
    factor = 2.0**power
    here, there = solve(features, 4, seed=seed), solve(factor * features, 4, seed=seed)
    assert_array_equal(there.atoms_KD, factor * here.atoms_KD)
    assert_array_equal(there.weights_K, here.weights_K)
    assert there.cost == factor**2 * here.cost


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_seed_gives_the_same_bytes_whatever_the_threads(solver: str) -> None:
    features = cloud(0, num=300, width=64)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(solve(features, 20, solver, seed=3, max_iters=5))
    assert found[0].atoms_KD.tobytes() == found[1].atoms_KD.tobytes()
    assert found[0].weights_K.tobytes() == found[1].weights_K.tobytes()
    assert found[0].cost_history == found[1].cost_history
    assert found[0].atoms_KD.tobytes() != solve(features, 20, solver, seed=4).atoms_KD.tobytes()


def test_solver_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []

    def spy(*arguments: object) -> None:
        inside.extend(pool["num_threads"] for pool in threadpool_info())

    monkeypatch.setitem(barycenter._SOLVERS, "lloyd", spy)
    with threadpool_limits(2):
        solve(cloud(0), 2)
        after = {pool["num_threads"] for pool in threadpool_info()}
    assert set(inside) == {1}
    assert after == {2}


# Odd inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_class_of_one_image_is_its_own_barycenter(solver: str) -> None:
    found = solve(cloud(0, num=1), 1, solver)
    assert_array_equal(found.atoms_KD, cloud(0, num=1))
    assert found.cost == 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("copies", [(30,), (10, 5, 15)])
def test_fewer_distinct_images_than_atoms(solver: str, copies: tuple[int, ...]) -> None:
    features = np.repeat(cloud(0, num=len(copies)), copies, axis=0)
    found = solve(features, 10, solver)
    assert np.isfinite(found.weights_K).all()
    assert_allclose(found.weights_K.sum(), 1, rtol=10 * EPS)  # a rounding a weight
    assert_cost_is_exact(found, features)
    if solver == "lloyd":
        assert found.weights_K.min() > 0
        assert found.cost <= cost_rounding(features)
    if solver == "lloyd" and len(copies) > 1:
        for image, count in zip(cloud(0, num=3), copies, strict=True):
            at_image = (found.atoms_KD == image).all(axis=1)
            # A rounding a weight, of at most 10.
            assert_allclose(found.weights_K[at_image].sum(), count / 30, rtol=10 * EPS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_features_of_zeros_have_barycenter_zero(solver: str) -> None:
    found = solve(np.zeros((8, 4), np.float32), 3, solver)
    assert_array_equal(found.atoms_KD, 0)
    assert found.weights_K.sum() == 1
    assert found.cost == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_fewer_images_than_atoms_is_an_error_that_names_the_class(solver: str) -> None:
    expected = r'^class 7 \("tench"\) has 1 images for 2 atoms; lower --ipc or drop the class$'
    with pytest.raises(DataError, match=expected):
        solve_barycenter(cloud(0, num=1), 2, config_of(solver), seed=0, where='class 7 ("tench")')


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_counted_in_the_error(value: float) -> None:
    features = cloud(0, num=10)
    features[[2, 5, 5], [0, 1, 3]] = value
    with pytest.raises(DataError, match=r"^class 3: 2 of 10 feature vectors are not finite; check"):
        solve_barycenter(features, 2, config_of("lloyd"), seed=0, where="class 3")


@pytest.mark.parametrize("shape", [(10,), (10, 0), (2, 3, 4)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        DataError, match=r"^the class: expected features of shape \(images, width\)"
    ):
        solve(np.zeros(shape), 1)


# Parts ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_projection_onto_the_simplex_is_the_nearest_point(values: list[float]) -> None:
    vector = np.array(values)
    # Another way: the threshold t with sum max(v - t, 0) = 1, by bisection.
    low, high = vector.min() - 1, vector.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(vector - middle, 0).sum() > 1 else (low, middle)
    found = barycenter._onto_simplex(vector)
    # Rounding of at most 8 values of at most 4, the threshold's among them.
    assert_allclose(found, np.maximum(vector - high, 0), rtol=0, atol=32 * EPS)
    assert_allclose(found.sum(), 1, rtol=32 * EPS)


@pytest.mark.parametrize(("ipc", "num"), [(1, 5), (3, 10), (7, 7), (4, 12), (9, 11)])
def test_quantile_means_share_every_image_out_once(ipc: int, num: int) -> None:
    means_KN = barycenter._quantile_means(ipc, num)
    assert means_KN.min() >= 0
    # A rounding a term, of shares of at most 1.
    assert_allclose(means_KN.sum(axis=1), 1, rtol=0, atol=num * EPS)
    assert_allclose(means_KN.sum(axis=0), ipc / num, rtol=0, atol=ipc * EPS)
    # The optimal plan on a line is monotone.
    weights = np.full(ipc, 1 / ipc)
    plan = ot.emd_1d(np.arange(ipc) / ipc, np.arange(num) / num, weights, np.full(num, 1 / num))
    assert_allclose(means_KN / ipc, plan, rtol=0, atol=num * EPS)


def test_sliced_lowers_its_own_objective() -> None:
    """It is D times the mean W2^2 of the projections, so it starts below W2^2 and falls."""
    features = cloud(0, num=200, width=20)
    found = solve(features, 10, "sliced", max_iters=100, num_projections=20)
    assert np.mean(found.cost_history[-20:]) < 0.9 * found.cost_history[0]
    # All 20 directions of an orthonormal basis together: a lower bound of the exact cost.
    first = solve(features, 10, "sliced", max_iters=1, num_projections=20)
    atoms = barycenter._start_of(features, 10, np.random.Generator(np.random.Philox(0)))
    assert first.cost_history[0] <= exact_cost(atoms, np.full(10, 0.1), features)


def test_nearest_images_are_the_best_distinct_choice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        features = rng.normal(size=(6, 2))
        # Crowded atoms, so that the nearest image of several is the same one.
        atoms = 0.1 * rng.normal(size=(3, 2))
        squared = ((atoms[:, None] - features) ** 2).sum(axis=2)
        totals = {rows: squared[range(3), rows].sum() for rows in permutations(range(6), 3)}
        found = nearest_images(atoms, features)
        assert len(set(found.tolist())) == 3
        assert totals[tuple(found.tolist())] == min(totals.values())


@pytest.mark.parametrize("solver", ["lloyd", "uniform", "emd"])
@pytest.mark.parametrize("exponent", [-60, -30, 40])
def test_the_unit_of_the_features_does_not_change_the_answer(solver: str, exponent: int) -> None:
    rng = np.random.default_rng(3)
    features_ND = rng.normal(size=(6, 4))[rng.integers(6, size=40)] + 0.1 * rng.normal(size=(40, 4))
    features_ND = features_ND.astype(np.float32)
    config = BarycenterConfig(solver=solver)
    plain = solve_barycenter(features_ND, 5, config, seed=0)
    scaled = solve_barycenter(features_ND * np.float32(2.0**exponent), 5, config, seed=0)
    # Powers of two round nothing.
    assert scaled.cost / 4.0**exponent == plain.cost
    np.testing.assert_array_equal(scaled.weights_K, plain.weights_K)
