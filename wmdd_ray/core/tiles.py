"""Images that hold a grid of smaller ones, each an image of its own (multi-formation).

With t tiles a stored image of side S is a t x t grid of images of side S // t, row by row; the rows and columns that are
left when t does not divide S are zero and unused. One stored image then has t^2 times the variety at a t-th of the
resolution.

Legend: N stored images, K = N t^2 small ones, S side of a stored image, H W pixels, C channels.

References:
    Kim et al. 2022, IDC, section 4.1 (uniform multi-formation). Sun et al. 2024, RDED (mosaics of real crops).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from wmdd_ray.errors import ConfigError


def tile_side(image_size: int, tiles: int) -> int:
    """Return the side of one small image, pixels.

    Raises:
        ConfigError: more tiles than pixels.
    """
    if tiles > image_size:
        raise ConfigError(
            f"--recover.tiles: expected at most one a pixel of the image's side ({image_size}), got {tiles}"
        )
    return image_size // tiles


def tile(images_KHWC: np.ndarray, tiles: int, image_size: int) -> np.ndarray:
    """Return (K / tiles^2, image_size, image_size, C): image j lies in grid j // tiles^2.

    Args:
        images_KHWC: uint8, side image_size // tiles; K a multiple of tiles^2.
        tiles: t, rows and columns of the grid.
        image_size: side of the grid, pixels.
    """
    side, (k, _, _, c) = tile_side(image_size, tiles), images_KHWC.shape
    assert k % tiles**2 == 0, f"{k} images do not fill grids of {tiles} x {tiles}"
    assert images_KHWC.shape[1:3] == (side, side), (images_KHWC.shape, side)
    grid = images_KHWC.reshape(-1, tiles, tiles, side, side, c).transpose(0, 1, 3, 2, 4, 5)
    used = tiles * side
    stored = np.zeros((len(grid), image_size, image_size, c), dtype=images_KHWC.dtype)
    stored[:, :used, :used] = grid.reshape(-1, used, used, c)
    return stored


def untile(images_NSSC: np.ndarray, tiles: int) -> np.ndarray:
    """Return (N tiles^2, side, side, C): the inverse of `tile`."""
    n, image_size, _, c = images_NSSC.shape
    side = tile_side(image_size, tiles)
    used = tiles * side
    grid = images_NSSC[:, :used, :used].reshape(n, tiles, side, tiles, side, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, c)


def shrink(images_NHWC: np.ndarray, side: int) -> np.ndarray:
    """Return `images_NHWC` (uint8) at `side` x `side` pixels: bilinear, antialiased, rounded; as they are at that size."""
    if images_NHWC.shape[1:3] == (side, side):
        return images_NHWC
    pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    small_NHWC: np.ndarray = small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(small_NHWC)
