"""What is seen of somebody's images before anything is chosen for them: their size, colors, number and classes.

Legend: H W pixels, C color channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from statistics import median_low
from typing import Any, Literal

import numpy as np
from PIL import Image

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import BadImageError, DataError
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources import RawImage, Shard, Source
from wmdd_ray.store.sources.parquet import ParquetSource
from wmdd_ray.store.sources.webdataset import WebDatasetSource
from wmdd_ray.units.cut import CutSource

SIZES = (28, 32, 64, 96, 128, 224)
"""Sides that images are brought to, pixels: those that recipes are made for, and two between."""

# The first images of evenly spread shards: every class has shards of its own where each image has a file.
_SHARDS = 64
_SAMPLE = 256
_FEW_SHARDS = 8
_FEW = 64
_READERS = 16
_SHRUNK = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What is known of the training images.

    `shorter_side` is a median, pixels; `mean` and `std` are per channel in [0, 1]. `sampled` of the images were looked at for
    these, all of them where it is 0. `smallest_class` is None where only reading tells; `num_images` is then estimated by bytes.
    `held_out` is the number of held-out images that come with them, None when there are none, -1 when only reading tells.
    """

    shorter_side: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sampled: int
    num_classes: int
    num_images: int
    smallest_class: int | None
    held_out: int | None

    @staticmethod
    def read(document: Mapping[str, Any]) -> Measured:
        """Return what was written as a dictionary."""
        return Measured(
            **{**document, "mean": tuple(document["mean"]), "std": tuple(document["std"])}
        )


def class_counts(
    source: Source, shards: Sequence[Shard], *, read: bool = False
) -> Counter[int] | None:
    """Return the images of every class by listing, or by the label column of Parquet; of tar shards None, unless to be `read`."""
    if isinstance(source, CutSource):
        return source.counts

    def counted(shard: Shard) -> Counter[int] | None:
        if isinstance(source, ParquetSource):
            return source.class_counts(shard.file)
        if shard.labels is not None and shard.num_images is not None:
            return Counter({shard.labels[0]: shard.num_images})
        if not (read and isinstance(source, WebDatasetSource)):
            return None
        return Counter(label for label in source.images_in(shard)[1].tolist() if label >= 0)

    counts: Counter[int] = Counter()
    with ThreadPoolExecutor(_READERS) as pool:
        for of_shard in pool.map(counted, shards):
            if of_shard is None:
                return None
            counts.update(of_shard)
    return counts


def sample(
    source: Source, shards: Sequence[Shard], num_shards: int, num_records: int
) -> list[RawImage]:
    """Return the first records of at most `num_shards` shards, evenly spread, about `num_records` in all."""
    spread = shards[:: max(1, -(-len(shards) // num_shards))]
    each = -(-num_records // max(1, len(spread)))
    return [record for shard in spread for record in islice(source.read_shard(shard), each)]


def shape_of(record: RawImage) -> tuple[int, bool] | None:
    """Return (shorter side in pixels, whether it has colors) of an image as it is stored; None of a bad one."""
    if isinstance(record.content, np.ndarray):
        return min(record.content.shape[:2]), record.content.shape[2:] == (3,)
    try:
        with Image.open(BytesIO(record.content)) as picture:
            return min(picture.size), picture.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr")
    except Exception:  # told where all images are read
        return None


def measure(
    source: Source, *, held_out: int | None, channels: int | None, image_size: int | None
) -> Measured:
    """Look at a sample of the training images, and count them.

    Args:
        source: The training images.
        held_out: As in `Measured`.
        channels: 1 or 3 where somebody wants so; None takes colors if a sampled image has any.
        image_size: Side that is wanted, pixels; None takes that of the images.

    Raises:
        DataError: No sampled image is good.
    """
    shards = source.shards(_SAMPLE // _SHARDS)
    # Those of which a part is cut off are read for it anyway.
    counts = class_counts(source, shards, read=held_out is None)
    records = sample(source, shards, _SHARDS, _SAMPLE)
    shapes = [shape for record in records if (shape := shape_of(record)) is not None]
    if not shapes:
        raise _no_good_one(source.root, records, source.config)
    side = median_low([side for side, _ in shapes])
    color = channels == 3 or (channels is None and any(color for _, color in shapes))
    seen = input_of(image_size or snapped(side), 3 if color else 1, (0.5,) * 3, (0.5,) * 3)
    seen = replace(seen, exif_orientation=source.config.exif_orientation)
    seen = replace(seen, max_image_pixels=source.config.max_image_pixels)
    mean, std = _moments(source.root, records, seen)
    num_images = sum(counts.values()) if counts else source.num_images
    if num_images is None:
        stored = sum(len(record.content) for record in records) / len(records)
        num_images = max(len(records), round(source.total_bytes / max(1, stored)))
    return Measured(
        shorter_side=side,
        channels=3 if color else 1,
        mean=mean,
        std=std,
        sampled=len(shapes),
        num_classes=len(source.class_names),
        num_images=num_images,
        smallest_class=min(counts[k] for k in range(len(source.class_names))) if counts else None,
        held_out=held_out,
    )


def _no_good_one(where: str, records: Sequence[RawImage], config: SourceConfig) -> DataError:
    """Return the error that no sampled image is good, with the reason of the first."""
    reason = f"{records[0].key}: {records[0].problem}" if records else "there is none"
    if records and not records[0].problem:
        try:
            decode_image(records[0].content, config, records[0].key)
        except BadImageError as error:
            reason = str(error)
    return DataError(
        f"{where}: expected images, found no good one among the first {len(records)} ({reason})"
    )


def _moments(
    where: str, records: Sequence[RawImage], config: SourceConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, as the network will see the images, four digits."""
    sums_2C = np.zeros((2, config.channels))
    good = 0
    for record in records:
        try:
            image_HWC = decode_image(record.content, config, record.key) / 255.0
        except BadImageError:
            continue
        sums_2C += image_HWC.mean((0, 1)), (image_HWC**2).mean((0, 1))
        good += 1
    if not good:
        raise _no_good_one(where, records, config)
    mean_C, square_C = sums_2C / good
    # A constant channel cannot be divided by its deviation.
    std_C = np.maximum(np.sqrt(np.maximum(square_C - mean_C**2, 0)), 1e-4)
    return tuple(np.round(mean_C, 4).tolist()), tuple(np.round(std_C, 4).tolist())


def of_prepared(manifest: Mapping[str, Any]) -> Measured:
    """Return what the manifest of `jobs/prepare.py` says."""
    counts = manifest["train"]["class_counts"]
    return Measured(
        shorter_side=manifest["shorter_side"],
        channels=manifest["channels"],
        mean=tuple(round(value, 4) for value in manifest["mean"]),
        std=tuple(max(round(value, 4), 1e-4) for value in manifest["std"]),
        sampled=0,
        num_classes=len(counts),
        num_images=sum(counts),
        smallest_class=min(counts),
        held_out=manifest["validation"]["num_images"] or None,
    )


def snapped(side: int) -> int:
    """Return the one of `SIZES` that is nearest in ratio."""
    return min(SIZES, key=lambda size: abs(math.log(size / side)))


def input_of(
    image_size: int, channels: Literal[1, 3], mean: tuple[float, ...], std: tuple[float, ...]
) -> SourceConfig:
    """Return the input of a side; 224 is cut out of 256 as in ImageNet's recipes."""
    return SourceConfig(
        image_size=image_size,
        resize=256 if image_size == 224 else image_size,
        channels=channels,
        mean=mean[:channels],
        std=std[:channels],
    )


def doubts(shapes: Sequence[tuple[int, bool]], config: SourceConfig) -> list[tuple[str, str]]:
    """Return what an input does to images that it was not made for, and what to do about it.

    `shapes` are (shorter side in pixels, whether it has colors) of sampled images.
    """
    side = median_low([side for side, _ in shapes])
    wanted = snapped(side)
    pairs = []
    better = f"leave --recipe out, or set --source.image-size {wanted} --source.resize {wanted}"
    if side >= _SHRUNK * config.resize:
        what = f"images of {side} px shrink to {config.resize} px, 1/{side // config.resize}"
        larger = "a larger --source.image-size and --source.resize keeps more of them"
        pairs.append((what, better if wanted > config.image_size else larger))
    elif config.image_size not in (wanted, side):
        what = f"images of {side} px are made {config.image_size} px"
        pairs.append((what, better))
    if config.channels == 1 and any(color for _, color in shapes):
        pairs.append(("colors are dropped", "set --source.channels 3"))
    return pairs


def doubts_of(source: Source, config: SourceConfig) -> list[tuple[str, str]]:
    """Return the `doubts` about a few images of a source."""
    records = sample(source, source.shards(_FEW // _FEW_SHARDS), _FEW_SHARDS, _FEW)
    shapes = [shape for record in records if (shape := shape_of(record)) is not None]
    return doubts(shapes, config) if shapes else []
