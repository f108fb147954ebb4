from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.embedding import features_and_moments, running_moments
from wmdd_ray.core.moments import merge_moments, variance_S
from wmdd_ray.core.networks import batch_norms, build_network, features_and_logits
from wmdd_ray.records import Moments


def network(offset: float = 0.0) -> nn.Module:
    """Return a small network; `offset` moves the inputs of all BatchNorm layers by so much."""
    config = NetworkConfig(arch="convnet3", width=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_network(config, num_classes=3, channels=1, image_size=8).eval()
        for norm in batch_norms(net):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        for conv in [m for m in net.modules() if isinstance(m, nn.Conv2d)]:
            conv.bias = nn.Parameter(torch.full((4,), offset))
    return net.requires_grad_(False)


NETWORK = network()
IMAGES = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = np.array([2, 0, 2, 2, 5, 0, 2, 5, 0, 0, 2])


def inputs_of(net: nn.Module, batch_size: int) -> list[torch.Tensor]:
    """Return every BatchNorm layer's input of all images, float64 (N, C, H W), from the same batches."""
    caught: list[list[torch.Tensor]] = [[] for _ in batch_norms(net)]
    handles = [
        norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
        for norm, seen in zip(batch_norms(net), caught, strict=True)
    ]
    for batch in IMAGES.split(batch_size):
        net(batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(seen).flatten(2) for seen in caught]


def of_values(values_NS: np.ndarray) -> Moments:
    mean_S = values_NS.mean(axis=0)
    return Moments(
        channels_L=(1, values_NS.shape[1] - 1),
        count_L=np.array([len(values_NS)] * 2),
        mean_S=mean_S,
        m2_S=((values_NS - mean_S) ** 2).sum(axis=0),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("batch_size", [1, 3, 11, 64])
def test_moments_equal_two_passes_in_float64_for_any_batches(
    batch_size: int, offset: float, memory_format: torch.memory_format
) -> None:
    net = network(offset).to(memory_format=memory_format)
    _, moments = features_and_moments(net, IMAGES, LABELS, batch_size=batch_size)
    assert list(moments) == [0, 2, 5]
    inputs = inputs_of(net, batch_size)
    for label, got in moments.items():
        layers = [x[torch.from_numpy(label == LABELS)].movedim(1, -1).flatten(0, 1) for x in inputs]
        mean = torch.cat([x.mean(0) for x in layers]).numpy()
        variance = torch.cat([x.var(0, correction=0) for x in layers]).numpy()
        assert got.count_L.tolist() == [len(x) for x in layers]
        assert got.channels_L == (4, 4, 4)
        np.testing.assert_allclose(got.mean_S, mean, rtol=2e-8, atol=1e-8)
        np.testing.assert_allclose(variance_S(got), variance, rtol=1e-6)


@given(st.permutations(range(11)), st.sets(st.integers(1, 10)))
@settings(max_examples=20, deadline=None)
def test_chunks_merged_in_any_order_give_the_moments_of_the_whole(
    order: list[int], cuts: set[int]
) -> None:
    index = np.array(order)
    _, whole = features_and_moments(NETWORK, IMAGES, LABELS, batch_size=11)
    parts: dict[int, list[Moments]] = {}
    for chunk in np.split(index, sorted(cuts)):
        _, found = features_and_moments(NETWORK, IMAGES[chunk], LABELS[chunk], batch_size=4)
        for label, moments in found.items():
            parts.setdefault(label, []).append(moments)
    for label, expected in whole.items():
        got = merge_moments(parts[label])
        np.testing.assert_array_equal(got.count_L, expected.count_L)
        np.testing.assert_allclose(got.mean_S, expected.mean_S, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(got.m2_S, expected.m2_S, rtol=2e-6)


@given(
    st.integers(0, 2**32 - 1),
    st.sets(st.integers(1, 29)),
    st.sampled_from([0.0, 1.0, 1e6]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_merging_is_exact_to_float64_even_for_a_large_mean_and_a_small_variance(
    seed: int, cuts: set[int], mean: float, order: object
) -> None:
    values_NS = mean + 1e-3 * np.random.default_rng(seed).standard_normal((30, 3))
    parts = [of_values(part) for part in np.split(values_NS, sorted(cuts))]
    order.shuffle(parts)  # type: ignore[attr-defined]
    got, expected = merge_moments(parts), of_values(values_NS)
    np.testing.assert_allclose(got.mean_S, expected.mean_S, rtol=1e-15, atol=1e-16)
    # float64 holds a mean of 1e6 to 1e-10: seven digits of deviations of 1e-3.
    np.testing.assert_allclose(got.m2_S, expected.m2_S, rtol=1e-12 if mean < 2 else 1e-6)


def test_merging_is_associative() -> None:
    a, b, c = (of_values(x) for x in np.split(np.random.default_rng(0).random((9, 3)), 3))
    left, right = (
        merge_moments([merge_moments([a, b]), c]),
        merge_moments([a, merge_moments([b, c])]),
    )
    np.testing.assert_allclose(left.mean_S, right.mean_S, rtol=1e-14)
    np.testing.assert_allclose(left.m2_S, right.m2_S, rtol=1e-13)


def test_features_do_not_depend_on_the_batches() -> None:
    expected, _ = features_and_logits(NETWORK, IMAGES)
    for batch_size in (2, 11):
        features_ND, _ = features_and_moments(NETWORK, IMAGES, LABELS, batch_size=batch_size)
        assert features_ND.dtype == np.float32
        np.testing.assert_allclose(features_ND, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_no_images_give_no_features_and_no_moments() -> None:
    features_ND, moments = features_and_moments(NETWORK, IMAGES[:0], LABELS[:0], batch_size=4)
    assert features_ND.shape == (0, 4)
    assert moments == {}


def test_the_network_keeps_no_hooks() -> None:
    features_and_moments(NETWORK, IMAGES, LABELS, batch_size=4)
    assert not any(m._forward_pre_hooks for m in NETWORK.modules())


def test_a_network_in_training_mode_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="eval mode"):
        features_and_moments(network().train(), IMAGES, LABELS, batch_size=4)


def test_running_moments_are_the_layers_buffers_in_order() -> None:
    mean_S, var_S = running_moments(NETWORK)
    norms = batch_norms(NETWORK)
    np.testing.assert_array_equal(mean_S[4:8], norms[1].running_mean)
    np.testing.assert_array_equal(var_S[8:], norms[2].running_var)
    assert mean_S.dtype == var_S.dtype == np.float64
