"""One folder a class: `CLASS/*.jpg`, or `train/CLASS/*.jpg` beside `val/CLASS/*.jpg`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import RawImage, Shard, Source, class_shards
from wmdd_ray.store.sources.classes import match_classes, plain, shown
from wmdd_ray.store.sources.files import read_ahead, reading
from wmdd_ray.store.sources.listing import SPLIT_NAMES, Listing, no_such_split

logger = logging.getLogger(__name__)

# Also what is not decoded: such files are counted as bad images, so that they do not vanish without
# a word.
_IMAGE_ENDINGS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".avif",
        ".heic",
    }
)


class ImageFolderSource(Source):
    """Image files whose path names their class: the first folder below `folder`.

    The key of an image is its path relative to the root, `folder` included.
    """

    format = "imagefolder"

    def __init__(self, listing: Listing, folder: str, class_names: tuple[str, ...]) -> None:
        files = dict(_class_images(listing.files, folder))
        super().__init__(
            root=listing.root, files=files, config=listing.config, class_names=class_names
        )
        self.folder = folder
        self._label_of = {plain(name): label for label, name in enumerate(class_names)}
        if len(self._label_of) < len(class_names):
            twin = next(n for n in class_names if class_names[self._label_of[plain(n)]] != n)
            other = class_names[self._label_of[plain(twin)]]
            raise DataError(
                f"{self.root}: two classes have names that look the same: {ascii(twin)} and {ascii(other)}; rename or join them"
            )

    @property
    def num_images(self) -> int:
        return len(self.files)

    def shards(self, chunk_images: int) -> list[Shard]:
        by_label: dict[int, list[str]] = {}
        for key in self.files:
            by_label.setdefault(self._label(key), []).append(key)
        return class_shards(sorted(by_label.items()), chunk_images, self.files)

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        yield from self._read(shard.keys, shard.sizes)

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        return list(self._read(keys, ()))

    def _label(self, key: str) -> int:
        parts = key.removeprefix(self.folder).split("/")
        inside = key.startswith(self.folder) and len(parts) >= 2 and ".." not in parts
        if not inside or plain(parts[0]) not in self._label_of:
            raise DataError(
                f"{self.root}: no image {key!r}, expected a path {self.folder}CLASS/FILE"
            )
        return self._label_of[plain(parts[0])]

    def _read(self, keys: Sequence[str], sizes: Sequence[int]) -> Iterator[RawImage]:
        """Yield the files in order, with a few reads under way ahead of the consumer."""
        self._connected()  # once, and not in every thread
        yield from read_ahead(self._read_one, itertools.zip_longest(keys, sizes))

    def _read_one(self, named: tuple[str, int | None]) -> RawImage:
        key, size_bytes = named
        label = self._label(key)
        where = self.url(key)
        with reading(where, "an image file"), self.open_random(key, size_bytes) as file:
            problem = self.too_large(file.size())
            content = b"" if problem else file.read()
        return RawImage(key=key, label=label, content=content, problem=problem)


def is_class_image(name: str) -> bool:
    """Return whether a file is an image inside some folder."""
    return "/" in name and is_image_name(name)


def open_imagefolder(listing: Listing) -> ImageFolderSource:
    """Return the image folders of the split.

    A folder `train` with folders of images inside is a split; one with images right inside is the
    class of trains.
    """
    folder = _split_folder(listing)
    found = sorted(
        {
            name.removeprefix(folder).split("/")[0]
            for name, _ in _class_images(listing.files, folder)
        }
    )
    loose = sum(
        1 for name in listing.files
        if name.startswith(folder) and "/" not in name.removeprefix(folder) and is_image_name(name)
    )  # fmt: skip
    if loose:
        logger.warning(
            "%s/%s: %d images lie in no class folder and are not read", listing.root, folder, loose
        )
    others = {
        name.removeprefix(folder).split("/")[0]
        for name in listing.files
        if name.startswith(folder) and "/" in name.removeprefix(folder)
    } - {*found}
    if others and found:
        logger.warning(
            "%s/%s: %d folders hold no image and make no class: %s",
            listing.root, folder, len(others), shown(sorted(others)),
        )  # fmt: skip
    if listing.class_names is not None:
        match_classes(found, listing.class_names, f"{listing.root}/{folder}".rstrip("/"))
    return ImageFolderSource(listing, folder, listing.class_names or tuple(found))


def _split_folder(listing: Listing) -> str:
    nested = {
        name.split("/")[0] for name in listing.files if name.count("/") >= 2 and is_image_name(name)
    }
    for names in SPLIT_NAMES[listing.split]:
        for folder in sorted(nested):
            if folder.lower() in names:
                return f"{folder}/"
    every_name = frozenset().union(*(names for split in SPLIT_NAMES.values() for names in split))
    top = {name.split("/")[0] for name in listing.files if is_class_image(name)}
    has_splits = any(folder.lower() in every_name for folder in nested)
    if has_splits or (listing.split == "val" and not listing.dedicated):
        raise no_such_split(listing, [f"{folder}/" for folder in sorted(top)])
    return ""


def _class_images(files: dict[str, int], folder: str) -> Iterator[tuple[str, int]]:
    for name, size in files.items():
        if name.startswith(folder) and is_class_image(name.removeprefix(folder)):
            yield name, size


def is_image_name(name: str) -> bool:
    """Return whether a file is an image by its ending."""
    return PurePosixPath(name).suffix.lower() in _IMAGE_ENDINGS
