"""The losses of students, against their definitions in NumPy and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from wmdd_ray.core.sinkhorn import sinkhorn_distance
from wmdd_ray.core.student_losses import (
    hard_label_loss,
    logit_loss,
    soft_label_loss,
    transport_loss,
)


def random_logits(n: int, seed: int, num_classes: int = 10) -> torch.Tensor:
    return 3 * torch.randn(n, num_classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_soft_label_loss_is_the_mean_divergence_of_the_tempered_softmaxes(
    temperature: float,
) -> None:
    student, teacher = random_logits(6, 0), random_logits(6, 1)
    p, q = (softmax(x.double().numpy() / temperature, axis=1) for x in (teacher, student))
    divergence_B = entropy(p, q, axis=1)
    loss = soft_label_loss(student, teacher, temperature).item()
    np.testing.assert_allclose(loss, divergence_B.mean(), rtol=1e-4)
    weights = np.array([0, 1, 2, 0.5, 0.5, 2])
    loss = soft_label_loss(student, teacher, temperature, torch.tensor(weights)).item()
    np.testing.assert_allclose(loss, (weights * divergence_B).mean(), rtol=1e-4)


def test_soft_label_loss_ignores_a_constant_in_a_row_and_is_zero_at_the_teacher() -> None:
    teacher = random_logits(4, 0)
    shift = torch.tensor([[5.0], [-3.0], [0.0], [100.0]])
    torch.testing.assert_close(
        soft_label_loss(teacher + shift, teacher, 4.0), torch.tensor(0.0), rtol=0, atol=1e-5
    )


def test_logit_loss_is_the_mean_squared_error_of_centered_logits() -> None:
    student, teacher = random_logits(6, 0), random_logits(6, 1)
    s, t = (x.double().numpy() for x in (student, teacher))
    error_BY = (s - s.mean(axis=1, keepdims=True)) - (t - t.mean(axis=1, keepdims=True))
    error_B = (error_BY**2).mean(axis=1)
    np.testing.assert_allclose(logit_loss(student, teacher).item(), error_B.mean(), rtol=1e-5)
    weights = np.array([0, 1, 2, 0.5, 0.5, 2])
    loss = logit_loss(student, teacher, torch.tensor(weights)).item()
    np.testing.assert_allclose(loss, (weights * error_B).mean(), rtol=1e-5)
    shift = torch.tensor([[5.0], [-3.0], [0.0], [100.0], [1.0], [2.0]])
    torch.testing.assert_close(logit_loss(student + shift, teacher), logit_loss(student, teacher))


def test_hard_label_loss_is_the_cross_entropy_to_the_mixed_classes() -> None:
    student = random_logits(4, 0)
    classes, partners = torch.tensor([0, 3, 9, 2]), torch.tensor([1, 3, 0, 5])
    share = torch.tensor([1.0, 0.25, 0.0, 0.5])
    target = torch.zeros(4, 10)
    for row in range(4):
        target[row, classes[row]] += share[row]
        target[row, partners[row]] += 1 - share[row]
    loss_B = nn.functional.cross_entropy(student, target, reduction="none")
    loss = hard_label_loss(student, classes, partners, share)
    torch.testing.assert_close(loss, loss_B.mean())
    weights = torch.tensor([0.0, 1.0, 2.0, 1.0])
    loss = hard_label_loss(student, classes, partners, share, weights)
    torch.testing.assert_close(loss, (weights * loss_B).mean())


def test_transport_loss_is_the_entropic_cost_of_centered_logits_and_a_share_of_their_mean_cost() -> (
    None
):
    rng = np.random.default_rng(0)
    student, teacher = (torch.tensor(rng.normal(0, 3, (12, 10))).float() for _ in range(2))
    options: dict[str, Any] = {"regularization": 0.1, "iterations": 20}
    found = transport_loss(student, teacher, **options)
    costs = torch.cdist(*(x - x.mean(dim=1, keepdim=True) for x in (student, teacher)), p=1) / 10
    expected = sinkhorn_distance(costs, regularization=0.1 * float(costs.mean()), iterations=20)
    torch.testing.assert_close(found, expected)
    moved = torch.linspace(-5, 5, 12)[:, None]
    torch.testing.assert_close(transport_loss(student + moved, teacher, **options), found)
    # It is of batches: whose output is whose does not count.
    torch.testing.assert_close(transport_loss(student, teacher.flip(0), **options), found)
    scaled = transport_loss(100 * student, 100 * teacher, **options)
    torch.testing.assert_close(scaled, 100 * found, rtol=1e-4, atol=0)


@pytest.mark.parametrize("batch", [1, 8])
def test_transport_loss_of_a_student_that_is_its_teacher_is_finite(batch: int) -> None:
    student = torch.zeros(batch, 10, requires_grad=True)
    loss = transport_loss(student, torch.zeros(batch, 10), regularization=0.1, iterations=10)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-9)
    assert student.grad is not None and not student.grad.any()
