"""From a URI to a `Source`: which format lies there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.store.sources import (
    arrays,
    cifar,
    class_tars,
    csvfile,
    flat,
    imagefolder,
    parquet,
    webdataset,
)
from wmdd_ray.store.sources.account import passed_over, refuse_much_passed_over
from wmdd_ray.store.sources.base import Source
from wmdd_ray.store.sources.classes import check_class_names, shown
from wmdd_ray.store.sources.endings import ending_of
from wmdd_ray.store.sources.layout import Flat, find_classes
from wmdd_ray.store.sources.listing import Listing, NoSuchSplitError, Split, list_files, split_word
from wmdd_ray.store.sources.patterns import layout_pattern

PREPARED_KEY = "prepared.json"
"""What `jobs/prepare.py` writes last beside its Parquet files; a folder that holds it needs no format."""

_WITH_LAYOUT = ("imagefolder", "webdataset", "parquet")
_PACKED = (".zip", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar")
_WNID = re.compile("n[0-9]{8}")
_WORDS = ("words.txt", "LOC_synset_mapping.txt")

# Each predicate looks at one relative name; each opener at the whole listing.
_FORMATS: dict[str, tuple[Callable[[str], bool], Callable[[Listing], Source], str]] = {
    "idx": (arrays.is_idx, arrays.open_idx, "IDX files (train-images-idx3-ubyte.gz, ...)"),
    "cifar": (
        cifar.is_cifar,
        cifar.open_cifar,
        "CIFAR's binary version (data_batch_1.bin, ..., or cifar-10-binary.tar.gz)",
    ),
    "webdataset": (webdataset.is_tar, class_tars.open_tars, "WebDataset shards (*.tar)"),
    "parquet": (parquet.is_parquet, parquet.open_parquet, "Parquet files (*.parquet)"),
    "imagefolder": (
        imagefolder.is_class_image,
        imagefolder.open_imagefolder,
        "image folders (CLASS/*.jpg or train/CLASS/*.jpg)",
    ),
    "csv": (
        flat.is_table,
        flat.open_tables,
        "a table of paths and labels (labels.csv, train.csv, ...)",
    ),
}


def open_source(
    uri: str,
    config: SourceConfig,
    *,
    split: Split,
    class_names: tuple[str, ...] | None = None,
    dedicated: bool = False,
) -> Source:
    """List `uri` and return its images of one split.

    Args:
        uri: `digits`, a path, or a URI: a folder, one file, or a pattern such as
        `s3://b/train-{000..012}.tar`.
        config: How the images are read; `format` may say `auto`.
        split: `train`, or `val` for the held-out images.
        class_names: Classes in label order, as the training images have them; held-out images are
            matched to them by name. None takes the order of the data.
        dedicated: `uri` was given for this split alone (`--val-data`), so a layout that names no
            splits is read whole. Otherwise such a layout holds training images only.

    Raises:
        DataError: Nothing there, no or several known formats, no such split, or other class names, or such that cannot be told
            apart or written on a line.
        ArtifactError: The store cannot be reached.
    """
    if config.format in ("auto", "digits") and uri == "digits":
        return arrays.open_digits(config, split, class_names)
    root, files, hidden = list_files(uri, config)
    listing = Listing(
        root=root,
        files=files,
        config=config,
        split=split,
        dedicated=dedicated,
        class_names=class_names,
        hidden=hidden,
    )
    format = _detect(listing)
    if config.layout and format not in _WITH_LAYOUT and not dedicated:
        raise ConfigError(
            f"--source.layout: expected none for {_FORMATS[format][2]}, which {root} holds; leave it out, or pass another "
            "--source.format"
        )
    source = _FORMATS[format][1](listing)
    check_class_names(source.class_names, root)
    source.titles = _titles(source, listing)
    source.passed_over = passed_over(source, listing)
    if source.format in ("imagefolder", "class tars", "folders in tars"):
        refuse_much_passed_over(source)
    return source


def _titles(source: Source, listing: Listing) -> tuple[str, ...]:
    """Return what the classes are called in words, where these are WordNet ids and a list of words comes with them."""
    if not all(map(_WNID.fullmatch, source.class_names)):
        return ()
    for name in listing.files:
        if name.rpartition("/")[2] in _WORDS and listing.root == source.root:
            lines = (source.read_if_there(name) or b"").decode("utf-8", "replace").splitlines()
            words = {line[:9]: line[9:].strip() for line in lines}
            if words.keys() >= {*source.class_names}:
                return tuple(words[wnid] for wnid in source.class_names)
    return ()


def _detect(listing: Listing) -> str:
    """Return the format: a named one must be there, `auto` must find exactly one."""
    if PREPARED_KEY in listing.files:
        return "parquet"
    if listing.config.format == "digits":
        raise _embedded(listing.root)
    candidates = list(_FORMATS) if listing.config.format == "auto" else [listing.config.format]
    matches = [name for name in candidates if any(map(_FORMATS[name][0], listing.files))]
    # Any table may lie beside images. One counts that was itself asked for, or is named as labels are; where it lies beside
    # folders of images, it may be the classes or the folders.
    tables = [name for name in listing.files if _names_labels(name)]
    # Beside folders of classes it says more of the images: jobs/export.py writes it there.
    only_json = tables == [csvfile.JSON_TABLE] and _has_class_folders(listing)
    asked = len(listing.files) == 1 or (bool(tables) and not only_json)
    if listing.config.format == "auto" and not (asked and {*matches} <= {"csv", "imagefolder"}):
        matches = [name for name in matches if name != "csv"]
    if len(matches) == 2 and "csv" in matches and not _has_class_folders(listing):
        return "csv"
    if len(matches) == 1:
        return matches[0]
    # Only now, for it looks into files.
    if not matches and "imagefolder" in candidates:
        # Right in the folder images have a class if the layout finds it in their names.
        by_layout = layout_pattern(listing.config.layout or "{class}/")
        if any("/" in name or by_layout.fullmatch(name) for name in listing.images):
            return "imagefolder"
    expected = ", ".join(_FORMATS[name][2] for name in (matches or candidates))
    if matches:
        raise DataError(
            f"{listing.root}: expected one format, found {len(matches)}: {expected}; name one by "
            "--source.format or pass the folder that holds just one"
        )
    endings = Counter(ending_of(name) or "none" for name in listing.files)
    counts = ", ".join(f"{count} x {ending}" for ending, count in endings.most_common(5))
    packed = [name for name in listing.files if ending_of(name) in _PACKED]
    advice = f"unpack {packed[0]} and pass the folder of its images; or " if packed else ""
    raise DataError(
        f"{listing.root}: expected {expected}, found {len(listing.files)} other files ({counts}): "
        f"{shown(list(listing.files))}; {advice}check --data, --val-data and --source.format"
    )


def _has_class_folders(listing: Listing) -> bool:
    """Return whether the images may lie in folders of classes, so that a table beside them is not all that says them."""
    try:
        return not isinstance(find_classes(listing), Flat)
    except NoSuchSplitError:
        return False
    except DataError:
        return True


def _names_labels(name: str) -> bool:
    """Return whether a table is named as the labels of images are."""
    stem = name.rpartition(".")[0].lower()
    return csvfile.is_csv(name) and (stem in ("labels", "metadata") or split_word(name) == stem)


def _embedded(uri: str) -> DataError:
    return DataError(
        f"{uri}: the recipe or --source.format says `digits`, which is embedded and has no files; pass --data digits for them, or "
        "--source.format auto (and the size, channels, mean and std of these images, or the --recipe that is made for them)"
    )
