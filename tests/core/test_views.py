"""Views: what is drawn, what is rendered, and that a stored view replays to the same pixels."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from wmdd_ray.config import ViewConfig
from wmdd_ray.core.views import (
    StoredImages,
    concatenate_views,
    crop,
    draw_block,
    draw_crops,
    draw_views,
    render_views,
    take,
    to_input,
)
from wmdd_ray.records import ViewDraw, Views

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def random_images(n: int, size: int = 14, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator)


def stored_images(n: int, size: int) -> StoredImages:
    pixels = np.random.default_rng(size).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return StoredImages(pixels, MEAN, STD)


def whole_box(n: int) -> torch.Tensor:
    return torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(n, 4)


def no_flip(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.bool)


def assert_same_views(first: Views, second: Views) -> None:
    for field in fields(Views):
        np.testing.assert_array_equal(
            getattr(first, field.name), getattr(second, field.name), err_msg=field.name
        )


def test_to_input_divides_by_255_then_normalizes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    expected = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    result = to_input(images, MEAN, STD)
    assert result.dtype == torch.float32 and result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)


class Divisors(TorchDispatchMode):
    """Collects what is divided by."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("aten.div"):
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


def test_to_input_divides_by_tensors_on_the_device_since_cuda_multiplies_by_a_reciprocal() -> None:
    divisors = Divisors()
    with divisors:
        to_input(np.zeros((2, 3, 3, 3), np.uint8), MEAN, STD, "meta")
    assert len(divisors.found) == 2
    for divisor in divisors.found:
        assert isinstance(divisor, torch.Tensor) and divisor.device.type == "meta", divisor


def test_to_input_leaves_its_argument_alone_and_takes_readonly_arrays() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)
    images.flags.writeable = False
    before = images.copy()
    to_input(images, MEAN, STD)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("size", [8, 13, 28, 100])
def test_crop_of_the_whole_image_is_the_image_bit_for_bit(size: int) -> None:
    images = random_images(3, size)
    torch.testing.assert_close(crop(images, whole_box(3), no_flip(3), size), images, rtol=0, atol=0)


def test_flip_mirrors_left_and_right_of_the_chosen_images_only() -> None:
    images = random_images(2)
    result = crop(images, whole_box(2), torch.tensor([True, False]), 14)
    torch.testing.assert_close(result[0], images[0].flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(result[1], images[1], rtol=0, atol=0)


def test_crop_of_whole_pixels_is_a_slice() -> None:
    images = random_images(1, 16)
    box = torch.tensor([[4 / 16, 2 / 16, 8 / 16, 8 / 16]])
    torch.testing.assert_close(crop(images, box, no_flip(1), 8), images[:, :, 4:12, 2:10])


def test_crop_agrees_with_grid_sample() -> None:
    images, n, size = random_images(40, 14).double(), 40, 11
    boxes = torch.from_numpy(draw_crops(np.random.default_rng(1), n, 0.1))
    flips = torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.5
    t = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    tx = torch.where(flips[:, None], 1 - t, t)
    y = 2 * (boxes[:, :1] + t * boxes[:, 2:3]) - 1
    x = 2 * (boxes[:, 1:2] + tx * boxes[:, 3:]) - 1
    grid = torch.stack([x[:, None].expand(n, size, size), y[..., None].expand(n, size, size)], -1)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    result = crop(images.float(), boxes, flips, size)
    torch.testing.assert_close(result, expected.float(), rtol=0, atol=1e-5)


def test_crop_outside_the_image_repeats_its_border() -> None:
    images = random_images(1, 6)
    result = crop(images, torch.tensor([[-2.0, 0.0, 1.0, 1.0]]), no_flip(1), 6)
    torch.testing.assert_close(result, images[:, :, :1].expand(1, 3, 6, 6))


def test_gradient_of_crop_is_its_transpose() -> None:
    # crop is linear: <crop(x), g> = <x, gradient>.
    images = random_images(5, 9).requires_grad_()
    boxes = torch.from_numpy(draw_crops(np.random.default_rng(3), 5, 0.2))
    boxes[0] = torch.tensor([0.7, -0.3, 0.6, 1.5])  # over the border
    flips = torch.tensor([True, False, True, False, True])
    result = crop(images, boxes, flips, 12)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(4))
    result.backward(direction)
    assert images.grad is not None
    for i in range(5):
        torch.testing.assert_close(
            (images[i] * images.grad[i]).sum(), (result[i] * direction[i]).sum(), rtol=1e-4, atol=0
        )
    # The same sum by automatic differentiation of plain indexing, in double precision.
    copy = images.detach().double().requires_grad_()
    rows = F.grid_sample(copy, _grid(boxes, flips, 12), padding_mode="border", align_corners=False)
    rows.backward(direction.double())
    assert copy.grad is not None
    torch.testing.assert_close(images.grad, copy.grad.float(), rtol=0, atol=1e-4)


def _grid(boxes: torch.Tensor, flips: torch.Tensor, size: int) -> torch.Tensor:
    n, t = len(boxes), (torch.arange(size, dtype=torch.float64) + 0.5) / size
    tx = torch.where(flips[:, None], 1 - t, t)
    y, x = 2 * (boxes[:, :1] + t * boxes[:, 2:3]) - 1, 2 * (boxes[:, 1:2] + tx * boxes[:, 3:]) - 1
    return torch.stack([x[:, None].expand(n, size, size), y[..., None].expand(n, size, size)], -1)


def test_drawn_crops_have_uniform_area_bounded_aspect_and_fit() -> None:
    boxes = draw_crops(np.random.default_rng(0), 20_000, 0.3).astype(np.float64)
    top, left, height, width = boxes.T
    assert (
        boxes.min() >= 0 and (top + height).max() <= 1 + 1e-6 and (left + width).max() <= 1 + 1e-6
    )
    assert stats.kstest(height * width, "uniform", args=(0.3, 0.7)).pvalue > 1e-3
    small = height * width < 0.7  # there the aspect is not narrowed
    log_aspect = np.log(width / height)[small]
    assert abs(log_aspect).max() <= np.log(4 / 3) + 1e-5
    low = np.log(3 / 4)
    assert stats.kstest(log_aspect, "uniform", args=(low, -2 * low)).pvalue > 1e-3
    assert stats.kstest(top / (1 - height), "uniform").pvalue > 1e-3
    assert stats.kstest(left / (1 - width), "uniform").pvalue > 1e-3


def test_scale_min_of_one_is_always_the_whole_image() -> None:
    boxes = draw_crops(np.random.default_rng(0), 50, 1.0)
    np.testing.assert_allclose(boxes, np.tile([0, 0, 1, 1], (50, 1)), atol=1e-7)


@pytest.mark.parametrize("mix", ["cutmix", "none"])
def test_views_depend_only_on_seed_epoch_and_row(mix: str) -> None:
    config = ViewConfig(mix=mix)
    first = draw_views(50, 16, config, seed=1, epoch=7)
    assert_same_views(first, draw_views(50, 16, config, seed=1, epoch=7))
    longer = draw_views(80, 16, config, seed=1, epoch=7)
    for name in ("crop_V4", "flip_V", "partner_crop_V4", "mix_box_V4", "share_V"):
        np.testing.assert_array_equal(getattr(longer, name)[:50], getattr(first, name))
    for seed, epoch in ((1, 8), (2, 7), (7, 1)):
        other = draw_views(50, 16, config, seed=seed, epoch=epoch)
        assert (other.crop_V4 != first.crop_V4).any(axis=1).all()


def test_seed_of_64_bits_is_accepted() -> None:
    draw_views(2, 16, ViewConfig(), seed=2**64 - 1, epoch=0)


def test_rows_of_all_fields_are_mutually_independent() -> None:
    # A draw that is used twice shows as a correlation between two fields.
    views = draw_views(20_000, 64, ViewConfig(), seed=0, epoch=0)
    fields_VF = np.column_stack(
        [
            np.prod(views.crop_V4[:, 2:], axis=1),
            views.crop_V4[:, 2] / views.crop_V4[:, 3],
            views.crop_V4[:, 0] / (1 - views.crop_V4[:, 2]),
            views.crop_V4[:, 1] / (1 - views.crop_V4[:, 3]),
            views.flip_V,
            np.prod(views.partner_crop_V4[:, 2:], axis=1),
            views.partner_crop_V4[:, 2] / views.partner_crop_V4[:, 3],
            views.partner_crop_V4[:, 0] / (1 - views.partner_crop_V4[:, 2]),
            views.partner_crop_V4[:, 1] / (1 - views.partner_crop_V4[:, 3]),
            views.partner_flip_V,
            views.partner_V,
            views.share_V,
        ]
    )
    correlation = np.corrcoef(fields_VF, rowvar=False)
    assert abs(correlation - np.eye(12)).max() < 0.1


def test_partners_cover_the_whole_data_set() -> None:
    partner_V = draw_views(5000, 16, ViewConfig(), seed=0, epoch=0).partner_V
    assert partner_V.min() >= 0 and partner_V.max() < 5000
    assert stats.kstest(partner_V / 5000, "uniform").pvalue > 1e-3


def test_cutmix_share_is_the_area_outside_the_box_that_is_pasted() -> None:
    views = draw_views(500, 28, ViewConfig(), seed=0, epoch=0)
    zeros_and_ones = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)])
    row_V = np.zeros(500, dtype=np.int32)
    marked = replace(views, image_V=row_V, partner_V=row_V + 1)
    rendered = render_views(zeros_and_ones, marked, 28)
    pasted_V = rendered.mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(1 - pasted_V, views.share_V, atol=1e-6)
    for picture, (top, left, bottom, right) in zip(rendered, views.mix_box_V4, strict=True):
        assert (picture[0, top:bottom, left:right] == 1).all()
    # Clipping at the border only shrinks a box, so the mean share lies above lambda's mean of 1/2.
    assert 0.5 < views.share_V.mean() < 0.75
    top, left, bottom, right = views.mix_box_V4.T
    assert min(top.min(), left.min()) == 0 and max(bottom.max(), right.max()) == 28


def test_no_mix_and_no_flip_are_what_they_say() -> None:
    config = ViewConfig(mix="none", flip=False)
    views = draw_views(20, 16, config, seed=0, epoch=0)
    assert not views.flip_V.any()
    np.testing.assert_array_equal(views.partner_V, views.image_V)
    np.testing.assert_array_equal(views.share_V, 1)
    images = random_images(20, 16)
    expected = crop(images, torch.from_numpy(views.crop_V4), no_flip(20), 16)
    torch.testing.assert_close(render_views(images, views, 16), expected, rtol=0, atol=0)
    assert not draw_views(200, 16, ViewConfig(flip=False), seed=0, epoch=0).partner_flip_V.any()


@pytest.mark.parametrize("mix", ["cutmix", "none"])
@pytest.mark.parametrize("size", [11, 16, 70])
def test_any_partition_of_the_rows_renders_the_same_pixels_bit_for_bit(mix: str, size: int) -> None:
    images = stored_images(37, 13 if size < 64 else 64)
    views = draw_views(37, size, ViewConfig(mix=mix), seed=0, epoch=3)
    whole = render_views(images, views, size)
    for batch in (1, 2, 5, 36):
        parts = [
            render_views(images, take(views, slice(i, i + batch)), size)
            for i in range(0, 37, batch)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    order = np.random.default_rng(0).permutation(37)
    shuffled = render_views(images, take(views, order), size)
    torch.testing.assert_close(shuffled, whole[torch.from_numpy(order)], rtol=0, atol=0)


def test_views_of_different_kinds_may_share_a_batch() -> None:
    images = stored_images(9, 12)
    kinds = [draw_views(9, 12, ViewConfig(mix=m), seed=0, epoch=0) for m in ("cutmix", "none")]
    together = render_views(images, concatenate_views(kinds), 12)
    apart = torch.cat([render_views(images, views, 12) for views in kinds])
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


def test_a_stored_view_replays_to_the_same_pixels(tmp_path: Path) -> None:
    images = stored_images(10, 12)
    views = draw_views(10, 12, ViewConfig(), seed=5, epoch=2)
    np.savez(tmp_path / "views.npz", **{f.name: getattr(views, f.name) for f in fields(Views)})
    with np.load(tmp_path / "views.npz") as arrays:
        replayed = Views(**dict(arrays))
    torch.testing.assert_close(
        render_views(images, replayed, 12), render_views(images, views, 12), rtol=0, atol=0
    )


def test_take_and_concatenate_are_inverse() -> None:
    views = draw_views(10, 16, ViewConfig(), seed=0, epoch=0)
    parts = [take(views, slice(0, 4)), take(views, np.arange(4, 10))]
    assert [len(p) for p in parts] == [4, 6]
    assert_same_views(concatenate_views(parts), views)


@pytest.mark.parametrize(("free_bytes", "moved"), [(4 * 48, True), (4 * 48 - 1, False)])
def test_stored_images_lie_on_a_gpu_whose_free_memory_is_four_times_theirs(
    free_bytes: int, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu: list[torch.device] = []

    def to(images: torch.Tensor, device: torch.device) -> torch.Tensor:
        on_gpu.append(device)
        return images

    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free_bytes, 1 << 40))
    monkeypatch.setattr(torch.Tensor, "to", to)
    StoredImages(np.zeros((1, 4, 4, 3), np.uint8), MEAN, STD, "cuda:0")
    assert on_gpu == ([torch.device("cuda:0")] if moved else [])


def test_stored_images_in_float_render_as_their_normalized_tensor() -> None:
    stored = stored_images(8, 9)
    views = draw_views(8, 9, ViewConfig(), seed=0, epoch=0)
    assert len(stored) == 8
    in_float = StoredImages(stored.images_NHWC, MEAN, STD, in_float=True)
    expected = render_views(to_input(stored.images_NHWC, MEAN, STD), views, 9)
    torch.testing.assert_close(render_views(in_float, views, 9), expected, rtol=0, atol=0)
    assert not torch.equal(render_views(stored, views, 9), expected)


def digest(views: Views) -> str:
    """Return a SHA-256 of all arrays' bytes, as on a little-endian machine."""
    arrays = [getattr(views, field.name) for field in fields(Views)]
    content = b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays)
    return hashlib.sha256(content).hexdigest()


GOLDEN = {
    ("cutmix", 0.25): "1eb003e7ae7ba3655240ae8f333d174899d183ec2a545db69075d15c3e87973f",
    ("none", 0.5): "1ae000e089a4c7becc9184545a7138e0cbf580645dbd4649b101164835886aae",
}


@pytest.mark.parametrize(("mix", "scale_min"), GOLDEN)
def test_views_are_the_ones_that_every_machine_draws(mix: str, scale_min: float) -> None:
    config = ViewConfig(mix=mix, crop_scale_min=scale_min)
    assert (
        digest(draw_views(5000, 224, config, seed=2**63 - 25, epoch=299)) == GOLDEN[mix, scale_min]
    )


def test_drawn_values_are_known_ones() -> None:
    views = draw_views(2, 28, ViewConfig(crop_scale_min=0.25), seed=5, epoch=2)
    # Written down once; the last bits count.
    assert [float(x).hex() for x in views.crop_V4[1]] == [
        "0x1.67dde80000000p-12",
        "0x1.a511600000000p-10",
        "0x1.7a8f7a0000000p-1",
        "0x1.e28c460000000p-1",
    ]
    assert views.mix_box_V4[1].tolist() == [0, 0, 28, 17]
    assert (views.partner_V.tolist(), views.flip_V.tolist()) == ([1, 1], [False, True])


def test_drawing_uses_nothing_that_numpy_does_not_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not the same on every machine")

    for name in ("Generator", "default_rng", "RandomState"):
        monkeypatch.setattr(np.random, name, refuse)
    for name in ("log", "exp", "power", "log1p", "expm1"):
        monkeypatch.setattr(np, name, refuse)
    draw_views(20, 16, ViewConfig(crop_scale_min=0.08), seed=0, epoch=0)


def test_a_block_is_drawn_again_with_the_images_positions_in_the_data_set() -> None:
    index_N = np.array([4, 5, 9], dtype=np.int32)
    draw = ViewDraw(
        seed=3,
        image_size=16,
        index_N=index_N,
        crop_scale_min=0.5,
        flip=True,
        mix="cutmix",
    )
    views = draw_block(draw, range(7, 9))
    local = [draw_views(3, 16, ViewConfig(), seed=3, epoch=epoch) for epoch in (7, 8)]
    np.testing.assert_array_equal(views.image_V, [4, 5, 9, 4, 5, 9])
    partners = np.concatenate([part.partner_V for part in local])
    np.testing.assert_array_equal(views.partner_V, index_N[partners])
    np.testing.assert_array_equal(views.crop_V4, np.concatenate([part.crop_V4 for part in local]))
