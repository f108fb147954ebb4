"""Directions that lead a sample: against POT, finite differences and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wmdd_ray.core import transport  # imported before POT, whose array libraries it chooses
from wmdd_ray.core.sinkhorn import sinkhorn_distance
from wmdd_ray.diffusion.guidance import (
    deviation_direction,
    mean_spacing,
    transport_direction,
    transport_distance,
)

# isort: split
import ot

assert transport


def _points(seed: int, count: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, width)).astype(np.float32))


def _costs(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    found: np.ndarray = ot.dist(x.double().numpy(), y.double().numpy(), "cityblock")
    return found / x.shape[1]


def test_the_distance_is_pots_sinkhorn_cost_and_at_a_small_regularization_the_exact_one() -> None:
    x, y = _points(0, 4, 6), _points(1, 12, 6)
    costs = _costs(x, y)
    a, b = np.full(4, 1 / 4), np.full(12, 1 / 12)
    for regularization in (0.3, 0.05):
        plan = ot.bregman.sinkhorn_log(
            a, b, costs, regularization, numItermax=20_000, stopThr=1e-12
        )
        divergence = (plan * np.log(plan / np.outer(a, b))).sum()
        expected = (plan * costs).sum() + regularization * divergence
        found = transport_distance(x, y, regularization=regularization, iterations=3000)
        np.testing.assert_allclose(float(found), expected, rtol=2e-5)
    exact = ot.emd2(a, b, costs)
    found = transport_distance(x, y, regularization=1e-3, iterations=3000)
    np.testing.assert_allclose(float(found), exact, rtol=0.005)


def test_the_transport_direction_is_the_gradient_by_finite_differences() -> None:
    current, earlier, real = _points(2, 1, 5)[0], _points(3, 3, 5), _points(4, 9, 5)
    options = {"regularization": 0.2, "iterations": 2000}
    found = transport_direction(current, earlier, real, **options)
    step = 1e-3

    def at(moved: torch.Tensor) -> float:
        samples = torch.cat([earlier, moved[None]]).double()
        costs = torch.cdist(samples, real.double(), p=1) / 5
        return float(sinkhorn_distance(costs, **options))

    for d in range(5):
        shift = torch.zeros(5)
        shift[d] = step
        difference = (at(current + shift) - at(current - shift)) / (2 * step)
        np.testing.assert_allclose(float(found[d]), difference * 4 * 5, atol=2e-3)
    assert found.abs().max() <= 1


def test_a_step_against_the_direction_shortens_the_distance() -> None:
    current, earlier, real = _points(5, 1, 8)[0], _points(6, 2, 8), _points(7, 20, 8)
    options = {"regularization": 0.1, "iterations": 200}
    direction = transport_direction(current, earlier, real, **options)

    def at(moved: torch.Tensor) -> float:
        return float(transport_distance(torch.cat([earlier, moved[None]]), real, **options))

    assert at(current - 0.05 * direction) < at(current)


def test_a_sample_between_two_modes_is_led_to_the_one_that_no_earlier_sample_covers() -> None:
    left, right = torch.full((10, 4), -1.0), torch.full((10, 4), 1.0)
    real = torch.cat([left, right]) + 0.1 * _points(8, 20, 4)
    current = torch.zeros(4)
    options = {"regularization": 0.05, "iterations": 200}
    covered_left = transport_direction(current, torch.full((1, 4), -1.0), real, **options)
    covered_right = transport_direction(current, torch.full((1, 4), 1.0), real, **options)
    assert (covered_left < -0.8).all(), "subtracted, it leads to the right"
    assert (covered_right > 0.8).all()


@pytest.mark.parametrize("earlier", [0, 1, 50])
def test_a_sample_is_led_as_strongly_however_many_came_before(earlier: int) -> None:
    real = torch.full((20, 6), 2.0)
    found = transport_direction(
        torch.zeros(6), torch.full((earlier, 6), 2.0), real, regularization=0.1, iterations=100
    )
    torch.testing.assert_close(found, torch.full((6,), -1.0), rtol=1e-3, atol=1e-3)


def test_far_and_tiny_values_give_finite_directions_under_bfloat16_autocast() -> None:
    for scale in (1e-6, 1.0, 1e4):
        real, current = scale * _points(9, 30, 16), 3 * scale * _points(10, 1, 16)[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = transport_direction(
                current, real[:2], real, regularization=1e-3 * scale, iterations=50
            )
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        assert found.abs().max() > 0.05


def test_the_deviation_direction_is_the_gradient_of_the_largest_cosine() -> None:
    current, earlier = _points(11, 1, 7)[0], _points(12, 4, 7)
    found = deviation_direction(current, earlier)

    def at(moved: torch.Tensor) -> float:
        z, y = moved.double(), earlier.double()
        return float((y @ z / (y.norm(dim=1) * z.norm())).max())

    length = float(current.norm())
    for d in range(7):
        shift = torch.zeros(7)
        shift[d] = 1e-3
        difference = (at(current + shift) - at(current - shift)) / 2e-3
        np.testing.assert_allclose(float(found[d]), difference * length * 7**0.5, atol=1e-3)
    sine = (1 - at(current) ** 2) ** 0.5
    np.testing.assert_allclose(float(found.square().mean().sqrt()), sine, rtol=1e-4)


def test_without_an_earlier_sample_nothing_deviates() -> None:
    assert deviation_direction(torch.ones(3), torch.empty(0, 3)).abs().sum() == 0


def test_the_spacing_is_the_mean_distance_of_different_latents() -> None:
    real = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    assert mean_spacing(real) == pytest.approx((1 + 2 + 3) / 3)
    assert mean_spacing(real[:1]) == 1
    assert mean_spacing(torch.ones(4, 2)) == 1
