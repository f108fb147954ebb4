"""InstanceNorm that keeps channels-last format and works in a CPU's cache.

torch's own takes contiguous arrays, in which it has images and channels change places with pixels, and gives one back: on
a CPU most of its time goes into copies.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers of images that are worked on at once on a CPU.
_AT_ONCE = 2**18


def images_at_once(x_BCHW: Tensor) -> int:
    """Return how many images are worked on together.

    On a CPU those that stay in its cache: fresh memory costs more than the arithmetic.
    """
    return len(x_BCHW) if x_BCHW.is_cuda else max(1, _AT_ONCE // x_BCHW[0].numel())


class InstanceNorm(nn.InstanceNorm2d):
    """torch's with weight and bias, by each image's own moments in training and in evaluation.

    In channels-last format on a CPU it takes a third to two thirds of torch's time; elsewhere it is torch's. It differs from
    torch's by roundings of float32. Moments are computed in float32 at least.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        formed = input.is_contiguous(memory_format=torch.channels_last)
        if formed and input.device.type == "cpu":
            output: Tensor = _Normalized.apply(input, self.weight, self.bias, self.eps)
            return output
        output = super().forward(input)
        return output.contiguous(memory_format=torch.channels_last) if formed else output


class _Normalized(torch.autograd.Function):
    """y = (x - mean_BC) / sqrt(var_BC + eps) * weight_C + bias_C, and its gradient, some images at a time.

    With x^ the normalized x, m() the mean over pixels and s = weight / sqrt(var + eps), the gradient is
    gx = s (gy - m(gy) - x^ m(gy x^)): one affine map of gy and x an image and channel.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x_BCHW.dtype, torch.float32)
        y_BCHW = torch.empty_like(x_BCHW)
        moments = []
        for x, y in _parts(x_BCHW, y_BCHW):
            mean = x.mean((2, 3), keepdim=True, dtype=exact)
            rstd = (x - mean).square_().mean((2, 3), keepdim=True).add_(eps).rsqrt_()
            scale = rstd * weight_C[:, None, None]
            shift = bias_C[:, None, None] - mean * scale
            y.copy_(torch.addcmul(shift, x, scale))
            moments.append((mean, rstd))
        mean_BC11, rstd_BC11 = (torch.cat(parts) for parts in zip(*moments, strict=True))
        ctx.save_for_backward(x_BCHW, weight_C, bias_C, mean_BC11, rstd_BC11)
        ctx.eps = eps
        return y_BCHW

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gy_BCHW,) = grad_outputs
        x_BCHW, weight_C, bias_C, mean_BC11, rstd_BC11 = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: torch's own operations have one.
            y_BCHW = F.instance_norm(x_BCHW, weight=weight_C, bias=bias_C, eps=ctx.eps)
            of = (x_BCHW, weight_C, bias_C)
            return *torch.autograd.grad(y_BCHW, of, gy_BCHW, create_graph=True), None
        gx_BCHW, pixels = torch.empty_like(x_BCHW), x_BCHW[0, 0].numel()
        exact, sums = rstd_BC11.dtype, []
        for x, gy, gx, mean, rstd in _parts(x_BCHW, gy_BCHW, gx_BCHW, mean_BC11, rstd_BC11):
            gy = gy.to(exact)
            sum_gy = gy.sum((2, 3), keepdim=True)
            sum_gyx = (gy * x).sum((2, 3), keepdim=True)
            sum_gyx.sub_(mean * sum_gy).mul_(rstd)
            scale = rstd * weight_C[:, None, None]
            of_x = scale * rstd * sum_gyx / -pixels
            of_one = scale * sum_gy / -pixels - of_x * mean
            gx.copy_(torch.addcmul(torch.addcmul(of_one, x, of_x), gy, scale))
            sums.append((sum_gyx, sum_gy))
        gweight_C, gbias_C = (torch.cat(parts).sum((0, 2, 3)) for parts in zip(*sums, strict=True))
        return gx_BCHW, gweight_C, gbias_C, None


def _parts(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield some images of every array at a time; the first is that of all channels and pixels."""
    together = images_at_once(arrays[0])
    return zip(*(array.split(together) for array in arrays), strict=True)
