"""What `jobs/prepare.py` is asked for, which images it holds out, and how it cuts them into files. No Ray.

Legend: N images, Y classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from wmdd_ray.config import BucketAccess, Format, Numbers, SourceConfig, TarKeys, refuse_secrets
from wmdd_ray.errors import ConfigError
from wmdd_ray.options import check, option

SPLITS = ("train", "validation")
DEFAULT_VAL_FRACTION = 0.05
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """How real images become shards."""

    val_data: str | None = None
    """Held-out images elsewhere; absent, those that the source brings itself (folders `train`/`val`, `t10k-*`, ...), if any."""
    val_fraction: float | None = option(None, ge=0, le=0.9)
    """Share of each class's images that is held out, at least one image of a class with two, chosen by a hash of seed and key, so
    that an image keeps its side when others are added. Given, it puts aside what the source holds out itself. Absent: 0.05, and 0
    where there are held-out images; 0 holds out nothing."""
    max_side: int = option(256, ge=8)
    """Largest shorter side, pixels; larger images are resized to it (antialiased; JPEG stays JPEG at quality 95, others become
    PNG; a photograph lies as it lay, and keeps its EXIF orientation), all others keep every byte. 256 is what ImageNet's recipes
    resize to."""
    shard_mb: int = option(64, ge=1, le=1024)
    """Most bytes of a Parquet file, MiB. A worker holds up to twice as much beside its own 170 MiB (measured at 64, with images
    of 10 KB)."""
    seed: int = option(0, ge=0)
    """Seed of the held-out split."""
    format: Format = "auto"
    """Layout of the source; `auto` looks at the names there."""
    classes: str | None = None
    """File with the class names in label order: a name a line, or (.json) a list or an object from label to name. Absent: the order
    that the source has (sorted folders, its own list of names, or numbers)."""
    max_bad_images: int = option(1000, ge=0)
    """Images that may be unreadable (named in bad_images.jsonl, left out) before the job stops."""
    max_image_pixels: int = option(64_000_000, gt=0)
    """Largest width x height that is decoded; a larger header is refused as a bad image."""
    follow_links: bool = False
    """Follow links out of the source's folder: say so only of links that are yours."""
    layout: str = ""
    """Where the images of a class lie, where the folders leave a doubt: `train/{class}`, `{split}/{class}`, `*/{class}`,
    `train/{class}.*`; --source.layout of jobs/distill.py says it in full."""
    tar_keys: TarKeys = "auto"
    """Where the key of a tar's member ends: `first-dot`, as webdataset has it, or `last-dot` (`img_012.05.png`). `auto` is the
    first, and stops where the last would find images that the first does not."""
    max_passed_over: float = 0.25
    """Largest share of a folder's files that may be no image of any class, [0, 1], text beside images not counted."""
    label_column: str | None = None
    """Where labels are: the column of a Parquet file or a table, the key in WebDataset's `.json`, `coarse_label` of CIFAR-100."""
    image_column: str | None = None
    """Where images are: the column of a Parquet file, the paths' of a table, the ending in WebDataset."""
    numbers: Numbers = "auto"
    """What a number as a label means: `index`, a place in the class names from 0 (`index-from-1`: from 1), or `name`, the class
    that is called so. `auto`: a place in --classes or in the names that come with the file, else its own name."""
    bucket: BucketAccess = field(default_factory=BucketAccess)
    """How the images are reached in a bucket."""

    def __post_init__(self) -> None:
        refuse_secrets("val-data", self.val_data)
        refuse_secrets("classes", self.classes)
        check(self)
        if self.val_data is not None and self.val_fraction is not None:
            raise ConfigError(
                "--val-data and --val-fraction: expected one of them, got both; the images of --val-data are held out as they are"
            )

    @property
    def source(self) -> SourceConfig:
        shared = {f.name for f in fields(self)} & {f.name for f in fields(SourceConfig)}
        options = {name: getattr(self, name) for name in shared}
        if self.classes and self.numbers == "auto":
            options["numbers"] = "index"  # the file of --classes has the names in label order
        return SourceConfig(**options)

    @property
    def shard_bytes(self) -> int:
        """Most bytes of a file, and of what a worker reads before it stores a part."""
        return self.shard_mb * _MIB

    def scan_options(self) -> dict[str, Any]:
        """Return the options that the parts depend on."""
        names = ("max_side", "shard_mb", "seed", "max_image_pixels")
        later = {name: getattr(self, name) for name in ("label_column", "image_column", "numbers")}
        later = {name: value for name, value in later.items() if value not in (None, "auto")}
        return {name: getattr(self, name) for name in names} | later


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFile:
    """One Parquet file to write: images by their place in the order of all parts."""

    unit: str
    key: str
    split: str
    rows_N: np.ndarray  # int64


def held_out(labels_N: np.ndarray, ranks_N: np.ndarray, fraction: float) -> np.ndarray:
    """Return which images (bool N) are held out: of each class `fraction`, rounded, those with the lowest ranks.

    A class with two images or more gives at least one and keeps at least one.
    """
    order_N = np.lexsort((ranks_N, labels_N))
    counts_Y = np.bincount(labels_N)
    taken_Y = np.rint(counts_Y * fraction).astype(np.int64)
    most_Y = np.maximum(counts_Y - 1, 0)
    taken_Y = np.clip(taken_Y, np.minimum(most_Y, 1 if fraction > 0 else 0), most_Y)
    first_Y = np.cumsum(counts_Y) - counts_Y
    sorted_N = labels_N[order_N]
    chosen = np.arange(len(labels_N)) - first_Y[sorted_N] < taken_Y[sorted_N]
    mask_N = np.zeros(len(labels_N), dtype=bool)
    mask_N[order_N] = chosen
    return mask_N


def output_files(
    labels_N: np.ndarray, sizes_N: np.ndarray, held_out_N: np.ndarray, shard_bytes: int
) -> list[OutputFile]:
    """Cut both splits into files of at most `shard_bytes`: class after class, each class in the order of the parts.

    `sizes_N` are bytes; an image that is larger than a file may be makes one of its own.
    """
    order_N = np.argsort(labels_N, kind="stable")
    files: list[OutputFile] = []
    for split, of_split_N in zip(SPLITS, (~held_out_N, held_out_N), strict=True):
        rows_N = order_N[of_split_N[order_N]]
        ends_N = np.cumsum(sizes_N[rows_N])
        cuts = [0]
        while cuts[-1] < len(rows_N):
            before = int(ends_N[cuts[-1] - 1]) if cuts[-1] else 0
            end = int(np.searchsorted(ends_N, before + shard_bytes, side="right"))
            cuts.append(max(end, cuts[-1] + 1))
        count = len(cuts) - 1
        files += [
            OutputFile(
                # Not the file's name: libraries that look for splits by name read every file that has one.
                unit=f"{split[0]}{i:05d}",
                key=f"{split}-{i:05d}-of-{count:05d}.parquet",
                split=split,
                rows_N=rows_N[start:end],
            )
            for i, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]
    return files
