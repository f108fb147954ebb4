"""What the source of a split does not read of what lies there, and whether that is too much."""

from __future__ import annotations

from collections.abc import Callable

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import Source
from wmdd_ray.store.sources.classes import SHOWN
from wmdd_ray.store.sources.endings import ending_of, is_image_name
from wmdd_ray.store.sources.imagefolder import ImageFolderSource
from wmdd_ray.store.sources.layout import is_unlabeled, join
from wmdd_ray.store.sources.listing import Listing, split_word, word_of_tars
from wmdd_ray.store.sources.passed import (
    LABELS,
    NO_CLASS,
    NO_IMAGE,
    NOT_NAMED,
    OTHER_SPLIT,
    SYSTEM,
    UNLABELED,
    PassedOver,
    Tally,
    lost,
    total,
)


def passed_over(source: Source, listing: Listing) -> tuple[PassedOver, ...]:
    """Return the files of a listing that the source of a split does not read, by reason, ending and folder."""
    prefix = source.root.removeprefix(listing.root).lstrip("/")
    read = {join(prefix, name) for name in source.files}
    beside = {join(prefix, name) for name in source.read_beside}
    depth = _depth_of_split(source)
    word_of: Callable[[str], str] = split_word
    if source.format == "class tars":
        tars = [name for name in listing.files if ending_of(name) == ".tar"]
        word_of = word_of_tars(tars) or split_word
    own = {_split_of(name, depth, word_of) for name in read}
    tally = Tally()
    for name in listing.hidden:
        tally.add(SYSTEM, name)
    for name in listing.files:
        if name in read:
            continue
        word = _split_of(name, depth, word_of)
        if word and word not in own:
            tally.add(OTHER_SPLIT, name)
        elif name in beside:
            tally.add(LABELS, name)
        elif not is_image_name(name):
            tally.add(NO_IMAGE, name)
        elif source.format == "csv":
            tally.add(NOT_NAMED, name)
        else:
            tally.add(UNLABELED if is_unlabeled(name) else NO_CLASS, name)
    return tally.groups()


def _split_of(name: str, depth: int | None, word_of: Callable[[str], str]) -> str:
    """Return the word of a split that a file belongs to: for images by their folders, of which `depth` are above the classes."""
    if not is_image_name(name):
        return word_of(name) if ending_of(name) == ".tar" else split_word(name)
    return split_word("/".join(name.split("/")[:-1][:depth]))


def _depth_of_split(source: Source) -> int | None:
    """Return how many folders lead to that of the split; None where none above the classes is called as one.

    Below it folders are classes, which may be called `train` or `test_tube`.
    """
    if not isinstance(source, ImageFolderSource) or not source.files:
        return None
    first = next(iter(source.files))
    match = source.pattern.fullmatch(first)
    assert match is not None
    above = first[: match.start("class")].split("/")[:-1]
    return max((place for place, part in enumerate(above, 1) if split_word(part)), default=None)


def refuse_much_passed_over(source: Source) -> None:
    """Raise a DataError when more than --source.max-passed-over of the files leave a doubt whether images were lost."""
    missed = lost(source.passed_over)
    if source.format != "imagefolder":
        # Beside tars lie archives of other things; that of a class would be one of them.
        missed = tuple(group for group in missed if group.ending == ".tar")
    share = total(missed) / (total(missed) + len(source.files))
    if share > source.config.max_passed_over:
        raise DataError(
            f"{source.root}: {total(missed)} files are no images of a class, beside {len(source.files)} that are read: "
            f"{', '.join(group.told for group in missed[:SHOWN])}; that is {share:.0%}, and --source.max-passed-over allows "
            f"{source.config.max_passed_over:.0%}. Raise it if they may be left out, or say by --source.layout where the images lie"
        )
