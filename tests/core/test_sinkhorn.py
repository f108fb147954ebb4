"""Entropic optimal transport of two batches, against POT, finite differences and an unrolled algorithm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wmdd_ray.core import transport  # imported before POT, whose array libraries it chooses
from wmdd_ray.core.sinkhorn import l1_costs, sinkhorn_distance

# isort: split
import ot

assert transport


def plan_of(costs_BM: Tensor, **options: Any) -> Tensor:
    """Return the plan, which is the gradient of the distance in the costs."""
    costs_BM = costs_BM.detach().requires_grad_(True)
    (plan_BM,) = torch.autograd.grad(sinkhorn_distance(costs_BM, **options), costs_BM)
    return plan_BM


def batches(first: int = 25, second: int = 25, width: int = 10, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(0, 3, (count, width))) for count in (first, second)]


def costs(*arguments: int, seed: int = 0) -> Tensor:
    first, second = batches(*arguments, seed=seed)
    return torch.cdist(first, second, p=1) / first.shape[1]


def uniform(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


def unrolled(costs_BM: Tensor, regularization: float, iterations: int) -> Tensor:
    """Return the same objective from the primal side, with a graph through all iterations."""
    rows, columns = costs_BM.shape
    kernel = torch.exp(-costs_BM / regularization)
    v = torch.ones(columns, dtype=costs_BM.dtype)
    for _ in range(iterations):
        u = 1 / rows / (kernel @ v)
        v = 1 / columns / (u @ kernel)
    u = 1 / rows / (kernel @ v)
    plan = u[:, None] * kernel * v
    kl = (plan * (plan * rows * columns).log()).sum()
    return (plan * costs_BM).sum() + regularization * kl


def test_costs_are_mean_absolute_differences_in_float32() -> None:
    first, second = batches(3, 4, 5)
    found = l1_costs(first, second)
    expected = (first[:, None] - second).abs().mean(dim=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [(25, 25), (7, 12), (1, 3), (100, 100)])
def test_a_small_regularization_gives_the_exact_cost_of_pot_up_to_its_entropy(
    first: int, second: int
) -> None:
    costs_BM = costs(first, second)
    exact = ot.emd2(uniform(first), uniform(second), costs_BM.numpy())
    reg = 0.01 * float(costs_BM.mean())
    found = float(sinkhorn_distance(costs_BM, regularization=reg, iterations=3000))
    assert exact - 1e-9 <= found <= exact + reg * math.log(min(first, second)) + 1e-9


@pytest.mark.parametrize("share", [0.05, 0.1, 1.0])
def test_plan_and_cost_are_those_of_pots_sinkhorn(share: float) -> None:
    costs_BM = costs(25, 30)
    reg = share * float(costs_BM.mean())
    expected = ot.sinkhorn(
        uniform(25), uniform(30), costs_BM.numpy(), reg, method="sinkhorn_log", stopThr=1e-12,
        numItermax=20_000,
    )  # fmt: skip
    expected_cost = ot.sinkhorn2(
        uniform(25), uniform(30), costs_BM.numpy(), reg, method="sinkhorn_log", stopThr=1e-12,
        numItermax=20_000,
    )  # fmt: skip
    plan = plan_of(costs_BM, regularization=reg, iterations=2000)
    np.testing.assert_allclose(plan.numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(float((plan * costs_BM).sum()), expected_cost, rtol=1e-7)
    kl = (expected * np.log(expected * 25 * 30)).sum()
    found = sinkhorn_distance(costs_BM, regularization=reg, iterations=2000)
    np.testing.assert_allclose(float(found), expected_cost + reg * kl, rtol=1e-7)


def test_the_gradient_is_the_finite_difference_of_the_converged_cost_in_the_outputs() -> None:
    first, second = batches(6, 8, 4)

    def value(outputs: Tensor) -> Tensor:
        costs_BM = torch.cdist(outputs, second, p=1) / 4
        return sinkhorn_distance(costs_BM, regularization=0.3, iterations=500)

    first.requires_grad_(True)
    (found,) = torch.autograd.grad(value(first), first)
    step = 1e-6
    for i, k in [(0, 0), (2, 3), (5, 1)]:
        moved = [first.detach().clone() for _ in range(2)]
        moved[0][i, k] += step
        moved[1][i, k] -= step
        expected = (value(moved[0]) - value(moved[1])) / (2 * step)
        torch.testing.assert_close(found[i, k], expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_that_of_an_unrolled_algorithm_without_its_graph() -> None:
    costs_BM = costs(25, 25).requires_grad_(True)
    reg = 0.1 * float(costs_BM.detach().mean())
    found = sinkhorn_distance(costs_BM, regularization=reg, iterations=400)
    expected = unrolled(costs_BM, reg, 400)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(value, costs_BM)[0] for value in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-10)
    assert gradients[0].abs().max() > 0.01


def test_the_gradient_after_few_iterations_has_whole_rows() -> None:
    plan = plan_of(costs(25, 25), regularization=0.3, iterations=3)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((25,), 1 / 25, dtype=torch.float64))


@pytest.mark.parametrize("batch", [25, 100])
def test_few_iterations_leave_little_mass_in_wrong_columns(batch: int) -> None:
    # A student half way to its teacher, outputs of a classifier that is sure of most.
    rng = np.random.default_rng(0)
    for _ in range(5):
        teacher = rng.normal(0, 2, (batch, 10)) + 12 * np.eye(10)[np.arange(batch) % 10]
        student = 0.5 * teacher + rng.normal(0, 1, (batch, 10))
        costs_BB = l1_costs(torch.tensor(student), torch.tensor(teacher))
        reg = 0.1 * float(costs_BB.mean())
        errors = [
            float((plan_BB.sum(dim=0) - 1 / batch).abs().sum()) / 2
            for n in (1, 10, 100)
            for plan_BB in [plan_of(costs_BB, regularization=reg, iterations=n)]
        ]
        assert errors[1] < 0.1
        assert errors[0] > errors[1] > errors[2]


def test_more_iterations_raise_the_lower_bound_to_the_cost() -> None:
    costs_BM = costs(25, 25)
    values = [
        float(sinkhorn_distance(costs_BM, regularization=0.1, iterations=n))
        for n in (1, 2, 5, 10, 50, 2000)
    ]
    assert values == sorted(values)
    assert values[-1] - values[-2] < 0.01 * values[-1]


def test_a_shuffled_batch_costs_nothing_but_entropy_and_a_moved_one_its_distance() -> None:
    first, _ = batches(20, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    options = {"regularization": 1e-3, "iterations": 200}
    shuffled = sinkhorn_distance(l1_costs(first, first[order]), **options)
    assert 0 <= float(shuffled) <= 1e-3 * math.log(20) + 1e-6
    moved = sinkhorn_distance(l1_costs(first, first + 100.0), **options)
    torch.testing.assert_close(float(moved), 100.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "reg"), [(1e-4, 1e-6), (1.0, 1e-4), (1e4, 1e-2), (1.0, 1e3)])
def test_nothing_over_or_underflows(dtype: torch.dtype, scale: float, reg: float) -> None:
    first, second = (scale * x for x in batches(25, 25))
    student = first.to(dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        costs_BB = l1_costs(student, second.to(dtype))
        found = sinkhorn_distance(costs_BB, regularization=reg, iterations=10)
    assert found.dtype == torch.float32
    found.backward()
    assert student.grad is not None
    assert bool(torch.isfinite(found)) and bool(torch.isfinite(student.grad).all())
    assert float(found.detach()) > 0
    # A row's mass, with the rounding of costs of a million regularizations.
    assert float(student.grad.abs().max()) <= 1 / 25 / 10 * 1.1


def test_bfloat16_outputs_inside_autocast_cost_what_their_values_cost_in_float32() -> None:
    first, second = (x.to(torch.bfloat16) for x in batches(25, 25))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn_distance(l1_costs(first, second), regularization=0.3, iterations=10)
    exact = torch.cdist(first.double(), second.double(), p=1) / 10
    expected = sinkhorn_distance(exact, regularization=0.3, iterations=10)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
