"""Parquet in Hugging Face's layout: a column of encoded images and one of integer labels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError, WmddError
from wmdd_ray.store.sources.base import RawImage, Shard, Source, file_shard_id
from wmdd_ray.store.sources.classes import MAX_CLASSES, integer_names, match_classes
from wmdd_ray.store.sources.files import reading
from wmdd_ray.store.sources.listing import Listing, files_of_split
from wmdd_ray.store.sources.parquet_columns import Columns, find_columns

# Rows that are in memory at once, beside the pages they come from.
_BATCH_ROWS = 32
# Column chunks are read in pieces of this size: a row group can be as large as the file.
_BUFFER_BYTES = 8 << 20
_FOOTER_THREADS = 8


class ParquetSource(Source):
    """Parquet files, a shard each. The key of an image is `FILE#ROW`."""

    format = "parquet"
    _transient = (*Source._transient, "_num_rows")

    def __init__(
        self,
        *,
        root: str,
        files: dict[str, int],
        config: SourceConfig,
        class_names: tuple[str, ...],
        relabel: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(
            root=root, files=files, config=config, class_names=class_names, relabel=relabel
        )
        self._num_rows: dict[str, int] | None = None

    @property
    def num_images(self) -> int:
        return sum(self._rows_of_files().values())

    def shards(self, chunk_images: int) -> list[Shard]:
        rows = self._rows_of_files()
        return [
            Shard(id=file_shard_id(i), file=file, num_images=rows[file], sizes=(size_bytes,))
            for i, (file, size_bytes) in enumerate(self.files.items())
        ]

    def _rows_of_files(self) -> dict[str, int]:
        """Return the rows of every file by its footer; read once, several at a time.

        The label statistics beside it stay untouched: Arrow 26 ends the whole process (SIGABRT)
        when it is asked for the statistics of certain malformed footers.
        """
        if self._num_rows is None:
            self._connected()
            with ThreadPoolExecutor(_FOOTER_THREADS) as executor:
                rows = list(executor.map(self._rows_of_file, self.files))
            self._num_rows = dict(zip(self.files, rows, strict=True))
        return self._num_rows

    def _rows_of_file(self, file: str) -> int:
        with self.open_parquet(file, self.files[file]) as (parquet, _):
            return int(parquet.metadata.num_rows)

    @contextlib.contextmanager
    def open_parquet(
        self, file: str, size_bytes: int | None = None
    ) -> Iterator[tuple[pq.ParquetFile, Columns]]:
        """Open a file and find its columns; Arrow's errors inside become those of `reading`."""
        where = self.url(file)
        with reading(where, "a Parquet file"), self.open_random(file, size_bytes) as handle:
            parquet = _parquet_file(handle, where)
            yield parquet, find_columns(parquet.schema_arrow, where)

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        row = 0
        with self.open_parquet(shard.file, shard.size_bytes) as (parquet, columns):
            for batch in parquet.iter_batches(
                _BATCH_ROWS, columns=columns.paths, use_threads=False
            ):
                for i in range(len(batch)):
                    yield self._record(shard.file, row + i, columns, batch, i)
                row += len(batch)
            if row != parquet.metadata.num_rows:
                raise DataError(
                    f"{self.url(shard.file)}: expected {parquet.metadata.num_rows} rows, found "
                    f"{row}; restore the file from its origin"
                )

    def _record(
        self, file: str, row: int, columns: Columns, batch: pa.RecordBatch, i: int
    ) -> RawImage:
        key = f"{file}#{row}"
        label, content = batch.column(columns.label)[i].as_py(), columns.images(batch)[i].as_py()
        if label is None:
            problem = f"no label: {columns.label} is null"
        elif content is None:
            problem = f"no image: {columns.image} has no bytes (paths in it are not followed)"
        else:
            problem = self.too_large(len(content))
        if problem:
            return RawImage(key=key, label=-1, content=b"", problem=problem)
        return RawImage(key=key, label=self.class_of(label, key), content=content)

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        rows_by_file: dict[str, set[int]] = {}
        for key in keys:
            file, _, row = key.rpartition("#")
            if not (file and re.fullmatch("[0-9]{1,18}", row)) or ".." in file.split("/"):
                raise DataError(f"{self.root}: no image {key!r}, expected FILE#ROW")
            rows_by_file.setdefault(file, set()).add(int(row))
        found = {
            (file, row): record
            for file, rows in rows_by_file.items()
            for row, record in self._read_rows(file, sorted(rows))
        }
        places = [(file, int(row)) for file, _, row in (key.rpartition("#") for key in keys)]
        for place in places:
            if place not in found:
                raise DataError(
                    f"{self.url(place[0])}: no row {place[1]}, its row groups hold fewer rows than its footer says; restore the "
                    "file from its origin"
                )
        return [found[place] for place in places]

    def _read_rows(self, file: str, rows: list[int]) -> Iterator[tuple[int, RawImage]]:
        """Yield some rows, given in ascending order, reading only the row groups that hold them."""
        with self.open_parquet(file) as (parquet, columns):
            if rows[-1] >= parquet.metadata.num_rows:
                raise DataError(
                    f"{self.url(file)}: no row {rows[-1]}, the file has {parquet.metadata.num_rows}"
                    "; it was changed since the key was made"
                )
            start = 0
            for group in range(parquet.metadata.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                wanted = [row for row in rows if start <= row < stop]
                for row, batch, i in _pick(
                    parquet, group, columns, [row - start for row in wanted]
                ):
                    yield start + row, self._record(file, start + row, columns, batch, i)
                start = stop


def _parquet_file(handle: pa.NativeFile, where: str) -> pq.ParquetFile:
    try:
        # Verified where the writer stored page checksums; without them a flipped bit can pass
        # unseen.
        return pq.ParquetFile(handle, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
    except (OSError, MemoryError, pa.ArrowException, WmddError):
        raise
    # Extension types that a library registered, such as Ray's, are made by Python code of that library, out of what
    # the file says of them: it may raise anything.
    except Exception as error:
        raise DataError(
            f"{where}: expected plain columns, found a type that cannot be made ({type(error).__name__}: {error}); "
            "write the file again without extension types"
        ) from error


def _pick(
    parquet: pq.ParquetFile, group: int, columns: Columns, wanted: list[int]
) -> Iterator[tuple[int, pa.RecordBatch, int]]:
    """Yield (row of the group, its batch, its row there) for each wanted row, ascending."""
    if not wanted:
        return
    first_row = 0
    for batch in parquet.iter_batches(
        _BATCH_ROWS, row_groups=[group], columns=columns.paths, use_threads=False
    ):
        for row in wanted:
            if first_row <= row < first_row + len(batch):
                yield row, batch, row - first_row
        first_row += len(batch)
        if first_row > wanted[-1]:
            return


def is_parquet(name: str) -> bool:
    """Return whether a file is a Parquet file."""
    return name.lower().endswith(".parquet")


def open_parquet(listing: Listing) -> ParquetSource:
    """Return the Parquet files of the split.

    Class names come from the ClassLabel of the `huggingface` schema metadata. Without it the
    classes are integers, and the label columns are read once to find the largest.
    """
    files = files_of_split(listing, {n: s for n, s in listing.files.items() if is_parquet(n)})
    source = ParquetSource(
        root=listing.root,
        files=files,
        config=listing.config,
        class_names=integer_names(MAX_CLASSES),
    )
    with source.open_parquet(next(iter(files))) as (_, columns):
        names = columns.class_names
    relabel = None
    if listing.class_names is not None:
        relabel = match_classes(names, listing.class_names, listing.root) if names else None
        names = listing.class_names
    return ParquetSource(
        root=listing.root,
        files=files,
        config=listing.config,
        class_names=names or integer_names(_count_classes(source)),
        relabel=relabel,
    )


def _count_classes(source: ParquetSource) -> int:
    """Return one more than the largest label, by reading the label column of every file."""
    largest = -1
    for file in source.files:
        with source.open_parquet(file) as (parquet, columns):
            for batch in parquet.iter_batches(columns=[columns.label], use_threads=False):
                labels = batch.column(columns.label).drop_null().to_pylist()
                if labels:
                    largest = max(largest, source.class_of(max(labels), file))
    if largest < 0:
        raise DataError(f"{source.root}: expected images with labels, found no label")
    return largest + 1
