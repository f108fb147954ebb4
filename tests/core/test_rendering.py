"""Pixels of views in whole numbers: the formula, torch's resampling in its place, and bits that no machine changes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wmdd_ray.config import ViewConfig
from wmdd_ray.core import rendering
from wmdd_ray.core.rendering import render_bytes
from wmdd_ray.core.resample import crop
from wmdd_ray.core.views import draw_views
from wmdd_ray.records import Views

# Of the image, and of the view.
SIDES = [(8, 8), (13, 28), (28, 28), (64, 64), (70, 96), (112, 224), (90, 64)]
GOLDEN = {
    (28, 1): "5e9a6799fd6375b22fc41ab31e2cc31361214aa98e7a68aca45ffeb7c5809b03",
    (224, 3): "bf4053a96728e2a27f1e4997ae9938dcbb748c0b9633547dd01802c939a81a23",
}


@pytest.fixture(autouse=True)
def ask_the_library_anew() -> Iterator[None]:
    rendering._library_agrees.cache_clear()
    yield
    rendering._library_agrees.cache_clear()


def noise(n: int, side: int, channels: int) -> torch.Tensor:
    words = np.random.Philox(key=np.array([side, channels], dtype=np.uint64))
    size = n * side * side * channels
    content = (words.random_raw(size) >> np.uint64(56)).astype(np.uint8)
    return torch.from_numpy(content).view(n, side, side, channels)


def plain(crop_V4: list[list[float]], flip_V: list[bool]) -> Views:
    """Return unmixed views of images 0, 1, ..."""
    views = draw_views(len(flip_V), 8, ViewConfig(mix="none"), seed=0, epoch=0)
    return replace(
        views, crop_V4=np.array(crop_V4, dtype=np.float32), flip_V=np.array(flip_V, dtype=bool)
    )


def digest_of(side: int, channels: int) -> str:
    views = draw_views(20, side, ViewConfig(), seed=3, epoch=1)
    pixels = render_bytes(noise(20, side, channels), views, side)
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("side", [8, 28, 64, 100])
def test_the_whole_image_is_the_image_and_its_mirror_the_mirror(side: int) -> None:
    images = noise(2, side, 3)
    pixels = render_bytes(images, plain([[0, 0, 1, 1]] * 2, [False, True]), side)
    assert torch.equal(pixels[0], images[0]) and torch.equal(pixels[1], images[1].flip(1))


def test_a_large_view_is_torchs_resampling_of_whole_pixels() -> None:
    images = noise(1, 100, 3)
    pixels = render_bytes(images, plain([[0.107, 0.2, 0.516, 0.703]], [True]), 128)
    # From rint(10.7) to rint(10.7 + 51.6), and from 20 to rint(90.3).
    box = images[:, 11:62, 20:90].permute(0, 3, 1, 2)
    expected = F.interpolate(box, size=(128, 128), mode="bilinear").flip(3)
    assert torch.equal(pixels.permute(0, 3, 1, 2), expected)


def test_small_views_are_those_in_float_but_for_rounding() -> None:
    images, rng = noise(60, 28, 1), np.random.default_rng(0)
    # Boxes that are sixteenths already, in images that are smooth enough for the border's clamping not to tell.
    start, length = rng.integers(0, 120, (60, 2)), rng.integers(160, 320, (60, 2))
    crop_V4 = np.concatenate([start, length], axis=1).astype(np.float32) / (28 * 16)
    flip_V = rng.random(60) < 0.5
    views = plain(crop_V4.tolist(), flip_V.tolist())
    got = render_bytes(images, views, 28).permute(0, 3, 1, 2).float()
    floats = images.permute(0, 3, 1, 2).float()
    expected = crop(floats, torch.from_numpy(crop_V4), torch.from_numpy(flip_V), 28)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert (got - expected)[inner].abs().max() <= 1.01
    assert (got - expected)[inner].abs().mean() < 0.35


@pytest.mark.parametrize(("image_size", "size"), SIDES)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_by_one_and_all_together_are_the_same_pixels(
    image_size: int, size: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise(12, image_size, channels)
    views = draw_views(12, size, ViewConfig(crop_scale_min=0.08), seed=1, epoch=2)
    usual = render_bytes(images, views, size)
    monkeypatch.setattr(rendering, "_singly", None)
    monkeypatch.setattr(rendering, "_library_agrees", lambda: False)
    assert torch.equal(render_bytes(images, views, size), usual)


def test_the_library_enlarges_every_length_by_the_formula() -> None:
    for size in (7, 64, 97, 224):
        rows = noise(1, size, 3)[:, :4]
        for length in range(1, size):
            part = rows[:, :, :length].contiguous().permute(0, 3, 1, 2)
            got = F.interpolate(part, size=(4, size), mode="bilinear")
            start, zero = torch.tensor([0]), torch.tensor([False])
            sizes = torch.tensor([size])
            axis = rendering._Axis.of(start, torch.tensor([length]), start, sizes, zero, 1, size)
            near, far = part[..., axis.near_BS[0]], part[..., axis.far_BS[0]]
            assert torch.equal(rendering._between(near, far, axis.share_BS[0]), got)


def test_a_partners_box_holds_that_part_of_the_partners_view() -> None:
    views = draw_views(40, 224, ViewConfig(), seed=0, epoch=0)
    rows, columns = torch.arange(224), torch.arange(224)
    # Pictures whose pixels tell their place, so that a shifted box shows.
    place = (rows[:, None, None] + columns[None, :, None]).expand(224, 224, 3) // 2
    images = place.to(torch.uint8)[None].repeat(40, 1, 1, 1)
    mixed = render_bytes(images, views, 224).int()
    partners = replace(
        views,
        crop_V4=views.partner_crop_V4,
        flip_V=views.partner_flip_V,
        mix_box_V4=np.zeros_like(views.mix_box_V4),
    )
    whole = render_bytes(images, partners, 224).int()
    for got, expected, box in zip(mixed, whole, views.mix_box_V4.tolist(), strict=True):
        top, left, bottom, right = box
        difference = (got - expected)[top:bottom, left:right]
        assert difference.numel() == 0 or difference.abs().max() <= 1


@pytest.mark.parametrize(("side", "channels"), GOLDEN)
def test_pixels_are_the_ones_that_every_machine_renders(side: int, channels: int) -> None:
    assert digest_of(side, channels) == GOLDEN[side, channels]


def test_a_processor_without_vector_instructions_renders_them_too() -> None:
    program = "from tests.core.test_rendering import digest_of; print(digest_of(224, 3))"
    plain_cpu = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    told = subprocess.run(
        [sys.executable, "-c", program], env=plain_cpu, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == GOLDEN[224, 3]


def test_a_library_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    before = F.interpolate

    def truncating(images: torch.Tensor, **options: object) -> torch.Tensor:
        return before(images.float(), **options).to(torch.uint8)

    monkeypatch.setattr(F, "interpolate", truncating)
    assert not rendering._library_agrees()
    assert digest_of(224, 3) == GOLDEN[224, 3]
