from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wmdd_ray.config import NetworkConfig, RecoverConfig
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import batch_norms, build_network, last_linear
from wmdd_ray.core.synthesis import ClassTarget, recover_group
from wmdd_ray.core.views import to_input
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import ClassImages

MEAN, STD, SIZE = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 16
CONFIG = RecoverConfig(iterations=6, learning_rate=0.1, roll_px=1)


def make_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = NetworkConfig(arch="convnet3", width=8)
        network = build_network(config, num_classes=3, channels=3, image_size=SIZE)
        for norm in batch_norms(network):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(last_linear(network).weight)
        pictures = to_input(smooth_pictures(9), MEAN, STD, "cpu")
    for norm in batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(pictures)
    return network.eval()


def smooth_pictures(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


NETWORK = make_network()


def make_target(label: int, ipc: int = 2, start: bool = True) -> ClassTarget:
    """Return the true moments and some features of random smooth pictures of a class."""
    pixels_NHWC = smooth_pictures(label)
    images = to_input(pixels_NHWC, MEAN, STD, "cpu")
    features_ND, moments = features_and_moments(NETWORK, images, np.full(12, label), batch_size=12)
    weights_K = np.random.default_rng(label).random(ipc) + 0.2
    return ClassTarget(
        label=label,
        atoms_KD=features_ND[-ipc:],
        weights_K=weights_K / weights_K.sum(),
        mean_S=moments[label].mean_S,
        var_S=variance_S(moments[label]),
        start_KHWC=pixels_NHWC[:ipc] if start else None,
    )


def recover(targets: list[ClassTarget], config: RecoverConfig, **options: Any) -> list[ClassImages]:
    options = {"network": NETWORK, "seed": 5, "channels": 3, "device": "cpu"} | options
    shape: dict[str, Any] = {"image_size": SIZE, "mean_C": MEAN, "std_C": STD}
    return recover_group(targets=targets, config=config, **shape, **options)


def first_and_last_losses(config: RecoverConfig, target: ClassTarget) -> tuple[float, float]:
    """Return the total at the first and the last step; without jitter, so that they compare."""
    still = replace(config, crop_scale_min=1.0, flip=False, roll_px=0)
    totals: list[float] = []

    def on_step(_: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        totals.append(float(get_state()["loss_total"][0]))

    recover([target], still, on_step=on_step)
    return totals[0], totals[-1]


def test_no_iterations_return_the_start_pixels_exactly() -> None:
    rng = np.random.default_rng(0)
    for label in (0, 1):
        pixels = rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
        pixels[0, :, :, :] = np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE, 1)
        target = replace(make_target(label), start_KHWC=pixels)
        (result,) = recover([target], replace(CONFIG, iterations=0))
        np.testing.assert_array_equal(result.images_KHWC, pixels)
        assert result.losses == {}


@pytest.mark.parametrize("term", ["wasserstein", "cross_entropy", "mean", "rbf_mmd"])
@pytest.mark.parametrize("start", [True, False])
def test_every_feature_term_is_lowered(term: Any, start: bool) -> None:
    config = replace(CONFIG, iterations=12, feature_term=term, moments="none")
    first, last = first_and_last_losses(config, make_target(1, start=start))
    assert last < 0.7 * first


@pytest.mark.parametrize("moments", ["per_class", "global"])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_moment_term_is_lowered(moments: Any, weighted: bool) -> None:
    config = replace(CONFIG, iterations=12, feature_term="none", moments=moments)
    target = make_target(1, ipc=3, start=False)
    first, last = first_and_last_losses(replace(config, weighted_moments=weighted), target)
    assert last < 0.7 * first


def test_the_total_is_the_weighted_sum_of_the_active_terms() -> None:
    config = replace(CONFIG, feature_weight=2.0, bn_weight=3.0, ce_weight=0.5)
    (result,) = recover([make_target(0)], config)
    losses = result.losses
    assert list(losses) == ["feature", "bn", "ce", "total"]
    expected = 2 * losses["feature"] + 3 * losses["bn"] + 0.5 * losses["ce"]
    np.testing.assert_allclose(losses["total"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"moments": "none"}, ["feature", "total"]),
        ({"bn_weight": 0.0}, ["feature", "total"]),
        ({"feature_term": "none"}, ["bn", "total"]),
        ({"feature_weight": 0.0, "ce_weight": 1.0}, ["bn", "ce", "total"]),
    ],
)
def test_losses_are_reported_for_active_terms_only(options: Any, names: list[str]) -> None:
    (result,) = recover([make_target(0)], replace(CONFIG, iterations=1, **options))
    assert list(result.losses) == names


def test_the_target_of_global_moments_are_the_running_statistics() -> None:
    config = replace(CONFIG, moments="global", iterations=2)
    target = make_target(0)
    other = replace(target, mean_S=target.mean_S + 1, var_S=target.var_S + 1)
    (one,), (two,) = recover([target], config), recover([other], config)
    np.testing.assert_array_equal(one.images_KHWC, two.images_KHWC)
    assert one.losses == two.losses


def test_weights_change_the_images_only_when_moments_are_weighted() -> None:
    target = make_target(0)
    uniform = replace(target, weights_K=np.array([0.5, 0.5]))
    for weighted in (False, True):
        config = replace(CONFIG, weighted_moments=weighted)
        (one,), (two,) = recover([target], config), recover([uniform], config)
        assert np.array_equal(one.images_KHWC, two.images_KHWC) != weighted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_term": "rbf_mmd", "weighted_moments": True},
        {"feature_term": "mean", "moments": "global"},
        {"feature_term": "cross_entropy", "ce_weight": 1.0},
    ],
)
@pytest.mark.parametrize("start", [True, False])
def test_a_class_gets_the_same_images_alone_and_in_company(options: Any, start: bool) -> None:
    config = replace(CONFIG, **options)
    targets = [make_target(label, start=start) for label in (0, 2, 1)]
    together = recover(targets, config)
    assert [r.label for r in together] == [0, 2, 1]
    for target, got in zip(targets, together, strict=True):
        (alone,) = recover([target], config)
        difference = got.images_KHWC.astype(int) - alone.images_KHWC
        assert np.abs(difference).max() <= 1, "one gray level, for sums in another order"
        np.testing.assert_allclose(
            list(got.losses.values()), list(alone.losses.values()), rtol=1e-3
        )
        np.testing.assert_array_equal(got.weights_K, target.weights_K)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resuming_at_any_iteration_gives_the_same_bytes(stop: int) -> None:
    targets = [make_target(0), make_target(1, start=False)]
    kept: dict[str, np.ndarray] = {}
    steps: list[int] = []

    def keep(iteration: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        steps.append(iteration)
        if iteration == stop:
            kept.update(get_state())

    expected = recover(targets, CONFIG, on_step=keep)
    assert steps == [1, 2, 3, 4, 5, 6]
    steps.clear()
    resumed = recover(targets, CONFIG, on_step=keep, state=kept)
    assert steps == list(range(stop + 1, 7))
    for one, two in zip(expected, resumed, strict=True):
        assert one.images_KHWC.tobytes() == two.images_KHWC.tobytes()
        assert one.losses == two.losses


def test_a_state_is_a_copy_that_later_steps_leave_alone() -> None:
    states: list[tuple[dict[str, np.ndarray], np.ndarray]] = []

    def keep(_: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        state = get_state()
        states.append((state, state["images"].copy()))

    recover([make_target(0)], CONFIG, on_step=keep)
    for state, images in states:
        np.testing.assert_array_equal(state["images"], images)
        assert all(isinstance(array, np.ndarray) for array in state.values())


def test_seed_and_class_decide_the_noise() -> None:
    config = replace(CONFIG, iterations=0)
    target = make_target(0, start=False)
    (one,), (two,) = recover([target], config), recover([target], config, seed=6)
    (three,) = recover([replace(target, label=1)], config)
    (again,) = recover([target], config)
    np.testing.assert_array_equal(one.images_KHWC, again.images_KHWC)
    assert not np.array_equal(one.images_KHWC, two.images_KHWC)
    assert not np.array_equal(one.images_KHWC, three.images_KHWC)


def test_pixels_stay_in_the_valid_range_under_an_absurd_rate() -> None:
    config = replace(CONFIG, learning_rate=1e3)
    low = [(0 - m) / s for m, s in zip(MEAN, STD, strict=True)]
    high = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]

    def check(_: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        images_BCHW = get_state()["images"]
        assert (images_BCHW.min(axis=(0, 2, 3)) >= np.array(low) - 1e-6).all()
        assert (images_BCHW.max(axis=(0, 2, 3)) <= np.array(high) + 1e-6).all()

    recover([make_target(0)], config, on_step=check)


def test_the_network_is_left_as_it_was() -> None:
    network = make_network()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recover([make_target(0)], CONFIG, network=network)
    torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not torch.backends.cudnn.deterministic


def test_gray_images_are_recovered() -> None:
    config = NetworkConfig(arch="convnet3", width=2)
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, num_classes=2, channels=1, image_size=8).eval()
    target = ClassTarget(
        label=1,
        atoms_KD=np.zeros((1, 2), dtype=np.float32),
        weights_K=np.ones(1),
        mean_S=np.zeros(6),
        var_S=np.ones(6),
    )
    (result,) = recover_group(
        network,
        [target],
        replace(CONFIG, iterations=2),
        image_size=8,
        channels=1,
        mean_C=(0.3,),
        std_C=(0.3,),
        seed=0,
        device="cpu",
    )
    assert result.images_KHWC.shape == (1, 8, 8, 1)


def test_a_configuration_without_a_loss_is_refused() -> None:
    config = replace(CONFIG, feature_term="none", moments="none")
    with pytest.raises(ConfigError, match="no loss term is active"):
        recover([make_target(0)], config)
    (result,) = recover([make_target(0)], replace(config, iterations=0))
    np.testing.assert_array_equal(result.images_KHWC, make_target(0).start_KHWC)


def test_divergence_is_an_error_that_names_the_classes() -> None:
    target = make_target(1)
    broken = replace(target, atoms_KD=np.full_like(target.atoms_KD, np.nan))
    with pytest.raises(DataError, match=r"pixels of classes \[1\] became NaN"):
        recover([make_target(0), broken], CONFIG)
