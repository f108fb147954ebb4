"""CIFAR-10 and CIFAR-100 in the binary version that their authors publish, unpacked or not.

A record is a byte a label (one, or of CIFAR-100 the coarse and the fine one), then 32 x 32 pixels of red, of green, of blue
(https://www.cs.toronto.edu/~kriz/cifar.html). The python version is pickles, which can run any code and are never read.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.arrays import FREE_BYTES, MAX_GZIP_RATIO, ArraySource
from wmdd_ray.store.sources.classes import match_classes
from wmdd_ray.store.sources.files import reading
from wmdd_ray.store.sources.labels import found_classes, label_of, number_places
from wmdd_ray.store.sources.listing import Listing, no_such_split
from wmdd_ray.store.sources.tar import Readable, tar_members

_BATCH = re.compile(r"(?:.*/)?(data_batch_[1-9]|test_batch|train|test)\.bin")
_ARCHIVE = re.compile(r"(?:.*/)?cifar-100?-binary\.tar\.gz")
_PICKLE = re.compile(
    r"(?:.*/)?(?:data_batch_[1-9]|test_batch|batches\.meta|cifar-100?-python\.tar\.gz|cifar-100-python/(?:train|test|meta))"
)
_DOWNLOADS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz or cifar-100-binary.tar.gz"
_PIXELS = 3 * 32 * 32
# All 50,000 training images of CIFAR-100.
_MAX_BATCH_BYTES = 50_000 * (2 + _PIXELS)
_NAMES = {
    "label": "batches.meta.txt",
    "fine_label": "fine_label_names.txt",
    "coarse_label": "coarse_label_names.txt",
}


class CifarSource(ArraySource):
    """The binary batches of one split."""

    format = "cifar"

    def __init__(self, listing: Listing, files: dict[str, int], column: str) -> None:
        super().__init__(listing.root, files, listing.config)
        self.split = listing.split
        self.column = column
        # Stay with a copy, unlike the listing.
        self.sizes = files

    def _numbering(self) -> object:
        # One archive holds both splits, and both kinds of label.
        return [self.places, self.split, self.column]

    def contents(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of the files that are wanted by their names, in the archive or beside each other."""
        for file, size_bytes in self.sizes.items():
            where = self.url(file)
            if not _ARCHIVE.fullmatch(file):
                if not is_wanted(file):
                    continue
                with reading(where, "a file"), self.open_random(file, size_bytes) as handle:
                    if handle.size() > _MAX_BATCH_BYTES:
                        raise _not_whole(where, self.column, handle.size())
                    yield file, handle.read()
                continue
            with (
                reading(where, "a tar archive"),
                self.open_stream(file, size_bytes) as stream,
                gzip.GzipFile(fileobj=stream) as unpacked,
            ):
                for member in tar_members(
                    cast(Readable, unpacked),
                    where,
                    lambda name, size: is_wanted(name) and size <= _MAX_BATCH_BYTES,
                ):
                    if member.content is not None:
                        yield member.name, member.content

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        num_labels = 1 if self.column == "label" else 2
        records = []
        most = min(_MAX_BATCH_BYTES, MAX_GZIP_RATIO * sum(self.sizes.values()) + FREE_BYTES)
        for name, content in self._batches(most):
            if not content or len(content) % (num_labels + _PIXELS):
                raise _not_whole(self.url(name), self.column, len(content))
            pixels = np.frombuffer(content, np.uint8).reshape(-1, num_labels + _PIXELS)
            records.append(pixels)
        if not records:
            raise DataError(
                f"{self.root}: expected batches of CIFAR's {self.split} images, found none"
            )
        records_NR = np.concatenate(records)
        images_NCHW = records_NR[:, num_labels:].reshape(-1, 3, 32, 32)
        at = 1 if self.column == "fine_label" else 0
        return np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1)), records_NR[:, at]

    def _batches(self, most_bytes: int) -> list[tuple[str, bytes]]:
        """Return the batches of the split by name, all together of at most that size."""
        contents: dict[str, bytes] = {}
        for name, content in self.contents(self._is_batch):
            if name in contents or sum(map(len, contents.values())) + len(content) > most_bytes:
                raise DataError(
                    f"{self.url(next(iter(self.sizes)))}: expected each batch of CIFAR once, {most_bytes} bytes of images at most, "
                    f"found more at {name}; restore the file from its origin"
                )
            contents[name] = content
        return sorted(contents.items())

    def _is_batch(self, name: str) -> bool:
        batch = _BATCH.fullmatch(name)
        return batch is not None and _split_of(batch[1]) == self.split


def is_cifar(name: str) -> bool:
    """Return whether a file is of a version of CIFAR, the one that cannot be read included."""
    return any(pattern.fullmatch(name) for pattern in (_BATCH, _ARCHIVE, _PICKLE))


def open_cifar(listing: Listing) -> CifarSource:
    """Return the binary batches of the split; classes are named by the lists beside them."""
    files = [name for name in listing.files if is_cifar(name)]
    batches = {name: match[1] for name in files if (match := _BATCH.fullmatch(name))}
    archives = [name for name in files if _ARCHIVE.fullmatch(name)]
    if not batches and not archives:
        raise DataError(
            f"{listing.root}: expected the binary version of CIFAR, found the python one ({files[0]}), whose pickles can run any "
            f"code and are never read; take {_DOWNLOADS}"
        )
    folders = {name.rpartition("/")[0] for name in batches}
    if len(folders) > 1 or (not batches and len(archives) > 1):
        raise DataError(
            f"{listing.root}: expected one data set, found {', '.join(sorted(folders or archives))}; pass the one that is meant"
        )
    kinds = {len(batch) > 5 for batch in batches.values()} or {"cifar-10-" in archives[0]}
    column = "label" if True in kinds else listing.config.label_column or "fine_label"
    if column not in _NAMES or (column == "label") != (True in kinds):
        raise DataError(
            f"{listing.root}: expected --source.label-column fine_label or coarse_label, which CIFAR-100 has, got {column}"
        )
    if batches:
        own = {name for name, batch in batches.items() if _split_of(batch) == listing.split}
        if not own:
            raise no_such_split(listing, list(batches))
        names_file = f"{folders.pop()}/{_NAMES[column]}".lstrip("/")
        chosen = sorted(own | ({names_file} & listing.files.keys()))
    else:
        chosen = archives
    source = CifarSource(listing, {name: listing.files[name] for name in chosen}, column)
    _name_classes(source, listing)
    return source


def _name_classes(source: CifarSource, listing: Listing) -> None:
    own = None
    names_file = _NAMES[source.column]
    for _, content in source.contents(lambda name: name.rpartition("/")[2] == names_file):
        lines = content.decode("utf-8", "replace").splitlines()
        own = tuple(line.strip() for line in lines if line.strip()) or None
    wanted, numbers = listing.class_names, listing.config.numbers
    if own is not None:
        places = (
            None
            if wanted is None
            else match_classes(own, wanted, source.root, held_out=listing.split == "val")
        )
        source.name_classes(wanted or own, places)
    elif wanted is not None:
        source.name_classes(wanted, number_places(wanted, numbers))
    else:
        _, numbers_N = source._load()
        labels = (label_of(int(value), numbers) for value in np.unique(numbers_N))
        present = {label: source.root for label in labels if label is not None}
        source.name_classes(*found_classes(present, numbers, source.root))


def _split_of(batch: str) -> str:
    return "val" if batch.startswith("test") else "train"


def _not_whole(where: str, column: str, size_bytes: int) -> DataError:
    record = _PIXELS + (1 if column == "label" else 2)
    return DataError(
        f"{where}: expected CIFAR's records of {record} bytes, at most 50,000, found {size_bytes} bytes; restore the file, or name "
        "the format by --source.format"
    )
