"""Which folders are the classes: read off the folders that hold images, and refused where they leave a doubt.

A layout is written as --source.layout takes it: `train/{class}`, `seg_train/seg_train/{class}`, `*/{class}`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.classes import plain, shown
from wmdd_ray.store.sources.listing import SPLIT_NAMES, Listing, no_such_split, split_word

# Folders that sort files by kind and not by what the images show.
_KINDS = frozenset({
    "images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "masks", "mask", "annotations", "annotation",
    "labels", "label", "segmentation", "segmentationclass", "segmentationobject", "data", "bboxes", "thumbnails",
})  # fmt: skip
_UNLABELED = re.compile(
    r"(^|[^a-z])(pred(iction)?s?|submissions?|unlabell?ed|unsup(ervised)?)([^a-z]|$)", re.IGNORECASE
)
_LISTS = re.compile(
    r"(^|[^a-z])(annotations?|splits?|ground_?truth|solution|train|val|valid|validation|dev|test)[^a-z]"
    r"(.*[^a-z])?(txt|csv|tsv|json|jsonl)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Flat:
    """Images that lie in one folder, so that no folder says their classes."""

    folder: str
    split_folder: str


class Tree:
    """The folders that images lie in, by what lies right below them. The root is the empty path."""

    def __init__(self, images: Iterable[str]) -> None:
        self.num_images = Counter(name.rpartition("/")[0] for name in images)
        self._below: dict[str, set[str]] = {}
        for folder in self.num_images:
            while folder:
                above, _, name = folder.rpartition("/")
                known = self._below.setdefault(above, set())
                if name in known:
                    break
                known.add(name)
                folder = above

    def below(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder that hold images at any depth, sorted."""
        return sorted(self._below.get(folder, ()))

    def descend(self, folder: str, known: frozenset[str] = frozenset()) -> str:
        """Return the first folder on the way down that holds more than one folder, or only images, or known classes."""
        while len(below := self.below(folder)) == 1 and not known.issuperset(map(plain, below)):
            inner = join(folder, below[0])
            if not self.below(inner):
                break
            folder = inner
        return folder


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder."""
    return f"{folder}/{name}" if folder else name


def find_classes(listing: Listing) -> str | Flat:
    """Return the folder of the class folders of a split, or the one folder that all of its images lie in.

    Raises:
        NoSuchSplitError: There are splits, and not this one.
        DataError: Several layouts are likely.
    """
    tree = Tree(listing.images)
    known = frozenset(map(plain, listing.class_names or ()))
    base = ""
    while len(below := tree.below(base)) == 1 and not known.issuperset(map(plain, below)):
        inner = tree.below(join(base, below[0]))
        if not inner or (split_word(below[0]) and not any(map(split_word, inner))):
            break
        base = join(base, below[0])
    splits = {name: split_word(name) for name in below if split_word(name)}
    others = [name for name in below if name not in splits]
    nested = [name for name in splits if tree.below(join(base, name))]
    if splits and (nested or not others) and not known.issuperset(map(plain, below)):
        split_folder = _split_folder(listing, tree, base, splits)
        _refuse_others(listing, tree, base, others)
    elif listing.split == "val" and not listing.dedicated:
        raise no_such_split(listing, [f"{name}/" for name in below])
    else:
        split_folder = base
    folder = tree.descend(split_folder, known)
    classes = tree.below(folder)
    if classes and known.issuperset(map(plain, classes)):
        return folder
    if len(classes) < 2:
        return Flat(join(folder, classes[0]) if classes else folder, split_folder)
    _refuse_doubts(listing, tree, folder, classes)
    if not splits and listing.split == "train" and not listing.dedicated:
        _refuse_unread_lists(listing, folder, classes)
    return folder


def _split_folder(listing: Listing, tree: Tree, base: str, splits: dict[str, str]) -> str:
    for names in SPLIT_NAMES[listing.split]:
        chosen = [name for name, word in splits.items() if word in names]
        if len(chosen) > 1:
            raise doubt(
                listing,
                f"{len(chosen)} folders may hold the images of one split: {shown(chosen)}",
                join(base, f"{chosen[0]}/{{class}}"),
            )
        if chosen:
            return join(base, chosen[0])
    raise no_such_split(listing, [f"{join(base, name)}/" for name in splits])


def _refuse_others(listing: Listing, tree: Tree, base: str, others: list[str]) -> None:
    doubtful = [
        name for name in others if not (is_unlabeled(name) and _is_flat(tree, join(base, name)))
    ]
    if doubtful:
        raise doubt(
            listing,
            f"folders of images lie beside those of the splits, and would not be read: {shown(doubtful)}",
            join(base, "{split}/{class}"),
            otherwise="pass the folder of one data set as --data, or, where these are held-out images, theirs as --val-data "
            "beside that of the training images",
        )


def is_unlabeled(name: str) -> bool:
    """Return whether a path says by itself that it has no labels, or no true ones (`seg_pred/`, `unlabeled/`, `submission.csv`)."""
    return _UNLABELED.search(name) is not None


def _is_flat(tree: Tree, folder: str) -> bool:
    return len(tree.below(tree.descend(folder))) <= 1


def _refuse_doubts(listing: Listing, tree: Tree, folder: str, classes: list[str]) -> None:
    """Refuse folders that may be something else than classes."""
    kinds = [name for name in classes if name.lower() in _KINDS or is_unlabeled(name)]
    if kinds:
        raise doubt(
            listing,
            f"{shown(kinds)} beside {shown([n for n in classes if n not in kinds]) or 'nothing else'} would be taken for classes",
            join(folder, "{class}"),
        )
    below = {name: tree.below(join(folder, name)) for name in classes}
    direct = [name for name in classes if tree.num_images[join(folder, name)]]
    inner = sorted(set().union(*below.values()))
    if inner and all(split_word(name) for name in inner) and not direct:
        raise doubt(
            listing,
            f"each of {shown(classes)} holds folders of splits ({shown(inner)}): they may be several data sets, or sizes or "
            "configurations of one",
            join(folder, "{class}/{split}"),
            join(folder, f"{classes[0]}/{{split}}/{{class}}"),
            otherwise=f"pass one of them as --data, such as {listing.root}/{join(folder, classes[0])}",
        )
    if not direct and len(inner) > 1:
        raise doubt(
            listing,
            f"images lie two levels down, in folders such as {shown([f'{n}/{below[n][0]}' for n in classes[:3]])}: the classes "
            f"may be the upper {len(classes)} or the lower {len(inner)} folders",
            join(folder, "{class}"),
            join(folder, "*/{class}"),
        )
    same = sorted(set.intersection(*(set(names) for names in below.values())))
    upper = set(direct)
    uneven = [name for name in classes if name not in upper and len(below[name]) > 1]
    if direct and (same or uneven):
        doubtful = (
            f"every class holds a folder {shown(same)} beside its images"
            if same
            else f"some folders hold images and others folders of images: {shown(uneven)}"
        )
        raise doubt(listing, doubtful, join(folder, "{class}"), join(folder, "{class}/*"))


def _refuse_unread_lists(listing: Listing, folder: str, classes: list[str]) -> None:
    inside = tuple(f"{join(folder, name)}/" for name in classes)
    unread = [
        name for name in listing.files
        if _LISTS.search(name.rpartition("/")[2]) and name not in listing.images and not name.startswith(inside)
    ]  # fmt: skip
    if unread:
        raise doubt(
            listing,
            f"all images of {shown(classes)} would be training images, and what may say otherwise is not read: {shown(unread)}",
            join(folder, "{class}"),
            otherwise="write what they say into labels.csv, with the columns path, label and split, and pass --source.format csv",
        )


def doubt(listing: Listing, why: str, *layouts: str, otherwise: str = "") -> DataError:
    """Return the error that a layout is in doubt, with the layouts that would settle it."""
    options = ", or by ".join(f"--source.layout '{layout}'" for layout in layouts)
    more = f", or {otherwise}" if otherwise else ""
    settled = f"say what is meant by {options}{more}" if layouts else otherwise
    return DataError(f"{listing.root}: the layout is in doubt: {why}; {settled}")
