"""Differentiable bilinear resampling of one box an image.

Legend: B batch, C channels, H W pixels of the input, S pixels of the output's side.
"""

from __future__ import annotations

from typing import Any

import torch


def crop(
    images_BCHW: torch.Tensor, crop_B4: torch.Tensor, flip_B: torch.Tensor, size: int
) -> torch.Tensor:
    """Return `size` x `size` bilinear resamplings of one box an image, mirrored where `flip_B`.

    Output pixel j of an axis lies at input position start + (j + 1/2) length / size - 1/2 (pixel
    centers, as `grid_sample` with align_corners=False), clamped to the image. No antialiasing:
    crops are enlarged as a rule. The whole image as box at its own size returns the same pixels
    exactly. Differentiable in `images_BCHW`, and the gradient is deterministic on a GPU too.

    Args:
        images_BCHW: float images.
        crop_B4: (top, left, height, width) as fractions of the image.
        flip_B: bool, mirror left and right.
        size: side of the output, pixels.
    """
    height, width = images_BCHW.shape[-2:]
    no_flip_B = torch.zeros_like(flip_B)
    rows = _neighbors(crop_B4[:, 0], crop_B4[:, 2], no_flip_B, height, size)
    columns = _neighbors(crop_B4[:, 1], crop_B4[:, 3], flip_B, width, size)
    result: torch.Tensor = _Resample.apply(images_BCHW, *rows, *columns)
    return result


def whole(images_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """Return whole images, upright, as `crop` resamples them to `size` x `size`; as they are where they have that size."""
    if images_BCHW.shape[-2:] == (size, size):
        return images_BCHW
    device, count = images_BCHW.device, len(images_BCHW)
    box_B4 = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(count, 4)
    return crop(images_BCHW, box_B4, torch.zeros(count, dtype=torch.bool, device=device), size)


class _Resample(torch.autograd.Function):
    """Separable bilinear interpolation: gathers forward, matrix products backward.

    The gradient of a gather is a scatter-add, which on a GPU adds in an order that changes from run
    to run; the same sum as two small matrix products has a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images_BCHW: torch.Tensor,
        top_BS: torch.Tensor,
        bottom_BS: torch.Tensor,
        down_BS: torch.Tensor,
        left_BS: torch.Tensor,
        right_BS: torch.Tensor,
        along_BS: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(top_BS, bottom_BS, down_BS, left_BS, right_BS, along_BS)
        b, c, h, w = images_BCHW.shape
        ctx.input_size = (h, w)
        s = top_BS.shape[1]
        first_row = (torch.arange(b * c, device=images_BCHW.device) * h)[:, None]
        flat = images_BCHW.reshape(b * c * h, w)

        def row(index_BS: torch.Tensor) -> torch.Tensor:
            index = (index_BS.repeat_interleave(c, dim=0) + first_row).view(-1)
            return flat.index_select(0, index).view(b, c, s, w)

        upper, lower = row(top_BS), row(bottom_BS)
        rows_BCSW = upper + down_BS[:, None, :, None] * (lower - upper)
        shape = (b, c, s, s)
        near = rows_BCSW.gather(3, left_BS[:, None, None, :].expand(shape))
        far = rows_BCSW.gather(3, right_BS[:, None, None, :].expand(shape))
        return near + along_BS[:, None, None, :] * (far - near)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_BCSS,) = grad_outputs
        top, bottom, down, left, right, along = ctx.saved_tensors
        h, w = ctx.input_size
        rows_BSH = _interpolation_matrix(top, bottom, down, h)
        columns_BSW = _interpolation_matrix(left, right, along, w)
        grad_BCSW = grad_BCSS @ columns_BSW[:, None]
        return (rows_BSH[:, None].transpose(2, 3) @ grad_BCSW, *([None] * 6))


def _neighbors(
    start_B: torch.Tensor, length_B: torch.Tensor, flip_B: torch.Tensor, n_in: int, n_out: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for each output pixel of an axis, both input neighbors and the second's share."""
    center_S = torch.arange(n_out, dtype=torch.float32, device=start_B.device) + 0.5
    center_BS = torch.where(flip_B[:, None], n_out - center_S, center_S)
    # Scaled as length * (n_in / n_out) so that the identity box has step exactly 1.
    position_BS = (start_B * n_in)[:, None] + center_BS * (length_B * (n_in / n_out))[:, None] - 0.5
    position_BS = position_BS.clamp(0, n_in - 1)
    low_BS = position_BS.floor()
    index_BS = low_BS.long()
    return index_BS, (index_BS + 1).clamp(max=n_in - 1), position_BS - low_BS


def _interpolation_matrix(
    low_BS: torch.Tensor, high_BS: torch.Tensor, share_BS: torch.Tensor, n_in: int
) -> torch.Tensor:
    """Return (B, S, n_in) float: row s holds 1 - share at `low` and share at `high`."""
    matrix = torch.zeros(*low_BS.shape, n_in, device=low_BS.device)
    matrix.scatter_(2, low_BS[..., None], (1 - share_BS)[..., None])
    # On the border low == high, but there the share is 0: the second entry is added, not written.
    high = torch.zeros_like(matrix).scatter_(2, high_BS[..., None], share_BS[..., None])
    return matrix + high
