"""From a URI to a `Source`: which format lies there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources import arrays, cifar, csvfile, imagefolder, parquet, webdataset
from wmdd_ray.store.sources.base import Source
from wmdd_ray.store.sources.classes import shown
from wmdd_ray.store.sources.listing import Listing, Split, list_files, split_word

PREPARED_KEY = "prepared.json"
"""What `jobs/prepare.py` writes last beside its Parquet files; a folder that holds it needs no format."""

# Each predicate looks at one relative name; each opener at the whole listing.
_FORMATS: dict[str, tuple[Callable[[str], bool], Callable[[Listing], Source], str]] = {
    "idx": (arrays.is_idx, arrays.open_idx, "IDX files (train-images-idx3-ubyte.gz, ...)"),
    "cifar": (
        cifar.is_cifar,
        cifar.open_cifar,
        "CIFAR's binary version (data_batch_1.bin, ..., or cifar-10-binary.tar.gz)",
    ),
    "webdataset": (webdataset.is_tar, webdataset.open_webdataset, "WebDataset shards (*.tar)"),
    "parquet": (parquet.is_parquet, parquet.open_parquet, "Parquet files (*.parquet)"),
    "imagefolder": (
        imagefolder.is_class_image,
        imagefolder.open_imagefolder,
        "image folders (CLASS/*.jpg or train/CLASS/*.jpg)",
    ),
    "csv": (
        csvfile.is_csv,
        csvfile.open_csv,
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
        DataError: Nothing there, no or several known formats, no such split, or other class names.
        ArtifactError: The store cannot be reached.
    """
    if config.format in ("auto", "digits") and uri == "digits":
        return arrays.open_digits(config, split, class_names)
    root, files = list_files(uri, follow_links=config.follow_links, access=config.bucket)
    listing = Listing(
        root=root,
        files=files,
        config=config,
        split=split,
        dedicated=dedicated,
        class_names=class_names,
    )
    return _FORMATS[_detect(listing)][1](listing)


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
    asked = len(listing.files) == 1 or any(map(_names_labels, listing.files))
    if listing.config.format == "auto" and not (asked and {*matches} <= {"csv", "imagefolder"}):
        matches = [name for name in matches if name != "csv"]
    if len(matches) == 1:
        return matches[0]
    expected = ", ".join(_FORMATS[name][2] for name in (matches or candidates))
    if matches:
        raise DataError(
            f"{listing.root}: expected one format, found {len(matches)}: {expected}; name one by "
            "--source.format or pass the folder that holds just one"
        )
    endings = Counter(PurePosixPath(name).suffix.lower() or "none" for name in listing.files)
    counts = ", ".join(f"{count} x {ending}" for ending, count in endings.most_common(5))
    raise DataError(
        f"{listing.root}: expected {expected}, found {len(listing.files)} other files ({counts}): "
        f"{shown(list(listing.files))}; check --data, --val-data and --source.format"
    )


def _names_labels(name: str) -> bool:
    """Return whether a table is named as the labels of images are."""
    stem = PurePosixPath(name).stem.lower()
    return csvfile.is_csv(name) and (stem in ("labels", "metadata") or split_word(name) == stem)


def _embedded(uri: str) -> DataError:
    return DataError(
        f"{uri}: the recipe or --source.format says `digits`, which is embedded and has no files; pass --data digits for them, or "
        "--source.format auto (and the size, channels, mean and std of these images, or the --recipe that is made for them)"
    )
