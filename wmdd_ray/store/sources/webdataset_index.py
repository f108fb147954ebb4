"""What lies beside WebDataset shards: names of the classes, and how many samples each shard holds."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import Source
from wmdd_ray.store.sources.classes import shown
from wmdd_ray.store.sources.patterns import expand_braces

logger = logging.getLogger(__name__)

_MAX_PATTERN_CHARS = 1024


def read_class_names(source: Source) -> tuple[str, ...] | None:
    """Return the class names of `classes.txt` or `classes.json`; None when there is neither."""
    for name, content in _beside(source, ("classes.txt", "classes.json")):
        base = name.rpartition("/")[2]
        try:
            return parse_class_names(content.decode("utf-8-sig"), base)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{source.url(name)}: expected one name a line (classes.txt), or a JSON list or an "
                f"object from label to name (classes.json), found otherwise ({error})"
            ) from error
    return None


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
