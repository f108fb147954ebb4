"""BatchNorm layers that also return the moments of their input, at less cost than the layer itself.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wmdd_ray.core.instance_norm import images_at_once
from wmdd_ray.core.networks import batch_norms, norm_activation
from wmdd_ray.errors import ConfigError

Tap = tuple[Tensor, Tensor]


@contextmanager
def tapped(network: nn.Module) -> Iterator[list[Tap]]:
    """Freeze `network` and tap its BatchNorm layers; on leaving, it is as it was.

    Yields:
        A list that after each forward pass holds one (mean_BC, var_BC) a layer, in the order of `batch_norms`:
        mean and biased variance of each image's channel, differentiable.
    """
    norms = batch_norms(network)
    assert not any(m.training for m in network.modules()), "taps need the network in eval mode"
    assert not any("forward" in vars(m) for m in norms), "this network is tapped already"
    required_grad = [p for p in network.parameters() if p.requires_grad]
    nothing = torch.empty(0)
    taps: list[Tap] = [(nothing, nothing)] * len(norms)
    for parameter in required_grad:
        parameter.requires_grad_(False)
    for layer, norm in enumerate(norms):
        # An attribute of the instance hides the method of the class until it is deleted.
        object.__setattr__(
            norm, "forward", partial(_tapped_forward, norm, norm_activation(norm), taps, layer)
        )
    try:
        yield taps
    finally:
        for norm in norms:
            object.__delattr__(norm, "forward")
        for parameter in required_grad:
            parameter.requires_grad_(True)


def check_taps(network: nn.Module, images_BCHW: Tensor) -> None:
    """Raise a ConfigError where gradients do not pass the tapped layers of a network in eval mode."""
    images_BCHW = images_BCHW.clone().requires_grad_(True)
    try:
        with tapped(network) as taps:
            logits = network(images_BCHW)
            total = logits.sum() + sum(mean.sum() + variance.sum() for mean, variance in taps)
            torch.autograd.grad(total, images_BCHW)
    except RuntimeError as error:
        raise ConfigError(
            f"--squeeze.network.arch: expected a teacher of which nothing but BatchNorm2d layers needs what they are given, got "
            f"a {type(network).__name__} ({str(error).partition(';')[0][:200]}); choose another, or --recover.moments none"
        ) from error


@contextmanager
def output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that after each forward pass holds the layer's output, as what follows left it."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        kept[:] = [output]

    handle = layer.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _tapped_forward(
    norm: nn.BatchNorm2d, activation: nn.Module | None, taps: list[Tap], layer: int, x_BCHW: Tensor
) -> Tensor:
    y_BCHW, *tap = TappedNorm.apply(
        x_BCHW, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    taps[layer] = (tap[0], tap[1])
    return y_BCHW if activation is None else activation(y_BCHW)


class TappedNorm(torch.autograd.Function):
    """Eval-mode BatchNorm with frozen parameters: x -> (y, mean_BC, var_BC).

    The gradient of all three outputs is one affine map of gy and x with a coefficient per image and channel,
        gx = scale_C gy + b_BC x + a_BC,   b = 2 g_var / HW,   a = g_mean / HW - b mean,
    so that it needs no graph and no reduction (torch's own BatchNorm backward does reduce, for the gradients of
    parameters that nobody asked for: this is where the time for the moments comes from). It is written over x, the
    saved output of the convolution before: fresh memory costs more than the arithmetic. An x that the operation before
    needs in its own backward pass, as ReLU does, is left as it is. Should another one that is given x need it, torch
    notices the overwriting and raises (`check_taps`).

    Under autocast x is bfloat16: y and gx are too, but the moments and their gradient are computed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        running_mean_C: Tensor,
        running_var_C: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = (weight_C, bias_C, running_mean_C, running_var_C)
        if x_BCHW.dtype == torch.bfloat16:
            mean_BC, var_BC = _upcast_moments(x_BCHW)
            y, _, _ = torch.native_batch_norm(x_BCHW, *parameters, False, 0.0, eps)
        elif x_BCHW.is_cuda:
            var_BC, mean_BC = torch.var_mean(x_BCHW, dim=(2, 3), correction=0)
            y, _, _ = torch.native_batch_norm(x_BCHW, *parameters, False, 0.0, eps)
        else:
            # On a CPU torch.var_mean is scalar code, 15 times slower than these three vectorized passes. The
            # centered copy of x is then overwritten by y.
            mean_BC11 = x_BCHW.mean(dim=(2, 3), keepdim=True)
            y = x_BCHW - mean_BC11
            norm_BC = torch.linalg.vector_norm(y, dim=(2, 3))
            mean_BC, var_BC = mean_BC11[:, :, 0, 0], norm_BC.square() / x_BCHW[0, 0].numel()
            nothing = x_BCHW.new_empty(0)
            out = (y, nothing, nothing)
            torch.native_batch_norm(x_BCHW, *parameters, False, 0.0, eps, out=out)
        scale_C = torch.rsqrt(running_var_C + eps)
        ctx.save_for_backward(x_BCHW, mean_BC, scale_C if weight_C is None else scale_C * weight_C)
        # A leaf, or a view of one, is the caller's own array.
        made_by = x_BCHW.grad_fn
        is_ours = made_by is not None and x_BCHW._base is None
        ctx.may_overwrite = is_ours and not hasattr(type(made_by), "_saved_result")
        return y, mean_BC, var_BC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gy_BCHW, gmean_BC, gvar_BC = grad_outputs
        x_BCHW, mean_BC, scale_C = ctx.saved_tensors
        pixels = x_BCHW[0, 0].numel()
        b_BC = gvar_BC * (2 / pixels)
        a_BC11 = (gmean_BC / pixels - b_BC * mean_BC)[:, :, None, None]
        b_BC11, scale_C11 = b_BC[:, :, None, None], scale_C[:, None, None]
        gx_BCHW = x_BCHW if ctx.may_overwrite else x_BCHW.clone()
        if gx_BCHW.dtype == torch.bfloat16:
            n = images_at_once(gx_BCHW)
            parts = (t.split(n) for t in (gx_BCHW, gy_BCHW, b_BC11, a_BC11))
            for gx, gy, b, a in zip(*parts, strict=True):
                gx.copy_(gx.float().mul_(b).add_(a).addcmul_(gy.float(), scale_C11))
            return gx_BCHW, None, None, None, None, None
        if gx_BCHW.is_cuda:
            torch.addcmul(a_BC11, gx_BCHW, b_BC11, out=gx_BCHW)
        else:
            # Twice as fast on a CPU, where a broadcast addcmul is not vectorized.
            gx_BCHW.mul_(b_BC11).add_(a_BC11)
        gx_BCHW.addcmul_(gy_BCHW, scale_C11)
        return gx_BCHW, None, None, None, None, None


def _upcast_moments(x_BCHW: Tensor) -> Tap:
    """Return the moments (mean_BC, var_BC) of a bfloat16 array, computed in float32."""
    means, variances = [], []
    for part in x_BCHW.split(images_at_once(x_BCHW)):
        x = part.float()
        mean = x.mean(dim=(2, 3), keepdim=True)
        norm = torch.linalg.vector_norm(x.sub_(mean), dim=(2, 3))
        means.append(mean[:, :, 0, 0])
        variances.append(norm.square() / x[0, 0].numel())
    return torch.cat(means), torch.cat(variances)
