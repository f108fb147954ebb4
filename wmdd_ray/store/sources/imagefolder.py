"""One folder a class: `CLASS/*.jpg`, or `train/CLASS/*.jpg` beside `val/CLASS/*.jpg`, or as --source.layout says."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.store.sources import flat
from wmdd_ray.store.sources.base import FileSource, RawImage, Shard, Source, class_shards
from wmdd_ray.store.sources.classes import match_classes, plain, shown
from wmdd_ray.store.sources.endings import ending_of, is_image_name
from wmdd_ray.store.sources.layout import Flat, doubt, find_classes, join
from wmdd_ray.store.sources.listing import SPLIT_NAMES, Listing, no_such_split, split_word
from wmdd_ray.store.sources.patterns import layout_pattern

logger = logging.getLogger(__name__)


class ImageFolderSource(FileSource):
    """Image files whose path names their class. The key of an image is its path relative to the root.

    Attributes:
        pattern: Matches the paths, with the class as a group.
        layout: The same in words.
    """

    format = "imagefolder"

    def __init__(
        self,
        listing: Listing,
        files: dict[str, int],
        pattern: re.Pattern[str],
        layout: str,
        class_names: tuple[str, ...],
    ) -> None:
        super().__init__(listing.root, files, listing.config, class_names)
        self.pattern = pattern
        self.layout = layout
        self._label_of = {plain(name): label for label, name in enumerate(class_names)}

    @property
    def num_images(self) -> int:
        return len(self.files)

    def shards(self, chunk_images: int) -> list[Shard]:
        by_label: dict[int, list[str]] = {}
        for key in self.files:
            by_label.setdefault(self._label(key), []).append(key)
        return class_shards(sorted(by_label.items()), chunk_images, self.files)

    def _label(self, key: str) -> int:
        match = None if ".." in key.split("/") else self.pattern.fullmatch(key)
        label = None if match is None else self._label_of.get(plain(match["class"]))
        if label is None:
            raise DataError(f"{self.root}: no image {key!r}, expected a path {self.layout}/FILE")
        return label

    def _read_one(self, named: tuple[str, int | None]) -> RawImage:
        key, size_bytes = named
        return self._read_file(key, self._label(key), key, size_bytes)


def is_class_image(name: str) -> bool:
    """Return whether a file is an image inside some folder, by its name."""
    return "/" in name and is_image_name(name)


def open_imagefolder(listing: Listing) -> Source:
    """Return the images of the split: of class folders, or of a folder with a list of their classes.

    Raises:
        DataError: The layout leaves a doubt that --source.layout has to settle, or no file is an image.
    """
    layout = listing.config.layout
    pattern = layout_pattern(layout) if layout else None
    files = {} if pattern is None else _files_of_layout(listing, pattern)
    if pattern is None or not files:
        if not listing.images:
            raise DataError(
                f"{listing.root}: expected images, found none among {len(listing.files)} files"
            )
        parent = find_classes(listing)
        if isinstance(parent, Flat):
            return flat.open_flat(listing, parent)
        layout = join(parent, "{class}")
        pattern = re.compile(re.escape(join(parent, "")) + "(?P<class>[^/]+)/.+", re.DOTALL)
        files = _matching(listing, pattern)
        table = flat.table_in(listing, parent)
        if table and listing.config.format != "imagefolder":
            raise doubt(
                listing,
                f"both folders and {table} may say the classes",
                layout,
                otherwise="pass --source.format csv",
            )
    matches = (pattern.fullmatch(name) for name in files)
    classes = sorted({match["class"] for match in matches if match})
    _warn_of_empty_classes(listing, layout, classes)
    if listing.class_names is not None:
        where = join(listing.root, layout.partition("{")[0]).rstrip("/")
        match_classes(classes, listing.class_names, where, held_out=listing.split == "val")
    return ImageFolderSource(listing, files, pattern, layout, listing.class_names or tuple(classes))


def _warn_of_empty_classes(listing: Listing, layout: str, classes: list[str]) -> None:
    """Say which folders beside those of the classes hold no image, and so make no class."""
    above = layout.removesuffix("{class}")
    if "{" in above or "*" in layout or above == layout:
        return
    beside = {
        name.removeprefix(above).partition("/")[0]
        for name in listing.files
        if name.startswith(above) and "/" in name.removeprefix(above)
    }
    if empty := sorted(beside - {*classes}):
        logger.warning(
            "%s/%s: %d folders hold no image and make no class: %s",
            listing.root, above, len(empty), shown(empty),
        )  # fmt: skip


def _matching(listing: Listing, pattern: re.Pattern[str]) -> dict[str, int]:
    return {
        name: size
        for name, size in listing.files.items()
        if name in listing.images and pattern.fullmatch(name)
    }


def _refuse_two_readings(listing: Listing, pattern: re.Pattern[str], files: Iterable[str]) -> None:
    """Raise where a layout such as `{class}_*` reads two classes in one path: `american` and `american_bulldog`."""
    layout = listing.config.layout
    longest = layout_pattern(layout, longest=True)
    for name in files:
        # The dot before an ending such as .jpg ends no class: `{class}.*` reads one class in cat.1.jpg.
        cut = len(ending_of(name)) if layout.endswith("*") and is_image_name(name) else 0
        one, other = pattern.fullmatch(name), longest.fullmatch(name[: len(name) - cut])
        if one and other and one["class"] != other["class"]:
            part = next(part for part in layout.split("/") if "{class}" in part)
            is_name = part.endswith("*") and layout.endswith(part)
            numbered = f"{part[:-1]}{{number}}.*" if is_name else part.replace("*", "{number}")
            raise doubt(
                listing,
                f"by --source.layout {layout!r} the class of {name} may be {one['class']!r} or {other['class']!r}",
                *([layout.replace(part, numbered)] if "*" in part else []),
                otherwise="write labels.csv beside the images (columns path and label) and pass --source.format csv",
            )


def _files_of_layout(listing: Listing, pattern: re.Pattern[str]) -> dict[str, int]:
    """Return the images of the split that --source.layout describes; none where it was not meant for held-out images elsewhere."""
    layout = listing.config.layout
    if "class" not in pattern.groupindex:
        raise ConfigError(
            f"--source.layout: expected {{class}} in the layout of folders of images, got {layout!r}"
        )
    files = _matching(listing, pattern)
    _refuse_two_readings(listing, pattern, files)
    if not files and not listing.dedicated:
        raise DataError(
            f"{listing.root}: expected images at --source.layout {layout!r}, found {len(listing.images)} elsewhere, such as "
            f"{min(listing.images, default='none')!r}"
        )
    if "split" in pattern.groupindex:
        words = {
            name: split_word(match["split"]) for name in files if (match := pattern.fullmatch(name))
        }
        for names in SPLIT_NAMES[listing.split]:
            if chosen := {name: size for name, size in files.items() if words[name] in names}:
                return chosen
    elif listing.split == "train" or listing.dedicated:
        return files
    if listing.dedicated:
        return {}
    raise no_such_split(listing, sorted({name.partition("/")[0] + "/" for name in files}))
