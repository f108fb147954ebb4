"""The influence term of IGD: against finite differences, where it leads, and the surrogate that it is measured by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wmdd_ray.core.optimizer import State
from wmdd_ray.diffusion.influence import (
    ClassInfluence,
    class_influence,
    influence,
    influence_direction,
    surrogate_of,
    surrogate_parameters,
    train_surrogate,
)
from wmdd_ray.errors import DataError

SHAPE = (2, 8, 8)
D = 128
CHECKPOINTS = (0, 1, 3)


@cache
def real() -> tuple[np.ndarray, np.ndarray]:
    """Three classes of latents: a pattern of their own each, in noise."""
    rng = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(3), 20)
    patterns = rng.normal(size=(3, *SHAPE))
    return (patterns[labels_N] + 0.5 * rng.normal(size=(60, *SHAPE))).astype(np.float16), labels_N


def trained(checkpoints: tuple[int, ...] = CHECKPOINTS, **more: Any) -> State:
    return train_surrogate(
        *real(), num_classes=3, checkpoints=checkpoints, seed=7, device="cpu", batch_size=20, **more
    )  # fmt: skip


@cache
def of_class(label: int) -> ClassInfluence:
    networks = surrogate_of(trained(), CHECKPOINTS, num_classes=3, shape_CHW=SHAPE, device="cpu")
    latents_NCHW, labels_N = real()
    own = torch.from_numpy(latents_NCHW[labels_N == label]).float()
    return class_influence(networks, own, label)


def doubled(of: ClassInfluence) -> ClassInfluence:
    return replace(
        of,
        networks=[copy.deepcopy(network).double() for network in of.networks],
        gradients_EP=[mean_P.double() for mean_P in of.gradients_EP],
    )


def noise(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=D).astype(np.float32))


def test_the_influence_is_the_mean_cosine_to_the_mean_gradient_of_the_real_latents() -> None:
    of, current = of_class(1), noise(1)
    latents_NCHW, labels_N = real()

    def gradient(network: torch.nn.Module, latent: Tensor) -> Tensor:
        network.zero_grad()
        loss = -network(latent.view(1, *SHAPE)).log_softmax(dim=1)[0, 1]
        loss.backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    cosines = []
    for network in of.networks:
        own = [gradient(network, torch.from_numpy(x).float()) for x in latents_NCHW[labels_N == 1]]
        mean = torch.stack(own).double().mean(dim=0)
        mine = gradient(network, current).double()
        cosines.append(float(mine @ mean / (mine.norm() * mean.norm())))
    assert len(set(np.sign(np.diff(cosines)))) >= 1 and np.ptp(cosines) > 1e-3
    np.testing.assert_allclose(influence(current, of).item(), np.mean(cosines), rtol=1e-4)


def test_the_direction_is_the_gradient_by_finite_differences() -> None:
    of, current = of_class(0), noise(2)
    found = influence_direction(current, of)
    exact, step = doubled(of), 1e-6

    def at(moved: Tensor) -> float:
        return influence(moved, exact).item()

    def slope(along: Tensor) -> float:
        return (at(current + step * along) - at(current - step * along)) / (2 * step)

    assert found.dtype == torch.float32
    # Along its own gradient a function has the gradient's length as its slope, along anything else less.
    length = slope(found.double()) / D**0.5
    for d in range(0, D, 9):
        along = torch.zeros(D, dtype=torch.float64)
        along[d] = 1
        np.testing.assert_allclose(float(found[d]), slope(along) / length * D**0.5, atol=2e-4)


@pytest.mark.parametrize("label", [0, 2])
def test_along_the_direction_noise_comes_to_teach_what_its_class_teaches(label: int) -> None:
    of, current = of_class(label), noise(3)
    before = influence(current, of).item()
    for _ in range(30):
        current = current + 0.05 * influence_direction(current, of)
    after = influence(current, of).item()
    latents_NCHW, labels_N = real()
    others = [
        influence(torch.from_numpy(x).float().flatten(), of).item()
        for x in latents_NCHW[labels_N == label]
    ]
    assert after > before + 0.1
    # The class's mean gradient is met better than by most of the latents that it is the mean of.
    assert after > np.median(others)


def test_a_latent_alone_in_its_class_has_all_the_influence_and_as_another_class_little() -> None:
    current = noise(4)
    of = class_influence(of_class(0).networks, current.view(1, *SHAPE), 0)
    assert influence(current, of).item() == pytest.approx(1, abs=1e-4)
    assert influence(current, replace(of, label=1)).item() < 0.5


def test_the_mean_gradient_does_not_depend_on_how_many_latents_go_through_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wmdd_ray.diffusion import influence as module

    whole, latents = of_class(2), torch.from_numpy(real()[0][40:]).float()
    monkeypatch.setattr(module, "_PART", 7)  # 20 are 7, 7 and 6
    parts = class_influence(whole.networks, latents, 2)
    for one, other in zip(parts.gradients_EP, whole.gradients_EP, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_every_direction_has_a_root_mean_square_of_one_also_under_bfloat16_autocast(
    scale: float,
) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = influence_direction(scale * noise(5), of_class(1))
    plain = influence_direction(scale * noise(5), of_class(1))
    assert found.square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


def test_gradients_of_tiny_values_have_a_direction_and_those_of_zero_have_none() -> None:
    network: Any = copy.deepcopy(of_class(1).networks[-1])
    latents = torch.from_numpy(real()[0][20:40]).float()
    with torch.no_grad():
        logits = network(latents)
        margins = logits[:, 1] - logits[:, [0, 2]].amax(dim=1)
        best, second = margins.argsort(descending=True)[:2]
        network.fc.bias *= 60 / margins[best]
        network.fc.weight *= 60 / margins[best]
    of = class_influence([network], latents[second][None], 1)
    assert 0 < of.gradients_EP[0].abs().max() < 1e-12
    current = latents[best].flatten()
    assert influence(latents[second].flatten(), of).item() == pytest.approx(1, abs=1e-3)
    assert influence_direction(current, of).square().mean().item() == pytest.approx(1, rel=1e-4)
    with torch.no_grad():
        network.fc.weight *= 1e6
    assert influence_direction(current, of).abs().max() == 0


def test_the_surrogate_learns_its_classes_and_begins_untrained() -> None:
    weights = trained()
    networks = surrogate_of(weights, CHECKPOINTS, num_classes=3, shape_CHW=SHAPE, device="cpu")
    latents_NCHW, labels_N = real()
    with torch.no_grad():
        top1 = [
            float((n(torch.from_numpy(latents_NCHW).float()).argmax(1).numpy() == labels_N).mean())
            for n in networks
        ]
    assert top1[0] < 0.7 and top1[-1] > 0.9
    kept = {name.partition(".")[0] for name in weights}
    assert kept == {"at00000", "at00001", "at00003"}
    count = sum(array.size for array in weights.values())
    assert count == 3 * surrogate_parameters(3, SHAPE)
    assert trained((0,)).keys() == {name for name in weights if name.startswith("at00000")}


def test_from_any_state_the_surrogate_is_that_of_a_training_that_never_stopped() -> None:
    states: dict[int, State] = {}

    def on_epoch(epoch: int, loss: float, get_state: Callable[[], State]) -> None:
        states[epoch] = {name: np.copy(array) for name, array in get_state().items()}

    whole = trained(on_epoch=on_epoch)
    assert sorted(states) == [1, 2, 3]
    for state in states.values():
        again = trained(state=state)
        assert again.keys() == whole.keys()
        assert all(np.array_equal(again[name], whole[name]) for name in whole)
    torch.manual_seed(99)
    again = trained()
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_latents_that_are_no_numbers_are_refused() -> None:
    latents_NCHW, labels_N = real()
    with pytest.raises(DataError, match="the loss of the surrogate .* is nan in epoch 0; check"):
        train_surrogate(
            np.full_like(latents_NCHW, np.nan), labels_N, num_classes=3, checkpoints=(0, 2),
            seed=0, device="cpu",
        )  # fmt: skip
