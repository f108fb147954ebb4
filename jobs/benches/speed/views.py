"""Rendering of views, in whole numbers and as sets of format 1 have them, against torchvision's functions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from wmdd_ray.config import ViewConfig
from wmdd_ray.core.views import StoredImages, draw_views, render_views, take
from wmdd_ray.records import Views

from ..reporting import Row, report, spread

_NUM_IMAGES = 100


def views(
    sizes: tuple[int, ...] = (28, 64, 224),
    batches: tuple[int, ...] = (1, 5, 25),
    repeats: int = 9,
    out: str | None = None,
) -> None:
    """Microseconds of a thread for a view: two crops with flips, the partner's box, and normalized float32; taking turns.

    `torchvision_bytes` ends with bytes, without the normalization that all others have.

    Args:
        sizes: Sides of images and views, pixels; 28 is gray, the others have colors.
        batches: Views that are rendered together; torchvision's are one by one.
        repeats: Turns; each renders for about a fiftieth of a second.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    for size in sizes:
        channels = 1 if size == 28 else 3
        shape = (_NUM_IMAGES, size, size, channels)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        color: Any = ((0.4,) * channels, (0.2,) * channels)
        stored, in_float = (StoredImages(pixels, *color, in_float=way) for way in (False, True))
        drawn = draw_views(_NUM_IMAGES, size, ViewConfig(), seed=0, epoch=0)
        for batch in batches:
            some = take(drawn, slice(0, batch))
            ways: dict[str, Callable[..., Any]] = {
                "bytes": lambda v, s=stored, n=size: render_views(s, v, n),
                "in_float": lambda v, s=in_float, n=size: render_views(s, v, n),
                "torchvision": lambda v, s=stored, n=size: _by_torchvision(s, v, n, True),
                "torchvision_bytes": lambda v, s=stored, n=size: _by_torchvision(s, v, n, False),
            }
            microseconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(repeats + 1):
                for name, render in ways.items():
                    microseconds[name].append(_microseconds(render, some))
            columns = {name: spread(each[1:]) for name, each in microseconds.items()}
            rows.append({"size": size, "batch": batch, **columns})
    report(rows, {"unit": "us of processor time a view", "threads": 1}, out)


def _microseconds(render: Callable[[Views], Any], some: Views) -> float:
    started, count = time.process_time(), 0
    while (spent := time.process_time() - started) < 0.02:
        render(some)
        count += len(some)
    return 1e6 * spent / count


def _by_torchvision(stored: StoredImages, some: Views, size: int, normalized: bool) -> None:
    import torchvision.transforms.v2.functional as tv

    sides = ("image_V", "crop_V4", "flip_V"), ("partner_V", "partner_crop_V4", "partner_flip_V")
    for v, (top, left, bottom, right) in enumerate(some.mix_box_V4.tolist()):
        made = []
        for image, crop, flip in sides:
            picture = stored.images_NHWC[int(getattr(some, image)[v])].permute(2, 0, 1)
            box = np.rint(getattr(some, crop)[v] * size).astype(int).clip([0, 0, 1, 1]).tolist()
            view = tv.resized_crop(picture, *box, size=[size, size], antialias=False)
            made.append(tv.horizontal_flip(view) if getattr(some, flip)[v] else view)
        made[0][:, top:bottom, left:right] = made[1][:, top:bottom, left:right]
        if normalized:
            floats = tv.to_dtype(made[0], torch.float32, scale=True)
            tv.normalize(floats, stored.mean_C, stored.std_C, inplace=True)
