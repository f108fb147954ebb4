from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.test_networks import SMALL, build
from wmdd_ray.core import instance_norm
from wmdd_ray.core.instance_norm import InstanceNorm

EPS = torch.finfo(torch.float32).eps


def pair(channels: int, dtype: torch.dtype = torch.float32) -> tuple[InstanceNorm, nn.Module]:
    """The layer with parameters that do something, and torch's own with the same in float64."""
    torch.manual_seed(0)
    layer, torchs = InstanceNorm(channels), nn.InstanceNorm2d(channels, affine=True)
    nn.init.normal_(layer.weight, 1, 0.5)
    nn.init.normal_(layer.bias)
    torchs.load_state_dict(layer.state_dict())
    return layer.to(dtype), torchs.double()


def gradients(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images_at_once", [1, 2, 100])
def test_values_and_gradients_are_those_of_torch(
    memory_format: Any, images_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (5, 7, 6, 4)
    monkeypatch.setattr(instance_norm, "_AT_ONCE", images_at_once * 7 * 6 * 4)
    layer, torchs = pair(7)
    x = (2 * torch.randn(shape) + 3).to(memory_format=memory_format)
    upstream = torch.randn(shape)
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    # Both are of the order of ten: sums of 24 pixels in float32.
    torch.testing.assert_close(y.double(), torchs(x.double()), rtol=0, atol=32 * 24 * EPS)
    expected = gradients(torchs, x.double(), upstream.double())
    for gradient, exact in zip(gradients(layer, x, upstream), expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=32 * 24 * EPS)


def test_first_and_second_derivatives_are_those_of_the_function() -> None:
    layer, _ = pair(2, torch.float64)
    x = torch.randn(3, 2, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()

    def applied(*inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(applied, inputs)
    assert torch.autograd.gradgradcheck(applied, inputs)


def test_bfloat16_is_rounded_once() -> None:
    layer, torchs = pair(3)
    x = (torch.randn(4, 3, 8, 8) + 3).bfloat16().to(memory_format=torch.channels_last)
    upstream = torch.randn(4, 3, 8, 8).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), torchs(x.double()), rtol=2**-8, atol=1e-5)
    gradient, *_ = gradients(layer, x, upstream)
    exact, *_ = gradients(torchs, x.double(), upstream.double())
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-4)


def test_networks_with_instance_norm_keep_the_memory_format() -> None:
    network = build(replace(SMALL, norm="instance")).to(memory_format=torch.channels_last)
    images = torch.rand(2, 4, 16, 16).to(memory_format=torch.channels_last)
    assert isinstance(network.in1, InstanceNorm)
    assert network.in1(images).is_contiguous(memory_format=torch.channels_last)
