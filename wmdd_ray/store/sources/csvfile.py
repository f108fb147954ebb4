"""A table of image paths and labels beside the images: `labels.csv`, `train.csv` and `val.csv`, or `metadata.jsonl`."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.base import FileSource, RawImage, Shard, class_shards
from wmdd_ray.store.sources.classes import SHOWN, one_line, shown
from wmdd_ray.store.sources.endings import is_image_name
from wmdd_ray.store.sources.files import reading, refuse_outside
from wmdd_ray.store.sources.labels import Label, beside_classes, found_classes, label_of, no_label
from wmdd_ray.store.sources.listing import (
    SPLIT_NAMES,
    SPLIT_WORDS,
    Listing,
    list_files,
    no_such_split,
    split_word,
)
from wmdd_ray.store.sources.webdataset_index import read_class_names

logger = logging.getLogger(__name__)

_PATH_NAMES = (
    *("path", "file_name", "filename", "file", "filepath", "file_path"),
    *("image", "image_path", "img", "img_path"),
)
_LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
_SPLIT_NAME = "split"
JSON_TABLE = "metadata.jsonl"
"""Hugging Face's table: an object a line."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of a table: where it stands, the three cells that count, and why it is no image, if so."""

    place: str
    path: str
    label: Label | None
    split: str
    problem: str = ""


class _NoSuchColumnsError(DataError):
    """A table has no column of paths, or none of labels."""


class CsvSource(FileSource):
    """Image files that a table names, with their labels. The key of an image is `PATH#LABEL`.

    Rows that are no image are bad images under the name of their line, such as `labels.csv:17`.
    """

    format = "csv"
    _transient = (*FileSource._transient, "_keys")

    def __init__(
        self,
        listing: Listing,
        files: dict[str, int],
        class_names: tuple[str, ...] | None = None,
        *,
        tables: str = "",
        keys: Mapping[int, Sequence[str]] | None = None,
        problems: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(listing.root, files, listing.config, class_names)
        self._tables = tables
        self._keys = dict(keys or {})
        self._problems = dict(problems or {})

    @property
    def num_images(self) -> int:
        return sum(map(len, self._keys.values()))

    def shards(self, chunk_images: int) -> list[Shard]:
        sizes = {
            key: self.files.get(key.rpartition("#")[0], 0)
            for key in itertools.chain.from_iterable(self._keys.values())
        }
        return class_shards(sorted(self._keys.items()), chunk_images, sizes)

    def fingerprint(self) -> str:
        """Return a SHA-256 over what the tables say, beside names and sizes of all files. Driver only."""
        return hashlib.sha256(f"{super().fingerprint()} {self._tables}".encode()).hexdigest()

    def _read_one(self, named: tuple[str, int | None]) -> RawImage:
        key, size_bytes = named
        if key in self._problems:
            return RawImage(key=key, label=-1, content=b"", problem=self._problems[key])
        path, _, label = key.rpartition("#")
        if not path or ".." in path.split("/") or not re.fullmatch("[0-9]{1,9}", label):
            raise DataError(f"{self.root}: no image {key!r}, expected PATH#LABEL")
        return self._read_file(key, self._class_of(int(label), key, None), path, size_bytes)


def is_csv(name: str) -> bool:
    """Return whether a file is a table that lies at the root."""
    return "/" not in name and (name.lower().endswith((".csv", ".tsv")) or name == JSON_TABLE)


def open_csv(listing: Listing) -> CsvSource:
    """Return the rows of the split.

    A row belongs to the split that its column `split` or its table's name says; without either, as in other formats.
    Labels are class names, in sorted order unless `classes.txt` or `classes.json` beside the table gives another, or
    numbers. Paths are relative to the table; absolute ones and URIs must lie below its folder.
    """
    tables = {name: size for name, size in listing.files.items() if is_csv(name)}
    source = CsvSource(listing, tables)
    rows, digest = _rows_of_split(source, listing)
    images = _image_files(listing, rows)
    checked = list(_without_repeats([_checked(row, images) for row in rows]))
    names, places = _classes(source, listing, checked)
    keys: dict[int, list[str]] = {}
    problems: dict[str, str] = {}
    for row in checked:
        # A row without a label is counted among the first class's, under which it is refused.
        label = 0 if row.label is None else places.get(row.label, 0)
        if row.problem:
            problems[row.place] = row.problem
            keys.setdefault(label, []).append(row.place)
        else:
            keys.setdefault(label, []).append(f"{row.path}#{label}")
    if len(problems) > listing.config.max_bad_images:
        first = "; ".join(f"{place}: {why}" for place, why in list(problems.items())[:SHOWN])
        raise DataError(
            f"{listing.root}: {len(problems)} rows cannot be used, --source.max-bad-images allows "
            f"{listing.config.max_bad_images}; correct them, or raise the limit. The first: {first}"
        )
    used = {row.path: images[row.path] for row in checked if not row.problem}
    files = dict(sorted({**used, **tables}.items()))
    return CsvSource(listing, files, names, tables=digest, keys=keys, problems=problems)


def _rows_of_split(source: CsvSource, listing: Listing) -> tuple[list[_Row], str]:
    """Return the rows of the split, and a checksum of the tables that they stand in."""
    wanted = SPLIT_NAMES[listing.split]
    rows: list[_Row] = []
    digest = hashlib.sha256()
    root = source.root.removesuffix("/") + "/"
    words = {table: split_word(table) for table in source.files}
    named = next((names for names in wanted if names & set(words.values())), frozenset())
    for table, size_bytes in source.files.items():
        word = words[table]
        if word and word not in named:
            continue
        with (
            reading(source.url(table), "a table in UTF-8"),
            source.open_random(table, size_bytes) as file,
        ):
            content = file.read()
        with reading(source.url(table), "a table in UTF-8"):
            text = content.decode("utf-8-sig")
        try:
            rows += (
                replace(row, path=row.path.removeprefix(root).removeprefix("./"))
                for row in _rows(text, source.url(table), table, word, listing.config)
            )
            digest.update(content)
        except _NoSuchColumnsError:
            # The tests of competitions have no labels.
            if word not in SPLIT_NAMES["val"][-1]:
                raise
            logger.warning("%s: has no labels, and is not read", source.url(table))
    for names in wanted:
        selected = [row for row in rows if row.split in names]
        if selected:
            _refuse_other_splits(rows, listing)
            return selected, digest.hexdigest()
    if not any(row.split for row in rows) and (listing.split == "train" or listing.dedicated):
        if rows:
            return rows, digest.hexdigest()
        raise DataError(f"{listing.root}: expected rows with paths and labels, found none")
    raise no_such_split(listing, sorted({row.split for row in rows} - {""}) or list(source.files))


def _refuse_other_splits(rows: Sequence[_Row], listing: Listing) -> None:
    """Raise a DataError where rows beside those of a split say another word than those of training and held-out images."""
    others = Counter(row.split for row in rows if row.split not in SPLIT_WORDS)
    if others:
        words = ", ".join(
            f"{word or 'nothing'!r} ({count} rows)" for word, count in sorted(others.items())
        )
        raise DataError(
            f"{listing.root}: expected a column split of {', '.join(sorted(SPLIT_WORDS))}, found {words} beside them; rename "
            "these, or take their rows out of the table"
        )


def _rows(text: str, where: str, table: str, word: str, config: SourceConfig) -> Iterator[_Row]:
    is_json = table == JSON_TABLE
    for place, (path, label, split) in (_json_cells if is_json else _cells)(text, where, config):
        named = label_of(label, config.numbers, is_text=not is_json)
        problem = f"{no_label(label)} for {one_line(path)}" if path and named is None else ""
        of_split = word if split is None else split.lower()
        yield _Row(f"{table}:{place}", path, named, of_split, problem)


def _cells(
    text: str, where: str, config: SourceConfig
) -> Iterator[tuple[int, tuple[str, object, str | None]]]:
    """Yield line, and path, label and split, of the rows of a table with separators."""
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        first = next(lines, [])
        path_at, label_at, split_at = _columns(first, config, where, by_place=True)
        width = max(path_at, label_at, -1 if split_at is None else split_at) + 1
        numbered = ((lines.line_num, cells) for cells in lines if any(map(str.strip, cells)))
        rows = [(lines.line_num, first), *itertools.islice(numbered, 1)]
        if _is_header(first, rows[-1][1], path_at, config, where):
            del rows[0]
        for number, cells in itertools.chain(rows, numbered):
            cells = [cell.strip() for cell in cells] + [""] * (width - len(cells))
            split = None if split_at is None else cells[split_at]
            yield number, (cells[path_at], cells[label_at], split)
    except csv.Error as error:
        raise DataError(
            f"{where}: line {lines.line_num} is malformed ({error}); expected cells separated by {delimiter!r}, and "
            'those that hold it, or a quote, in double quotes ("a ""b""")'
        ) from error


def _is_header(
    first: list[str], second: list[str], path_at: int, config: SourceConfig, where: str
) -> bool:
    """Return whether the first line of a table names its columns: by their usual names, or by what lies below."""
    if is_image_name(first[path_at].strip()):
        return False
    named = {_column_name(cell) for cell in first}
    asked = {_column_name(name) for name in (config.image_column, config.label_column) if name}
    if named & {*_PATH_NAMES, *_LABEL_NAMES, _SPLIT_NAME, *asked}:
        return True
    if len(second) > path_at and is_image_name(second[path_at].strip()):
        return True
    raise DataError(
        f"{where}: the first line ({shown(first)}) may name the columns or be an image's row; put a line `path,label` above it, or "
        "call its columns so"
    )


def _json_cells(
    text: str, where: str, config: SourceConfig
) -> Iterator[tuple[int, tuple[str, object, str | None]]]:
    """Yield the same of a table with an object a line; the first one has all names."""
    names: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = {str(name): value for name, value in json.loads(line).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{where}: line {number} is malformed ({error}); expected a JSON object a line, such as "
                '{"file_name": "0.png", "label": "ant"}'
            ) from error
        names = names or list(row)
        path_at, label_at, split_at = _columns(names, config, where, by_place=False)
        split = None if split_at is None else str(row.get(names[split_at], ""))
        yield number, (str(row.get(names[path_at], "")), row.get(names[label_at]), split)


def _columns(
    header: list[str], config: SourceConfig, where: str, *, by_place: bool
) -> tuple[int, int, int | None]:
    """Return the places of path, label and split: as asked for, by usual names, else (`by_place`) the first two of two columns."""
    named = [_column_name(cell) for cell in header]
    split = named.index(_SPLIT_NAME) if _SPLIT_NAME in named else None
    path = _place(named, config.image_column, _PATH_NAMES)
    label = _place(named, config.label_column, _LABEL_NAMES)
    others = [i for i in range(len(named)) if i != split]
    by_place = by_place and config.label_column is None and config.image_column is None
    if len(others) == 2 and by_place:
        first, second = others
        if path is None:
            path = second if label == first else first
        if label is None:
            label = second if path == first else first
    if path is None or label is None:
        raise _NoSuchColumnsError(
            f"{where}: expected a header with a column of paths ({', '.join(_PATH_NAMES[:4])}, ...) and one of labels "
            f"({', '.join(_LABEL_NAMES[:4])}, ...), or two columns; found {shown(header) or 'an empty table'}; name them by "
            "--source.image-column and --source.label-column"
        )
    return path, label, split


def _column_name(cell: str) -> str:
    return cell.strip().lower().replace(" ", "_")


def _place(named: list[str], wanted: str | None, usual: Sequence[str]) -> int | None:
    names = usual if wanted is None else (_column_name(wanted),)
    return next((named.index(name) for name in names if name in named), None)


def _image_files(listing: Listing, rows: Sequence[_Row]) -> dict[str, int]:
    """Return path -> bytes of the files that may be meant: one listing of the folder that holds all of them."""
    if any(is_image_name(name) for name in listing.files):
        return listing.files
    folders = {posixpath.dirname(row.path) for row in rows if row.path}
    inside = [folder for folder in folders if not (folder.startswith("/") or ".." in folder)]
    common = posixpath.commonpath(inside) if inside and all(inside) else ""
    where = f"{listing.root}/{common}".rstrip("/")
    if not listing.config.follow_links:
        refuse_outside(listing.root, [common])
    _, sizes, _ = list_files(where, listing.config)
    prefix = f"{common}/" if common else ""
    return {prefix + name: size for name, size in sizes.items()}


def _without_repeats(rows: Sequence[_Row]) -> Iterator[_Row]:
    seen: dict[str, _Row] = {}
    for row in rows:
        before = seen.setdefault(row.path, row)
        if before is row or not row.path:
            yield row
        else:
            other = f" with label {before.label!r}" if before.label != row.label else ""
            yield replace(row, problem=f"{row.path} stands at {before.place} already{other}")


def _checked(row: _Row, images: Mapping[str, int]) -> _Row:
    """Return a row with its path as the listing has it, or with the reason why it is no image."""
    if row.problem:
        return row
    if not row.path:
        return replace(row, problem="no path")
    # Tables that were written on Windows.
    for path in (row.path, row.path.replace("\\", "/")):
        if path in images:
            return replace(row, path=path)
    return replace(row, problem=f"no file {one_line(row.path)} below the folder of the table")


def _classes(
    source: CsvSource, listing: Listing, rows: Sequence[_Row]
) -> tuple[tuple[str, ...], dict[Label, int]]:
    """Return the class names, and the class of every label that a good row has.

    Raises:
        DataError: A label is none of the classes.
    """
    examples = {
        row.label: row.path for row in reversed(rows) if row.label is not None and not row.problem
    }
    if not examples:
        first = f"{rows[0].place}: {rows[0].problem}"
        raise DataError(
            f"{source.root}: expected rows with paths and labels, found no good one; the first is {first}"
        )
    numbers = listing.config.numbers
    names, places = beside_classes(
        read_class_names(source), listing.class_names, numbers, source.root
    )
    if names is None:
        names, places = found_classes(examples, numbers, source.root)
    source.name_classes(names, places)
    return names, {label: source.class_of(label, path) for label, path in examples.items()}
