"""Pixels of views, computed in whole numbers: the same bits on any machine, for one view or many, on a device or not.

A rectangle of an image is resampled bilinearly to fill a rectangle of the view. Both are whole pixels where the image has
64 or more a side, as torchvision's crops are; boxes in smaller images are rounded to a 16th of a pixel. Pixel j of n lies at
start + (j + 1/2) length / n - 1/2, clamped to the pixels that the box touches, and is near + share (far - near): the share
is rounded to 2^-14, the result to a byte, columns first and then rows.

That is what `torch.nn.functional.interpolate` does with bytes that it enlarges, and where it can it does it here. What it has in
floating point are the shares, and none of them lies so near to where rounding turns that another order of operations would
change it: k / 2n is, times 2^14, a whole number and a fraction of an odd denominator, for any n below 2^14. Smaller images,
and all on a device, are computed together by the same formula in integer operations.

Legend: V views, B = V or 2 V rectangles, N images, C channels, H W pixels of an image, S of a view's side.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from wmdd_ray.records import Views

_BITS = 14
_WHOLE_PX, _PARTS = 64, 16


class _Boxes(NamedTuple):
    """From where to where: int64, except for the flips. A source is counted in 1 / parts of a pixel."""

    image_B: np.ndarray
    start_B2: np.ndarray
    length_B2: np.ndarray
    flip_B: np.ndarray
    first_B2: np.ndarray
    size_B2: np.ndarray


def render_bytes(images_NHWC: torch.Tensor, views: Views, size: int) -> torch.Tensor:
    """Return the views' pixels, uint8 (V, S, S, C), on the images' device.

    A row whose mix box is not empty has there what the partner's view has there; the part of the partner's crop that this takes is
    rounded as a crop is.

    Args:
        images_NHWC: uint8.
        views: rows that index into the images.
        size: S, the one that the views were drawn for.
    """
    sides = images_NHWC.shape[1:3]
    parts = 1 if min(sides) >= _WHOLE_PX else _PARTS
    whole_V4 = np.tile([0, 0, size, size], (len(views), 1))
    boxes = _boxes(views.image_V, views.crop_V4, views.flip_V, whole_V4, sides, parts, size)
    mix_V4 = views.mix_box_V4.astype(np.int64)
    if (mix_V4[:, 2:] > mix_V4[:, :2]).all(axis=1).any():
        others = views.partner_V, views.partner_crop_V4, views.partner_flip_V
        mixed = _boxes(*others, mix_V4, sides, parts, size)
        boxes = _Boxes(*map(np.concatenate, zip(boxes, mixed, strict=True)))
    enlarged = bool((boxes.length_B2 <= boxes.size_B2.clip(1)).all())
    on_cpu, few_channels = images_NHWC.device.type == "cpu", images_NHWC.shape[3] <= 4
    if parts == 1 and enlarged and on_cpu and few_channels and _library_agrees():
        return _singly(images_NHWC, boxes, len(views), size)
    return _together(images_NHWC, boxes, len(views), size, parts)


def _boxes(
    image_V: np.ndarray,
    crop_V4: np.ndarray,
    flip_V: np.ndarray,
    to_V4: np.ndarray,
    sides: tuple[int, ...],
    parts: int,
    size: int,
) -> _Boxes:
    """Return what parts of the crops fill the rectangles `to_V4` (top, left, bottom, right) of the views."""
    first_V2, end_V2 = to_V4[:, :2], to_V4[:, 2:]
    seen_V4 = to_V4.copy()
    seen_V4[flip_V, 1], seen_V4[flip_V, 3] = size - to_V4[flip_V, 3], size - to_V4[flip_V, 1]
    full_2 = np.array(sides) * parts
    at_V2, extent_V2 = crop_V4[:, :2].astype(np.float64), crop_V4[:, 2:].astype(np.float64)
    low_V2, high_V2 = (
        np.floor((at_V2 + extent_V2 * (edge_V2 / size)) * full_2 + 0.5).astype(np.int64)
        for edge_V2 in (seen_V4[:, :2], seen_V4[:, 2:])
    )
    length_V2 = np.clip(high_V2 - low_V2, 1, full_2)
    start_V2 = np.minimum(low_V2, full_2 - length_V2)
    return _Boxes(
        image_V.astype(np.int64), start_V2, length_V2, flip_V, first_V2, end_V2 - first_V2
    )


@cache
def _library_agrees() -> bool:
    """Return whether torch's resampling on this machine is the one of the formula."""
    image = torch.arange(67 * 71 * 3).mul(2654435761).bitwise_right_shift(9).to(torch.uint8)
    numbers = [[0], [[3, 5]], [[53, 61]], [False], [[0, 0]], [[96, 96]]]
    given = image.view(1, 67, 71, 3), _Boxes(*map(np.array, numbers)), 1, 96
    return torch.equal(_singly(*given), _together(*given, 1))


def _singly(images_NHWC: torch.Tensor, boxes: _Boxes, num_views: int, size: int) -> torch.Tensor:
    """Return the views by `interpolate`, a rectangle at a time; boxes are whole pixels and not larger than what they fill."""
    shape = (num_views, size, size, images_NHWC.shape[3])
    pixels_VSSC = torch.empty(shape, dtype=torch.uint8)
    for b, row in enumerate(zip(*(array.tolist() for array in boxes), strict=True)):
        i, (top, left), (height, width), flip, (down, right), (rows, columns) = row
        if rows <= 0 or columns <= 0:
            continue
        # Four dimensions with contiguous channels: any other layout takes twice the time.
        box = images_NHWC[i : i + 1, top : top + height, left : left + width].contiguous()
        filled = F.interpolate(box.permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear")
        filled = (filled.flip(3) if flip else filled).permute(0, 2, 3, 1)[0]
        pixels_VSSC[b % num_views, down : down + rows, right : right + columns] = filled
    return pixels_VSSC


def _together(
    images_NHWC: torch.Tensor, boxes: _Boxes, num_views: int, size: int, parts: int
) -> torch.Tensor:
    """Return the views by integer operations on all rectangles."""
    image, start, length, flip, first, sides = (
        torch.from_numpy(np.ascontiguousarray(array)).to(images_NHWC.device) for array in boxes
    )
    images_BCHW = images_NHWC[image].permute(0, 3, 1, 2).contiguous()
    b, c, h, _ = images_BCHW.shape
    down, across = (
        _Axis.of(start[:, i], length[:, i], first[:, i], sides[:, i], mirrored, parts, size)
        for i, mirrored in enumerate((torch.zeros_like(flip), flip))
    )
    near, far = (images_BCHW.gather(3, x[:, None, None].expand(b, c, h, size)) for x in across[:2])
    flat = _between(near, far, across.share_BS[:, None, None]).view(b * c * h, size)
    row = (torch.arange(b * c, device=flat.device) * h)[:, None]
    upper, lower = (
        flat.index_select(0, (x.repeat_interleave(c, dim=0) + row).view(-1)).view(b, c, size, size)
        for x in down[:2]
    )
    pixels = _between(upper, lower, down.share_BS[:, None, :, None])
    if b > num_views:
        inside = (down.inside_BS[:, :, None] & across.inside_BS[:, None])[num_views:, None]
        pixels = torch.where(inside, pixels[num_views:], pixels[:num_views])
    return pixels.permute(0, 2, 3, 1)


class _Axis(NamedTuple):
    """For each output pixel of an axis: both neighbors, the far one's share in 2^-14, and whether it is one of the rectangle's."""

    near_BS: torch.Tensor
    far_BS: torch.Tensor
    share_BS: torch.Tensor
    inside_BS: torch.Tensor

    @classmethod
    def of(
        cls,
        start_B: torch.Tensor,
        length_B: torch.Tensor,
        first_B: torch.Tensor,
        size_B: torch.Tensor,
        mirrored_B: torch.Tensor,
        parts: int,
        size: int,
    ) -> _Axis:
        """Count positions in 1 / (2 size_B parts) of a pixel, which makes all of them whole numbers."""
        start_B1, length_B1, size_B1 = start_B[:, None], length_B[:, None], size_B[:, None].clamp(1)
        place_BS = torch.arange(size, device=start_B.device) - first_B[:, None]
        inside_BS = (place_BS >= 0) & (place_BS < size_B[:, None])
        place_BS = torch.where(mirrored_B[:, None], size_B1 - 1 - place_BS, place_BS)
        unit_B1 = 2 * size_B1 * parts
        last_B1 = (start_B1 + length_B1 - 1) // parts
        position_BS = (
            2 * size_B1 * start_B1 + (2 * place_BS + 1) * length_B1 - size_B1 * parts
        ).clamp(start_B1 // parts * unit_B1, last_B1 * unit_B1)
        near_BS = position_BS // unit_B1
        rest_BS = position_BS - near_BS * unit_B1
        share_BS = ((rest_BS << (_BITS + 1)) + unit_B1) // (2 * unit_B1)
        return cls(
            near_BS, torch.minimum(near_BS + 1, last_B1), share_BS.to(torch.int32), inside_BS
        )


def _between(near: torch.Tensor, far: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return near + share (far - near) / 2^14, rounded to bytes."""
    start = near.to(torch.int32)
    step = share * (far.to(torch.int32) - start) + (1 << (_BITS - 1))
    return (start + (step >> _BITS)).to(torch.uint8)
