"""Which of a GPU's algorithms compute."""

from __future__ import annotations

import torch

from wmdd_ray.core.kernels import deterministic_gradients


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
