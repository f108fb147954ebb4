"""Real images in three parts: `train` and `val` lie in the table's folder; `test` does not (`judge.py`).

Everything that is trained, selected or tuned is handed a `Workplace`, which knows the folder and no address of the data; who
knows one nevertheless finds the test images closed while a unit works.

Legend: N images, H W pixels, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import load_images, open_source

Split = Literal["val", "test"]
_MEMORY_BYTES = 4 << 30
# Of the process, so that it holds for every thread of it too.
_test_is_closed = False


@dataclass(frozen=True, eq=False)
class Labeled:
    """Real images (uint8 NHWC) and their labels (int64), in the order of their files."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray

    def of_class(self, label: int) -> np.ndarray:
        """Return the rows of a class, ascending."""
        return np.flatnonzero(self.labels_N == label)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What all training is handed: the folder of the table, how pixels are normalized, the device.

    `split_unit` names the unit of the room `splits` with the arrays of `train` and `val`, and `data` is their fingerprint.
    """

    out: str
    source: SourceConfig
    class_names: tuple[str, ...]
    split_unit: str
    data: str
    device: str = "cpu"

    def room(self, name: str) -> Room:
        """Return a room of the folder; units of one place never race, so its token is the folder's name."""
        return Room(Store(self.out), name, "accuracy")

    @cached_property
    def train(self) -> Labeled:
        """What everything is trained on and selected from; memory-mapped."""
        return self._mapped("train")

    @cached_property
    def val(self) -> Labeled:
        """The part of the training images that was held out: for the teacher's record and for choosing options."""
        return self._mapped("val")

    def _mapped(self, part: str) -> Labeled:
        folder = Path(self.out) / "splits"
        images, labels = (
            np.load(folder / _array_key(self.split_unit, part, kind), mmap_mode="r")
            for kind in ("images", "labels")
        )
        return Labeled(images, labels)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: a process opens its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("train", "val")}


def make_splits(
    out: str, uri: str, config: SourceConfig, held_out: int, device: str, imbalance: float = 1.0
) -> Workplace:
    """Store `train` and `val` of a source's training images under `out`, and return the place to work at.

    Args:
        out: Folder of the table.
        uri: Where the real images are; this function and `judge.open_test` alone are told.
        config: How they are read.
        held_out: Training images that become `val`: the last of the file; 0 takes the last tenth of every class.
        device: Torch device that everything is computed on.
        imbalance: Images of the first class of `train` over those of the last; between them the counts fall geometrically
            (the long-tailed profile of Cao et al. 2019). `val` is as it was.
    """
    source = open_source(uri, config, split="train")
    room = Room(Store(out), "splits", "accuracy")
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
    marker = room.read_unit(unit)
    for entry in marker.files:
        room.read(entry)  # verified here once: the processes map the files
    return Workplace(
        out=str(Path(out).absolute()),
        source=config,
        class_names=source.class_names,
        split_unit=unit,
        data="-".join(entry.sha256[:8] for entry in marker.files),
        device=device,
    )


@contextmanager
def closed_test() -> Iterator[None]:
    """Keep the test split closed within: who trains, selects or labels there has not seen it."""
    global _test_is_closed
    before, _test_is_closed = _test_is_closed, True
    try:
        yield
    finally:
        _test_is_closed = before


def load_split(
    uri: str,
    config: SourceConfig,
    split: Literal["train", "val"],
    class_names: tuple[str, ...] | None = None,
) -> Labeled:
    """Return a split of a source as it is stored; `val` is the source's own held-out part, our test split.

    Raises:
        ConfigError: The test split is asked for while a unit works.
    """
    if _test_is_closed and split != "train":
        raise ConfigError(
            f"the test split of {uri} stays closed while a unit works: its images are read when everything is trained; train "
            "on `Workplace.train` and choose on `Workplace.val`"
        )
    source = open_source(uri, config, split=split, class_names=class_names)
    loaded = load_images(source, config, _MEMORY_BYTES)
    if loaded is None:
        raise DataError(f"{uri}: expected images that take at most 4 GiB decoded")
    keys, labels_N, images_NHWC, _ = loaded
    # Array sources number their images; they come class by class and go back into the files' order.
    order_N = np.argsort([int(key) for key in keys])
    return Labeled(images_NHWC[order_N], labels_N[order_N])


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
