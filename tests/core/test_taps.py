from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.networks import batch_norms, build_network
from wmdd_ray.core.taps import TappedNorm, tapped
from wmdd_ray.core.teacher_check import check_teacher
from wmdd_ray.errors import ConfigError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(arch: Any = "convnet3") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = NetworkConfig(arch=arch, width=4, small_stem=True)
        net = build_network(config, num_classes=3, channels=3, image_size=16).eval()
        for norm in batch_norms(net):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
    return net


def plain(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> list[Tensor]:
    y = F.batch_norm(x, mean, var, weight, bias, eps=eps)
    return [y, x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0)]


def parameters(dtype: torch.dtype, affine: bool) -> list[Any]:
    mean, var = normal(3, seed=1, dtype=dtype), normal(3, seed=2, dtype=dtype).exp()
    weight, bias = normal(3, seed=3, dtype=dtype), normal(3, seed=4, dtype=dtype)
    return [mean, var, weight if affine else None, bias if affine else None, 1e-5]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [(4, 5), (1, 1)])
def test_the_gradient_of_a_tap_passes_gradcheck(affine: bool, size: tuple[int, int]) -> None:
    x = normal(2, 3, *size, dtype=torch.float64).requires_grad_(True)

    def tap(x: Tensor) -> Any:
        return TappedNorm.apply(x, *parameters(torch.float64, affine))

    assert torch.autograd.gradcheck(tap, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("overwritten", [True, False])
def test_a_tap_equals_the_layer_and_its_moments_by_plain_autograd(
    memory_format: Any, overwritten: bool
) -> None:
    x = normal(4, 3, 8, 6).to(memory_format=memory_format).requires_grad_(True)
    upstream = [normal(4, 3, 8, 6, seed=5), normal(4, 3, seed=6), normal(4, 3, seed=7)]
    results = []
    for function in (TappedNorm.apply, plain):
        outputs = function(x * 1 if overwritten else x, *parameters(torch.float32, affine=True))
        (gradient,) = torch.autograd.grad(list(outputs), x, upstream)
        results.append([*outputs, gradient])
    assert torch.equal(results[0][0], results[1][0]), "the layer's own output, to the last bit"
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 8, 6), (2, 3, 300, 300)])
@pytest.mark.parametrize("overwritten", [True, False])
def test_a_tap_of_bfloat16_has_float32_moments_and_the_nearest_gradient(
    affine: bool, shape: tuple[int, ...], overwritten: bool
) -> None:
    x = (normal(*shape) + 3).bfloat16().requires_grad_(True)
    before = x.detach().clone()
    leaf = x.detach().double().requires_grad_(True)
    upstream = [normal(*shape, seed=5), normal(*shape[:2], seed=6), normal(*shape[:2], seed=7)]
    upstream[0] = upstream[0].bfloat16()
    got = TappedNorm.apply(x * 1 if overwritten else x, *parameters(torch.float32, affine))
    assert [out.dtype for out in got] == [torch.bfloat16, torch.float32, torch.float32]
    expected = plain(
        leaf,
        *[p.double() if isinstance(p, Tensor) else p for p in parameters(torch.float32, affine)],
    )
    torch.testing.assert_close(got[0].double(), expected[0], rtol=2**-8, atol=1e-2)
    torch.testing.assert_close([m.double() for m in got[1:]], expected[1:], rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(list(got), x, upstream)
    (exact,) = torch.autograd.grad(expected, leaf, [u.double() for u in upstream])
    # Rounded once: half a unit of the last of 8 bits.
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-6)
    assert torch.equal(x, before), "the caller's array"


def test_the_variance_keeps_its_digits_beside_a_large_mean() -> None:
    x = normal(2, 3, 16, 16) + 1000
    _, _, var_BC = TappedNorm.apply(x, *parameters(torch.float32, affine=True))
    expected = x.double().var(dim=(2, 3), correction=0)
    torch.testing.assert_close(var_BC.double(), expected, rtol=1e-5, atol=0)


def test_the_caller_s_array_is_not_overwritten() -> None:
    x = normal(2, 3, 4, 4).requires_grad_(True)
    before = x.detach().clone()
    for view in (x, x.view(2, 3, 4, 4)):
        outputs = TappedNorm.apply(view, *parameters(torch.float32, affine=True))
        torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), x)
        assert torch.equal(x, before)


def test_overwriting_what_another_operation_needs_is_noticed() -> None:
    x = normal(2, 3, 4, 4).requires_grad_(True)
    shared = x * 1
    square = shared.square()
    y, _, _ = TappedNorm.apply(shared, *parameters(torch.float32, affine=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum() + square.sum(), x)


def test_a_norm_behind_an_activation_leaves_it_its_output() -> None:
    x = normal(2, 3, 8, 8).requires_grad_(True)
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), norm, nn.Flatten(), nn.Linear(144, 3)).eval()
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    with tapped(net):
        (found,) = torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


class Shared(nn.Module):
    """A norm whose input another operation squares."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return self.last((y.square() + self.norm(y)).mean(dim=(2, 3)))


def test_a_network_of_norms_behind_activations_may_be_a_teacher() -> None:
    check_teacher(network("timm:repvgg_a0"), channels=3, image_size=32, needs_norms=True)


def test_a_norm_whose_input_others_need_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"got a Shared .*modified by an inplace.*moments none"):
        check_teacher(Shared(), channels=3, image_size=8, needs_norms=True)
    check_teacher(Shared(), channels=3, image_size=8, needs_norms=False)


@pytest.mark.parametrize(
    "arch",
    [
        "convnet3",
        "resnet18",
        "mobilenet_v2",
        "timm:efficientnet_b0",
        "timm:regnetx_002",
    ],
)
def test_a_tapped_network_has_the_outputs_moments_and_gradients_of_the_plain_one(arch: Any) -> None:
    net = network(arch)
    x = normal(3, 3, 16, 16).requires_grad_(True)
    caught: list[Tensor] = []
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        for norm in batch_norms(net)
    ]
    logits = net(x)
    moments = [(c.mean(dim=(2, 3)), c.var(dim=(2, 3), correction=0)) for c in caught]
    loss = logits.square().sum() + sum(m.square().sum() + v.sum() for m, v in moments)
    (expected,) = torch.autograd.grad(loss, x)
    for hook in hooks:
        hook.remove()
    with tapped(net) as taps:
        tapped_logits = net(x)
        loss = tapped_logits.square().sum() + sum(m.square().sum() + v.sum() for m, v in taps)
        (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(tapped_logits, logits)
    torch.testing.assert_close(taps, moments, rtol=1e-4, atol=1e-5)
    scale = float(expected.abs().max())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * scale)


def test_a_network_is_frozen_while_tapped_and_as_before_after_an_error() -> None:
    net = network()
    net.get_parameter("fc.bias").requires_grad_(False)
    required = [p.requires_grad for p in net.parameters()]
    state = {k: v.clone() for k, v in net.state_dict().items()}

    def interrupted() -> None:
        with tapped(net):
            assert not any(p.requires_grad for p in net.parameters())
            net(normal(1, 3, 16, 16))
            raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        interrupted()
    assert [p.requires_grad for p in net.parameters()] == required
    assert not any("forward" in vars(m) for m in net.modules())
    torch.testing.assert_close(dict(net.state_dict()), state, rtol=0, atol=0)


def test_tapping_twice_or_in_training_mode_is_our_fault() -> None:
    net = network()
    with tapped(net), pytest.raises(AssertionError, match="tapped already"), tapped(net):
        pass
    with pytest.raises(AssertionError, match="eval mode"), tapped(net.train()):
        pass
