from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wmdd_ray.core.crops import easiest_crops
from wmdd_ray.core.tiles import shrink
from wmdd_ray.errors import DataError


class Bright(nn.Module):
    """Classes dark and bright: the logit of 1 is the mean of the image; counts what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.seen.append(tuple(x_BCHW.shape))
        mean_B = x_BCHW.mean(dim=(1, 2, 3))
        return torch.stack([self.zero.expand_as(mean_B), mean_B], dim=1)


def gradients(n: int, size: int = 16) -> np.ndarray:
    """Return n images that brighten from left to right, each from another gray."""
    ramp = np.arange(size)[None, :] * 4 + 10 * np.arange(n)[:, None]
    return np.broadcast_to(ramp[:, None, :, None], (n, size, size, 1)).astype(np.uint8)


def crops(images: np.ndarray, label: int, count: int, **options: Any) -> np.ndarray:
    options = {"side": 8, "seed": 0, "crop_scale_min": 0.2, "network": Bright().eval()} | options
    color: dict[str, Any] = {"image_size": 16, "mean_C": (0.5,), "std_C": (0.25,)}
    network = options.pop("network")
    return easiest_crops(network, images, label, count, **color, **options)


def test_the_easiest_images_come_first_and_each_gives_one_crop() -> None:
    images = gradients(12)[np.random.default_rng(0).permutation(12)]
    bright = crops(images, 1, 5, crop_scale_min=1.0)
    assert bright.shape == (5, 8, 8, 1) and bright.dtype == np.uint8
    # A crop of scale 1 is the whole image: the five brightest.
    np.testing.assert_array_equal(bright, shrink(gradients(12)[:-6:-1], 8))
    np.testing.assert_array_equal(
        crops(images, 0, 5, crop_scale_min=1.0), shrink(gradients(12)[:5], 8)
    )


def test_the_easiest_crop_of_an_image_is_the_best_of_all_that_were_drawn() -> None:
    image = gradients(1)
    means = [
        float(crops(image, 1, 1, crops_per_image=number).mean()) for number in (1, 2, 4, 8, 64)
    ]
    # The crops of a smaller number are among those of a larger one.
    assert means == sorted(means) and means[-1] > means[0] + 5
    worst = float(crops(image, 0, 1, crops_per_image=64).mean())
    assert worst < shrink(image, 8).mean() < means[-1]


def test_the_teacher_sees_the_stored_crop_enlarged_to_its_input() -> None:
    network = Bright().eval()
    crops(gradients(3), 1, 3, network=network, batch_size=10)
    assert network.seen == [(10, 1, 16, 16), (5, 1, 16, 16)]


def test_crops_do_not_depend_on_the_batches_but_on_seed_and_class() -> None:
    images = gradients(9)
    expected = crops(images, 1, 4)
    for batch_size in (5, 11, 20):
        np.testing.assert_array_equal(crops(images, 1, 4, batch_size=batch_size), expected)
    assert not np.array_equal(crops(images, 1, 4, seed=1), expected)


def test_crops_of_other_classes_are_drawn_differently() -> None:
    class Blind(Bright):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return torch.zeros(len(x_BCHW), 3) + self.zero

    one, two = (crops(gradients(4), label, 4, network=Blind().eval()) for label in (1, 2))
    assert not np.array_equal(one, two)


def test_few_images_give_their_easiest_crops_first_and_then_their_second() -> None:
    images = gradients(3)
    each = {
        i: [crop.mean() for crop in crops(images[i : i + 1], 1, 5, crops_per_image=5)]
        for i in range(3)
    }
    assert all(means == sorted(means, reverse=True) for means in each.values())
    found = crops(images, 1, 8)
    assert len(found) == 8 and len({crop.tobytes() for crop in found}) == 8
    # The brightest image's easiest crop leads, and no second crop stands before any first.
    np.testing.assert_array_equal(found[:3], crops(images, 1, 3))


def test_more_crops_than_images_can_give_are_refused_with_the_class() -> None:
    with pytest.raises(DataError, match="class 1 has 3 images .* at most 5 times each, but 16"):
        crops(gradients(3), 1, 16)
