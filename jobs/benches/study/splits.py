"""Real images in three parts: `train` and `val` lie in the study's folder; `test` does not (`judge.py`).

Everything that is trained, selected or tuned is handed a `Place`, which knows the folder and no address of the data.

Legend: N images, H W pixels, C channels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, load_images, open_source
from wmdd_ray.store.sources.arrays import ArraySource

Split = Literal["val", "test"]
_MEMORY_BYTES = 8 << 30


@dataclass(frozen=True, eq=False)
class Labeled:
    """Real images (uint8 NHWC) and their labels (int64), in the order of their files."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray


class PartSource(ArraySource):
    """A part of the training images as a source of the product: decoded, in memory-mapped files of the study."""

    format = "study"

    def __init__(self, place: Place, part: str, files: dict[str, int]) -> None:
        super().__init__(place.out, files, place.source, place.class_names)
        self._paths = [
            Path(place.out) / "splits" / _array_key(place.split_unit, part, kind)
            for kind in ("images", "labels")
        ]

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        images_NHWC, labels_N = (np.load(path, mmap_mode="r") for path in self._paths)
        return images_NHWC, np.asarray(labels_N)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What all training is handed: the folder of the study, how pixels are normalized.

    `split_unit` names the unit of the room `splits` with the arrays of `train` and `val`. `judged_uri` is the source whose own
    held-out part is what finished students are attacked on; absent, that is `val`.
    """

    out: str
    source: SourceConfig
    class_names: tuple[str, ...]
    split_unit: str
    judged_uri: str | None = None

    @property
    def store(self) -> Store:
        return Store(self.out)

    @property
    def splits(self) -> Room:
        """The room of `train` and `val`; nobody races for it."""
        return Room(self.store, "splits", "study")

    def source_of(self, part: str) -> PartSource:
        """Return `train` or `val` as a source: two different ones for the pipeline, and no more there are."""
        marker = self.splits.read_unit(self.split_unit)
        files = {
            f"{part}-{entry.sha256[:16]}": entry.size_bytes
            for entry in marker.files
            if f"/{part}-" in entry.key
        }
        return PartSource(self, part, files)

    def judged_source_of(self, part: str) -> Source:
        """Return the sources of what works after all training."""
        if part == "train" or self.judged_uri is None:
            return self.source_of(part)
        return open_source(self.judged_uri, self.source, split="val", class_names=self.class_names)

    def load(self, part: str) -> Labeled:
        return Labeled(*self.source_of(part)._load())


def uri_of(dataset: str, data: str | None) -> str:
    """Return where the real images of a recipe are, unless `data` says it."""
    return data or dataset.replace("_", "-")


def held_out_of(dataset: str) -> int:
    """Return how many training images of a recipe are `val`: 0 is the last tenth of every class."""
    return 5000 if dataset == "fashion_mnist" else 0


def make_place(
    out: str, uri: str, config: SourceConfig, held_out: int, imbalance: float = 1.0
) -> Place:
    """Store `train` and `val` of a source's training images under `out`, and return the place to work at.

    Args:
        out: Folder of the study.
        uri: Where the real images are; this function and `judge.open_test` alone are told.
        config: How they are read.
        held_out: Training images that become `val`: the last of the file; 0 takes the last tenth of every class.
        imbalance: Images of the first class of `train` over those of the last; between them the counts fall geometrically
            (the long-tailed profile of Cao et al. 2019). `val` is as it was.
    """
    source = open_source(uri, config, split="train")
    out = str(Path(out).absolute())
    room = Room(Store(out), "splits", "study")
    unit = f"{source.fingerprint()[:12]}-{config.image_size}px-{held_out}"
    if imbalance != 1:
        unit += f"-{imbalance:g}to1"
    if unit not in room.finished():
        whole = load_split(uri, config, "train")
        is_val_N = _val_rows(whole.labels_N, held_out)
        rows_N = np.flatnonzero(~is_val_N)
        if imbalance != 1:
            rows_N = rows_N[long_tailed(whole.labels_N[rows_N], imbalance)]
        parts = {"train": rows_N, "val": np.flatnonzero(is_val_N)}
        content = {}
        for part, rows_N in parts.items():
            content[_array_key(unit, part, "images")] = _npy(whole.images_NHWC[rows_N])
            content[_array_key(unit, part, "labels")] = _npy(whole.labels_N[rows_N])
        counts = {part: len(rows_N) for part, rows_N in parts.items()}
        room.commit_unit(unit, content, attempt=room.begin_unit(unit) or 1, metrics=counts)
    for entry in room.read_unit(unit).files:
        room.read(entry)  # verified here once: the processes map the files
    return Place(out=out, source=config, class_names=source.class_names, split_unit=unit)


def load_split(
    uri: str,
    config: SourceConfig,
    split: Literal["train", "val"],
    class_names: tuple[str, ...] | None = None,
) -> Labeled:
    """Return a split of a source as it is stored; `val` is the source's own held-out part, our test split."""
    source = open_source(uri, config, split=split, class_names=class_names)
    loaded = load_images(source, config, _MEMORY_BYTES)
    if loaded is None:
        raise DataError(f"{uri}: expected images that take at most 8 GiB decoded")
    keys, labels_N, images_NHWC, _ = loaded
    if all(key.isdecimal() for key in keys):
        # Array sources number their images; they come class by class and go back into the files' order.
        order_N = np.argsort([int(key) for key in keys])
        return Labeled(images_NHWC[order_N], labels_N[order_N])
    return Labeled(images_NHWC, labels_N)


def _val_rows(labels_N: np.ndarray, held_out: int) -> np.ndarray:
    is_val_N = np.zeros(len(labels_N), dtype=bool)
    if held_out:
        is_val_N[len(labels_N) - held_out :] = True
        return is_val_N
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        is_val_N[rows[len(rows) - len(rows) // 10 :]] = True
    return is_val_N


def long_tailed(labels_N: np.ndarray, imbalance: float) -> np.ndarray:
    """Return the rows that stay, ascending, when class c of Y may have `imbalance`^(-c / (Y - 1)) times the images of the first.

    A class keeps the first of its images, and all of them where it has fewer.
    """
    counts_Y = np.bincount(labels_N)
    last = max(1, len(counts_Y) - 1)
    shares = [
        np.flatnonzero(labels_N == label)[: max(1, round(counts_Y[0] * imbalance ** (-label / last)))]
        for label in range(len(counts_Y))
    ]  # fmt: skip
    return np.sort(np.concatenate(shares))


def _array_key(unit: str, part: str, kind: str) -> str:
    return f"{unit}/{part}-{kind}.npy"


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()
