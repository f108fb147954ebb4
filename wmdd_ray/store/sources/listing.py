"""Names under a URI: listed once, brace patterns, and which of them belong to which split."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import pyarrow.fs as pafs

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.classes import shown
from wmdd_ray.store.sources.endings import (
    START_BYTES,
    is_image_name,
    is_image_start,
    is_system_name,
    tells_nothing,
)
from wmdd_ray.store.sources.files import open_whole, read_ahead, reading, refuse_outside, walk_local
from wmdd_ray.store.sources.patterns import expand_braces, layout_pattern
from wmdd_ray.store.uris import arrow_filesystem, local_path

Split = Literal["train", "val"]

# Parts of one thing.
_PART_FOLDER = re.compile(r"[0-9]+|[^=]+=.*|.*\.parquet", re.IGNORECASE)


class NoSuchSplitError(DataError):
    """The data hold no images of the asked split, and nothing else is wrong with them."""


class NothingThereError(DataError):
    """There is no file under the URI."""


# In order of preference: `test` often carries no labels where there is a `validation` too.
SPLIT_NAMES: dict[Split, tuple[frozenset[str], ...]] = {
    "train": (frozenset({"train", "training"}),),
    "val": (frozenset({"val", "valid", "validation", "dev"}), frozenset({"test", "testing"})),
}
SPLIT_WORDS = frozenset().union(*itertools.chain.from_iterable(SPLIT_NAMES.values()))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A URI as asked for and as found. `files` maps relative names to bytes, sorted by name.

    `dedicated` says that the URI was given for this split alone, so that names without a split
    belong to it. `hidden` are the names that are hidden or a system's, of which none is in `files`.
    """

    root: str
    files: dict[str, int]
    config: SourceConfig
    split: Split
    dedicated: bool
    class_names: tuple[str, ...] | None
    hidden: tuple[str, ...] = ()

    @cached_property
    def images(self) -> frozenset[str]:
        """Names of the files that are images: by their ending, or where it tells nothing by their first bytes."""
        return frozenset(filter(is_image_name, self.files)).union(self._images_by_content())

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of a file that says what the images are; a DataError when it is larger."""
        where = f"{self.root}/{name}"
        if self.files[name] > max_bytes:
            raise DataError(
                f"{where}: expected at most {max_bytes} bytes of what says the classes, found {self.files[name]}"
            )
        filesystem, base = arrow_filesystem(self.root, self.config.bucket)
        with (
            reading(where, "a list of classes"),
            open_whole(filesystem, f"{base}/{name}", where, self.files[name]) as file,
        ):
            return bytes(file.read())

    def _images_by_content(self) -> Iterator[str]:
        unknown = [name for name, size in self.files.items() if size and tells_nothing(name)]
        filesystem, base = arrow_filesystem(self.root, self.config.bucket)

        def is_image(name: str) -> bool:
            with reading(f"{self.root}/{name}", "a file"):
                handle = open_whole(filesystem, f"{base}/{name}", name, None)
                with handle:
                    return is_image_start(handle.read(START_BYTES))

        yield from itertools.compress(unknown, read_ahead(is_image, unknown))


def list_files(uri: str, config: SourceConfig) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """Return (root, files, hidden) of a folder, a file, or a pattern such as `train-{000..012}.tar`.

    What is hidden (a leading dot in any part: macOS writes `._x.jpg` beside `x.jpg`) or a system's is told apart. Of `config` it
    takes how a bucket is reached, and whether links may lead out of the folder; a file that is named is read in any case.

    Raises:
        DataError: There is nothing, a file of the pattern is missing, links lead out of the folder, or keys have empty parts.
        ArtifactError: The store cannot be reached, or refuses.
    """
    path = local_path(uri)
    uri = (str(path) if path is not None else uri).rstrip("/")
    if "{" in uri and not (path is not None and path.exists()):
        return *_list_pattern(uri, config), ()
    filesystem, base = arrow_filesystem(uri, config.bucket)
    with reading(uri, "files that can be listed"):
        top = filesystem.get_file_info(base)
        if top.type == pafs.FileType.File:
            folder, _, name = uri.rpartition("/")
            return folder, {name: top.size}, ()
        files, hidden = (
            walk_local(uri, follow_links=config.follow_links)
            if path is not None and top.type == pafs.FileType.Directory
            else _remote_files(filesystem, base)
        )
    refuse_empty_parts(uri, files)
    if not files:
        raise NothingThereError(
            f"{uri}: expected images, found nothing there; check --data and --val-data"
        )
    return uri, dict(sorted(files.items())), tuple(hidden)


def _remote_files(filesystem: pafs.FileSystem, base: str) -> tuple[dict[str, int], list[str]]:
    try:
        entries = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    except FileNotFoundError:
        return {}, []
    # Object stores name keys without the leading slash that a root such as memory's has.
    prefix = base.strip("/") + "/"
    files = {
        entry.path.lstrip("/").removeprefix(prefix): entry.size
        for entry in entries
        if entry.type == pafs.FileType.File
    }
    hidden = [name for name in files if any(map(is_system_name, name.split("/")))]
    for name in hidden:
        del files[name]
    return files, hidden


def refuse_empty_parts(uri: str, files: Iterable[str]) -> None:
    """Refuse keys of an object store that no client can be relied on to find again."""
    empty = [name for name in files if "//" in f"/{name}"]
    if empty:
        raise DataError(
            f"{uri}: expected keys without empty parts, found {len(empty)} with a doubled slash: {shown(empty)}; rename them, or "
            "pass the folder behind that slash"
        )


def _list_pattern(uri: str, config: SourceConfig) -> tuple[str, dict[str, int]]:
    is_disk = local_path(uri) is not None
    root = _folder_of_pattern(uri, is_disk=is_disk)
    names = expand_braces(uri.removeprefix(root + "/"), uri)
    filesystem, base = arrow_filesystem(root, config.bucket)
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
    if not config.follow_links:
        refuse_outside(root, names)
    return root, {name: entry.size for name, entry in sorted(zip(names, entries, strict=True))}


def _folder_of_pattern(uri: str, *, is_disk: bool) -> str:
    """Return the folder above the first brace of a pattern; a folder of the disk may have braces in its own name."""
    root, slash, rest = uri[: uri.index("{")].rpartition("/")[0], "/", uri
    while is_disk:
        rest = uri.removeprefix(root + "/")
        first, slash, _ = rest.partition("/")
        if not slash or not os.path.isdir(f"{root}/{first}"):
            break
        root = f"{root}/{first}"
    return root


def files_of_split(
    listing: Listing,
    candidates: dict[str, int],
    word_of: Callable[[str], str] | None = None,
) -> dict[str, int]:
    """Return the candidates of the split, by words in their names, or as `word_of` has them.

    `train-0001.tar` and `data/validation-0.parquet` have such a word. Files without any are
    training images, or all belong to a dedicated URI. --source.layout may name the files.

    Raises:
        DataError: No file is left, or they lie in several folders, so that they may be several data sets.
    """
    layout = listing.config.layout
    if layout:
        pattern = layout_pattern(layout)
        candidates = {n: size for n, size in candidates.items() if pattern.fullmatch(n)}
    words = {name: (word_of or split_word)(name) for name in candidates}
    for names in SPLIT_NAMES[listing.split]:
        selected = {name: size for name, size in candidates.items() if words[name] in names}
        if selected:
            break
    else:
        if any(words.values()) or not (listing.split == "train" or listing.dedicated):
            raise no_such_split(listing, list(candidates))
        selected = candidates
    folders = Counter(_place(name) for name in selected)
    if len(folders) > 1 and not layout:
        held = ", ".join(f"{folder or '.'}/ ({count})" for folder, count in folders.most_common(5))
        depth = max(name.count("/") for name in selected)
        raise DataError(
            f"{listing.root}: the files of one split lie in {len(folders)} folders: {held}, which may be several data sets, or "
            f"sizes or configurations of one; pass one of them as --data, or name the files that belong together by "
            f"--source.layout ('{'*/' * depth}*' takes all that lie so deep)"
        )
    return selected


def _place(name: str) -> str:
    """Return the folder of a file, without folders that are parts of one thing: numbers, `key=value`, `x.parquet/`."""
    return "/".join(part for part in name.split("/")[:-1] if not _PART_FOLDER.fullmatch(part))


@lru_cache(1 << 16)
def split_word(name: str) -> str:
    """Return the last word of a path that names a split: files count more than their folders."""
    # MNIST calls its test images t10k.
    parts = re.split(r"[^a-z]+", name.lower().replace("t10k", "test"))
    words = [word for word in parts if word in SPLIT_WORDS]
    return words[-1] if words else ""


def word_of_tars(tars: Iterable[str]) -> Callable[[str], str] | None:
    """Return what has the word of a split of a tar: its name or its folder, if all have one; None where only some have words.

    So `bullet_train.tar` beside `car.tar` is no tar of a split, nor is `val/bullet_train.tar` beside `train/car.tar` one of train.
    """
    if not any(map(split_word, tars)):
        return split_word
    for part in (posixpath.basename, posixpath.dirname, str):
        if all(split_word(part(name)) for name in tars):
            return lambda name, part=part: split_word(part(name))  # type: ignore[misc]
    return None


def no_such_split(listing: Listing, names: list[str]) -> NoSuchSplitError:
    """Return the error that nothing in a listing belongs to the asked split."""
    expected = ", ".join(sorted(frozenset().union(*SPLIT_NAMES[listing.split])))
    if listing.split == "train":
        kind, advice = "training", "pass the folder of the training images as --data"
    else:
        kind, advice = "held-out", "pass held-out images as --val-data"
    return NoSuchSplitError(
        f"{listing.root}: expected {kind} images in folders or files named {expected}, found "
        f"{shown(names)}; {advice}"
    )
