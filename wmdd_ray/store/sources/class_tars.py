"""A tar a class, named as the class and with nothing but its images, in a folder or in one tar: how ILSVRC2012 is published."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import RawImage, Shard, Source
from wmdd_ray.store.sources.classes import match_classes, shown
from wmdd_ray.store.sources.endings import is_image_name, is_system_name
from wmdd_ray.store.sources.files import reading, streamed
from wmdd_ray.store.sources.listing import Listing, files_of_split, split_word, word_of_tars
from wmdd_ray.store.sources.passed import NO_IMAGE, SYSTEM, Tally
from wmdd_ray.store.sources.tar import Readable, tar_members
from wmdd_ray.store.sources.tar_folders import Place, open_folders, tars_of_split
from wmdd_ray.store.sources.webdataset import WebDatasetSource, is_tar, open_webdataset
from wmdd_ray.store.sources.webdataset_index import has_class_names

_LOOKED_AT = 16


class ClassTarSource(WebDatasetSource):
    """Tars of classes, a shard each. The key of an image is where it lies in the outermost file, and its class."""

    format = "class tars"
    _transient = (*WebDatasetSource._transient, "_tars")

    def __init__(
        self,
        listing: Listing,
        files: dict[str, int],
        tars: Mapping[str, Place],
        class_names: tuple[str, ...],
    ) -> None:
        super().__init__(listing.root, files, listing.config, class_names)
        self._tars = dict(tars)

    def shards(self, chunk_images: int) -> list[Shard]:
        return [
            Shard(
                id=f"c{label:05d}",
                file=tar.file,
                labels=(label,),
                sizes=(self.files[tar.file], tar.offset, tar.size_bytes),
            )
            for label, name in enumerate(self.class_names)
            if (tar := self._tars.get(name))
        ]

    def images_in(self, shard: Shard) -> tuple[list[str], np.ndarray]:
        """Return key and class of every image of a class's tar, which is read through for them."""
        keys = [image.key for image in self.read_shard(shard)]
        assert shard.labels is not None
        return keys, np.full(len(keys), shard.labels[0])

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        assert shard.labels is not None
        (label,), (_, start, size_bytes) = shard.labels, shard.sizes
        where = f"{self.url(shard.file)} ({self.class_names[label]})"
        passed = Tally()

        def wanted(name: str, size: int) -> bool:
            return is_image_name(name) and size <= self.max_content_bytes

        with (
            reading(where, "a tar archive"),
            self.open_random(shard.file, shard.size_bytes) as handle,
        ):
            handle.seek(start)
            for member in tar_members(_Window(streamed(handle), size_bytes), where, wanted):
                hidden = any(map(is_system_name, member.name.split("/")))
                if hidden or not is_image_name(member.name):
                    passed.add(SYSTEM if hidden else NO_IMAGE, member.name)
                    continue
                key = f"{shard.file}#{start + member.offset}:{member.size_bytes}:{label}"
                yield RawImage(
                    key=key,
                    label=label,
                    content=member.content or b"",
                    problem=self.too_large(member.size_bytes),
                )
        self.passed_inside = passed.groups()


class _Window:
    """The next bytes of a stream, as a file of their own."""

    def __init__(self, stream: Readable, size_bytes: int) -> None:
        self._stream = stream
        self._left = size_bytes

    def read(self, size: int, /) -> bytes:
        content = self._stream.read(min(size, self._left))
        self._left -= len(content)
        return content


def open_tars(listing: Listing) -> Source:
    """Return the tar files of the split: tars of classes, of folders of classes, or shards of samples that bring their labels.

    Raises:
        DataError: Tars of images that bring no labels, and are not named as their images are.
    """
    tars = {name: size for name, size in listing.files.items() if is_tar(name)}
    if "{class}" in listing.config.layout:
        return open_folders(listing, tars)
    probe = WebDatasetSource(listing.root, tars, listing.config)
    word_of = word_of_tars(tars)
    some = tars_of_split(listing, tars, word_of or split_word) or tars
    first, size_bytes = next(iter(some.items()))
    names = [] if has_class_names(probe) else _first_names(probe, first, 0, size_bytes)
    images = [name.removeprefix("./") for name in names if is_image_name(name)]
    if names and all(map(is_tar, names)):
        files = files_of_split(listing, tars)
        inner = [tar for file, size in files.items() for tar in _inner_tars(probe, file, size)]
        return _open_class_tars(listing, files, inner, _first_names(probe, *inner[0][1]))
    if not images or any(name.lower().endswith((".cls", ".json")) for name in names):
        return open_webdataset(listing)
    of_class = len(some) > 1 and all(_class_of(first) in name for name in images)
    if word_of is None:
        # Called as classes are, if all of them are tars of classes.
        of_class = all(_is_named_as_class(probe, file, size) for file, size in tars.items())
        word_of = (lambda _: "") if of_class else split_word
    if of_class or (listing.split == "train" and not any("/" in name for name in images)):
        files = files_of_split(listing, tars, word_of)
        whole = [(_class_of(file), Place(file, 0, size)) for file, size in files.items()]
        images = [name for name in _first_names(probe, *whole[0][1]) if is_image_name(name)]
        return _open_class_tars(listing, files, whole, images)
    return open_folders(listing, tars)


def _is_named_as_class(probe: Source, file: str, size_bytes: int) -> bool:
    """Return whether the first images of a tar, or the folder right above them, are called as the tar is."""
    names = [name for name in _first_names(probe, file, 0, size_bytes) if is_image_name(name)]
    return bool(names) and all(_class_of(file) in "/".join(n.split("/")[-2:]) for n in names)


def _open_class_tars(
    listing: Listing, files: dict[str, int], tars: list[tuple[str, Place]], names: list[str]
) -> Source:
    by_class = dict(tars)
    if len(by_class) < len(tars):
        raise DataError(
            f"{listing.root}: expected one tar a class, found {len(tars)} for {len(by_class)} classes"
        )
    if len(tars) == 1 or not all(tars[0][0] in name for name in names):
        raise DataError(
            f"{listing.root}: {tars[0][1].file} holds images ({shown(names)}) and nothing says their classes, nor do "
            f"their names begin with {tars[0][0]!r} as in ILSVRC's tar a class; unpack it, into a folder a class or val/ beside "
            "the list of names and classes that belongs to it, and pass the folder"
        )
    classes = sorted(by_class)
    if listing.class_names is not None:
        match_classes(classes, listing.class_names, listing.root)
    return ClassTarSource(listing, files, by_class, listing.class_names or tuple(classes))


def _first_names(probe: Source, file: str, offset: int, size_bytes: int) -> list[str]:
    """Return the names of the first members of a tar that lies in a file."""
    where = probe.url(file)
    with reading(where, "a tar archive"), probe.open_random(file) as handle:
        handle.seek(offset)
        members = tar_members(_Window(streamed(handle), size_bytes), where, lambda *_: False)
        names = [member.name for member in itertools.islice(members, _LOOKED_AT)]
    return [name for name in names if not any(map(is_system_name, name.split("/")))]


def _inner_tars(probe: Source, file: str, size_bytes: int) -> Iterator[tuple[str, Place]]:
    """Yield the tars in a tar by their headers, whose contents are not read."""
    with reading(probe.url(file), "a tar archive"), probe.open_random(file, size_bytes) as handle:
        for member in tar_members(handle, probe.url(file), lambda *_: False, handle.seek):
            if is_tar(member.name) and not is_system_name(member.name.rpartition("/")[2]):
                yield _class_of(member.name), Place(file, member.offset, member.size_bytes)


def _class_of(name: str) -> str:
    return name.rpartition("/")[2][: -len(".tar")]
