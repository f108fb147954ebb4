"""Names under a URI: listed once, brace patterns, and which of them belong to which split."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pyarrow.fs as pafs

from wmdd_ray.config import BucketAccess, SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.classes import shown
from wmdd_ray.store.sources.files import reading, walk_local
from wmdd_ray.store.uris import arrow_filesystem, local_path

Split = Literal["train", "val"]

_MAX_EXPANDED = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class NoSuchSplitError(DataError):
    """The data hold no images of the asked split, and nothing else is wrong with them."""


class NothingThereError(DataError):
    """There is no file under the URI."""


# In order of preference: `test` often carries no labels where there is a `validation` too.
SPLIT_NAMES: dict[Split, tuple[frozenset[str], ...]] = {
    "train": (frozenset({"train", "training"}),),
    "val": (frozenset({"val", "valid", "validation"}), frozenset({"test"})),
}


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A URI as asked for and as found. `files` maps relative names to bytes, sorted by name.

    `dedicated` says that the URI was given for this split alone, so that names without a split
    belong to it.
    """

    root: str
    files: dict[str, int]
    config: SourceConfig
    split: Split
    dedicated: bool
    class_names: tuple[str, ...] | None


def list_files(
    uri: str, *, follow_links: bool = False, access: BucketAccess | None = None
) -> tuple[str, dict[str, int]]:
    """Return (root, files) of a folder, a file, or a pattern such as `train-{000..012}.tar`.

    Hidden names (a leading dot in any part) are left out: macOS writes `._x.jpg` beside `x.jpg`.

    Args:
        uri: What to list.
        follow_links: Whether links on the local disk may lead out of the folder; a file that is named is read in
            any case.
        access: How a bucket is reached.

    Raises:
        DataError: There is nothing, a file of the pattern is missing, links lead out of the folder, or keys have empty parts.
        ArtifactError: The store cannot be reached, or refuses.
    """
    path = local_path(uri)
    uri = (str(path) if path is not None else uri).rstrip("/")
    if "{" in uri:
        return _list_pattern(uri, access)
    filesystem, base = arrow_filesystem(uri, access)
    with reading(uri, "files that can be listed"):
        top = filesystem.get_file_info(base)
        if top.type == pafs.FileType.File:
            folder, _, name = uri.rpartition("/")
            return folder, {name: top.size}
        files = (
            walk_local(uri, follow_links=follow_links)
            if path is not None and top.type == pafs.FileType.Directory
            else _remote_files(filesystem, base)
        )
    refuse_empty_parts(uri, files)
    visible = {name: size for name, size in files.items() if not re.search(r"(^|/)\.", name)}
    if not visible:
        raise NothingThereError(
            f"{uri}: expected images, found nothing there; check --data and --val-data"
        )
    return uri, dict(sorted(visible.items()))


def _remote_files(filesystem: pafs.FileSystem, base: str) -> dict[str, int]:
    try:
        found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    except FileNotFoundError:
        return {}
    # Object stores name keys without the leading slash that a root such as memory's has.
    prefix = base.strip("/") + "/"
    return {
        entry.path.lstrip("/").removeprefix(prefix): entry.size
        for entry in found
        if entry.type == pafs.FileType.File
    }


def refuse_empty_parts(uri: str, files: Iterable[str]) -> None:
    """Refuse keys of an object store that no client can be relied on to find again."""
    empty = [name for name in files if "//" in f"/{name}"]
    if empty:
        raise DataError(
            f"{uri}: expected keys without empty parts, found {len(empty)} with a doubled slash: {shown(empty)}; rename them, or "
            "pass the folder behind that slash"
        )


def _list_pattern(uri: str, access: BucketAccess | None) -> tuple[str, dict[str, int]]:
    root = uri[: uri.index("{")].rpartition("/")[0]
    names = [name.removeprefix(root + "/") for name in expand_braces(uri)]
    filesystem, base = arrow_filesystem(root, access)
    with reading(uri, "files that can be listed"):
        entries = filesystem.get_file_info([f"{base}/{name}" for name in names])
    missing = [
        n for n, entry in zip(names, entries, strict=True) if entry.type != pafs.FileType.File
    ]
    if missing:
        raise DataError(
            f"{uri}: expected {len(names)} files, {len(missing)} of them are missing: "
            f"{shown(missing)}; correct the pattern or restore the files"
        )
    return root, {name: entry.size for name, entry in sorted(zip(names, entries, strict=True))}


def expand_braces(pattern: str) -> list[str]:
    """Return the names that `{000..012}` and `{a,b}` stand for, in order.

    Numbers are as wide as the first end of their range.

    Raises:
        DataError: An unclosed or empty brace, a falling range, or more than 100,000 names.
    """
    parts = _BRACES.split(pattern)
    if any(c in part for part in parts[::2] for c in "{}"):
        raise DataError(
            f"{pattern}: expected closed braces without nesting, such as {{000..012}} or {{a,b}}"
        )
    choices = [_choices(part, pattern) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for options in choices:
        count *= len(options)
    if not 1 <= count <= _MAX_EXPANDED:
        raise DataError(
            f"{pattern}: expected 1 to {_MAX_EXPANDED} files, the pattern stands for {count}"
        )
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(body: str, pattern: str) -> list[str]:
    match = _RANGE.fullmatch(body)
    if match is None:
        return body.split(",")
    first, last = int(match[1]), int(match[2])
    if last - first >= _MAX_EXPANDED:
        raise DataError(f"{pattern}: the range {body} stands for more than {_MAX_EXPANDED} files")
    return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]


def files_of_split(listing: Listing, candidates: dict[str, int]) -> dict[str, int]:
    """Return the candidates of the split, by words in their names.

    `train-0001.tar` and `data/validation-0.parquet` have such a word. Files without any are
    training images, or all belong to a dedicated URI.

    Raises:
        DataError: No file is left.
    """
    words = {name: split_word(name) for name in candidates}
    for names in SPLIT_NAMES[listing.split]:
        selected = {name: size for name, size in candidates.items() if words[name] in names}
        if selected:
            return selected
    if not any(words.values()) and (listing.split == "train" or listing.dedicated):
        return candidates
    raise no_such_split(listing, list(candidates))


def split_word(name: str) -> str:
    """Return the last word of a path that names a split: files count more than their folders."""
    known = frozenset().union(*itertools.chain.from_iterable(SPLIT_NAMES.values()))
    found = [word for word in re.split(r"[^a-z]+", name.lower()) if word in known]
    return found[-1] if found else ""


def no_such_split(listing: Listing, found: list[str]) -> NoSuchSplitError:
    """Return the error that nothing in a listing belongs to the asked split."""
    expected = ", ".join(sorted(frozenset().union(*SPLIT_NAMES[listing.split])))
    if listing.split == "train":
        kind, advice = "training", "pass the folder of the training images as --data"
    else:
        kind, advice = "held-out", "pass held-out images as --val-data"
    return NoSuchSplitError(
        f"{listing.root}: expected {kind} images in folders or files named {expected}, found "
        f"{shown(found)}; {advice}"
    )
