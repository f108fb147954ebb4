from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wmdd_ray.core.losses import GroupTarget, MomentLoss, cross_entropy_G, feature_loss_G

TERMS: tuple[Any, ...] = ("wasserstein", "cross_entropy", "mean", "rbf_mmd")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def target_of(atoms_GKD: Tensor, weights_GK: Tensor, share_GK: Tensor | None = None) -> GroupTarget:
    return GroupTarget(
        labels_G=torch.arange(len(atoms_GKD)),
        atoms_GKD=atoms_GKD,
        weights_GK=weights_GK,
        share_GK=weights_GK if share_GK is None else share_GK,
    )


def simplex(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).softmax(dim=-1)


@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 4),
    ipc=st.integers(1, 4),
    weighted=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_the_moment_loss_is_that_of_each_class_computed_by_itself(
    seed: int, groups: int, ipc: int, weighted: bool
) -> None:
    channels_L, sizes = (2, 3), ((4, 5), (2, 2))
    inputs = [
        normal(groups * ipc, c, *s, seed=seed + i).requires_grad_(True)
        for i, (c, s) in enumerate(zip(channels_L, sizes, strict=True))
    ]
    target_mean_GS, target_var_GS = normal(groups, 5, seed=seed + 2), simplex(groups, 5, seed=seed)
    share_GK = (
        simplex(groups, ipc, seed=seed)
        if weighted
        else torch.full((groups, ipc), 1 / ipc, dtype=torch.float64)
    )
    taps = [(x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0)) for x in inputs]
    got_G = MomentLoss(channels_L, share_GK, target_mean_GS[None], target_var_GS[None])(taps)

    expected = []
    for g in range(groups):
        total = torch.zeros((), dtype=torch.float64)
        for x, span in zip(inputs, (slice(0, 2), slice(2, 5)), strict=True):
            own_KCHW = x[g * ipc : (g + 1) * ipc]
            if weighted:
                share = share_GK[g][:, None, None, None] / own_KCHW[0, 0].numel()
                mean = (share * own_KCHW).sum(dim=(0, 2, 3))
                deviation = own_KCHW - mean[:, None, None]
                var = (share * deviation.square()).sum(dim=(0, 2, 3))
            else:
                mean = own_KCHW.mean(dim=(0, 2, 3))
                var = own_KCHW.var(dim=(0, 2, 3), correction=0)
            total = total + (mean - target_mean_GS[g, span]).norm()
            total = total + (var - target_var_GS[g, span]).norm()
        expected.append(total)
    expected_G = torch.stack(expected)
    torch.testing.assert_close(got_G, expected_G)
    torch.testing.assert_close(
        torch.autograd.grad(got_G.sum(), inputs, retain_graph=True),
        torch.autograd.grad(expected_G.sum(), inputs),
    )


def test_moments_that_are_met_have_no_loss_and_a_finite_gradient() -> None:
    x = normal(2, 3, 4, 4).requires_grad_(True)
    tap = (x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0))
    share_GK = torch.ones(2, 1, dtype=torch.float64)
    loss_G = MomentLoss((3,), share_GK, tap[0].detach()[None], tap[1].detach()[None])([tap])
    torch.testing.assert_close(loss_G, torch.zeros_like(loss_G), rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(loss_G.sum(), x)
    torch.testing.assert_close(gradient, torch.zeros_like(x))


def taps_of(seed: int) -> list[Any]:
    """Return the taps of two layers of 2 and 3 channels, of two classes of two images."""
    return [(normal(4, c, seed=seed + c), normal(4, c, seed=seed - c).exp()) for c in (2, 3)]


def halves() -> Tensor:
    return torch.full((2, 2), 0.5, dtype=torch.float64)


def test_several_targets_share_the_moment_loss_in_equal_parts() -> None:
    mean_TGS, var_TGS = normal(3, 2, 5), normal(3, 2, 5, seed=1).exp()
    got_G = MomentLoss((2, 3), halves(), mean_TGS, var_TGS)(taps_of(10))
    each_TG = [
        MomentLoss((2, 3), halves(), mean_TGS[t : t + 1], var_TGS[t : t + 1])(taps_of(10))
        for t in range(3)
    ]
    torch.testing.assert_close(got_G, torch.stack(each_TG).mean(dim=0))


def test_the_moments_that_are_compared_are_averaged_from_the_second_call() -> None:
    target = normal(1, 2, 5), normal(1, 2, 5, seed=1).exp()
    loss = MomentLoss((2, 3), halves(), *target, decay=0.75)

    def moments(seed: int) -> tuple[Tensor, Tensor]:
        mean_GKS, var_GKS = (
            torch.cat(parts, dim=1).view(2, 2, 5) for parts in zip(*taps_of(seed), strict=True)
        )
        mean_GS = mean_GKS.mean(dim=1)
        return mean_GS, (var_GKS + (mean_GKS - mean_GS[:, None]).square()).mean(dim=1)

    def distance_G(mean_GS: Tensor, var_GS: Tensor) -> Tensor:
        gaps = (mean_GS - target[0][0], var_GS - target[1][0])
        layers = [gap[:, span] for gap in gaps for span in (slice(0, 2), slice(2, 5))]
        return torch.stack([layer.norm(dim=1) for layer in layers]).sum(dim=0)

    average = moments(10)
    torch.testing.assert_close(loss(taps_of(10)), distance_G(*average))
    for seed in (20, 30):
        average = tuple(
            0.75 * old + 0.25 * new for old, new in zip(average, moments(seed), strict=True)
        )
        torch.testing.assert_close(loss(taps_of(seed)), distance_G(*average))


def test_the_gradient_of_averaged_moments_is_that_of_their_current_part() -> None:
    # Of one image, mean and variance both below their target 9: the loss falls by what either rises.
    def slopes_of(decay: float) -> list[float]:
        target = torch.full((1, 1, 1), 9.0)
        loss = MomentLoss((1,), torch.ones(1, 1), target, target, decay)
        for value in (1.0, 2.0):
            tap = tuple(torch.full((1, 1), value, requires_grad=True) for _ in range(2))
            slopes = torch.autograd.grad(loss([(tap[0], tap[1])]).sum(), tap)
        return [float(slope) for slope in slopes]

    assert slopes_of(0.0) == [-1.0, -1.0]
    assert slopes_of(0.75) == [-0.25, -0.25]


@pytest.mark.parametrize("term", TERMS)
def test_the_feature_term_of_a_class_does_not_depend_on_its_company(term: Any) -> None:
    features, logits = normal(6, 4), normal(6, 3, seed=1)
    atoms, weights = normal(3, 2, 4, seed=2), simplex(3, 2)
    together_G = feature_loss_G(term, features, logits, target_of(atoms, weights))
    for g in range(3):
        rows = slice(2 * g, 2 * g + 2)
        alone = GroupTarget(
            labels_G=torch.tensor([g]),
            atoms_GKD=atoms[g : g + 1],
            weights_GK=weights[g : g + 1],
            share_GK=weights[g : g + 1],
        )
        got = feature_loss_G(term, features[rows], logits[rows], alone)
        torch.testing.assert_close(got[0], together_G[g])


def test_the_wasserstein_term_is_the_mean_squared_distance_of_pairs() -> None:
    atoms = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    features = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    target = target_of(atoms, torch.tensor([[0.9, 0.1]]))
    got = feature_loss_G("wasserstein", features, features, target)
    torch.testing.assert_close(got, torch.tensor([(25.0 + 1.0) / 2]))


def test_the_mean_term_compares_weighted_means_only() -> None:
    atoms = torch.tensor([[[0.0, 0.0], [4.0, 0.0]]])
    weights = torch.tensor([[0.75, 0.25]])
    same_mean = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    moved = same_mean + torch.tensor([0.0, 2.0])
    for features, expected in ((same_mean, 0.0), (moved, 4.0)):
        got = feature_loss_G("mean", features, features, target_of(atoms, weights))
        torch.testing.assert_close(got, torch.tensor([expected]))


def test_images_of_equal_share_meet_the_mean_of_atoms_of_unequal_mass() -> None:
    atoms = torch.tensor([[[0.0, 0.0], [4.0, 0.0]]], dtype=torch.float64)
    weights, share = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]], dtype=torch.float64)
    # At (0, 0) and (2, 0) their mean is the class's, (1, 0); at their atoms it is not.
    met = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    for features, expected in ((met, 0.0), (atoms[0], 1.0)):
        got = feature_loss_G("mean", features, features, target_of(atoms, weights, share))
        torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64))
    got = feature_loss_G("rbf_mmd", atoms[0], atoms[0], target_of(atoms, weights, share))
    # (s - w)' K (s - w) with s - w = (-1/4, 1/4) and a kernel of exp(-1) between the atoms.
    expected = torch.tensor([2 / 16 * (1 - np.exp(-1))], dtype=torch.float64)
    torch.testing.assert_close(got, expected)


def test_the_rbf_term_has_the_known_values_of_two_points_and_of_equal_sets() -> None:
    atoms = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    target = target_of(atoms, weights)
    equal = feature_loss_G("rbf_mmd", atoms[0].flip(0), atoms[0], target)
    torch.testing.assert_close(equal, torch.zeros(1, dtype=torch.float64))
    far = feature_loss_G("rbf_mmd", atoms[0] + 1e3, atoms[0], target)
    # h is the one squared distance, 4: the kernel is 1 on the diagonal and exp(-1) beside it.
    expected = 2 * (0.5 + 0.5 * np.exp(-1))
    torch.testing.assert_close(far, torch.tensor([expected], dtype=torch.float64))


def test_the_rbf_term_of_a_single_atom_scales_with_its_norm() -> None:
    atoms = torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]], dtype=torch.float64)
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    target = target_of(atoms, torch.ones(2, 1, dtype=torch.float64))
    got = feature_loss_G("rbf_mmd", features, features, target)
    expected = 2 - 2 * np.exp(-1.0)
    torch.testing.assert_close(got, torch.tensor([expected, expected], dtype=torch.float64))


def test_the_rbf_term_follows_the_weights() -> None:
    atoms, features = normal(1, 3, 4), normal(3, 4, seed=1)
    weights = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    target = target_of(atoms, weights)
    got = feature_loss_G("rbf_mmd", features, features, target)
    distances = torch.pdist(atoms[0]).square()
    kernel = torch.exp(-(features[0] - atoms[0, 0]).square().sum() / distances.median())
    torch.testing.assert_close(got, (2 - 2 * kernel)[None])


def test_the_rbf_term_has_a_finite_gradient_where_points_meet() -> None:
    features = normal(2, 4).requires_grad_(True)
    target = target_of(features.detach()[None].clone(), simplex(1, 2))
    (gradient,) = torch.autograd.grad(
        feature_loss_G("rbf_mmd", features, features, target).sum(), features
    )
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_cross_entropy_is_the_mean_of_each_class() -> None:
    logits = normal(4, 2)
    target = target_of(normal(2, 2, 3), simplex(2, 2))
    log_p = logits.log_softmax(dim=1)
    expected = torch.stack([-log_p[:2, 0].mean(), -log_p[2:, 1].mean()])
    torch.testing.assert_close(cross_entropy_G(logits, target), expected)
    got = feature_loss_G("cross_entropy", normal(4, 3), logits, target)
    torch.testing.assert_close(got, expected)


def test_moments_across_classes_are_those_of_a_position_s_images_pooled() -> None:
    torch.manual_seed(1)
    num_classes, num_images = 3, 2
    x_GKCHW = torch.randn(num_classes, num_images, 4, 5, 5, dtype=torch.float64)
    x_BCHW = x_GKCHW.flatten(0, 1)
    tap = (x_BCHW.mean(dim=(2, 3)), x_BCHW.var(dim=(2, 3), correction=0))
    target_mean_C, target_var_C = torch.randn(4).double(), torch.rand(4).double()
    loss = MomentLoss(
        (4,),
        torch.full((num_images, num_classes), 1 / num_classes, dtype=torch.float64),
        target_mean_C.expand(1, num_images, 4),
        target_var_C.expand(1, num_images, 4),
        across_classes=True,
    )
    expected = []
    for k in range(num_images):
        # As SRe2L's hook has it: the moments of a batch of one image of every class.
        batch = x_GKCHW[:, k]
        var_C = batch.transpose(0, 1).reshape(4, -1).var(dim=1, correction=0)
        mean_C = batch.mean(dim=(0, 2, 3))
        expected.append((target_var_C - var_C).norm() + (target_mean_C - mean_C).norm())
    torch.testing.assert_close(loss([tap]), torch.stack(expected))
