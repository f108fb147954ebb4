"""WebDataset: tar shards where consecutive members of one stem are a sample: `K.jpg`, `K.cls`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import RawImage, Shard, Source
from wmdd_ray.store.sources.classes import MAX_CLASSES
from wmdd_ray.store.sources.files import reading
from wmdd_ray.store.sources.labels import Label, beside_classes, found_classes
from wmdd_ray.store.sources.listing import Listing, files_of_split
from wmdd_ray.store.sources.passed import Tally
from wmdd_ray.store.sources.samples import Sample, samples
from wmdd_ray.store.sources.webdataset_index import read_class_names, read_counts

logger = logging.getLogger(__name__)

_KEY = re.compile(r"(.+)#([0-9]{1,18}):([0-9]{1,18}):([0-9]{1,18})", re.DOTALL)


class WebDatasetSource(Source):
    """Tar shards. The key of an image is where it lies, and its class: `FILE#OFFSET:SIZE:LABEL`."""

    format = "webdataset"
    _transient = (*Source._transient, "_counts")

    _counts: Mapping[str, int] = MappingProxyType({})

    def count(self, counts: dict[str, int]) -> None:
        """Expect as many samples of each shard as an index says."""
        self._counts = counts

    @property
    def num_images(self) -> int | None:
        """Unknown without an index: a tar file has no table of contents."""
        known = self._counts.keys() >= self.files.keys()
        return sum(self._counts[file] for file in self.files) if known else None

    def shards(self, chunk_images: int) -> list[Shard]:
        return self._file_shards(self._counts)

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        return self._records(shard, self.max_content_bytes)

    def images_in(self, shard: Shard) -> tuple[list[str], np.ndarray]:
        """Return key and class (int64 N, -1 of a bad one) of every sample of a shard, keeping no image."""
        named = [(record.key, record.label) for record in self._records(shard, 0)]
        return [key for key, _ in named], np.array([y for _, y in named], dtype=np.int64)

    def _records(self, shard: Shard, max_content_bytes: int) -> Iterator[RawImage]:
        where = self.url(shard.file)
        count = 0
        passed = Tally()
        with (
            reading(where, "a tar archive"),
            self.open_stream(shard.file, shard.size_bytes) as stream,
        ):
            for sample in samples(stream, where, max_content_bytes, self.config, passed):
                count += 1
                yield self._record(shard.file, sample)
        self.passed_inside = passed.groups()
        if shard.num_images not in (None, count):
            raise DataError(
                f"{where}: expected {shard.num_images} samples as the index beside it says, found "
                f"{count}; restore the shard, or correct the index"
            )

    def _record(self, file: str, sample: Sample) -> RawImage:
        key = f"{file}#{sample.stem}"
        if sample.problem:
            problem = sample.problem
        elif not sample.offset:
            endings = self.config.image_column or "jpg, png, webp, ..."
            problem = f"no image member ({endings}), only {sample.shown_endings}"
        elif sample.label is None:
            column = self.config.label_column
            expected = (
                f'{{"{column}": ...}} in .json'
                if column
                else 'a number or a name in .cls or {"label": ...} in .json'
            )
            problem = (
                f"{sample.no_label}: expected {expected} (-1 is none), among {sample.shown_endings}"
            )
        else:
            problem = self.too_large(sample.size_bytes)
        if problem:
            return RawImage(key=key, label=-1, content=b"", problem=problem)
        assert sample.label is not None
        label = self.class_of(sample.label, key)
        key = f"{file}#{sample.offset}:{sample.size_bytes}:{label}"
        return RawImage(key=key, label=label, content=sample.content or b"")

    def fingerprint(self) -> str:
        """Return a SHA-256 over what is read, and over where keys end if that is not webdataset's rule. Driver only."""
        plain = super().fingerprint()
        if self.config.tar_keys != "last-dot":
            return plain
        return hashlib.sha256(f"{plain} last-dot".encode()).hexdigest()

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        by_file: dict[str, list[int]] = {}
        places = [self._place(key) for key in keys]
        for position, (file, _, _, _) in enumerate(places):
            by_file.setdefault(file, []).append(position)
        images: dict[int, RawImage] = {}
        for file, positions in by_file.items():
            with reading(self.url(file), "a tar archive"), self.open_random(file) as handle:
                for position in positions:
                    _, offset, size_bytes, label = places[position]
                    content = handle.read_at(size_bytes, offset)
                    if len(content) < size_bytes:
                        raise DataError(
                            f"{self.url(file)}: expected {size_bytes} bytes at {offset}, found "
                            f"{len(content)}; the file was changed since the key was made"
                        )
                    images[position] = RawImage(key=keys[position], label=label, content=content)
        return [images[position] for position in range(len(keys))]

    def _place(self, key: str) -> tuple[str, int, int, int]:
        match = _KEY.fullmatch(key)
        if match is None or ".." in match[1].split("/"):
            raise DataError(f"{self.root}: no image {key!r}, expected FILE#OFFSET:SIZE:LABEL")
        offset, size_bytes, label = (int(number) for number in match.groups()[1:])
        if size_bytes > self.max_content_bytes or label >= len(self.class_names):
            raise DataError(f"{self.root}: image {key!r} has an impossible size or label")
        return match[1], offset, size_bytes, label


def is_tar(name: str) -> bool:
    """Return whether a file is a tar shard."""
    return name.lower().endswith(".tar")


def open_webdataset(listing: Listing) -> WebDatasetSource:
    """Return the tar shards of the split.

    Class names come from `classes.txt` (a name a line) or `classes.json` (a list, or an object from
    label to name) beside the shards or at the root. Without them the training shards are read once to find the labels. Samples
    are counted against `_info.json` or `sizes.json`.
    """
    files = files_of_split(listing, {n: s for n, s in listing.files.items() if is_tar(n)})
    source = WebDatasetSource(listing.root, files, listing.config)
    numbers = listing.config.numbers
    names, places = beside_classes(
        read_class_names(source), listing.class_names, numbers, listing.root
    )
    if names is None:
        names, places = found_classes(_found_labels(source), numbers, listing.root)
    source.name_classes(names, places)
    source.count(read_counts(source, listing.files))
    return source


def _found_labels(source: WebDatasetSource) -> dict[Label, str]:
    """Return the labels that there are, and an image of each, by reading every shard once."""
    logger.warning(
        "%s: no classes.txt or classes.json beside the shards, so all %d are read to find the classes",
        source.root,
        len(source.files),
    )
    examples: dict[Label, str] = {}
    for file, size_bytes in source.files.items():
        where = source.url(file)
        with reading(where, "a tar archive"), source.open_stream(file, size_bytes) as stream:
            for sample in samples(stream, where, 0, source.config):
                if sample.label is not None:
                    examples.setdefault(sample.label, f"{file}#{sample.stem}")
                    if len(examples) > MAX_CLASSES:
                        raise DataError(
                            f"{where}: expected at most {MAX_CLASSES} classes, found more"
                        )
    return examples
