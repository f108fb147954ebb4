"""Sources small enough to be one array: scikit-learn's digits, and IDX files (MNIST and kin)."""

from __future__ import annotations

import abc
import gzip
import io
import math
import re
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

import numpy as np

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.store.sources.base import RawImage, Shard, Source, class_shards
from wmdd_ray.store.sources.classes import integer_names, match_classes
from wmdd_ray.store.sources.files import reading
from wmdd_ray.store.sources.labels import found_classes, label_of, number_places
from wmdd_ray.store.sources.listing import Listing, Split, no_such_split

_IDX_NAME = re.compile(r"(?:.*[-/])?(train|t10k|test|val)-images[-.]idx[34]-ubyte(\.gz)?")
_IDX_SPLITS = {"train": ("train",), "val": ("val", "t10k", "test")}
_UBYTE = 0x08
# Images shrink to a fifth; deflate could make a thousand bytes of one.
MAX_GZIP_RATIO, FREE_BYTES = 100, 1 << 20
# The IDX files carry no names; https://github.com/zalandoresearch/fashion-mnist lists these.
_FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# A whole part of a path: `old-fashioned/mnist` is none.
_FASHION = re.compile(
    r"(?i)(?:^|/)(?:dataset-)?fashion(?:[-_]?mnist)?(?:/|-(?:train|t10k|test|val)-images)"
)

_NUM_DIGITS = 1797
_TEST_DIGITS_PER_CLASS = 36


class ArraySource(Source):
    """Images that are held whole by whoever reads: the key of an image is its index.

    The arrays are loaded at the first read and stay with this copy of the source: keep one in an
    actor.
    """

    _transient = (*Source._transient, "_arrays")

    _arrays: tuple[np.ndarray, np.ndarray] | None = None

    @abc.abstractmethod
    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (images uint8 NHW or NHWC, labels_N as the files number them)."""

    def _loaded(self) -> tuple[np.ndarray, np.ndarray]:
        if self._arrays is None:
            images, numbers_N = self._load()
            values, first, place_N = np.unique(numbers_N, return_index=True, return_inverse=True)
            classes = []
            for value, i in zip(values, first, strict=True):
                label = label_of(int(value), self.config.numbers)
                assert label is not None, "a byte is never -1"
                classes.append(self.class_of(label, str(i)))
            self._arrays = images, np.array(classes, dtype=np.int64)[place_N]
        return self._arrays

    @property
    def num_images(self) -> int:
        return len(self._loaded()[1])

    def shards(self, chunk_images: int) -> list[Shard]:
        labels_N = self._loaded()[1]
        by_label = (
            (int(y), [str(i) for i in np.flatnonzero(labels_N == y)]) for y in np.unique(labels_N)
        )
        return class_shards(by_label, chunk_images)

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        yield from self.read_keys(shard.keys)

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        images, labels_N = self._loaded()
        for key in keys:
            if not (re.fullmatch("[0-9]{1,18}", key) and int(key) < len(labels_N)):
                raise DataError(
                    f"{self.root}: no image {key!r}, expected an index below {len(labels_N)}"
                )
        return [
            RawImage(key=key, label=int(labels_N[int(key)]), content=images[int(key)])
            for key in keys
        ]


class DigitsSource(ArraySource):
    """1797 handwritten digits of 8 x 8 pixels from scikit-learn: 1437 to train, 360 held out."""

    format = "digits"

    def __init__(self, config: SourceConfig, split: Split, class_names: tuple[str, ...]) -> None:
        # There is no file, but the fingerprint must tell the splits apart.
        num_held_out = 10 * _TEST_DIGITS_PER_CLASS
        num_images = num_held_out if split == "val" else _NUM_DIGITS - num_held_out
        super().__init__("digits", {split: num_images * 64}, config, class_names)
        self.split = split

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        # Imported here: half a second, for this source alone.
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ConfigError(
                "the digits come with scikit-learn, which is not installed: pip install scikit-learn, or name other images"
            ) from error

        digits = load_digits()
        images_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        labels_N = digits.target.astype(np.int64)
        # RandomState is the one generator whose stream NumPy has frozen: the split stays as it is
        # for ever.
        order = np.random.RandomState(0).permutation(len(labels_N))
        held_out = np.zeros(len(labels_N), dtype=bool)
        for label in range(len(digits.target_names)):
            held_out[order[labels_N[order] == label][:_TEST_DIGITS_PER_CLASS]] = True
        chosen = held_out if self.split == "val" else ~held_out
        return images_NHW[chosen], labels_N[chosen]


def open_digits(
    config: SourceConfig, split: Split, class_names: tuple[str, ...] | None
) -> DigitsSource:
    """Return one split of the embedded digits."""
    names = integer_names(10)
    if class_names is not None and match_classes(names, class_names, "digits") is not None:
        raise DataError(f"digits: expected the classes 0 to 9 in this order, got {class_names}")
    return DigitsSource(config, split, names)


class IdxSource(ArraySource):
    """A pair of IDX files. They hold no class names."""

    format = "idx"

    def __init__(self, listing: Listing, images_file: str, labels_file: str) -> None:
        files = {name: listing.files[name] for name in sorted((images_file, labels_file))}
        super().__init__(listing.root, files, listing.config)
        self.images_file = images_file
        self.labels_file = labels_file
        self.sizes = files  # stays with a copy, unlike the listing

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        images = _read_idx(self, self.images_file, (3, 4))
        labels_N = _read_idx(self, self.labels_file, (1,)).astype(np.int64)
        if len(images) != len(labels_N) or not len(images):
            raise DataError(
                f"{self.url(self.images_file)}: expected as many images as labels and at least "
                f"one, found {len(images)} images and {len(labels_N)} labels; restore both files"
            )
        return images, labels_N


def is_idx(name: str) -> bool:
    """Return whether a file holds the images of an IDX pair."""
    return _IDX_NAME.fullmatch(name) is not None


def open_idx(listing: Listing) -> IdxSource:
    """Return the IDX pair of the split, as MNIST names it (`train-...`, `t10k-...`)."""
    kinds = {name: match[1] for name in listing.files if (match := _IDX_NAME.fullmatch(name))}
    for split in _IDX_SPLITS[listing.split]:
        images_files = [name for name, found_split in kinds.items() if found_split == split]
        if images_files:
            break
    else:
        raise no_such_split(listing, list(kinds))
    if len(images_files) > 1:
        raise DataError(
            f"{listing.root}: expected one file of {split} images, found {', '.join(images_files)}"
            "; pass a folder that holds one data set"
        )
    images_file = images_files[0]
    stem = re.sub(r"images([-.])idx[34]-ubyte(\.gz)?$", r"labels\1idx1-ubyte", images_file)
    labels_file = next((name for name in (stem, stem + ".gz") if name in listing.files), None)
    if labels_file is None:
        raise DataError(
            f"{listing.root}: found {images_file} but not its labels, {stem} or {stem}.gz"
        )
    source = IdxSource(listing, images_file, labels_file)
    wanted, numbers = listing.class_names, listing.config.numbers
    is_fashion = _FASHION.search(f"{listing.root}/{images_file}") is not None
    if wanted is not None:
        # The training labels, whose names no file holds.
        same = is_fashion and wanted == _FASHION_NAMES
        source.name_classes(wanted, None if same else number_places(wanted, numbers))
        return source
    values = np.unique(_read_idx(source, labels_file, (1,)))
    labels = (label_of(int(value), numbers) for value in values)
    # Of no labels, the file is told when it is read.
    present = {label: labels_file for label in labels if label is not None} or {0: labels_file}
    names, places = found_classes(present, numbers, listing.root)
    if is_fashion and names == integer_names(len(_FASHION_NAMES)):
        names = _FASHION_NAMES
    source.name_classes(names, places)
    return source


def _read_idx(source: IdxSource, file: str, expected_dims: tuple[int, ...]) -> np.ndarray:
    """Return an IDX array of unsigned bytes, read-only.

    Raises:
        DataError: Another type or rank, or more or fewer bytes than the header says.
    """
    where = source.url(file)
    what = f"an IDX file of unsigned bytes with {' or '.join(map(str, expected_dims))} dimensions"
    try:
        with reading(where, what), source.open_random(file, source.sizes[file]) as handle:
            stored = handle.read()
            is_gzip = file.endswith(".gz")
            limit_bytes = len(stored) * (MAX_GZIP_RATIO if is_gzip else 1) + FREE_BYTES
            stream: BinaryIO = io.BytesIO(stored)
            if is_gzip:
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
            zeros, kind, num_dims = struct.unpack(">HBB", stream.read(4))
            if zeros or kind != _UBYTE or num_dims not in expected_dims:
                raise DataError(
                    f"{where}: expected {what}, found type {kind:#x} with {num_dims} dimensions"
                )
            shape = struct.unpack(f">{num_dims}I", stream.read(4 * num_dims))
            size_bytes = math.prod(shape)
            content = stream.read(size_bytes + 1) if size_bytes <= limit_bytes else b""
    except struct.error as error:
        raise DataError(
            f"{where}: expected {what}, found cut or malformed content ({error})"
        ) from error
    if len(content) != size_bytes:
        amount = "more" if len(content) > size_bytes else "fewer"
        raise DataError(
            f"{where}: expected {size_bytes} bytes after the header {shape}, found {amount}; "
            "restore the file"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
