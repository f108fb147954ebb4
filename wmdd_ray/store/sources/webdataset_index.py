"""What lies beside WebDataset shards: names of the classes, and how many samples each shard holds."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wmdd_ray.config import Numbers
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import Source
from wmdd_ray.store.sources.classes import plain, shown
from wmdd_ray.store.sources.patterns import expand_braces

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"([0-9]{1,9})[\s,:;]+\S")
_CLASS_FILES = ("classes.txt", "classes.json")
_MAX_PATTERN_CHARS = 1024


def has_class_names(source: Source) -> bool:
    """Return whether names of classes lie beside the shards or at the root."""
    return any(True for _ in _beside(source, _CLASS_FILES))


def read_class_names(source: Source) -> tuple[str, ...] | None:
    """Return the class names of `classes.txt`, or else `classes.json`, of a folder; None when there is neither.

    Raises:
        DataError: A file is none of names, its lines are numbered otherwise than labels are, or two folders have other names.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, content in _beside(source, _CLASS_FILES):
        folder, _, base = name.rpartition("/")
        if folder in found:
            continue
        try:
            names = parse_class_names(content.decode("utf-8-sig"), base)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{source.url(name)}: expected one name a line (classes.txt), or a JSON list or an "
                f"object from label to name (classes.json), found otherwise ({error})"
            ) from error
        if base == "classes.txt":
            _refuse_other_numbers(names, source.config.numbers, source.url(name))
        found[folder] = name, names
    for name, names in found.values():
        first_name, first = next(iter(found.values()))
        if [*map(plain, names)] != [*map(plain, first)]:
            raise DataError(
                f"{source.root}: expected the same class names beside all files, found others in {first_name} ({shown(first)}) and "
                f"in {name} ({shown(names)}); make them alike, or pass one of these folders alone"
            )
    return next((names for _, names in found.values()), None)


def _refuse_other_numbers(names: Sequence[str], numbers: Numbers, where: str) -> None:
    """Refuse `1 dog`, `0 cat`: lines that all begin with a number, which is another than that of their place."""
    told = [int(match[1]) for name in names if (match := _NUMBERED.match(name))]
    first = int(numbers == "index-from-1")
    if numbers == "name" or len(told) < len(names):
        return
    for place, (number, name) in enumerate(zip(told, names, strict=True), first):
        if number != place:
            raise DataError(
                f"{where}: expected the name of number {place} in line {place - first + 1}, found {name!r}, which may be that of "
                f"{number}; sort the lines by what number labels are, take the numbers off, or, where they are parts of the names, "
                "write these as a list into classes.json instead"
            )


def parse_class_names(text: str, base: str) -> tuple[str, ...]:
    """Return the names in a file of one name a line, or, where `base` ends in .json, in a list or an object."""
    if not base.endswith(".json"):
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


def read_counts(source: Source, listed: Mapping[str, int]) -> dict[str, int]:
    """Return the samples of each shard of a split that `_info.json` (timm) or `sizes.json` (webdataset) names.

    `listed` are all names under the root: a listing that holds the index must hold all shards that the index names.

    Raises:
        DataError: A shard that the index names is not there.
    """
    counts: dict[str, int] = {}
    for name, content in _beside(source, ("_info.json", "sizes.json")):
        folder = name.rpartition("/")[0]
        try:
            by_file = _parse_counts(json.loads(content), name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning(
                "%s: is no index of shards, so samples are not counted against it (%r)",
                source.url(name), error,
            )  # fmt: skip
            continue
        named = {f"{folder}/{file}".lstrip("/"): count for file, count in by_file.items()}
        missing = sorted(named.keys() - listed.keys()) if name in listed else []
        if missing:
            raise DataError(
                f"{source.url(name)}: names {len(named)} shards, {len(missing)} of them are missing: {shown(missing)}; "
                "restore them, or correct the index"
            )
        counts |= {file: count for file, count in named.items() if file in source.files}
    return counts


def _parse_counts(parsed: Any, name: str) -> dict[str, int]:
    if name.endswith("sizes.json"):
        counts = dict(parsed)
    else:
        counts = {}
        for split in parsed["splits"].values():
            lengths, names = split["shard_lengths"], list[str]()
            for pattern in split["filenames"]:
                # A small file could stand for a hundred thousand long names a pattern.
                if len(pattern) > _MAX_PATTERN_CHARS or len(names) > len(lengths):
                    raise ValueError("patterns that stand for more than the lengths beside them")
                names += expand_braces(pattern)
            counts |= dict(zip(names, lengths, strict=True))
    if not all(type(count) is int and count >= 0 for count in counts.values()):
        raise ValueError("counts are not whole numbers")
    return counts


def _beside(source: Source, bases: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files with these base names that lie beside the shards or at the root."""
    folders = sorted({file.rpartition("/")[0] for file in source.files} | {""}, reverse=True)
    for folder, base in itertools.product(folders, bases):
        name = f"{folder}/{base}".lstrip("/")
        content = source.read_if_there(name)
        if content is not None:
            yield name, content
