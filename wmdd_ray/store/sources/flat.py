"""Images of a split in one folder, and what says their classes: a table beside them, or a list of names and classes.

Tiny-ImageNet's `val/val_annotations.txt`, Kaggle's `LOC_val_solution.csv`, `val.txt` with a name and a class a line, ILSVRC's
`ILSVRC2012_validation_ground_truth.txt` with its `meta.mat`, and Hugging Face's `train/metadata.csv` and `metadata.jsonl`.
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources import csvfile
from wmdd_ray.store.sources.base import Source
from wmdd_ray.store.sources.classes import SHOWN, plain, shown
from wmdd_ray.store.sources.labels import beside_classes, class_of, label_of
from wmdd_ray.store.sources.layout import Flat, doubt, is_unlabeled, join
from wmdd_ray.store.sources.listing import SPLIT_NAMES, Listing, no_such_split, split_word
from wmdd_ray.store.sources.matfile import read_structs

_TABLES = ("metadata.csv", "labels.csv", "metadata.tsv", "labels.tsv", csvfile.JSON_TABLE)
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_SYNSET = ("ILSVRC2012_ID", "WNID", "num_children")
_DEVKIT = re.compile(r"(?:.*/)?ILSVRC2012_devkit.*\.(?:tar\.gz|tgz)")
_ORDERS = ("classes.txt", "synsets.txt")
_COORDINATE = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
# 50,000 images of ILSVRC have lists of 1.5 MB; meta.mat has a tenth of a megabyte.
_MAX_LIST_BYTES = 256 << 20
_MAX_META_BYTES = 1 << 20


def table_in(listing: Listing, folder: str) -> str:
    """Return the table of paths and labels that lies in a folder below the root; empty when there is none."""
    if not folder:
        return ""
    return next((join(folder, name) for name in _TABLES if join(folder, name) in listing.files), "")


def is_table(name: str) -> bool:
    """Return whether a file is a table of paths and labels, at the root or in a folder."""
    return csvfile.is_csv(name) or name.rpartition("/")[2] in _TABLES


def open_tables(listing: Listing) -> Source:
    """Return the rows of the tables at the root, or of the one in the folder of the split."""
    if any(map(csvfile.is_csv, listing.files)):
        return csvfile.open_csv(listing)
    tables = [name for name in listing.files if is_table(name)]
    for names in SPLIT_NAMES[listing.split]:
        of_split = [name for name in tables if split_word(posixpath.dirname(name)) in names]
        if len(of_split) == 1:
            return _open_table(listing, of_split[0])
    raise no_such_split(listing, tables)


def _open_table(listing: Listing, table: str) -> Source:
    """Return the images that a table in a folder below the root names, by paths relative to that folder."""
    folder = posixpath.dirname(table) + "/"
    return csvfile.open_csv(
        replace(
            listing,
            root=f"{listing.root}/{folder}".rstrip("/"),
            files={
                name.removeprefix(folder): size
                for name, size in listing.files.items()
                if name.startswith(folder)
            },
            dedicated=True,
        )
    )


def open_flat(listing: Listing, flat: Flat) -> Source:
    """Return the images of one folder with the classes that a table or a list says.

    Raises:
        NoSuchSplitError: These are test images without labels.
        DataError: Nothing says the classes.
    """
    table = table_in(listing, flat.folder) or table_in(listing, flat.split_folder)
    if table:
        return _open_table(listing, table)
    images = {
        posixpath.basename(name): name
        for name in sorted(listing.images)
        if posixpath.dirname(name) == flat.folder
    }
    refused = [
        f"{name}, which has it, is not read: unpack it by tar -xzf {name} in {listing.root}"
        for name in listing.files
        if _DEVKIT.fullmatch(name)
    ]
    if listing.class_names is not None:
        said = {name: _labels(listing, name, images, refused) for name in _lists(listing, flat)}
        lists = [name for name, label_of in said.items() if label_of]
        if any(said[name] != said[lists[0]] for name in lists):
            raise DataError(
                f"{listing.root}: expected one list of the classes of the {len(images)} images in {flat.folder}/, found lists that "
                f"differ: {shown(lists)}; take away those that are not meant"
            )
        if lists:
            return _listed(listing, lists[0], images, said[lists[0]])
    folder = f"{flat.folder}/" if flat.folder else ""
    if split_word(flat.split_folder) in SPLIT_NAMES["val"][-1]:
        raise no_such_split(listing, [f"{folder}*, {len(images)} images without labels"])
    why = f" ({'; '.join(refused)})" if refused else ""
    if listing.split == "val" and not listing.dedicated:
        raise doubt(
            listing,
            f"{len(images)} held-out images lie in one folder, {folder}, and no file says their classes{why}",
            join(flat.split_folder and "train", "{class}"),
            otherwise="put them into a folder a class, or a list of names and classes beside them (val_annotations.txt, val.txt)",
        )
    raise doubt(
        listing,
        f"all {len(images)} images lie in one folder, {folder or './'}, which makes one class{why}",
        join(posixpath.dirname(flat.folder), "{class}"),
        join(flat.folder, "{class}.*"),
        otherwise="write labels.csv beside the images (columns path and label), or pass the folder of the class folders as --data",
    )


def _lists(listing: Listing, flat: Flat) -> list[str]:
    """Return the files that may say the classes: lists by their ending, in the folder of the split, or named as the split is."""
    words = frozenset().union(*SPLIT_NAMES[listing.split])
    inside = join(flat.split_folder, "") if flat.split_folder else None
    return [
        name
        for name in listing.files
        if name.lower().endswith((".txt", ".csv", ".tsv"))
        and not is_unlabeled(posixpath.basename(name))
        and (
            split_word(posixpath.basename(name)) in words
            or (inside is not None and name.startswith(inside))
            or (listing.dedicated and not flat.split_folder)
        )
    ]


def _labels(
    listing: Listing, name: str, images: Mapping[str, str], refused: list[str]
) -> dict[str, str]:
    """Return file name -> class of the images that a list names; empty, and why in `refused`, when it is no such list.

    Raises:
        DataError: It names an image twice, with two classes.
    """
    text = listing.read(name, _MAX_LIST_BYTES).decode("utf-8-sig", "replace")
    if posixpath.basename(name) == _GROUND_TRUTH:
        return _ground_truth(listing, name, text, images, refused)
    stems: dict[str, str | None] = {}
    for image in images:
        stem = posixpath.splitext(image)[0]
        stems[stem] = None if stem in stems else image
    said: dict[str, str] = {}
    for line in text.splitlines():
        fields = (
            re.split(r"\t|,", line, maxsplit=2)
            if re.search(r"[\t,]", line)
            else line.split(None, 1)
        )
        if len(fields) < 2:
            continue
        base = posixpath.basename(fields[0].strip().replace("\\", "/"))
        match = base if base in images else stems.get(base)
        if match is not None:
            label = fields[1].strip()
            if said.setdefault(match, label) != label:
                raise DataError(
                    f"{listing.root}/{name}: names {match} with two classes, {said[match]!r} and {label!r}; correct it"
                )
    if not said:
        return {}
    order = _order(listing)
    classes = _classes(set(said.values()), listing, order)
    unknown = sorted(set(said.values()) - classes.keys())
    if unknown:
        hint = (
            ", and no classes.txt or synsets.txt says which classes these numbers are (--source.numbers index: places among the "
            "training classes)"
            if order is None and all(label.isdecimal() for label in unknown)
            else ""
        )
        refused.append(
            f"{name} says {shown(unknown)}, which {'is' if len(unknown) == 1 else 'are'} none of the "
            f"{len(listing.class_names or ())} classes{hint}"
        )
        return {}
    return {image: classes[label] for image, label in said.items()}


def _classes(
    texts: Iterable[str], listing: Listing, order: tuple[str, ...] | None
) -> dict[str, str]:
    """Return the training class of each text of a list, by the rule of `labels`, without those that are none of them."""
    names, numbers = listing.class_names or (), listing.config.numbers
    _, places = beside_classes(order, names, numbers, listing.root)
    by_name = {plain(name): label for label, name in enumerate(names)}
    classes: dict[str, str] = {}
    for text in texts:
        name = text if plain(text) in by_name else _without_boxes(text, by_name)
        if plain(name) in by_name and not numbers.startswith("index"):
            classes[text] = names[by_name[plain(name)]]
        elif (label := label_of(name, numbers, is_text=True)) is not None:
            with contextlib.suppress(DataError):
                place = class_of(label, places, names, by_name, listing.root, numbers)
                classes[text] = names[place]
    return classes


def _without_boxes(text: str, by_name: Mapping[str, int]) -> str:
    """Return the class that boxes of four numbers follow, as in Kaggle's solutions; any other text as it is.

    Before each box the class may stand again: `n03995372 85 1 499 272 n03995372 9 1 99 72`.
    """
    words = text.split()
    most = max((name.count(" ") for name in by_name), default=0) + 1
    for count in range(1, min(most, len(words) - 4) + 1):
        name, rest = " ".join(words[:count]), f" {' '.join(words[count:])} "
        if plain(name) in by_name:
            for boxes in (rest.split(), rest.replace(f" {name} ", " ").split()):
                if len(boxes) % 4 == 0 and all(map(_COORDINATE.fullmatch, boxes)):
                    return name
    return text


def _order(listing: Listing) -> tuple[str, ...] | None:
    """Return the classes in the order of a file with a name a line, if it has the training classes and no others."""
    for name in _ORDERS:
        if name in listing.files:
            lines = listing.read(name, _MAX_LIST_BYTES).decode("utf-8-sig", "replace").splitlines()
            names = tuple(plain(line) for line in lines if line.strip())
            if sorted(names) == sorted(map(plain, listing.class_names or ())):
                return names
    return None


def _ground_truth(
    listing: Listing, name: str, text: str, images: Mapping[str, str], refused: list[str]
) -> dict[str, str]:
    """Return the classes of ILSVRC's validation images: line k is the id of image k, and meta.mat has the class of each id."""
    meta = join(posixpath.dirname(name), "meta.mat")
    if meta not in listing.files:
        refused.append(
            f"{name} holds ids of ILSVRC, and meta.mat, which says what they are, is not beside it"
        )
        return {}
    try:
        synsets = read_structs(listing.read(meta, _MAX_META_BYTES), "synsets", _SYNSET)
        class_of = {
            one["ILSVRC2012_ID"]: str(one["WNID"]) for one in synsets if not one["num_children"]
        }
        classes = [class_of[int(line)] for line in text.split()]
        numbers = {image: int(re.findall(r"\d+", image)[-1]) for image in images}
        if not {*numbers.values()} == {*range(1, len(classes) + 1)}:
            raise ValueError(f"{len(images)} images, {len(classes)} lines")
        said = {image: classes[number - 1] for image, number in numbers.items()}
    except (ValueError, KeyError, IndexError, zlib.error) as error:
        raise DataError(
            f"{listing.root}/{name}: expected an id a line for images that are numbered from 1, and ILSVRC's meta.mat beside it, "
            f"found otherwise ({type(error).__name__}: {error}); restore both files"
        ) from error
    unknown = sorted(set(said.values()) - set(listing.class_names or ()))
    if unknown:
        refused.append(f"{name} says {shown(unknown)}, which are none of the classes")
        return {}
    return said


def _listed(
    listing: Listing, name: str, images: Mapping[str, str], label_of: Mapping[str, str]
) -> Source:
    """Return the images with their classes; those that the list leaves out are bad images."""
    names = listing.class_names
    assert names is not None
    place = {class_name: label for label, class_name in enumerate(names)}
    keys: dict[int, list[str]] = {}
    problems: dict[str, str] = {}
    for image, path in images.items():
        if image in label_of:
            label = place[label_of[image]]
            keys.setdefault(label, []).append(f"{path}#{label}")
        else:
            problems[path] = f"{name} does not name it"
            keys.setdefault(0, []).append(path)
    if len(problems) > listing.config.max_bad_images:
        raise DataError(
            f"{listing.root}: {len(problems)} of {len(images)} images are not named in {name}, --source.max-bad-images allows "
            f"{listing.config.max_bad_images}; complete it, or raise the limit. The first: {shown(list(problems)[:SHOWN])}"
        )
    read = sorted((*images.values(), name))
    return csvfile.CsvSource(
        listing,
        {path: listing.files[path] for path in read},
        names,
        tables=hashlib.sha256(repr(sorted(label_of.items())).encode()).hexdigest(),
        keys=keys,
        problems=problems,
    )
