"""Random views of images: drawn from a seed, stored as plain arrays, replayed to the same pixels.

A view is a resized crop with an optional flip, mixed with such a crop of a partner image (CutMix).
Each row of a `Views` record is self-contained, so a student may use any batch size, order
or number of workers. Pixels are resampled in whole numbers and normalized by separate elementwise float32
operations: they do not depend, to the last bit, on the machine, nor on what else is in the batch.

Views need not be stored, because any machine draws them again (`draw_block`): between the words of
a counter-based generator and the boxes there is only +, -, *, /, sqrt and rounding, which IEEE 754
defines to the last bit. numpy promises the words of `Philox`, but not what its `Generator` makes of
them, and exp and log differ between processors.

Legend: B batch, V views, N images, C channels, H W pixels of the input, S pixels of an output side.

References:
    Yun et al. 2019, CutMix. Shen and Xing 2022, FKD (stored views and their soft labels). Szegedy
    et al. 2015, the ranges of area and aspect of random resized crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache

import numpy as np
import torch

from wmdd_ray.config import ViewConfig
from wmdd_ray.core.rendering import render_bytes
from wmdd_ray.core.resample import crop as crop
from wmdd_ray.records import ViewDraw, Views

_LOG_ASPECT_MAX = 0.28768207245178093  # log 4/3, written out: a log is not the same everywhere
# Uniform numbers a row: 2 x (4 crop + 1 flip) + partner + lambda + 2 box center = 14, rounded up to
# whole counters of Philox (4 numbers each), so that row i begins at counter 4 i.
_DRAWS_PER_ROW = 16
# Of the free memory of a GPU: images that would take more stay on the CPU, which then gathers each batch.
_SHARE_OF_GPU = 0.25


class StoredImages:
    """uint8 images that are normalized after they are rendered: a quarter of the memory of float32.

    `stored[index]` is float32 NCHW on `device`.
    """

    def __init__(
        self,
        images_NHWC: np.ndarray | torch.Tensor,
        mean_C: Sequence[float],
        std_C: Sequence[float],
        device: torch.device | str = "cpu",
        *,
        in_float: bool = False,
    ) -> None:
        """Keep uint8 `images_NHWC` where they are, or on a GPU that has room; views and looked-up images go to `device`.

        Views are resampled in bytes; with `in_float` in float32, as those of sets of format 1 were.
        """
        self.images_NHWC = _tensor_of(images_NHWC)
        self.mean_C, self.std_C = tuple(mean_C), tuple(std_C)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(self.device)
            if self.images_NHWC.nbytes <= free_bytes * _SHARE_OF_GPU:
                self.images_NHWC = self.images_NHWC.to(self.device)
                self.device = self.images_NHWC.device  # with its number
        self.in_float = in_float

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def __getitem__(self, index_B: torch.Tensor) -> torch.Tensor:
        rows_BHWC = self.images_NHWC[index_B.to(self.images_NHWC.device)]
        return to_input(rows_BHWC, self.mean_C, self.std_C, self.device)


Images = torch.Tensor | StoredImages


def to_input(
    images_NHWC: np.ndarray | torch.Tensor,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the network's input: float32 NCHW, (pixel / 255 - mean) / std.

    Args:
        images_NHWC: uint8 pixels.
        mean_C: per-channel mean in [0, 1].
        std_C: per-channel standard deviation in [0, 1].
        device: where the result lies; bytes, not floats, are moved there.
    """
    images = _tensor_of(images_NHWC)
    assert images.dtype == torch.uint8, images.dtype
    assert images.shape[-1] == len(mean_C) == len(std_C), "one mean and std a channel"
    pixels = (
        images.to(device)
        .permute(0, 3, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
    )
    mean, std = _per_channel((tuple(mean_C), tuple(std_C)), pixels.device)
    # Of a number, a CUDA kernel would multiply by the reciprocal.
    return pixels.div_(pixels.new_full((), 255)).sub_(mean).div_(std)


@cache
def _per_channel(
    rows_2C: tuple[tuple[float, ...], ...], device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Return each row as (C, 1, 1) on a device, kept: a GPU would wait for both in every step."""
    with torch.inference_mode(False):
        rows = torch.tensor(rows_2C, dtype=torch.float32, device=device)
        return rows[:, :, None, None].unbind()


def draw_crops(rng: np.random.Generator, n: int, scale_min: float) -> np.ndarray:
    """Return n random boxes, float32 (n, 4): (top, left, height, width) as fractions of the image.

    The area is uniform in [scale_min, 1]. The aspect ratio is log-uniform in [3/4, 4/3], narrowed
    to what fits at that area: unlike torchvision's trials with a fallback, this keeps the area
    uniform and always needs four random numbers a box.
    """
    return _crops_of(rng.random((n, 4)), scale_min)


def draw_views(
    num_images: int, image_size: int, config: ViewConfig, *, seed: int, epoch: int
) -> Views:
    """Return one view of every image; row i depends only on (seed, epoch, i), its partner on N too.

    CutMix: lambda is uniform; a box of area share 1 - lambda around a uniform center, clipped at
    the border, is taken from the partner, and `share_V` is the image's own share after clipping.
    The partner is any image of the data set, with its own crop and flip.

    Args:
        num_images: images of the data set.
        image_size: side of the rendered view, pixels.
        config: how views are drawn.
        seed: seed of the label epochs, >= 0.
        epoch: label epoch, >= 0.
    """
    u = _uniform(seed, epoch, num_images * _DRAWS_PER_ROW).reshape(num_images, _DRAWS_PER_ROW)
    image_V = np.arange(num_images, dtype=np.int32)
    crop_V4 = _crops_of(u[:, 0:4], config.crop_scale_min)
    flip_V = (u[:, 4] < 0.5) & config.flip
    if config.mix == "none":
        return Views(
            image_V=image_V,
            crop_V4=crop_V4,
            flip_V=flip_V,
            partner_V=image_V,
            partner_crop_V4=crop_V4,
            partner_flip_V=flip_V,
            mix_box_V4=np.zeros((num_images, 4), dtype=np.int16),
            share_V=np.ones(num_images, dtype=np.float32),
        )
    box_V4, share_V = _mix_boxes(u[:, 11], u[:, 12:14], image_size)
    return Views(
        image_V=image_V,
        crop_V4=crop_V4,
        flip_V=flip_V,
        partner_V=(u[:, 10] * num_images).astype(np.int32),
        partner_crop_V4=_crops_of(u[:, 5:9], config.crop_scale_min),
        partner_flip_V=(u[:, 9] < 0.5) & config.flip,
        mix_box_V4=box_V4,
        share_V=share_V.astype(np.float32),
    )


def draw_block(draw: ViewDraw, epochs: range) -> Views:
    """Return the views of a block of label epochs, epoch by epoch, as `relabel` drew them."""
    config = ViewConfig(
        crop_scale_min=draw.crop_scale_min,
        flip=draw.flip,
        mix=draw.mix,  # type: ignore[arg-type]
    )
    parts = [
        draw_views(len(draw.index_N), draw.image_size, config, seed=draw.seed, epoch=epoch)
        for epoch in epochs
    ]
    return renamed(concatenate_views(parts), draw.index_N)


def renamed(views: Views, index_N: np.ndarray) -> Views:
    """Return the views of some of the images with these images' positions in the whole data set."""
    return replace(views, image_V=index_N[views.image_V], partner_V=index_N[views.partner_V])


def render_views(images_NCHW: Images, views: Views, image_size: int) -> torch.Tensor:
    """Return the views' pixels, float32 (V, C, image_size, image_size), on the images' device.

    A row whose mix box is not empty has the partner's view there; any other row is the view itself.

    Args:
        images_NCHW: `StoredImages`, which are resampled in whole numbers (`rendering`); or normalized images, in float32.
        views: rows that index into `images_NCHW`.
        image_size: side of the output, pixels: the one that the views were drawn for.
    """
    if isinstance(images_NCHW, torch.Tensor) or images_NCHW.in_float:
        return _rendered_in_float(images_NCHW, views, image_size)
    pixels = view_bytes(images_NCHW, views, image_size)
    return to_input(pixels, images_NCHW.mean_C, images_NCHW.std_C, images_NCHW.device)


def view_bytes(images: StoredImages, views: Views, image_size: int) -> torch.Tensor:
    """Return the views' pixels before they are normalized, uint8 (V, image_size, image_size, C), on the images' device."""
    assert not images.in_float, "such views are rendered in float32"
    stored, device = images.images_NHWC, images.device
    if stored.device != device:
        index_B, place_B = np.unique(
            np.concatenate([views.image_V, views.partner_V]), return_inverse=True
        )
        stored = stored[torch.from_numpy(index_B)].to(device)
        image_V, partner_V = np.split(place_B, 2)
        views = replace(views, image_V=image_V, partner_V=partner_V)
    return render_bytes(stored, views, image_size)


def _rendered_in_float(images_NCHW: Images, views: Views, image_size: int) -> torch.Tensor:
    device = images_NCHW.device

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, device=device)

    def crops(image_V: np.ndarray, crop_V4: np.ndarray, flip_V: np.ndarray) -> torch.Tensor:
        images = images_NCHW[on_device(image_V.astype(np.int64))]
        return crop(images, on_device(crop_V4), on_device(flip_V), image_size)

    own = crops(views.image_V, views.crop_V4, views.flip_V)
    top_V, left_V, bottom_V, right_V = views.mix_box_V4.T
    if not ((bottom_V > top_V) & (right_V > left_V)).any():
        return own
    other = crops(views.partner_V, views.partner_crop_V4, views.partner_flip_V)
    pixel_S = np.arange(image_size)
    in_rows_VS = (pixel_S >= top_V[:, None]) & (pixel_S < bottom_V[:, None])
    in_columns_VS = (pixel_S >= left_V[:, None]) & (pixel_S < right_V[:, None])
    rows, columns = on_device(in_rows_VS), on_device(in_columns_VS)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], other, own)


def take(views: Views, index: np.ndarray | slice) -> Views:
    """Return the rows `index` of `views`."""
    return Views(**{f.name: getattr(views, f.name)[index] for f in fields(Views)})


def concatenate_views(parts: Sequence[Views]) -> Views:
    """Return the rows of all `parts`, in order."""
    return Views(
        **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Views)}
    )


def _crops_of(u_N4: np.ndarray, scale_min: float) -> np.ndarray:
    """Return boxes from uniform numbers (area, aspect, top, left); float32, inside [0, 1]."""
    area_N = scale_min + (1 - scale_min) * u_N4[:, 0]
    # height = sqrt(area / aspect) <= 1 and width = sqrt(area * aspect) <= 1.
    log_aspect_N = (2 * u_N4[:, 1] - 1) * np.minimum(_LOG_ASPECT_MAX, _exact_log(1 / area_N))
    aspect_N = _exact_exp(log_aspect_N)
    height_N = np.sqrt(area_N / aspect_N)
    width_N = np.sqrt(area_N * aspect_N)
    top_N, left_N = u_N4[:, 2] * (1 - height_N), u_N4[:, 3] * (1 - width_N)
    return np.stack([top_N, left_N, height_N, width_N], axis=1).astype(np.float32).clip(0, 1)


def _exact_log(x_N: np.ndarray) -> np.ndarray:
    """Return min(log x, log 4/3) for x >= 1 by its series in (x - 1) / (x + 1) <= 1/7, term by term: the same bits anywhere."""
    z_N = (np.minimum(x_N, 4 / 3) - 1) / (np.minimum(x_N, 4 / 3) + 1)
    square_N, total_N = z_N * z_N, np.zeros_like(z_N)
    for odd in range(21, 0, -2):
        total_N = total_N * square_N + 1 / odd
    return 2 * z_N * total_N


def _exact_exp(x_N: np.ndarray) -> np.ndarray:
    """Return exp x for |x| <= log 4/3 by its Taylor polynomial of degree 14: the same bits anywhere."""
    total_N = np.ones_like(x_N)
    for degree in range(14, 0, -1):
        total_N = total_N * x_N / degree + 1
    return total_N


def _mix_boxes(
    share_V: np.ndarray, center_V2: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return CutMix boxes (top, left, bottom, right) in pixels, and the share outside them."""
    side_V = np.sqrt(1 - share_V) * size
    center_V2 = np.floor(center_V2 * size)
    start_V2 = np.clip(np.rint(center_V2 - side_V[:, None] / 2), 0, size)
    stop_V2 = np.clip(np.rint(center_V2 + side_V[:, None] / 2), 0, size)
    box_V4 = np.concatenate([start_V2, stop_V2], axis=1).astype(np.int16)
    area_V = np.prod(stop_V2 - start_V2, axis=1)
    return box_V4, 1 - area_V / size**2


def _words(seed: int, number: int, n: int) -> np.ndarray:
    """Return n words of Philox, uint64, whose stream numpy guarantees (unlike those of `Generator`)."""
    return np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).random_raw(n)


def _uniform(seed: int, number: int, n: int) -> np.ndarray:
    """Return n multiples of 2^-53 in [0, 1), float64."""
    return (_words(seed, number, n) >> np.uint64(11)) * 2.0**-53


def _tensor_of(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return `array` as a tensor; arrays that may not be written (memory maps) are copied."""
    if isinstance(array, torch.Tensor):
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())
