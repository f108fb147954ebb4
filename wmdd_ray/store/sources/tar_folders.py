"""Tars of images whose classes say folders inside of them, or a list beside them: `CLASS/x.jpg`, ILSVRC2012_img_val.tar.

What lies in the tars of a split is taken for files: of tars called `train.tar` or `val-0.tar` for files in train/ or val/, of
others for files in the folder of the tars. From there on it is as with files.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.account import passed_over, refuse_much_passed_over
from wmdd_ray.store.sources.base import RawImage, Shard, Source, class_shards
from wmdd_ray.store.sources.csvfile import CsvSource, is_csv
from wmdd_ray.store.sources.endings import is_image_name, is_system_name
from wmdd_ray.store.sources.files import read_ahead, reading
from wmdd_ray.store.sources.imagefolder import open_imagefolder
from wmdd_ray.store.sources.layout import join
from wmdd_ray.store.sources.listing import (
    SPLIT_NAMES,
    Listing,
    NoSuchSplitError,
    no_such_split,
    split_word,
)
from wmdd_ray.store.sources.passed import LABELS, PassedOver, Tally
from wmdd_ray.store.sources.tar import tar_members
from wmdd_ray.store.sources.webdataset import WebDatasetSource

logger = logging.getLogger(__name__)

_LISTS = (".txt", ".csv", ".tsv")


class Place(NamedTuple):
    """Where a member of a tar lies."""

    file: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Members(Listing):
    """A listing of what lies in tars, and of the files beside these that are no images."""

    places: Mapping[str, Place] = field(default_factory=dict)

    def read(self, name: str, max_bytes: int) -> bytes:
        if name not in self.places or self.files[name] > max_bytes:
            return super().read(name, max_bytes)
        return _Packed(self, {}).content(self.places[name])


class _Packed(WebDatasetSource):
    """Images in tars, of which is known where each lies. The key of one is that place, and its class."""

    format = "folders in tars"
    _transient = (*WebDatasetSource._transient, "_keys")

    def __init__(
        self,
        listing: Listing,
        files: dict[str, int],
        class_names: tuple[str, ...] = ("?",),
        keys: Mapping[int, list[str]] | None = None,
        problems: Mapping[str, str] | None = None,
        passed: tuple[PassedOver, ...] = (),
    ) -> None:
        super().__init__(listing.root, files, listing.config, class_names)
        self._keys = dict(keys or {})
        self._problems = dict(problems or {})
        self._passed = passed
        self._first = class_shards([(min(keys), [""])], 1)[0].id if keys else ""
        # Stay with a copy, unlike the listing.
        self._sizes = dict(files)

    @property
    def num_images(self) -> int:
        return sum(map(len, self._keys.values()))

    def shards(self, chunk_images: int) -> list[Shard]:
        return class_shards(sorted(self._keys.items()), chunk_images)

    def fingerprint(self) -> str:
        """Return a SHA-256 over where each image lies and its class, beside names and sizes of the tars. Driver only."""
        keys = repr(sorted(self._keys.items()))
        return hashlib.sha256(f"{super().fingerprint()} {keys}".encode()).hexdigest()

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        self._connected()  # once, and not in every thread
        yield from read_ahead(self._read_one, shard.keys)
        # The account of all members is told once.
        self.passed_inside = self._passed if shard.id == self._first else ()

    def _read_one(self, key: str) -> RawImage:
        if key in self._problems:
            return RawImage(key=key, label=-1, content=b"", problem=self._problems[key])
        file, offset, size_bytes, label = self._place(key)
        return RawImage(key=key, label=label, content=self.content(Place(file, offset, size_bytes)))

    def content(self, place: Place) -> bytes:
        """Return the bytes at a place of a tar."""
        where = self.url(place.file)
        with (
            reading(where, "a tar archive"),
            self.open_random(place.file, self._sizes.get(place.file)) as handle,
        ):
            content = bytes(handle.read_at(place.size_bytes, place.offset))
        if len(content) < place.size_bytes:
            raise DataError(
                f"{where}: expected {place.size_bytes} bytes at {place.offset}, found {len(content)}; restore the file"
            )
        return content


def tars_of_split(
    listing: Listing, tars: Mapping[str, int], word_of: Callable[[str], str] = split_word
) -> dict[str, int]:
    """Return the tars whose names say that they are of the split; all where none says a split, and none where they say others."""
    words = {name: word_of(name) for name in tars}
    for names in SPLIT_NAMES[listing.split]:
        if chosen := {name: size for name, size in tars.items() if words[name] in names}:
            return chosen
    return {} if any(words.values()) else dict(tars)


def open_folders(listing: Listing, tars: Mapping[str, int]) -> Source:
    """Return the images of the split that lie in the tars of a listing.

    Raises:
        NoSuchSplitError: None of them is of the split.
        DataError: As for files in folders; and where two tars hold a file of one name.
    """
    chosen = tars_of_split(listing, tars)
    if not chosen:
        raise no_such_split(listing, list(tars))
    logger.warning(
        "%s: %d tars hold images without labels beside them, and are read once to find their folders",
        listing.root, len(chosen),
    )  # fmt: skip
    prefix = listing.split if any(map(split_word, chosen)) else ""
    places: dict[str, Place] = {}
    for file, size_bytes in chosen.items():
        for name, place in _members(listing, file, size_bytes):
            path = join(prefix, name)
            if path in places:
                raise DataError(
                    f"{listing.root}: expected each file once, found {name!r} in {places[path].file} and in {file}; unpack them "
                    "into folders of their own, and pass the folder that is meant"
                )
            places[path] = place
    sizes = {path: place.size_bytes for path, place in sorted(places.items())}
    hidden = tuple(path for path in sizes if any(map(is_system_name, path.split("/"))))
    left_out = {*hidden}
    seen = {path: size for path, size in sizes.items() if path not in left_out}
    # Without tables: those name files, and these are none.
    said = {p: s for p, s in seen.items() if is_image_name(p) or p.lower().endswith(_LISTS)}
    beside = {
        name: size
        for name, size in listing.files.items()
        if name not in tars and not is_image_name(name) and not is_csv(name)
    }
    inside = _Members(
        root=listing.root,
        files=dict(sorted({**beside, **said}.items())),
        config=listing.config,
        split=listing.split,
        dedicated=listing.dedicated,
        class_names=listing.class_names,
        places=places,
    )
    try:
        opened = open_imagefolder(inside)
    except DataError as error:
        if len(listing.files) > 1 or isinstance(error, NoSuchSplitError):
            raise
        raise DataError(
            f"{error}; lists that lie beside {next(iter(tars))} are read where their folder is passed, and not the tar alone"
        ) from error
    opened.passed_over = passed_over(opened, replace(inside, files=seen, hidden=hidden))
    if opened.format == "imagefolder":
        refuse_much_passed_over(opened)
    return _packed(listing, chosen, opened, places)


def _members(listing: Listing, file: str, size_bytes: int) -> Iterator[tuple[str, Place]]:
    """Yield name and place of the regular members of a tar, by their headers."""
    probe = _Packed(listing, {file: size_bytes})
    with reading(probe.url(file), "a tar archive"), probe.open_random(file, size_bytes) as handle:
        for member in tar_members(handle, probe.url(file), lambda *_: False, handle.seek):
            name = re.sub(r"^(\./|/)+", "", member.name)
            yield name, Place(file, member.offset, member.size_bytes)


def _packed(
    listing: Listing, tars: dict[str, int], opened: Source, places: Mapping[str, Place]
) -> Source:
    """Return the images of a source of files as what they are, members of tars."""
    source = _Packed(listing, tars)
    problems_of_rows = opened._problems if isinstance(opened, CsvSource) else {}
    keys: dict[int, list[str]] = {}
    problems: dict[str, str] = {}
    for shard in opened.shards(1 << 30):
        assert shard.labels is not None
        (label,) = shard.labels
        for key in shard.keys:
            path = key if key in places else key.rpartition("#")[0]
            place = places[path]
            name = f"{place.file}#{place.offset}:{place.size_bytes}:{label}"
            problem = problems_of_rows.get(key) or source.too_large(place.size_bytes)
            if problem:
                name = f"{place.file}#{path}"
                problems[name] = problem
            keys.setdefault(label, []).append(name)
    inside = Tally()
    inside.add_all(opened.passed_over)
    for name in opened.files:
        if name in places and not is_image_name(name):
            inside.add(LABELS, name)
    read = {name: listing.files[name] for name in opened.files if name in listing.files}
    return _Packed(
        listing,
        dict(sorted({**tars, **read}.items())),
        opened.class_names,
        keys,
        problems,
        inside.groups(),
    )
