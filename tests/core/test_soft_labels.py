"""Soft labels: what compression keeps, what it loses, and what it refuses."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from torch import nn

from wmdd_ray.config import DistillConfig, NetworkConfig, RelabelConfig, ViewConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.soft_labels import (
    compress,
    concatenate_labels,
    decompress,
    label_statistics,
    label_views,
    take_labels,
)
from wmdd_ray.core.views import draw_views, render_views, take
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.recipes import imagenet1k, tiny_imagenet

FULL = RelabelConfig(compression="full")


def steps(step: float = 0.125, k: int | None = None) -> RelabelConfig:
    kind = {} if k is None else {"compression": "top_k", "top_k": k}
    return RelabelConfig(precision="int8", step=step, **kind)


def top(k: int) -> RelabelConfig:
    return RelabelConfig(compression="top_k", top_k=k)


def random_logits(num_views: int, num_classes: int, scale: float = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((num_views, num_classes))).astype(np.float32)


def test_full_labels_keep_every_probability_to_half_precision() -> None:
    logits_VY = random_logits(200, 100)
    labels = compress(logits_VY, FULL)
    assert labels.values_VK.dtype == np.float16 and labels.indices_VK is None
    result_VY, true_VY = log_softmax(decompress(labels), 1), log_softmax(logits_VY, 1)
    gap_VY = logits_VY.max(axis=1, keepdims=True) - logits_VY
    # Half a unit of the last of float16's 11 bits; the normalizer is off by less than 2^-9 here.
    assert (abs(result_VY - true_VY) <= gap_VY * 2**-11 + 2**-9).all()


def test_a_large_common_offset_costs_no_precision() -> None:
    # 3000 has a spacing of 2 in float16.
    logits_VY = random_logits(50, 10)
    shifted = decompress(compress(logits_VY.astype(np.float64) + 3000, FULL))
    np.testing.assert_allclose(softmax(shifted, 1), softmax(logits_VY, 1), atol=0.01)
    shifted = decompress(compress(logits_VY.astype(np.float64) - 3000, top(4)))
    plain = decompress(compress(logits_VY, top(4)))
    np.testing.assert_allclose(shifted, plain, atol=0.02)


@pytest.mark.parametrize("config", [FULL, top(3), steps(), steps(k=3)])
def test_logits_beyond_half_precision_saturate_to_finite_values(config: RelabelConfig) -> None:
    logits_VY = np.array([[1e30, 0, -1e30, 5, 1, 2], [0, 0, 0, 0, 0, -1e9]], dtype=np.float32)
    result = decompress(compress(logits_VY, config))
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result.argmax(axis=1)[:1], [0])
    np.testing.assert_allclose(softmax(result[0])[0], 1)


@settings(max_examples=80, deadline=None)
@given(
    num_classes=st.integers(1, 30),
    k=st.integers(1, 30),
    scale=st.floats(0, 1e4),
    step=st.floats(2**-14, 1000),
    seed=st.integers(0, 2**16),
)
def test_steps_are_off_by_half_a_step_or_by_a_509th_of_a_wide_row(
    num_classes: int, k: int, scale: float, step: float, seed: int
) -> None:
    logits_VY = random_logits(20, num_classes, scale, seed)
    labels = compress(logits_VY, steps(step, k))
    assert labels.values_VK.dtype == np.uint8 and labels.step_V is not None
    assert labels.step_V.dtype == np.float16
    kept = -np.sort(-logits_VY.astype(np.float64), axis=1)[:, :k]
    gap_VK = kept[:, :1] - kept
    bound_V = np.maximum(step / 2, gap_VK.max(axis=1) / 509)
    found_VY = decompress(labels)
    largest_first = -np.sort(-found_VY.astype(np.float64), axis=1)[:, : gap_VK.shape[1]]
    if k >= num_classes:
        found = found_VY.max(axis=1, keepdims=True) - found_VY
        true = logits_VY.astype(np.float64).max(axis=1, keepdims=True) - logits_VY
        error_V = abs(found - true).max(axis=1)
    else:
        assert labels.indices_VK is not None
        values = np.take_along_axis(found_VY, labels.indices_VK.astype(np.int64), axis=1)
        error_V = abs(-values - gap_VK).max(axis=1)
    assert (error_V <= bound_V * (1 + 2**-10) + 1e-6).all()
    assert np.isfinite(largest_first).all()


def test_steps_of_a_row_in_numbers() -> None:
    labels = compress(np.array([[3.0, 1.3, -2.0], [400.0, 0.0, 200.0]]), steps(0.5))
    np.testing.assert_array_equal(labels.values_VK[0], [0, 3, 10])
    np.testing.assert_array_equal(decompress(labels)[0], [0, -1.5, -5])
    assert labels.step_V is not None
    np.testing.assert_allclose(labels.step_V, [0.5, 400 / 255], rtol=2**-11)
    assert labels.values_VK[1].max() == 255


def test_top_k_keeps_the_k_largest_probabilities_and_spreads_the_rest_evenly() -> None:
    logits_VY, k = random_logits(300, 50), 7
    labels = compress(logits_VY, top(k))
    assert labels.indices_VK is not None and labels.rest_V is not None
    assert labels.indices_VK.dtype == np.uint16 and labels.rest_V.dtype == np.float16
    expected_VK = np.argsort(-logits_VY, axis=1)[:, :k]
    np.testing.assert_array_equal(labels.indices_VK, expected_VK)
    true_VY, result_VY = softmax(logits_VY, axis=1), softmax(decompress(labels), axis=1)
    kept_true = np.take_along_axis(true_VY, expected_VK, axis=1)
    kept_result = np.take_along_axis(result_VY, expected_VK, axis=1)
    np.testing.assert_allclose(kept_result, kept_true, rtol=0.01)
    others = np.ones_like(true_VY, dtype=bool)
    np.put_along_axis(others, expected_VK, False, axis=1)
    rest_VR = result_VY[others].reshape(300, 43)
    np.testing.assert_allclose(rest_VR, np.repeat(rest_VR[:, :1], 43, axis=1), rtol=1e-6)
    np.testing.assert_allclose(rest_VR.sum(1), (true_VY * others).sum(1), rtol=0.01)


def test_top_k_of_a_hand_computed_row() -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8 in shuffled order; the best two are kept.
    labels = compress(np.log([[1 / 8, 1 / 2, 1 / 8, 1 / 4]]), top(2))
    assert labels.rest_V is not None
    np.testing.assert_allclose(labels.values_VK, [[0, -np.log(2)]], atol=1e-3)
    np.testing.assert_allclose(labels.rest_V, [np.log(1 / 2)], atol=1e-3)
    probabilities = softmax(decompress(labels), axis=1)
    np.testing.assert_allclose(probabilities, [[1 / 8, 1 / 2, 1 / 8, 1 / 4]], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    num_classes=st.integers(2, 40),
    k=st.integers(1, 45),
    scale=st.floats(0, 100),
    seed=st.integers(0, 2**16),
)
def test_mass_sums_to_one_and_the_best_class_stays(
    num_classes: int, k: int, scale: float, seed: int
) -> None:
    logits_VY = random_logits(20, num_classes, scale, seed)
    labels = compress(logits_VY, top(k))
    assert (labels.indices_VK is None) == (k >= num_classes)
    result = decompress(labels)
    assert result.shape == (20, num_classes) and result.dtype == np.float32
    np.testing.assert_allclose(softmax(result, axis=1).sum(1), 1, rtol=1e-5)
    best_V1 = logits_VY.argmax(axis=1)[:, None]
    kept = np.take_along_axis(softmax(result, axis=1), best_V1, axis=1)
    true = np.take_along_axis(softmax(logits_VY, axis=1), best_V1, axis=1)
    np.testing.assert_allclose(kept, true, rtol=0.02)


def test_compressing_what_was_decompressed_changes_no_probability_again() -> None:
    once = decompress(compress(random_logits(50, 30), top(5)))
    twice = decompress(compress(once, top(5)))
    np.testing.assert_allclose(softmax(twice, 1), softmax(once, 1), rtol=2e-3)


@pytest.mark.parametrize("config", [FULL, top(4), steps(), steps(k=4)])
def test_rows_are_taken_and_put_together_without_decompression(config: RelabelConfig) -> None:
    labels = compress(random_logits(20, 9), config)
    order = np.random.default_rng(0).permutation(20)
    parts = [take_labels(labels, order[:8]), take_labels(labels, order[8:])]
    np.testing.assert_array_equal(decompress(concatenate_labels(parts)), decompress(labels)[order])


def kept_share(logits_VY: np.ndarray, config: RelabelConfig, temperature: float) -> float:
    """Return how much of KL(teacher || uniform) at a temperature the compressed labels keep."""

    def log_probabilities(values_VY: np.ndarray) -> np.ndarray:
        return log_softmax(values_VY.astype(np.float64) / temperature, axis=1)

    exact_VY = log_probabilities(logits_VY)
    stored_VY = log_probabilities(decompress(compress(logits_VY, config)))
    lost = (np.exp(exact_VY) * (exact_VY - stored_VY)).sum(axis=1).mean()
    even = -np.log(logits_VY.shape[1])
    return 1 - float(lost / (np.exp(exact_VY) * (exact_VY - even)).sum(axis=1).mean())


@pytest.mark.parametrize("recipe", [tiny_imagenet, imagenet1k])
def test_recipes_of_many_classes_keep_the_labels_at_their_students_temperature(
    recipe: Callable[[int], DistillConfig],
) -> None:
    config = recipe(10)
    num_classes = 200 if recipe is tiny_imagenet else 1000
    logits_VY = np.random.default_rng(0).standard_t(5, size=(50, num_classes)) * 2
    logits_VY[:, 0] += 12
    temperature = config.evaluate.temperature
    assert kept_share(logits_VY, config.relabel, temperature) > 0.97
    # The guard would see what was there before.
    assert kept_share(logits_VY, top(50), temperature) < 0.8


def test_a_step_costs_its_variance_at_a_high_temperature() -> None:
    logits_VY = random_logits(100, 50, scale=4)
    share = kept_share(logits_VY, steps(1.0), 40.0)
    # Both divergences are half of the variances over T^2.
    assert abs((1 - share) - (1 / 12) / logits_VY.var(axis=1).mean()) < 0.1 * (1 - share)


def test_equal_logits_are_the_uniform_distribution() -> None:
    result = decompress(compress(np.full((3, 12), 4.0), top(5)))
    np.testing.assert_allclose(softmax(result, axis=1), 1 / 12, rtol=2e-3)


def test_more_classes_than_sixteen_bits_need_full_labels() -> None:
    logits_VY = np.zeros((1, 2**16 + 1), dtype=np.float32)
    logits_VY[0, -1] = 9
    with pytest.raises(ConfigError, match=r"at most 65536 classes, got 65537; use .* full"):
        compress(logits_VY, top(10))
    assert decompress(compress(logits_VY, FULL)).argmax() == 2**16
    assert decompress(compress(logits_VY[:, 1:], top(10))).argmax() == 2**16 - 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_with_their_view(bad: float) -> None:
    logits_VY = random_logits(4, 3)
    logits_VY[2, 1] = bad
    with pytest.raises(DataError, match="finite teacher logits.*for view 2"):
        compress(logits_VY, FULL)


def test_labels_are_the_networks_logits_on_the_rendered_views() -> None:
    torch.manual_seed(0)
    images = torch.randn(9, 1, 8, 8)
    views = draw_views(9, 8, ViewConfig(), seed=0, epoch=0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    expected = network(render_views(images, views, 8)).detach().numpy()
    for batch_size in (2, 9, 100):
        result = label_views(network, images, views, 8, batch_size)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def convnet(seed: int, width: int = 4, size: int = 16) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = NetworkConfig(arch="convnet3", width=width)
        return build_network(config, num_classes=3, channels=1, image_size=size).eval()


def pictures(num_images: int, size: int = 16) -> torch.Tensor:
    return torch.randn(
        (num_images, 1, size, size), generator=torch.Generator().manual_seed(num_images)
    )


def test_images_of_half_the_side_are_labeled_at_the_network_s_input() -> None:
    images = pictures(5, size=14)
    views = draw_views(5, 28, ViewConfig(), seed=0, epoch=0)
    network = convnet(0, size=28)
    got = label_views(network, images, views, 28, 2)
    # The crops are fractions of the image, so views of an enlarged image are nearly the same ones.
    enlarged = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    expected = label_views(network, enlarged, views, 28, 2)
    assert got.shape == (5, 3) and np.abs(got - expected).max() < 0.2 * expected.std()
    assert not np.array_equal(got, label_views(network, images.flip(0), views, 28, 2))


def test_labels_by_batch_statistics_are_those_of_interleaved_batches_in_training_mode() -> None:
    images = pictures(11)
    views = draw_views(11, 16, ViewConfig(), seed=0, epoch=0)
    network, training = convnet(0), convnet(0).train()
    got = label_views(network, images, views, 16, 4, batch_statistics=True)
    for rows in (slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)):
        expected = training(render_views(images, take(views, rows), 16)).detach().numpy()
        np.testing.assert_allclose(got[rows], expected, rtol=1e-4, atol=1e-5)
    plain = label_views(network, images, views, 16, 4)
    assert np.abs(got - plain).max() > 0.1 * plain.std()


def test_a_network_is_as_before_after_labels_by_batch_statistics_and_after_an_error() -> None:
    network = convnet(0)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    views = draw_views(6, 16, ViewConfig(), seed=0, epoch=0)
    before = label_views(network, pictures(6), views, 16, 4)
    label_views(network, pictures(6), views, 16, 4, batch_statistics=True)
    with pytest.raises(RuntimeError, match="expected input"):
        label_views(network, pictures(6).expand(6, 2, 16, 16), views, 16, 4, batch_statistics=True)
    torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)
    assert not any(m.training for m in network.modules())
    np.testing.assert_array_equal(label_views(network, pictures(6), views, 16, 4), before)


def test_a_network_in_training_mode_gives_no_labels() -> None:
    images = torch.randn(2, 1, 8, 8)
    views = draw_views(2, 8, ViewConfig(), seed=0, epoch=0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).train()
    with pytest.raises(AssertionError, match="eval mode"):
        label_views(network, images, views, 8, 2)


def test_statistics_tell_how_sure_labels_are_and_how_they_differ_over_an_image_s_views() -> None:
    views = draw_views(2, 8, ViewConfig(mix="none"), seed=0, epoch=0)
    assert views.image_V.tolist() == [0, 1]
    sure, even = np.array([100.0, 0.0]), np.array([0.0, 0.0])
    # Image 0 is sure of one class, then of the other; image 1 knows nothing, twice.
    epochs = [(views, np.stack([sure, even])), (views, np.stack([sure[::-1], even]))]
    found = label_statistics(epochs, 2)
    assert found["label_entropy"] == pytest.approx(np.log(2) / 2)
    assert found["label_diversity"] == pytest.approx(np.log(2) / 2)
    one = label_statistics(epochs[:1], 2)
    assert one["label_diversity"] == pytest.approx(0, abs=1e-12)


def test_statistics_take_little_more_memory_than_the_sum_of_the_labels() -> None:
    num_images, num_classes = 4000, 300
    views = draw_views(num_images, 8, ViewConfig(), seed=0, epoch=0)
    rng = np.random.default_rng(0)
    epochs = [(views, rng.normal(size=(num_images, num_classes)).astype(np.float32))] * 2
    tracemalloc.start()
    found = label_statistics(epochs, num_images)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    share = softmax(epochs[0][1].astype(np.float64), axis=1)
    assert found["label_entropy"] == pytest.approx(-(share * np.log(share)).sum(axis=1).mean())
    assert found["label_diversity"] == pytest.approx(0, abs=1e-12)
    assert peak_bytes < 8 * num_images * num_classes + (16 << 20)
