from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from wmdd_ray.core.tiles import shrink, tile, tile_side, untile
from wmdd_ray.errors import ConfigError


def pictures(n: int, side: int, channels: int = 3) -> np.ndarray:
    shape = (n, side, side, channels)
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


def test_small_images_lie_row_by_row_in_the_grid_of_their_stored_image() -> None:
    images = pictures(8, 5)
    stored = tile(images, 2, 10)
    assert stored.shape == (2, 10, 10, 3)
    for j, image in enumerate(images):
        n, row, column = j // 4, j % 4 // 2, j % 2
        got = stored[n, 5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
        np.testing.assert_array_equal(got, image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("tiles", "image_size"), [(1, 8), (2, 28), (3, 28), (3, 8), (5, 9)])
def test_untile_is_the_inverse_of_tile_and_what_is_left_over_is_zero(
    tiles: int, image_size: int, channels: int
) -> None:
    side = image_size // tiles
    images = pictures(2 * tiles**2, side, channels)
    stored = tile(images, tiles, image_size)
    assert stored.shape == (2, image_size, image_size, channels) and stored.dtype == np.uint8
    assert int((stored > 0).sum()) == images.size, "no pixel of the images is 0"
    assert not stored[:, tiles * side :].any() and not stored[:, :, tiles * side :].any()
    np.testing.assert_array_equal(untile(stored, tiles), images)
    np.testing.assert_array_equal(tile(untile(stored, tiles), tiles, image_size), stored)


def test_images_that_fill_no_grid_are_our_fault() -> None:
    with pytest.raises(AssertionError, match="7 images do not fill grids of 2 x 2"):
        tile(pictures(7, 4), 2, 8)
    with pytest.raises(AssertionError, match="4"):
        tile(pictures(4, 3), 2, 8)


def test_more_tiles_than_pixels_are_refused() -> None:
    assert tile_side(8, 8) == 1
    with pytest.raises(ConfigError, match=r"--recover.tiles: .*side \(8\), got 9"):
        tile_side(8, 9)


def test_shrinking_to_the_same_side_takes_no_memory() -> None:
    images = pictures(3, 9)
    assert shrink(images, 9) is images


@pytest.mark.parametrize("side", [14, 9, 5, 1])
def test_shrinking_agrees_with_pillow_to_one_gray_level(side: int) -> None:
    images = pictures(2, 28)
    for image, got in zip(images, shrink(images, side), strict=True):
        resized = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        difference = np.asarray(resized).astype(int) - got
        assert np.abs(difference).max() <= 1


def test_a_checkerboard_shrinks_to_gray() -> None:
    board = (255 * (np.indices((16, 16)).sum(axis=0) % 2)).astype(np.uint8)
    small = shrink(board[None, :, :, None], 4)
    assert np.abs(small.astype(int) - 127).max() <= 1
