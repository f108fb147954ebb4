from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.jitter import Jitter, noise_start, roll
from wmdd_ray.core.views import crop

CONFIG = RecoverConfig(crop_scale_min=0.3, roll_px=3)


def pictures(n: int, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((n, 2, size, size), generator=generator)


def jitter(
    labels: list[int], ipc: int = 2, config: RecoverConfig = CONFIG, size: int = 8
) -> Jitter:
    return Jitter(labels, ipc, config, image_size=size, seed=3, device="cpu")


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-9, 8)])
def test_roll_is_torch_s_roll_of_each_image(shift: tuple[int, int]) -> None:
    images = pictures(3)
    shifts = torch.tensor([shift, (1, 0), (0, -1)])
    for got, image, own in zip(roll(images, shifts), images, shifts.tolist(), strict=True):
        assert torch.equal(got, image.roll(own, dims=(1, 2)))


def test_the_gradient_of_roll_passes_gradcheck() -> None:
    images = pictures(2, size=3).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: roll(x, torch.tensor([[1, -1], [2, 0]])), images)


def test_the_jitter_of_a_class_does_not_depend_on_its_company_or_on_the_history() -> None:
    images = pictures(4)
    together, alone = jitter([7, 1]), jitter([1])
    for iteration in (0, 5, 255, 256, 300, 4):
        expected = together(images, iteration)[2:]
        assert torch.equal(alone(images[2:], iteration), expected)
        assert torch.equal(jitter([1])(images[2:], iteration), expected)


def test_images_iterations_classes_and_seeds_are_jittered_differently() -> None:
    image = pictures(1).expand(2, 2, 8, 8)
    other_seed = Jitter([1], 2, CONFIG, image_size=8, seed=4, device="cpu")
    results = [
        *jitter([1])(image, 0),
        *jitter([1])(image, 1),
        *jitter([1])(image, 256),
        *jitter([2])(image, 0),
        *other_seed(image, 0),
    ]
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flip": False, "roll_px": 0}, {"plain"}),
        ({"flip": True, "roll_px": 0}, {"plain", "mirrored"}),
    ],
)
def test_without_crop_and_roll_only_flips_remain(options: Any, expected: set[str]) -> None:
    image = pictures(1)
    apply = jitter([0], ipc=1, config=RecoverConfig(crop_scale_min=1.0, **options))
    seen = set()
    for iteration in range(20):
        result = apply(image, iteration)
        plain, mirrored = torch.equal(result, image), torch.equal(result, image.flip(3))
        assert plain or mirrored
        seen.add("plain" if plain else "mirrored")
    assert seen == expected


def test_small_images_are_enlarged_to_the_network_s_input_and_rolled_by_its_pixels() -> None:
    config = RecoverConfig(crop_scale_min=1.0, flip=False, roll_px=2)
    image = pictures(1, size=4)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    large = crop(image, whole, torch.tensor([False]), 12)
    shifts = {
        (dy, dx)
        for iteration in range(60)
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        if torch.equal(
            jitter([0], ipc=1, config=config, size=12)(image, iteration),
            large.roll((dy, dx), dims=(2, 3)),
        )
    }
    assert len(shifts) > 15


def test_rolls_reach_every_shift_in_both_directions_and_no_further() -> None:
    config = RecoverConfig(crop_scale_min=1.0, flip=False, roll_px=1)
    image = pictures(1, size=4)
    seen = set()
    apply = jitter([0], ipc=1, config=config, size=4)
    for iteration in range(80):
        result = apply(image, iteration)
        seen |= {
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 2)
            if torch.equal(result, image.roll((dy, dx), dims=(2, 3)))
        }
    # On 4 pixels a shift of -2 equals one of 2: those would show up as either.
    assert {(y, x) for y, x in seen if abs(y) < 2 and abs(x) < 2} == seen
    assert len(seen) == 9


def test_noise_is_standard_normal_and_belongs_to_seed_and_class() -> None:
    noise = noise_start(0, 5, (200, 3, 8, 8))
    assert noise.dtype == np.float32
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)
    np.testing.assert_array_equal(noise, noise_start(0, 5, (200, 3, 8, 8)))
    for other in (noise_start(1, 5, noise.shape), noise_start(0, 6, noise.shape)):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02
