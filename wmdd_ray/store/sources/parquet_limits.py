"""What a Parquet file may unpack to: bounded by its own size before anything is read.

Images do not shrink when they are packed, so a column that unpacks to a hundred times its size is none of images. And one value
of a dictionary can stand in all rows, so few enough are unpacked at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wmdd_ray.errors import DataError
from wmdd_ray.store import pages
from wmdd_ray.store.sources.parquet_columns import Columns

_MAX_RATIO = 100
_MAX_BATCH_BYTES = 256 << 20
# Of a label, and what a column may have in any case.
_LABEL_BYTES, _FREE_BYTES = 64, 1 << 20
_HEADER_BYTES = 512
# Field ids of a footer beside those of `pages`.
_NUM_VALUES, _UNPACKED = 5, 6


class Bounds:
    """Columns of files, and what they may unpack to: looked at once a file and process, and again where its footer is another one.

    A look parses the footer and every page's header in Python, 7 ms for 44 row groups and 20 for the names of 10,000 classes, and
    every class opens the file for itself.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, Columns]] = {}
        # One tuple for all files that declare the same names: there may be ten thousand of each.
        self._names: dict[tuple[str, ...] | None, tuple[str, ...] | None] = {}

    def bounded(
        self,
        handle: pa.NativeFile,
        parquet: pq.ParquetFile,
        find: Callable[[], Columns],
        where: str,
        *,
        nearby: bool,
    ) -> Columns:
        """Return what `bounded` does of the columns that `find` finds in the file at `where`."""
        content = _Content(handle)
        identity = hashlib.sha256(b"%d " % handle.size() + _footer(content)).digest()
        known = self._known.get(where)
        if known is None or known[0] != identity:
            columns = bounded(content, parquet, find(), where, nearby=nearby)
            names = self._names.setdefault(columns.class_names, columns.class_names)
            known = self._known[where] = identity, replace(columns, class_names=names)
        return known[1]


def bounded(
    content: _Content, parquet: pq.ParquetFile, columns: Columns, where: str, *, nearby: bool
) -> Columns:
    """Return the columns with the largest value that each may have, as the footer and the pages' headers say.

    Arrow's own accessors of a footer end the process where it was damaged. `nearby` says that a look at each page's header takes no
    request to a store; else the footer is taken at its word.

    Raises:
        DataError: A column says that it unpacks to much more than what it is made of, or the footer cannot be read.
    """
    paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    largest = {}
    try:
        groups = pages._struct(_footer(content), 0)[0][pages._ROW_GROUPS]
        for path in (columns.image_path, columns.label):
            at = paths.index(path)
            chunks = [group[pages._COLUMNS][at] for group in groups]
            largest[path] = max(
                (
                    _unpacked(content, chunk[pages._COLUMN_META], path, columns, where, nearby)
                    for chunk in chunks
                ),
                default=0,
            )
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where}: expected a Parquet file, found a malformed footer or page ({error}); restore the file from its origin"
        ) from error
    return replace(
        columns, image_bytes=largest[columns.image_path], label_bytes=largest[columns.label]
    )


def batches(
    parquet: pq.ParquetFile, columns: Columns, most: int, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file, or of some row groups, in batches of at most `most`."""
    rows = batch_rows(columns.image_bytes, most)
    paths = [columns.image_path, columns.label]
    yield from parquet.iter_batches(rows, row_groups=groups, columns=paths, use_threads=False)


def batch_rows(value_bytes: int, most: int) -> int:
    """Return how many rows may hold the largest value that there can be: one of a dictionary stands in any number of them."""
    return max(1, min(most, _MAX_BATCH_BYTES // max(1, value_bytes)))


def _footer(content: _Content) -> bytes:
    footer_bytes = int.from_bytes(content[-8:-4], "little")
    return bytes(content[-8 - footer_bytes : -8])


def _unpacked(
    content: _Content, meta: Any, path: str, columns: Columns, where: str, nearby: bool
) -> int:
    """Return what a column's piece in a row group unpacks to."""
    stored, unpacked = meta[pages._STORED], meta[_UNPACKED]
    most = _FREE_BYTES + (
        _LABEL_BYTES * meta[_NUM_VALUES] if path == columns.label else _MAX_RATIO * stored
    )
    # Of a column without a value the first page is at 0.
    starts = [start for start in (meta[pages._FIRST_PAGE], meta.get(pages._DICTIONARY)) if start]
    at = min(starts, default=0)
    stop, in_pages = at + (stored if starts else 0), 0
    while nearby and at < stop and in_pages <= most:
        header, at = pages._struct(content, at)  # type: ignore[arg-type]
        in_pages += header[pages._PAGE_BYTES]
        if min(at, header[pages._PAGE_BYTES], header[pages._PAGE_STORED]) < 0:
            raise ValueError(f"a page of {header[pages._PAGE_BYTES]} bytes")
        at += header[pages._PAGE_STORED]
    if not 0 <= max(unpacked, in_pages) <= most:
        raise DataError(
            f"{where}: column {path} says that {stored} bytes unpack to {max(unpacked, in_pages)}, expected at most {most}; "
            "images and labels do not shrink like that, so the file is damaged or made to fill the memory"
        )
    return int(max(unpacked, in_pages))


class _Content:
    """A file as bytes, of which a little is read around the place that is looked at."""

    def __init__(self, handle: pa.NativeFile) -> None:
        self._handle = handle
        self._size = handle.size()
        self._start, self._block = 0, b""

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop, _ = place.indices(self._size)
            return self._handle.read_at(max(0, stop - start), start)
        if not 0 <= place - self._start < len(self._block):
            if not 0 <= place < self._size:
                raise IndexError("the end of the file")
            self._start, self._block = place, self._handle.read_at(_HEADER_BYTES, place)
        return self._block[place - self._start]
