"""What is measured of images: known answers on images that were made for them, in every format."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.store.written_sources import IMAGES_NHWC, PNGS, WRITERS, write_imagefolder
from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import open_source
from wmdd_ray.units.own_data import Measured, doubts, measure, of_prepared, sample

READING = SourceConfig()


def measured(store: Store, **given: Any) -> Measured:
    source = open_source(store.uri, READING, split="train")
    return measure(source, **{"held_out": None, "channels": None, "image_size": None, **given})


def picture(color: tuple[int, int, int], size: tuple[int, int], format: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, color).save(sink, format)
    return sink.getvalue()


@pytest.mark.parametrize("format", WRITERS)
def test_gray_images_are_counted_and_measured_in_every_format(format: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    WRITERS[format](store)
    found = measured(store, image_size=8)
    assert (found.shorter_side, found.channels, found.sampled) == (8, 1, 24)
    assert (found.smallest_class, found.num_images) == (8, 24)
    assert found.num_classes == 3
    pixels = IMAGES_NHWC / 255
    np.testing.assert_allclose(found.mean, pixels.mean(), atol=1e-4)
    np.testing.assert_allclose(found.std, pixels.std(), atol=1e-4)
    with_held_out = measured(store, image_size=8, held_out=-1)
    if format == "webdataset":
        # By bytes alone, where no part is cut off: the tars have headers and labels beside the images.
        assert with_held_out.smallest_class is None and with_held_out.num_images >= 24
    else:
        assert with_held_out == replace(found, held_out=-1)


def test_colors_are_measured_by_channel_and_the_median_decides_the_size(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for i, side in enumerate((20, 64, 64, 70, 300)):
        store.put(f"train/a/{i}.png", picture((255, 51, 0), (side * 2, side)))
        store.put(f"train/b/{i}.png", picture((0, 51, 0), (side, side + 1)))
    found = measured(store)
    assert (found.shorter_side, found.channels, found.num_images) == (64, 3, 10)
    assert found.mean == (0.5, 0.2, 0.0)
    assert found.std == (0.5, 0.0001, 0.0001)  # a constant channel is not divided by 0
    gray = measured(store, channels=1)
    assert gray.channels == 1
    np.testing.assert_allclose(
        gray.mean, (0.299 * 0.5 + 0.587 * 0.2,), atol=0.003
    )  # ITU-R 601 luma


def test_the_same_images_are_measured_alike_and_bad_ones_left_out(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_imagefolder(store)
    before = measured(store)
    assert measured(store) == before
    store.put("train/ant/zzz.png", PNGS[0][:40])
    store.put("train/ant/zzzz.png", b"no picture")
    after = measured(store)
    assert (after.mean, after.num_images) == (before.mean, 26)
    for key in store.list("train"):
        store.put(key, b"no picture")
    with pytest.raises(
        DataError, match=r"found no good one .*\(train/ant/000.png: expected a JPEG, PNG or WebP"
    ):
        measured(store)


def test_a_sample_takes_the_first_records_of_shards_that_are_evenly_spread(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_imagefolder(store)
    source = open_source(store.uri, READING, split="train")
    shards = source.shards(2)
    keys = [record.key for record in sample(source, shards, 3, 6)]
    assert keys == [key for shard in shards[::4] for key in shard.keys]


def test_a_manifest_of_prepare_says_all_and_one_without_sizes_nothing() -> None:
    found: dict[str, Any] = {
        "shorter_side": 64,
        "channels": 1,
        "mean": [0.12345678],
        "std": [0.0],
        "train": {"class_counts": [7, 5]},
        "validation": {"num_images": 0},
    }
    assert of_prepared(found) == Measured(
        shorter_side=64, channels=1, mean=(0.1235,), std=(1e-4,), sampled=0, num_classes=2,
        num_images=12, smallest_class=5, held_out=None,
    )  # fmt: skip


SIZE: Callable[[int], SourceConfig] = lambda side: replace(READING, image_size=side, resize=side)  # noqa: E731


@pytest.mark.parametrize(
    ("side", "input_side", "told"),
    [
        (64, 64, []),
        (70, 64, []),
        (64, 32, ["images of 64 px shrink to 32 px, 1/2"]),
        (63, 32, ["images of 63 px are made 32 px"]),
        (64, 224, ["images of 64 px are made 224 px"]),
        (2000, 224, ["images of 2000 px shrink to 224 px, 1/8"]),
    ],
)
def test_a_size_that_is_not_the_data_s_is_told(side: int, input_side: int, told: list[str]) -> None:
    found = doubts([(side, True)] * 3, SIZE(input_side))
    assert [text for text, _ in found] == told
    assert all(advice for _, advice in found)


def test_colors_that_are_dropped_are_told() -> None:
    gray = replace(SIZE(32), channels=1, mean=(0.5,), std=(0.5,))
    assert doubts([(32, False), (32, True)], gray) == [
        ("colors are dropped", "set --source.channels 3")
    ]
    assert doubts([(32, False)], gray) == []
