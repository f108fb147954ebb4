"""Which of a GPU's algorithms compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from wmdd_ray.config import ViewConfig
from wmdd_ray.core.curvature import classifier_curvature
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.kernels import deterministic_gradients, full_float32
from wmdd_ray.core.soft_labels import label_views
from wmdd_ray.core.views import draw_views


def flags() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        torch.backends.cudnn.deterministic,
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def test_gradients_on_a_gpu_are_of_algorithms_with_one_order_and_a_cpu_keeps_its_attention() -> (
    None
):
    before = flags()
    with deterministic_gradients("cuda:0"):
        assert flags() == (True, True, False, False, False)
    assert flags() == before
    with deterministic_gradients("cpu"):
        assert flags() == (True, *before[1:])
    assert flags() == before


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_as_before_however_it_was_set(allowed: bool) -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = allowed
    try:
        with full_float32():
            assert cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
        assert cudnn.allow_tf32 is allowed
    finally:
        cudnn.allow_tf32 = before


def test_labels_moments_and_curvature_are_computed_without_tf32() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    seen: list[str] = []
    network.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    )
    images, labels = torch.randn(5, 1, 8, 8), np.array([0, 1, 2, 0, 1])
    network.eval()
    label_views(network, images, draw_views(5, 8, ViewConfig(), seed=0, epoch=0), 8, 5)
    features_and_moments(network, images, labels, batch_size=5)
    classifier_curvature(network, images, torch.from_numpy(labels), step=0.1).backward()
    assert seen == ["ieee"] * 4
