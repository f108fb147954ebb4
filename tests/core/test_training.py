"""Training: batches, optimizers, the teacher's loop, the student's loop, and accuracy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tests.core.test_student_losses import random_logits
from wmdd_ray.config import EvaluateConfig, NetworkConfig, SqueezeConfig, ViewConfig
from wmdd_ray.core import training
from wmdd_ray.core.batches import (
    EpochBatches,
    eval_batches,
    in_memory_batches,
    order_of,
    steps_of,
    student_steps,
)
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.optimizer import (
    MuonAdamW,
    WeightAverage,
    cosine_rate,
    descend,
    load_training_state,
    make_optimizer,
    take_step,
    training_state,
)
from wmdd_ray.core.soft_labels import label_views
from wmdd_ray.core.training import (
    accuracy,
    optimizer_and_average,
    train_classifier,
    train_student,
)
from wmdd_ray.core.views import StoredImages, draw_views, to_input
from wmdd_ray.errors import ConfigError
from wmdd_ray.records import Views

MEAN, STD = (0.5,), (0.5,)
Labeled = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Labeled:
    """Return scikit-learn's 1797 digits as uint8 (N, 8, 8, 1), in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = (images.reshape(-1, 8, 8, 1) * 15.9).astype(np.uint8)
    return pixels[order], labels[order].astype(np.int64)


def small_network(seed: int = 0, width: int = 16, channels_last: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 16, 10),
    )
    return network.to(memory_format=torch.channels_last) if channels_last else network


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def train_on(
    network: nn.Module, data: Labeled, config: SqueezeConfig, **options: Any
) -> torch.optim.Optimizer:
    """Train `network` on all of `data`, and return the optimizer."""
    optimizer = options.pop("optimizer", None) or optimizer_of(network, config)

    def batches(epoch: int, part: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return in_memory_batches(
            *data,
            batch_size=config.batch_size,
            seed=1,
            epoch=epoch,
            part=part,
            num_parts=config.batch_parts,
        )

    steps = steps_of(len(data[0]), config.batch_size)
    train_classifier(
        network,
        optimizer,
        batches,
        config,
        steps_per_epoch=steps,
        mean_C=MEAN,
        std_C=STD,
        seed=1,
        **options,
    )
    return optimizer


def optimizer_of(network: nn.Module, config: SqueezeConfig) -> torch.optim.Optimizer:
    return optimizer_and_average(network, config)[0]


# Optimizers


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_weight_decay_spares_parameters_of_one_dimension(name: str) -> None:
    network = small_network()
    before = copy.deepcopy(network)
    optimizer = make_optimizer(network, name, learning_rate=0.1, weight_decay=0.5)
    loss = sum((0 * p).sum() for p in network.parameters())
    assert isinstance(loss, torch.Tensor)
    take_step(optimizer, loss, 0.1, 0, 10)
    for old, new in zip(before.parameters(), network.parameters(), strict=True):
        if old.ndim == 1:
            torch.testing.assert_close(new, old, rtol=0, atol=0)
        else:
            assert (new.norm() < 0.99 * old.norm()).item()


def test_rate_falls_as_a_cosine_from_peak_to_zero() -> None:
    rates = [cosine_rate(0.4, step, 4) for step in range(5)]
    expected = [0.4, 0.2 + 0.1 * np.sqrt(2), 0.2, 0.2 - 0.1 * np.sqrt(2), 0]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_rate_rises_in_equal_steps_to_the_peak_from_which_the_cosine_falls() -> None:
    rates = [cosine_rate(0.4, step, 7, warmup_steps=3) for step in range(8)]
    np.testing.assert_allclose(rates[:4], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(rates[3:], [cosine_rate(0.4, step, 4) for step in range(5)])


def test_a_step_uses_the_rate_of_the_schedule() -> None:
    weight = nn.Linear(1, 1, bias=False)
    before = weight.weight.item()
    optimizer = make_optimizer(weight, "sgd", learning_rate=9.0, weight_decay=0, momentum=0)
    take_step(optimizer, weight.weight.sum(), 0.4, 2, 4)
    np.testing.assert_allclose(weight.weight.item(), before - 0.2, rtol=1e-6)
    descend(optimizer, 0.4, 0, 4, warmup_steps=1)  # along the gradient that is there
    np.testing.assert_allclose(weight.weight.item(), before - 0.4, rtol=1e-6)


def test_frozen_parameters_are_left_out_of_the_optimizer() -> None:
    network = small_network()
    network[0].requires_grad_(False)
    optimizer = make_optimizer(network, "adamw", learning_rate=0.1, weight_decay=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters() if p.requires_grad}


def three_convolutions(channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    network = build_network(
        NetworkConfig(arch="convnet3", width=12), num_classes=10, channels=1, image_size=8
    )
    return network.to(memory_format=torch.channels_last) if channels_last else network


@pytest.mark.parametrize("channels_last", [True, False])
def test_muon_moves_a_hidden_kernel_as_torchs_muon_moves_the_kernel_as_a_matrix(
    channels_last: bool,
) -> None:
    network = three_convolutions(channels_last)
    kernel = network.get_parameter("conv2.weight")
    assert kernel.is_contiguous() is not channels_last
    matrix = nn.Parameter(kernel.detach().reshape(12, -1).clone())
    settings: dict[str, Any] = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([matrix], lr=0.01, **settings)
    optimizer = make_optimizer(network, "muon", learning_rate=0.01, weight_decay=0.1)
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        before = matrix.detach().clone()
        loss = network(images).square().mean()
        (gradient,) = torch.autograd.grad(loss, kernel, retain_graph=True)
        take_step(optimizer, loss, 0.01, step, 10)
        matrix.grad = gradient.reshape(12, -1).clone()
        reference.param_groups[0]["lr"] = cosine_rate(0.01, step, 10)
        reference.step()
        moved = (matrix - before).abs().max().item()
        assert moved > 1e-3
        # The products of matrices are taken in bfloat16, and the order of the columns differs.
        tolerance = 0.03 * moved if channels_last else 0
        torch.testing.assert_close(kernel.reshape(12, -1), matrix, rtol=0, atol=tolerance)
        with torch.no_grad():
            matrix.copy_(kernel.reshape(12, -1))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("convnet3", {"conv2.weight", "conv3.weight"}),
        ("vit_tiny", {"self_attention.in_proj_weight", "out_proj.weight", "0.weight", "3.weight"}),
    ],
)
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(arch: Any, expected: set[str]) -> None:
    network = build_network(
        NetworkConfig(arch=arch, width=4), num_classes=3, channels=1, image_size=8
    )
    optimizer = make_optimizer(network, "muon", learning_rate=0.1, weight_decay=0.1)
    assert isinstance(optimizer, MuonAdamW)
    held = {matrix.data_ptr(): matrix.shape for matrix in optimizer.param_groups[0]["params"]}
    names = [n for n, p in network.named_parameters() if p.data_ptr() in held]
    assert len(names) == len(held) == (2 if arch == "convnet3" else 4 * 4)
    assert {n for n in names if not any(n.endswith(e) for e in expected)} == set()
    others = [id(p) for group in optimizer.param_groups[1:] for p in group["params"]]
    assert len(others) == len(list(network.parameters())) - len(held)
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), depthwise, nn.Conv2d(6, 6, 1), nn.Linear(2, 2))
    optimizer = make_optimizer(network, "muon", learning_rate=0.1, weight_decay=0.1)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(6, 6)]


def test_muon_without_a_hidden_matrix_is_adamw() -> None:
    network = build_network(
        NetworkConfig(arch="convnet1", width=4), num_classes=3, channels=1, image_size=8
    )
    optimizer = make_optimizer(network, "muon", learning_rate=0.1, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(network.parameters()))


def test_muon_refuses_weights_that_were_laid_out_anew() -> None:
    network = three_convolutions(channels_last=False)
    optimizer = make_optimizer(network, "muon", learning_rate=0.1, weight_decay=0.1)
    network.to(memory_format=torch.channels_last)
    loss = network(torch.zeros(2, 1, 8, 8)).sum()
    with pytest.raises(AssertionError, match="laid out anew"):
        take_step(optimizer, loss, 0.1, 0, 1)


# The average of the weights


def test_the_average_is_that_of_torch_but_for_a_start_that_has_no_part_in_it() -> None:
    network = small_network()
    optimizer = make_optimizer(network, "adamw", learning_rate=0.1, weight_decay=0)
    average = WeightAverage(network, 0.8)
    shares = [1 / sum(0.8**i for i in range(step)) for step in range(1, 6)]

    def reference_of(averages: Any, values: Any, count: torch.Tensor | int) -> None:
        for old, new in zip(averages, values, strict=True):
            if old.is_floating_point():
                old.copy_((1 - shares[int(count)]) * old + shares[int(count)] * new)

    reference = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=reference_of, use_buffers=True
    )
    for step in range(5):
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        take_step(optimizer, network(images).square().mean(), 0.1, step, 10)
        average.update()
        reference.update_parameters(network)
    trained = copy.deepcopy(network.state_dict())
    average.put_into_network()
    expected, found = reference.module.state_dict(), network.state_dict()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
            assert (value != trained[name]).any()
        else:
            assert value.item() == 5  # a counter counts, and is no average


def test_the_average_after_one_step_is_the_weights_after_it() -> None:
    network = small_network()
    average = WeightAverage(network, 0.999)
    with torch.no_grad():
        network[0].weight.mul_(3)
    after = copy.deepcopy(network.state_dict())
    average.update()
    average.put_into_network()
    torch.testing.assert_close(network.state_dict(), after, rtol=0, atol=0)


# Batches


def test_batches_of_an_epoch_are_disjoint_whole_and_shuffled(digits: Labeled) -> None:
    images, _ = digits
    names = np.arange(len(images))  # labels that name their image
    batches = list(in_memory_batches(images, names, batch_size=64, seed=0, epoch=0))
    assert len(batches) == steps_of(len(images), 64) == 28
    index = torch.cat([labels for _, labels in batches]).numpy()
    assert len(np.unique(index)) == len(index) == 28 * 64
    assert (index != np.sort(index)).any()
    for pixels, labels in batches:
        assert pixels.dtype == torch.uint8 and len(pixels) == 64
        np.testing.assert_array_equal(pixels.numpy(), images[labels.numpy()])


def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [order_of(100, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    np.random.seed(5)
    np.testing.assert_array_equal(order_of(100, seed=0, epoch=1), orders[1])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (orders[i] != orders[j]).any()


@pytest.mark.parametrize("num_parts", [2, 3])
def test_parts_of_a_batch_do_not_overlap(digits: Labeled, num_parts: int) -> None:
    images, names = digits[0], np.arange(len(digits[0]))
    options: dict[str, Any] = {"batch_size": 50, "seed": 3, "epoch": 2}
    whole = [labels for _, labels in in_memory_batches(images, names, **options)]
    parts_of = [
        in_memory_batches(images, names, part=k, num_parts=num_parts, **options)
        for k in range(num_parts)
    ]
    labels_of = [[labels for _, labels in batches] for batches in parts_of]
    assert {len(batches) for batches in labels_of} == {len(whole)}
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches in labels_of]
        assert {len(part) for part in parts} == {50 // num_parts}
        together = torch.cat(parts)
        torch.testing.assert_close(together, batch[: len(together)], rtol=0, atol=0)


def test_fewer_images_than_a_batch_are_one_batch(digits: Labeled) -> None:
    few = digits[0][:7], digits[1][:7]
    batches = list(in_memory_batches(*few, batch_size=64, seed=0, epoch=0))
    assert [len(labels) for _, labels in batches] == [7]


def test_more_parts_than_images_of_a_batch_are_refused(digits: Labeled) -> None:
    with pytest.raises(ConfigError, match="got 5 parts of batches of 4 images; lower it"):
        next(in_memory_batches(*digits, batch_size=4, seed=0, epoch=0, num_parts=5))


def test_eval_batches_are_all_images_in_order(digits: Labeled) -> None:
    batches = list(eval_batches(*digits, mean_C=MEAN, std_C=STD, batch_size=500))
    assert [len(labels) for _, labels in batches] == [500, 500, 500, 297]
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), to_input(digits[0], MEAN, STD))
    np.testing.assert_array_equal(torch.cat([y for _, y in batches]).numpy(), digits[1])


# The teacher


def test_a_classifier_learns_the_digits(digits: Labeled) -> None:
    config = SqueezeConfig(epochs=3, batch_size=32, crop_scale_min=0.8, flip=False)
    network, losses = small_network(), []
    train_on(
        network,
        (digits[0][:1400], digits[1][:1400]),
        config,
        on_epoch=lambda epoch, loss: losses.append((epoch, loss)),
    )
    held_out = eval_batches(
        digits[0][1400:], digits[1][1400:], mean_C=MEAN, std_C=STD, batch_size=200
    )
    top1, top5, _ = accuracy(network, held_out)
    assert top1 > 0.93 and top5 > 0.99
    assert [epoch for epoch, _ in losses] == [0, 1, 2]
    assert losses[2][1] < losses[1][1] < losses[0][1]


OF_TODAY: dict[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 0.01,
    "warmup_epochs": 2.5,
    "ema_decay": 0.9,
    "crop_scale_min": 1.0,
    "shift_px": 2,
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("changes", [{}, OF_TODAY], ids=["plain", "of today"])
def test_training_resumed_from_plain_arrays_gives_the_same_bytes(
    digits: Labeled, channels_last: bool, changes: dict[str, Any]
) -> None:
    data = digits[0][:300], digits[1][:300]
    config = SqueezeConfig(**{"epochs": 4, "batch_size": 50, **changes})

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage | None]:
        network = small_network(seed=seed, channels_last=channels_last)
        return network, *optimizer_and_average(network, config)

    whole, optimizer, average = start(0)
    saved = {}

    def save(epoch: int, _: float) -> None:
        saved[epoch] = training_state(whole, optimizer, average)

    train_on(whole, data, config, optimizer=optimizer, average=average, on_epoch=save)
    resumed, again, average_again = start(7)
    # As they come back from a file: row-major, and 0-dimensional arrays with one dimension.
    state = {name: np.ascontiguousarray(array) for name, array in saved[1].items()}
    load_training_state(resumed, again, state, average_again)
    train_on(resumed, data, config, optimizer=again, average=average_again, start_epoch=2)
    assert_same_weights(resumed, whole)


def test_a_classifier_ends_as_the_average_of_its_weights_after_every_step(digits: Labeled) -> None:
    data, config = (digits[0][:100], digits[1][:100]), SqueezeConfig(epochs=2, batch_size=50)
    network, after = small_network(), []
    optimizer = optimizer_of(network, config)
    optimizer.register_step_post_hook(lambda *_: after.append(copy.deepcopy(network.state_dict())))
    train_on(network, data, config, optimizer=optimizer, average=WeightAverage(network, 0.5))
    assert len(after) == 4
    for name, value in network.state_dict().items():
        weighted = sum(0.5 ** (4 - i) * state[name] for i, state in enumerate(after, 1))
        if value.is_floating_point():
            torch.testing.assert_close(value, weighted / sum(0.5**i for i in range(4)))


def test_a_shift_moves_whole_pixels_and_repeats_the_border(
    digits: Labeled,
) -> None:
    seen: list[torch.Tensor] = []
    network = small_network()
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    config = SqueezeConfig(epochs=1, batch_size=200, crop_scale_min=1.0, shift_px=2, flip=False)
    images = digits[0][:200]
    train_classifier(
        network,
        optimizer_of(network, config),
        lambda *_: [(torch.from_numpy(images), torch.from_numpy(digits[1][:200]))],
        config,
        steps_per_epoch=1,
        mean_C=MEAN,
        std_C=STD,
        seed=0,
    )
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    places = [(down, right) for down in range(5) for right in range(5)]
    moved = torch.stack(
        [to_input(padded[:, d : d + 8, r : r + 8].copy(), MEAN, STD) for d, r in places]
    )
    same_PN = (moved == seen[0]).flatten(2).all(2)
    assert same_PN.any(0).all()
    assert same_PN.any(1).all()  # every one of the 25 places is drawn


def test_a_shift_leaves_the_crops_and_flips_as_they_are_drawn_without_it(digits: Labeled) -> None:
    images, rngs = to_input(digits[0][:50], MEAN, STD), [np.random.default_rng(0) for _ in "ab"]
    plain, shifted = (
        training._augment(images, rng, SqueezeConfig(shift_px=shift_px))
        for rng, shift_px in zip(rngs, (0, 1), strict=True)
    )
    stays = np.random.default_rng(0)
    stays.random(50 * 5)
    still_B = (stays.integers(-1, 2, (50, 2)) == 0).all(1)
    assert 0 < still_B.sum() < 50
    torch.testing.assert_close(shifted[still_B], plain[still_B], rtol=0, atol=0)
    assert (shifted[~still_B] != plain[~still_B]).flatten(1).any(1).all()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_training_state_of_every_optimizer_round_trips(name: str, channels_last: bool) -> None:
    def steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + 3):
            images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
            take_step(optimizer, network(images).square().mean(), 0.01, step, 10)

    first = small_network(channels_last=channels_last)
    second = small_network(seed=1, channels_last=channels_last)
    kwargs: dict[str, Any] = {"name": name, "learning_rate": 0.01, "weight_decay": 0.1}
    optimizers = make_optimizer(first, **kwargs), make_optimizer(second, **kwargs)
    steps(first, optimizers[0], 0)
    load_training_state(second, optimizers[1], training_state(first, optimizers[0]))
    assert_same_weights(second, first)
    steps(first, optimizers[0], 3)
    steps(second, optimizers[1], 3)
    assert_same_weights(second, first)


def test_training_draws_nothing_from_global_generators(digits: Labeled) -> None:
    data, config = (digits[0][:100], digits[1][:100]), SqueezeConfig(epochs=1, batch_size=50)
    first, second = small_network(), small_network()
    train_on(first, data, config)
    np.random.seed(9)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    train_on(second, data, config)
    assert_same_weights(first, second)
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_each_part_of_a_batch_has_an_augmentation_of_its_own_and_the_first_ones_moments(
    digits: Labeled,
) -> None:
    seen: list[torch.Tensor] = []
    network = small_network()
    norm = next(layer for layer in network if isinstance(layer, nn.BatchNorm2d))
    network[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    inputs: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    config = SqueezeConfig(epochs=1, batch_size=20, batch_parts=2)
    twice = np.concatenate([digits[0][:1]] * 20), np.concatenate([digits[1][:1]] * 20)
    train_on(network, twice, config)
    assert len(seen) == 2 and (seen[0] != seen[1]).any()
    torch.testing.assert_close(norm.running_mean, 0.1 * inputs[0].mean((0, 2, 3)))
    assert norm.num_batches_tracked == 1


def test_the_rate_falls_over_all_epochs_and_not_over_each(
    digits: Labeled, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    monkeypatch.setattr(training, "descend", lambda *args: steps.append(args[1:]))
    monkeypatch.setattr(training, "take_step", lambda *args: steps.append(args[2:]))
    config = SqueezeConfig(epochs=3, batch_size=50, learning_rate=0.3)
    train_on(small_network(), (digits[0][:100], digits[1][:100]), config)
    assert steps == [(0.3, step, 6, 0) for step in range(6)]
    steps.clear()
    warmed = SqueezeConfig(epochs=3, batch_size=50, learning_rate=0.3, warmup_epochs=1.5)
    train_on(small_network(), (digits[0][:100], digits[1][:100]), warmed)
    assert steps == [(0.3, step, 6, 3) for step in range(6)]
    steps.clear()
    images = to_input(digits[0][:16], MEAN, STD)
    train_small(small_network(), images, fixed_epochs(16), learning_rate=0.2)
    assert steps == [(0.2, step, 6) for step in range(6)]


def test_only_the_announced_steps_of_an_epoch_are_taken(digits: Labeled) -> None:
    taken = []

    def endless(epoch: int, part: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            taken.append(epoch)
            yield torch.from_numpy(digits[0][:8]), torch.from_numpy(digits[1][:8])

    network, config = small_network(), SqueezeConfig(epochs=2, batch_size=8)
    train_classifier(
        network,
        optimizer_of(network, config),
        endless,
        config,
        steps_per_epoch=3,
        mean_C=MEAN,
        std_C=STD,
        seed=0,
    )
    assert taken == [0, 0, 0, 1, 1, 1]


def test_a_loss_that_is_not_finite_names_the_learning_rate(digits: Labeled) -> None:
    config = SqueezeConfig(epochs=1, batch_size=50, learning_rate=1e30)
    with pytest.raises(ConfigError, match=r"--squeeze.learning-rate: .*finite.*epoch 0.*lower it"):
        train_on(small_network(), (digits[0][:200], digits[1][:200]), config)


# The student


def soft_epochs(
    network: nn.Module, images: torch.Tensor
) -> Any:  # Callable[[int], tuple[Views, ndarray]]
    config = ViewConfig(crop_scale_min=0.7, flip=False)

    def epoch_of(epoch: int) -> tuple[Views, np.ndarray]:
        views = draw_views(len(images), 8, config, seed=0, epoch=epoch)
        return views, label_views(network.eval(), images, views, 8, 100)

    return epoch_of


EDC: dict[str, Any] = {
    "loss": "mse",
    "ce_weight": 0.025,
    "ema_decay": 0.9,
    "schedule": "half_cosine",
}


@pytest.mark.parametrize(
    "changes",
    [{}, EDC, {"optimizer": "muon", "learning_rate": 2e-3}, {"mixed_precision": True}],
    ids=["plain", "edc", "muon", "bfloat16"],
)
def test_a_student_learns_its_teacher_from_views(digits: Labeled, changes: dict[str, Any]) -> None:
    teacher = small_network()
    train_on(teacher, digits, SqueezeConfig(epochs=2, batch_size=32, flip=False))
    images = to_input(digits[0][:300], MEAN, STD)
    student = small_network(seed=3)
    config = EvaluateConfig(batch_size=25, temperature=4.0, **changes)
    losses: list[float] = []
    train_student(
        student,
        images,
        soft_epochs(teacher, images),
        None,
        config,
        epochs=12,
        image_size=8,
        seed=0,
        classes_N=digits[1][:300],
        on_epoch=lambda _, loss, get_state: losses.append(loss),
    )
    held_out = eval_batches(
        digits[0][300:], digits[1][300:], mean_C=MEAN, std_C=STD, batch_size=500
    )
    top1, *_ = accuracy(student, held_out)
    assert top1 > 0.85
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]


def test_a_student_learns_from_hard_labels_without_logits(digits: Labeled) -> None:
    images = to_input(digits[0][:300], MEAN, STD)
    config = ViewConfig(crop_scale_min=0.7, flip=False)

    def views_of(epoch: int) -> tuple[Views, None]:
        return draw_views(300, 8, config, seed=0, epoch=epoch), None

    def train(classes: np.ndarray) -> float:
        student = small_network(seed=3)
        train_student(
            student,
            images,
            views_of,
            None,
            # Of the losses to soft labels nothing is used.
            EvaluateConfig(batch_size=25, ce_weight=7.0, loss="mse"),
            epochs=12,
            image_size=8,
            seed=0,
            classes_N=classes,
            labels="hard",
        )
        held_out = eval_batches(
            digits[0][300:], digits[1][300:], mean_C=MEAN, std_C=STD, batch_size=500
        )
        return accuracy(student, held_out)[0]

    assert train(digits[1][:300]) > 0.85
    assert train((digits[1][:300] + 1) % 10) < 0.05  # the classes are what is learned


def fixed_epochs(n: int, seed: int = 0) -> Any:
    logits = random_logits(n, seed).numpy()
    return lambda epoch: (draw_views(n, 8, ViewConfig(), seed=0, epoch=epoch), logits)


def train_small(network: nn.Module, images: Any, epochs_of: Any, **changes: Any) -> nn.Module:
    """Train on 3 label epochs in batches of 8, and return the network."""
    weights = changes.pop("weights", None)
    given = {"seed": changes.pop("seed", 0), "classes_N": changes.pop("classes", None)}
    config = EvaluateConfig(batch_size=8, **changes)
    train_student(network, images, epochs_of, weights, config, epochs=3, image_size=8, **given)
    return network


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "muon", "mixed_precision": True},
        EDC,
    ],
    ids=["adamw", "sgd", "muon-bfloat16", "edc"],
)
def test_a_student_resumed_after_any_epoch_is_the_same_to_the_last_bit(
    changes: dict[str, Any],
) -> None:
    config = EvaluateConfig(batch_size=8, **changes)
    states: list[dict[str, np.ndarray]] = []

    def train(seed: int, state: dict[str, np.ndarray] | None) -> nn.Module:
        # With dropout, whose random numbers come from torch's own generator.
        network = nn.Sequential(nn.Dropout(0.5), *small_network(seed))
        train_student(
            network,
            torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
            fixed_epochs(20),
            None,
            config,
            epochs=3,
            image_size=8,
            seed=5,
            classes_N=np.arange(20) % 10,
            state=state,
            on_epoch=lambda epoch, loss, get_state: states.append(get_state()),
        )
        return network

    whole = train(1, None)
    for state in states[:3]:
        torch.manual_seed(99)
        assert_same_weights(train(2, dict(state)), whole)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_students_of_one_seed_are_equal_to_the_last_bit(optimizer: str) -> None:
    images = torch.randn(21, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first = train_small(small_network(), images, fixed_epochs(21), optimizer=optimizer)
    np.random.seed(1)
    torch.randn(3)
    second = train_small(small_network(), images, fixed_epochs(21), optimizer=optimizer)
    assert_same_weights(first, second)
    other = train_small(small_network(), images, fixed_epochs(21), optimizer=optimizer, seed=1)
    assert (other[0].weight != first[0].weight).any()


def test_rendering_few_or_many_views_at_a_time_trains_the_same_student(
    monkeypatch: pytest.MonkeyPatch, digits: Labeled
) -> None:
    images = to_input(digits[0][:30], MEAN, STD)
    first = train_small(small_network(), images, fixed_epochs(30))
    monkeypatch.setattr(training, "_RENDER_FLOATS", 1)
    second = train_small(small_network(), images, fixed_epochs(30))
    assert_same_weights(first, second)
    stored = StoredImages(digits[0][:30], MEAN, STD, in_float=True)
    assert_same_weights(first, train_small(small_network(), stored, fixed_epochs(30)))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "sizes"),
    [(7, 2, [3, 2, 2]), (6, 2, [2, 2, 2]), (7, 3, [3, 2, 2]), (1, 2, [1]), (3, 1, [1, 1, 1])],
)
def test_no_batch_is_of_one_view_unless_there_is_one_or_one_was_asked_for(
    num_images: int, batch_size: int, sizes: list[int]
) -> None:
    batches = list(EpochBatches(num_images, 1, batch_size, seed=0, rank=0, world=1))
    assert [len(batch) for batch in batches] == sizes
    assert student_steps(num_images, batch_size) == len(sizes)


def test_a_student_of_batches_of_two_learns_from_an_odd_number_of_images(digits: Labeled) -> None:
    images = to_input(digits[0][:5], MEAN, STD)
    config = EvaluateConfig(epochs=1, batch_size=2)
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(10), nn.BatchNorm1d(10))
    network(images)
    views = draw_views(5, 8, ViewConfig(), seed=0, epoch=0)
    labels = (views, random_logits(5, 0).numpy())
    train_student(network, images, lambda _: labels, None, config, epochs=1, image_size=8, seed=0)


def test_batches_of_a_student_are_of_equal_size_and_hold_every_view_once() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen = nn.Linear(1, 10), list[torch.Tensor]()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.seen.append(images.mean(dim=(1, 2, 3)).round())
            return self.linear(images.mean(dim=(2, 3)))

    constant = torch.arange(26.0)[:, None, None, None].expand(26, 1, 8, 8).contiguous()
    views = draw_views(26, 8, ViewConfig(mix="none"), seed=0, epoch=0)
    network = Recorder()
    train_small(network, constant, lambda _: (views, random_logits(26, 0).numpy()))
    assert [len(batch) for batch in network.seen[:4]] == [7, 7, 6, 6]
    epochs = [torch.cat(network.seen[i : i + 4]) for i in (0, 4, 8)]
    for seen in epochs:
        torch.testing.assert_close(seen.sort().values, torch.arange(26.0))
    assert (epochs[0] != epochs[1]).any()


def test_weights_of_images_scale_their_loss_only_when_the_option_is_on() -> None:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = np.full(16, 0.1)
    weights[5] = 0

    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    changed = random_logits(16, 0).numpy()
    changed[5] += 50 * np.eye(10)[3]

    def other_label(epoch: int) -> tuple[Views, np.ndarray]:
        return draw_views(16, 8, ViewConfig(), seed=0, epoch=epoch), changed

    options: dict[str, Any] = {"weights": weights, "weighted_loss": True}
    plain = train_small(linear(), images, fixed_epochs(16))
    weighted = train_small(linear(), images, fixed_epochs(16), **options)
    assert (plain[1].weight != weighted[1].weight).any()
    # An image of weight 0 teaches nothing: its label may change.
    assert_same_weights(weighted, train_small(linear(), images, other_label, **options))
    options["weights"] = 7 * weights  # only relative weights count
    rescaled = train_small(linear(), images, fixed_epochs(16), **options)
    torch.testing.assert_close(rescaled.state_dict(), weighted.state_dict())
    options["weighted_loss"] = False
    assert_same_weights(plain, train_small(linear(), images, fixed_epochs(16), **options))


def test_a_rate_that_falls_to_half_is_half_of_a_cosine_of_twice_the_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    monkeypatch.setattr(training, "take_step", lambda *args: steps.append(args[2:]))
    images = torch.zeros(16, 1, 8, 8)
    train_small(small_network(), images, fixed_epochs(16), schedule="half_cosine")
    rates = np.array([cosine_rate(*arguments) for arguments in steps])
    expected = 1e-3 * (1 + np.cos(np.pi * np.arange(6) / 12)) / 2
    np.testing.assert_allclose(rates, expected)
    np.testing.assert_allclose(cosine_rate(steps[0][0], 6, steps[0][2]), 0.5e-3)


def test_cross_entropy_joins_a_loss_by_its_weight_and_reads_the_partners_class() -> None:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = np.arange(16) % 10

    def train(**changes: Any) -> nn.Module:
        return train_small(small_network(), images, epochs_of, **changes)

    def epochs_of(epoch: int) -> Any:
        views, logits = fixed_epochs(16)(epoch)
        views.share_V[:] = 0  # the partner's class is all that counts
        views.partner_V[:] = 5
        return views, logits

    assert_same_weights(train(), train(classes=classes))
    with_ce = train(classes=classes, ce_weight=0.5)
    assert (with_ce[0].weight != train()[0].weight).any()
    others = np.where(np.arange(16) == 5, classes, 9)
    assert_same_weights(with_ce, train(classes=others, ce_weight=0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ce_weight": -0.1}, "--evaluate.ce-weight: expected >= 0, got -0.1"),
        ({"ema_decay": 1.0}, r"--evaluate.ema-decay: expected in \[0, 1\), got 1.0"),
        ({"optimizer": "adam"}, "--evaluate.optimizer: expected one of adamw, sgd, muon"),
        ({"schedule": "half"}, "--evaluate.schedule: expected one of cosine, half_cosine"),
        ({"loss": "MSE"}, "--evaluate.loss: expected one of kl, mse, got 'MSE'"),
        ({"sinkhorn_weight": -1.0}, "--evaluate.sinkhorn-weight: expected >= 0, got -1.0"),
        ({"sinkhorn_regularization": 0.0}, "--evaluate.sinkhorn-regularization: expected > 0"),
        ({"sinkhorn_iterations": 0}, "--evaluate.sinkhorn-iterations: expected >= 1, got 0"),
    ],
)
def test_a_student_recipe_that_is_no_recipe_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**values)


def loss_of_a_pass(labels: Any, weights_N: np.ndarray | None, **options: Any) -> float:
    """Return the mean loss of a pass over 16 images that teaches nothing."""
    losses: list[float] = []
    train_student(
        small_network(),
        torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        fixed_epochs(16),
        weights_N,
        EvaluateConfig(learning_rate=1e-30, **options),
        epochs=1,
        image_size=8,
        seed=0,
        classes_N=np.arange(16) % 10,
        labels=labels,
        on_epoch=lambda _, value, get_state: losses.append(value),
    )
    return losses[0]


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_loss_of_a_step_is_that_to_the_soft_labels_plus_the_weighted_cross_entropy(
    loss: Any,
) -> None:
    # An image's weight counts in both terms.
    weights_N = np.linspace(0.5, 1.5, 16)

    def loss_of(ce_weight: float, labels: Any, weighted: bool = True) -> float:
        options = {"batch_size": 8, "ce_weight": ce_weight, "weighted_loss": weighted}
        return loss_of_a_pass(labels, weights_N, loss=loss, **options)

    soft, hard = loss_of(0, "soft"), loss_of(0, "hard")
    assert soft > 1e-3 and hard > 1
    assert abs(loss_of(0, "soft", weighted=False) / soft - 1) > 1e-4
    assert abs(loss_of(0, "hard", weighted=False) / hard - 1) > 1e-4
    np.testing.assert_allclose(loss_of(0.5, "soft"), soft + 0.5 * hard, rtol=1e-5)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_transport_term_joins_the_loss_to_soft_labels_by_its_weight_and_no_other(
    loss: Any,
) -> None:
    def loss_of(weight: float, labels: Any = "soft") -> float:
        options = {"batch_size": 16, "ce_weight": 0.5, "sinkhorn_weight": weight}
        return loss_of_a_pass(labels, None, loss=loss, **options)

    term = loss_of(1.0) - loss_of(0.0)
    assert term > 0.1
    assert loss_of(0.25) - loss_of(0.0) == pytest.approx(0.25 * term, rel=1e-4)
    assert loss_of(1.0, "hard") == loss_of(0.0, "hard")


def test_bfloat16_reaches_the_students_forward_pass_and_not_its_loss_or_weights() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen = nn.Linear(64, 10), set[torch.dtype]()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.linear(images.flatten(1))
            self.seen.add(logits.dtype)
            return logits

    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for on, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        network = Recorder()
        train_small(network, images, fixed_epochs(16), mixed_precision=on)
        assert network.seen == {dtype}
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert network(images).dtype == torch.float32


def test_a_teacher_is_trained_in_bfloat16_only_when_asked(digits: Labeled) -> None:
    data, seen = (digits[0][:64], digits[1][:64]), []
    for on in (False, True):
        network = small_network()
        network[-1].register_forward_hook(lambda *a: seen.append(a[2].dtype))
        train_on(network, data, SqueezeConfig(epochs=1, batch_size=64, mixed_precision=on))
    assert seen == [torch.float32, torch.bfloat16]


def test_the_student_ends_as_the_average_and_reports_what_it_trains() -> None:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    last = train_small(small_network(), images, fixed_epochs(16))
    trained: list[dict[str, torch.Tensor]] = []
    averaged = small_network()
    train_student(
        averaged,
        images,
        fixed_epochs(16),
        None,
        EvaluateConfig(batch_size=8, ema_decay=0.9),
        epochs=3,
        image_size=8,
        seed=0,
        on_epoch=lambda *_: trained.append(copy.deepcopy(averaged.state_dict())),
    )
    torch.testing.assert_close(trained[-1], last.state_dict(), rtol=0, atol=0)
    short = train_small(small_network(), images, fixed_epochs(16), ema_decay=1e-9)
    torch.testing.assert_close(
        short.state_dict(), last.state_dict()
    )  # of the weights after each step
    for name, value in averaged.state_dict().items():
        if value.is_floating_point():
            assert (value != trained[-1][name]).any(), name


class Deterministic(nn.Module):
    """Counts the passes, and requires that convolutions add in one order."""

    passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert torch.backends.cudnn.deterministic
        self.passes += 1
        return images


def test_teachers_and_students_train_by_convolutions_that_add_in_one_order(digits: Labeled) -> None:
    seen = Deterministic()
    network = nn.Sequential(seen, *small_network())
    train_on(network, tuple(part[:32] for part in digits), SqueezeConfig(epochs=1))
    assert seen.passes > 0
    seen.passes = 0
    train_small(network, torch.randn(16, 1, 8, 8), fixed_epochs(16))
    assert seen.passes > 0 and not torch.backends.cudnn.deterministic


def test_weights_are_averaged_together_to_the_bits_of_one_by_one() -> None:
    network = small_network()
    average = WeightAverage(network, 0.9)
    expected = {k: v.clone() for k, v in network.state_dict().items() if v.is_floating_point()}
    for step in range(1, 4):
        for parameter in network.parameters():
            parameter.data.normal_()
        average.update()
        for name, value in expected.items():
            value.lerp_(network.state_dict()[name], (1 - 0.9) / (1 - 0.9**step))
    average.put_into_network()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in expected.items())


def test_a_diverging_student_is_told_to_lower_its_rate() -> None:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"--evaluate.learning-rate: .*finite"):
        train_small(
            small_network(),
            images,
            fixed_epochs(16),
            learning_rate=1e38,
            optimizer="sgd",
        )


# Accuracy


class Replay(nn.Module):
    """Returns its input, flattened, as logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_accuracy_counts_the_best_and_the_best_five() -> None:
    logits_BY = torch.arange(10.0).flip(0).expand(10, 10)  # class 0 is best, class 9 last
    labels_B = torch.arange(10)
    batches = [
        (logits_BY[part, :, None, None], labels_B[part]) for part in (slice(0, 7), slice(7, 10))
    ]
    assert accuracy(Replay(), batches)[:2] == (0.1, 0.5)


def test_top5_of_three_classes_is_always_right() -> None:
    logits_BY = torch.eye(3)[:, :, None, None]
    top1, top5, recall_Y = accuracy(Replay(), [(logits_BY, torch.tensor([0, 1, 0]))])
    assert top5 == 1 and recall_Y.tolist() == [0.5, 1, 0]
    np.testing.assert_allclose(top1, 2 / 3)


@pytest.mark.parametrize("mode", [True, False])
def test_accuracy_is_measured_in_eval_mode_and_puts_the_mode_back(mode: bool) -> None:
    network = small_network().train(mode)
    before = copy.deepcopy(network.state_dict())
    accuracy(network, [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))])
    assert network.training is mode
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
