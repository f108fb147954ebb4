"""WebDataset: tar shards where consecutive members of one stem are a sample: `K.jpg`, `K.cls`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import RawImage, Shard, Source, file_shard_id
from wmdd_ray.store.sources.classes import MAX_CLASSES, integer_names, match_classes
from wmdd_ray.store.sources.files import reading
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

    def __init__(
        self,
        *,
        root: str,
        files: dict[str, int],
        config: SourceConfig,
        class_names: tuple[str, ...],
        relabel: tuple[int, ...] | None = None,
        counts: dict[str, int] | None = None,
    ) -> None:
        super().__init__(
            root=root, files=files, config=config, class_names=class_names, relabel=relabel
        )
        self._counts = counts or {}

    @property
    def num_images(self) -> int | None:
        """Unknown without an index: a tar file has no table of contents."""
        known = self._counts.keys() >= self.files.keys()
        return sum(self._counts[file] for file in self.files) if known else None

    def shards(self, chunk_images: int) -> list[Shard]:
        return [
            Shard(
                id=file_shard_id(i),
                file=file,
                num_images=self._counts.get(file),
                sizes=(size_bytes,),
            )
            for i, (file, size_bytes) in enumerate(self.files.items())
        ]

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        where = self.url(shard.file)
        count = 0
        passed = Tally()
        with (
            reading(where, "a tar archive"),
            self.open_stream(shard.file, shard.size_bytes) as stream,
        ):
            for sample in samples(
                stream, where, self.max_content_bytes, keys=self.config.tar_keys, passed=passed
            ):
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
        elif not sample.has_image:
            problem = f"no image member (jpg, png, webp, ...), only {sample.shown_endings}"
        elif sample.label is None:
            problem = (
                'no label: expected an integer in .cls or {"label": integer} in .json, among '
                + sample.shown_endings
            )
        else:
            problem = self.too_large(sample.size_bytes)
        if problem:
            return RawImage(key=key, label=-1, content=b"", problem=problem)
        assert sample.label is not None and sample.content is not None
        label = self.class_of(sample.label, key)
        key = f"{file}#{sample.offset}:{sample.size_bytes}:{label}"
        return RawImage(key=key, label=label, content=sample.content)

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
        found: dict[int, RawImage] = {}
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
                    found[position] = RawImage(key=keys[position], label=label, content=content)
        return [found[position] for position in range(len(keys))]

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
    label to name) beside the shards or at the root. Without them the classes are integers, and the
    training shards are read once to find the largest. Samples are counted against `_info.json` or `sizes.json`.
    """
    files = files_of_split(listing, {n: s for n, s in listing.files.items() if is_tar(n)})
    source = WebDatasetSource(
        root=listing.root,
        files=files,
        config=listing.config,
        class_names=integer_names(MAX_CLASSES),
    )
    names = read_class_names(source)
    relabel = None
    if listing.class_names is not None:
        relabel = match_classes(names, listing.class_names, listing.root) if names else None
        names = listing.class_names
    opened = WebDatasetSource(
        root=listing.root,
        files=files,
        config=listing.config,
        class_names=names or integer_names(_count_classes(source)),
        relabel=relabel,
        counts=read_counts(source, listing.files),
    )
    opened.read_beside = source.read_beside
    return opened


def _count_classes(source: WebDatasetSource) -> int:
    """Return one more than the largest label, by reading every shard once."""
    logger.warning(
        "%s: no classes.txt or classes.json beside the shards, so all %d are read to count classes",
        source.root,
        len(source.files),
    )
    largest = -1
    for file, size_bytes in source.files.items():
        where = source.url(file)
        with reading(where, "a tar archive"), source.open_stream(file, size_bytes) as stream:
            for sample in samples(stream, where, max_content_bytes=0, keys=source.config.tar_keys):
                if sample.label is not None:
                    largest = max(largest, source.class_of(sample.label, f"{file}#{sample.stem}"))
    if largest < 0:
        raise DataError(
            f"{source.root}: expected samples with labels (KEY.jpg and KEY.cls), found no label"
        )
    return largest + 1
