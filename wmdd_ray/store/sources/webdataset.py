"""WebDataset: tar shards where consecutive members of one stem are a sample: `K.jpg`, `K.cls`."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import RawImage, Shard, Source, file_shard_id, reading
from wmdd_ray.store.sources.classes import MAX_CLASSES, integer_names, match_classes
from wmdd_ray.store.sources.listing import Listing, files_of_split
from wmdd_ray.store.sources.tar import Readable, tar_members

logger = logging.getLogger(__name__)

_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_LABEL_ENDINGS = ("cls", "json")
_MAX_LABEL_BYTES = 1 << 20
# WebDataset's rule: the stem ends at the first dot of the base name.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_KEY = re.compile(r"(.+)#(\d+):(\d+):(\d+)", re.DOTALL)


@dataclass(slots=True)
class _Sample:
    stem: str
    endings: list[str] = field(default_factory=list)
    offset: int = 0
    size_bytes: int = 0
    content: bytes | None = None
    label: int | None = None


class WebDatasetSource(Source):
    """Tar shards. The key of an image is where it lies, and its class: `FILE#OFFSET:SIZE:LABEL`."""

    format = "webdataset"

    @property
    def num_images(self) -> None:
        """Unknown: a tar file has no table of contents."""
        return

    def shards(self, chunk_images: int) -> list[Shard]:
        return [Shard(id=file_shard_id(i), file=file) for i, file in enumerate(self.files)]

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        where = self.url(shard.file)
        with reading(where, "a tar archive"), self.open_stream(shard.file) as stream:
            for sample in _samples(stream, where, self.max_content_bytes):
                yield self._record(shard.file, sample)

    def _record(self, file: str, sample: _Sample) -> RawImage:
        key = f"{file}#{sample.stem}"
        has_image = any(ending in _IMAGE_ENDINGS for ending in sample.endings)
        if not has_image:
            problem = (
                f"no image member ({', '.join(_IMAGE_ENDINGS)}), only {', '.join(sample.endings)}"
            )
        elif sample.label is None:
            problem = (
                'no label: expected an integer in .cls or {"label": integer} in .json, among '
                + ", ".join(sample.endings)
            )
        else:
            problem = self.too_large(sample.size_bytes)
        if problem:
            return RawImage(key=key, label=-1, content=b"", problem=problem)
        assert sample.label is not None and sample.content is not None
        label = self.class_of(sample.label, key)
        key = f"{file}#{sample.offset}:{sample.size_bytes}:{label}"
        return RawImage(key=key, label=label, content=sample.content)

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
    training shards are read once to find the largest.
    """
    files = files_of_split(listing, {n: s for n, s in listing.files.items() if is_tar(n)})
    source = WebDatasetSource(
        root=listing.root,
        files=files,
        config=listing.config,
        class_names=integer_names(MAX_CLASSES),
    )
    names = _class_names(source, files)
    relabel = None
    if listing.class_names is not None:
        relabel = match_classes(names, listing.class_names, listing.root) if names else None
        names = listing.class_names
    return WebDatasetSource(
        root=listing.root,
        files=files,
        config=listing.config,
        class_names=names or integer_names(_count_classes(source)),
        relabel=relabel,
    )


def _class_names(source: Source, files: dict[str, int]) -> tuple[str, ...] | None:
    folders = sorted({file.rpartition("/")[0] for file in files} | {""}, reverse=True)
    for folder, base in itertools.product(folders, ("classes.txt", "classes.json")):
        name = f"{folder}/{base}".lstrip("/")
        content = source.read_if_there(name)
        if content is None:
            continue
        try:
            return _parse_class_names(content.decode("utf-8"), base)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{source.url(name)}: expected one name a line (classes.txt), or a JSON list or an "
                f"object from label to name (classes.json), found otherwise ({error})"
            ) from error
    return None


def _parse_class_names(text: str, base: str) -> tuple[str, ...]:
    if base == "classes.txt":
        names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        parsed = json.loads(text)
        names = (
            [parsed[str(i)] for i in range(len(parsed))]
            if isinstance(parsed, dict)
            else list(parsed)
        )
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("no names, or names that are no strings")
    return tuple(names)


def _count_classes(source: WebDatasetSource) -> int:
    """Return one more than the largest label, by reading every shard once."""
    logger.warning(
        "%s: no classes.txt or classes.json beside the shards, so all %d are read to count classes",
        source.root,
        len(source.files),
    )
    largest = -1
    for file in source.files:
        where = source.url(file)
        with reading(where, "a tar archive"), source.open_stream(file) as stream:
            for sample in _samples(stream, where, max_content_bytes=0):
                if sample.label is not None:
                    largest = max(largest, source.class_of(sample.label, f"{file}#{sample.stem}"))
    if largest < 0:
        raise DataError(
            f"{source.root}: expected samples with labels (KEY.jpg and KEY.cls), found no label"
        )
    return largest + 1


def _samples(stream: Readable, where: str, max_content_bytes: int) -> Iterator[_Sample]:
    """Group members into samples; a stem with neither image nor label (a license) is none."""

    def wanted(name: str, size_bytes: int) -> bool:
        ending = _split_name(name)[1]
        if ending in _IMAGE_ENDINGS:
            return size_bytes <= max_content_bytes
        return ending in _LABEL_ENDINGS and size_bytes <= _MAX_LABEL_BYTES

    members = tar_members(stream, where, wanted)
    named = ((_split_name(member.name), member) for member in members)
    for stem, group in itertools.groupby(named, key=lambda pair: pair[0][0]):
        if not stem:
            # groupby needs its group consumed before it goes on, and does so by itself.
            continue
        sample = _Sample(stem)
        for (_, ending), member in group:
            sample.endings.append(ending)
            if ending in _IMAGE_ENDINGS and not sample.size_bytes:
                sample.offset, sample.size_bytes, sample.content = (
                    member.offset,
                    member.size_bytes,
                    member.content,
                )
            elif (
                ending in _LABEL_ENDINGS
                and member.content is not None
                and (ending == "cls" or sample.label is None)
            ):
                sample.label = _parse_label(member.content, ending)
        if any(ending in (*_IMAGE_ENDINGS, *_LABEL_ENDINGS) for ending in sample.endings):
            yield sample


def _split_name(name: str) -> tuple[str, str]:
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def _parse_label(content: bytes, ending: str) -> int | None:
    try:
        if ending == "cls":
            return int(content)
        label = json.loads(content)["label"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return label if type(label) is int else None
