"""The curvature term against quadratics with a known Hessian, torch's own Hessian products, and differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.autograd.functional import hvp

from wmdd_ray.config import NetworkConfig, SqueezeConfig
from wmdd_ray.core.batches import in_memory_batches
from wmdd_ray.core.curvature import ascent_step, classifier_curvature, curvature
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.optimizer import (
    load_training_state,
    make_optimizer,
    training_state,
)
from wmdd_ray.core.training import train_classifier
from wmdd_ray.errors import ConfigError

Form = Literal["gradient", "loss"]
FORMS: tuple[Form, ...] = ("gradient", "loss")


def quadratic(seed: int, size: int = 6) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Return x -> x A x / 2 + b x of each row, A (symmetric, of both signs) and b."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(size, size, generator=generator, dtype=torch.float64)
    a, b = half + half.T, torch.randn(size, generator=generator, dtype=torch.float64)
    return lambda x: 0.5 * ((x @ a) * x).sum(dim=1) + x @ b, a, b


def smooth_network(seed: int = 0) -> nn.Module:
    """A small classifier with BatchNorm in float64 whose second derivatives exist everywhere."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()
    network(2 + torch.randn(32, 1, 4, 4, dtype=torch.float64))  # running moments that matter
    return network


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 3


@pytest.mark.parametrize("step", [0.01, 1.0, 30.0])
def test_of_a_quadratic_it_is_the_step_times_the_hessian_along_the_gradient(step: float) -> None:
    losses_of, a, b = quadratic(1)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    g = x @ a + b
    along = g / g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        curvature(losses_of, x, step=step), (step * along @ a).norm(dim=1).mean()
    )
    rise = step * g.norm(dim=1) + 0.5 * step**2 * ((along @ a) * along).sum(dim=1)
    torch.testing.assert_close(
        curvature(losses_of, x, step=step, form="loss"), rise.mean().abs(), rtol=1e-10, atol=1e-10
    )


def test_of_a_plane_the_gradient_form_is_zero_and_the_loss_form_its_slope() -> None:
    slope = torch.tensor([3.0, 4.0], dtype=torch.float64)
    x = torch.zeros(3, 2, dtype=torch.float64)
    assert curvature(lambda x: x @ slope, x, step=2.0).item() == 0.0
    loss_form = curvature(lambda x: x @ slope, x, step=2.0, form="loss")
    assert loss_form.item() == pytest.approx(10.0)


def test_of_a_network_it_is_torchs_hessian_product_when_the_step_is_small() -> None:
    network, (images, labels), step = smooth_network().eval(), batch(), 1e-5
    found = classifier_curvature(network, images, labels, step=step) / step

    expected = []
    for image, label in zip(images, labels, strict=True):

        def loss(x: Tensor, label: Tensor = label) -> Tensor:
            return F.cross_entropy(network(x[None]), label[None])

        gradient = torch.autograd.functional.jacobian(loss, image)
        expected.append(hvp(loss, image, gradient / gradient.norm())[1].norm())
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_in_the_weights_is_that_of_finite_differences(form: Form) -> None:
    network, (images, labels), step = smooth_network().eval(), batch(), 0.7
    classifier_curvature(network, images, labels, step=step, form=form).backward()

    def losses(x: Tensor) -> Tensor:
        return F.cross_entropy(network(x), labels, reduction="none")

    def gradients(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(losses(x).sum(), x)[0]

    moved = images + ascent_step(gradients(images), step)  # stays where it is as the weights change

    def term() -> float:
        if form == "loss":
            return (losses(moved).mean() - losses(images).mean()).abs().item()
        change = gradients(moved) - gradients(images)
        return change.flatten(1).norm(dim=1).mean().item()

    checked = 0
    for parameter in network.parameters():
        assert parameter.grad is not None
        for i in range(0, parameter.numel(), 17):
            with torch.no_grad():
                value = parameter.view(-1)[i].item()
                parameter.view(-1)[i] = value + 1e-5
            above = term()
            parameter.data.view(-1)[i] = value - 1e-5
            below = term()
            parameter.data.view(-1)[i] = value
            slope = (above - below) / 2e-5
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-44])
def test_every_image_steps_by_the_same_length_however_small_its_gradient(scale: float) -> None:
    gradients = torch.tensor([[[3.0, 4.0]], [[-1.0, 0.0]], [[0.0, 0.0]]]) * scale
    moved = ascent_step(gradients, 2.0)
    assert moved.shape == gradients.shape
    torch.testing.assert_close(moved[1:], torch.tensor([[[-2.0, 0.0]], [[0.0, 0.0]]]))
    torch.testing.assert_close(moved[0].norm(), torch.tensor(2.0))
    if scale > 1e-40:  # subnormal numbers have few digits
        torch.testing.assert_close(moved[0], torch.tensor([[1.2, 1.6]]))


def test_an_image_at_which_the_loss_is_flat_gives_no_nan() -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    term = curvature(lambda x: (weight * x**2).sum(dim=1), x, step=1.0)
    term.backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all() and torch.isfinite(term)


@pytest.mark.parametrize("form", FORMS)
def test_an_images_term_does_not_depend_on_its_batch_and_batch_norm_is_left_alone(
    form: Form,
) -> None:
    network, (images, labels) = smooth_network().train(), batch(6)
    before = copy.deepcopy(network.state_dict())
    alone = [
        classifier_curvature(network, images[i : i + 1], labels[i : i + 1], step=1.0, form=form)
        for i in range(6)
    ]
    together = classifier_curvature(network, images, labels, step=1.0, form=form)
    torch.testing.assert_close(together, torch.stack(alone).mean())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in network.modules())
    assert images.grad is None and not images.requires_grad


def test_under_autocast_it_is_computed_in_float32() -> None:
    network = smooth_network().float()
    images, labels = batch(64)
    images = images.float()
    bare = copy.deepcopy(network).eval()
    plain = curvature(
        lambda x: F.cross_entropy(bare(x), labels, reduction="none"), images, step=1e-3
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = classifier_curvature(network, images, labels, step=1e-3)
        assert network(images).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


# Training

DATA = (
    np.random.default_rng(0).integers(0, 256, (96, 8, 8, 1)).astype(np.uint8) // 2,
    np.arange(96) % 4,
)
for _image, _label in zip(*DATA, strict=True):
    _image[2 * _label : 2 * _label + 2] += 100  # a class is a bright stripe


def convnet(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if norm:
        network = build_network(NetworkConfig(width=4), num_classes=4, channels=1, image_size=8)
    else:
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 4)
        )
    return network.to(memory_format=torch.channels_last)


def train(
    network: nn.Module, config: SqueezeConfig, *, rank: int = 0, world: int = 1, first: int = 0,
    state: dict[str, np.ndarray] | None = None, stop: int | None = None,
) -> tuple[list[float], list[float], dict[str, np.ndarray]]:  # fmt: skip
    """Train on DATA; return losses, curvature terms, and the state after epoch `stop`, or after the last."""
    optimizer = make_optimizer(
        network, "sgd", learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    if state is not None:
        load_training_state(network, optimizer, state)
    losses: list[float] = []
    terms: list[float] = []
    kept: dict[str, np.ndarray] = {}

    def on_epoch(epoch: int, loss: float) -> None:
        losses.append(loss)
        if stop is None or epoch == stop:
            kept.update(training_state(network, optimizer))

    train_classifier(
        network,
        optimizer,
        lambda epoch, part: in_memory_batches(
            *DATA, batch_size=32, seed=0, epoch=epoch, part=part, num_parts=config.batch_parts
        ),
        config,
        steps_per_epoch=3,
        mean_C=(0.5,),
        std_C=(0.25,),
        seed=0,
        rank=rank,
        world=world,
        start_epoch=first,
        on_epoch=on_epoch,
        on_curvature=lambda epoch, term: terms.append(term),
    )
    return losses, terms, kept


def options(form: Form = "gradient", weight: float = 0.5, bf16: bool = False) -> SqueezeConfig:
    return SqueezeConfig(
        epochs=3,
        batch_size=32,
        curvature_weight=weight,
        curvature_form=form,
        curvature_step=1.0,
        mixed_precision=bf16,
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_trained_with_the_term_is_flatter_than_one_without(form: Form) -> None:
    plain, curved = convnet(), convnet()
    assert train(plain, replace(options(form, weight=0.0), epochs=10))[1] == []
    assert len(train(curved, replace(options(form, weight=20.0), epochs=10))[1]) == 10
    images = (torch.from_numpy(DATA[0]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    labels = torch.from_numpy(DATA[1])
    measured = [
        classifier_curvature(network, images, labels, step=1.0, form=form).item()
        for network in (plain, curved)
    ]
    assert measured[1] < 0.5 * measured[0]


@pytest.mark.parametrize(
    ("form", "bf16"), [("gradient", False), ("gradient", True), ("loss", False)]
)
def test_training_with_the_term_goes_on_to_the_last_bit(form: Form, bf16: bool) -> None:
    config = options(form, bf16=bf16)
    whole, cut = convnet(), convnet()
    losses, terms, _ = train(whole, config)
    _, _, state = train(cut, config, stop=0)
    resumed = convnet()
    more_losses, more_terms, _ = train(resumed, config, state=state, first=1)
    assert (more_losses, more_terms) == (losses[1:], terms[1:])
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_weight_at_which_the_loss_is_not_finite_is_named() -> None:
    config = SqueezeConfig(epochs=1, batch_size=32, learning_rate=1e20, curvature_weight=1e30)
    with pytest.raises(ConfigError, match=r"lower it, or --squeeze.curvature-weight 1e\+30"):
        train(convnet(), config)


def in_parts(num_parts: int, *, plain: bool = False) -> SqueezeConfig:
    """Return options for batches of parts; `plain` ones augment nothing, so that without BatchNorm no part differs from a batch."""
    return SqueezeConfig(
        epochs=2, batch_size=32, curvature_weight=2.0, curvature_step=1.0, batch_parts=num_parts,
        crop_scale_min=1.0 if plain else 0.5, flip=not plain,
    )  # fmt: skip


def test_the_parts_of_a_batch_take_the_steps_of_the_whole_with_the_term_in_each() -> None:
    whole, cut, without = (convnet(norm=False) for _ in range(3))
    losses, terms, _ = train(whole, in_parts(1, plain=True))
    assert train(cut, in_parts(4, plain=True))[:2] == (
        pytest.approx(losses, rel=1e-4),
        pytest.approx(terms, rel=1e-4),
    )
    torch.testing.assert_close(cut.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-6)
    train(without, replace(in_parts(1, plain=True), curvature_weight=0.0))
    assert not torch.allclose(whole[3].weight, without[3].weight, atol=1e-4)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        network = convnet()
        numbers = train(network, in_parts(4), rank=rank, world=2)[:2]
        torch.save((numbers, network.state_dict()), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_make_the_bits_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    alone = convnet()
    numbers = train(alone, in_parts(4))[:2]
    for rank in (0, 1):
        found_numbers, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found_numbers == numbers
        torch.testing.assert_close(found, dict(alone.state_dict()), rtol=0, atol=0)


# Options


def test_the_weight_is_that_of_ipc_ten_and_falls_with_ipc_by_the_power() -> None:
    config = SqueezeConfig(curvature_weight=0.8, curvature_ipc_power=0.5)
    weights = [config.at_ipc(ipc).curvature_weight for ipc in (1, 10, 40)]
    assert weights == pytest.approx([0.8 * 10**0.5, 0.8, 0.4])
    assert SqueezeConfig(curvature_weight=0.8).at_ipc(50).curvature_weight == 0.8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"curvature_weight": -1.0}, r"--squeeze.curvature-weight: expected >= 0"),
        ({"curvature_weight": float("nan")}, r"--squeeze.curvature-weight: .*got nan"),
        ({"curvature_step": 0.0}, r"--squeeze.curvature-step: expected > 0"),
        (
            {"curvature_form": "hessian"},
            r"--squeeze.curvature-form: expected one of gradient, loss",
        ),
        ({"curvature_ipc_power": -0.5}, r"--squeeze.curvature-ipc-power: expected >= 0"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SqueezeConfig(**wrong)
