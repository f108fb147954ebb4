"""Parquet in Hugging Face's layout: a column of encoded images and one of labels, numbers or names."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wmdd_ray.errors import DataError, WmddError
from wmdd_ray.store.sources.base import RawImage, Shard, Source
from wmdd_ray.store.sources.classes import MAX_CLASSES, match_classes, one_line, plain
from wmdd_ray.store.sources.files import reading
from wmdd_ray.store.sources.labels import (
    Label,
    Places,
    found_classes,
    label_of,
    no_label,
    number_places,
)
from wmdd_ray.store.sources.listing import Listing, files_of_split
from wmdd_ray.store.sources.parquet_columns import Columns, find_columns
from wmdd_ray.store.sources.parquet_limits import Bounds, batch_rows, batches
from wmdd_ray.store.uris import local_path

# Rows that are in memory at once, beside the pages they come from.
_BATCH_ROWS = 32
# Column chunks are read in pieces of this size: a row group can be as large as the file.
_BUFFER_BYTES = 8 << 20
_FOOTER_THREADS = 8
_LABEL_ROWS = 65_536

Names = tuple[str, ...]
logger = logging.getLogger(__name__)


class ParquetSource(Source):
    """Parquet files, a shard each. The key of an image is `FILE#ROW`."""

    format = "parquet"
    _transient = (*Source._transient, "_footers", "_bounds", "_places_of")

    _footers: dict[str, tuple[int, Names | None]] | None = None
    _bounds: Bounds | None = None
    _places_of: dict[Names, Places] | None = None

    @property
    def num_images(self) -> int:
        return sum(num_rows for num_rows, _ in self.footers.values())

    def shards(self, chunk_images: int) -> list[Shard]:
        return self._file_shards({file: rows for file, (rows, _) in self.footers.items()})

    @property
    def footers(self) -> dict[str, tuple[int, Names | None]]:
        """Rows and declared class names of every file; read once, several at a time. Driver only.

        The label statistics beside them stay untouched: Arrow 26 ends the whole process (SIGABRT)
        when it is asked for the statistics of certain malformed footers.
        """
        if self._footers is None:
            self._connected()
            one_of: dict[Names | None, Names | None] = {}

            def read(file: str) -> tuple[int, Names | None]:
                with self.open_parquet(file, self.files[file]) as (parquet, columns):
                    names = columns.class_names
                    return int(parquet.metadata.num_rows), one_of.setdefault(names, names)

            with ThreadPoolExecutor(_FOOTER_THREADS) as executor:
                self._footers = dict(zip(self.files, executor.map(read, self.files), strict=True))
        return self._footers

    def _numbering(self) -> object:
        declared = {names: None for _, names in self.footers.values()}
        places = [self._places(names) for names in declared]
        return places[0] if len(places) == 1 else places

    @contextlib.contextmanager
    def open_parquet(
        self, file: str, size_bytes: int | None = None
    ) -> Iterator[tuple[pq.ParquetFile, Columns]]:
        """Open a file and find its columns; Arrow's errors inside become those of `reading`."""
        where = self.url(file)
        with reading(where, "a Parquet file"), self.open_random(file, size_bytes) as handle:
            parquet = _parquet_file(handle, where)
            find = partial(find_columns, parquet.schema_arrow, self.config, where)
            nearby = local_path(self.root) is not None
            if self._bounds is None:
                self._bounds = Bounds()
            yield parquet, self._bounds.bounded(handle, parquet, find, where, nearby=nearby)

    def label_counts(self, file: str, size_bytes: int | None = None) -> Counter[Label]:
        """Return label -> rows of a file, reading its label column alone; rows without a label are left out."""
        counts = Counter[Label]()
        for column, values in self._label_columns(file, size_bytes):
            for found in values.value_counts().to_pylist():
                label = label_of(found["values"], self.config.numbers)
                if label is not None:
                    counts[label] += found["counts"]
            if len(counts) > MAX_CLASSES:
                raise DataError(
                    f"{self.url(file)}: expected labels of at most {MAX_CLASSES} classes in {column}, found more; name another "
                    "column by --source.label-column"
                )
        return counts

    def images_in(self, shard: Shard) -> tuple[list[str], np.ndarray]:
        """Return key and class (int64 N, -1 of those without a label) of every row of a shard, reading no images."""
        file = shard.file
        with self.open_parquet(file) as (_, columns):
            places = self._places(columns.class_names)
        parts = [np.empty(0, dtype=np.int64)]
        for _, values in self._label_columns(file, None):
            encoded = values.dictionary_encode()
            classes = [
                -1 if label is None else self._class_of(label, file, places)
                for value in encoded.dictionary.to_pylist()
                for label in [label_of(value, self.config.numbers)]
            ]
            rows_N = encoded.indices.fill_null(len(classes)).to_numpy(zero_copy_only=False)
            parts.append(np.array([*classes, -1], dtype=np.int64)[rows_N])
        labels_N = np.concatenate(parts)
        return [f"{file}#{row}" for row in range(len(labels_N))], labels_N

    def _label_columns(self, file: str, size_bytes: int | None) -> Iterator[tuple[str, pa.Array]]:
        """Yield the name of the label column of a file and its values in parts, dictionaries decoded."""
        with self.open_parquet(file, size_bytes) as (parquet, columns):
            is_fixed = pa.types.is_primitive(parquet.schema_arrow.field(columns.label).type)
            rows = _LABEL_ROWS if is_fixed else batch_rows(columns.label_bytes, _LABEL_ROWS)
            for batch in parquet.iter_batches(rows, columns=[columns.label], use_threads=False):
                values = batch.column(columns.label)
                is_dictionary = pa.types.is_dictionary(values.type)
                yield columns.label, values.dictionary_decode() if is_dictionary else values

    def class_counts(self, file: str) -> Counter[int]:
        """Return class -> rows of a file, reading no images."""
        with self.open_parquet(file) as (_, columns):
            places = self._places(columns.class_names)
        counts = Counter[int]()
        for label, rows in self.label_counts(file).items():
            counts[self._class_of(label, file, places)] += rows
        return counts

    def _places(self, names: Names | None) -> Places:
        """Return the class of each number in a file that declares these names."""
        if names is None:
            return self.places
        if self._places_of is None:
            self._places_of = {}
        if names not in self._places_of:
            is_same = [*map(plain, names)] == [*map(plain, self._label_names)]
            places = None if is_same else tuple(self.class_of(name, "any") for name in names)
            self._places_of[names] = places
        return self._places_of[names]

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        row = 0
        with self.open_parquet(shard.file, shard.size_bytes) as (parquet, columns):
            places = self._places(columns.class_names)
            for batch in batches(parquet, columns, _BATCH_ROWS):
                for i in range(len(batch)):
                    yield self._record(shard.file, row + i, columns, places, batch, i)
                row += len(batch)
            if row != parquet.metadata.num_rows:
                raise DataError(
                    f"{self.url(shard.file)}: expected {parquet.metadata.num_rows} rows, found "
                    f"{row}; restore the file from its origin"
                )

    def _record(
        self, file: str, row: int, columns: Columns, places: Places, batch: pa.RecordBatch, i: int
    ) -> RawImage:
        key = f"{file}#{row}"
        value, content = batch.column(columns.label)[i].as_py(), columns.images(batch)[i].as_py()
        label = label_of(value, self.config.numbers)
        if label is None:
            said = "null" if value is None else one_line(repr(value))
            problem = f"{no_label(value)}: {columns.label} is {said}"
        elif content is None:
            problem = f"no image: {columns.image} has no bytes (paths in it are not followed)"
        else:
            problem = self.too_large(len(content))
        if problem:
            return RawImage(key=key, label=-1, content=b"", problem=problem)
        assert label is not None
        return RawImage(key=key, label=self._class_of(label, key, places), content=content)

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        rows_by_file: dict[str, set[int]] = {}
        for key in keys:
            file, _, row = key.rpartition("#")
            if not (file and re.fullmatch("[0-9]{1,18}", row)) or ".." in file.split("/"):
                raise DataError(f"{self.root}: no image {key!r}, expected FILE#ROW")
            rows_by_file.setdefault(file, set()).add(int(row))
        records = {
            (file, row): record
            for file, rows in rows_by_file.items()
            for row, record in self._read_rows(file, sorted(rows))
        }
        places = [(file, int(row)) for file, _, row in (key.rpartition("#") for key in keys)]
        for place in places:
            if place not in records:
                raise DataError(
                    f"{self.url(place[0])}: no row {place[1]}, its row groups hold fewer rows than its footer says; restore the "
                    "file from its origin"
                )
        return [records[place] for place in places]

    def _read_rows(self, file: str, rows: list[int]) -> Iterator[tuple[int, RawImage]]:
        """Yield some rows, given in ascending order, reading only the row groups that hold them."""
        with self.open_parquet(file) as (parquet, columns):
            if rows[-1] >= parquet.metadata.num_rows:
                raise DataError(
                    f"{self.url(file)}: no row {rows[-1]}, the file has {parquet.metadata.num_rows}"
                    "; it was changed since the key was made"
                )
            start, places = 0, self._places(columns.class_names)
            for group in range(parquet.metadata.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                wanted = [row for row in rows if start <= row < stop]
                for row, batch, i in _pick(
                    parquet, group, columns, [row - start for row in wanted]
                ):
                    yield start + row, self._record(file, start + row, columns, places, batch, i)
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
    for batch in batches(parquet, columns, _BATCH_ROWS, [group]):
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

    Class names come from the ClassLabel in the `huggingface` schema metadata of every file, brought together by name. Where no
    file has any, the label columns are read once to find the classes.
    """
    files = files_of_split(listing, {n: s for n, s in listing.files.items() if is_parquet(n)})
    source = ParquetSource(listing.root, files, listing.config)
    declared = [
        names for names in {n: None for _, n in source.footers.values()} if names is not None
    ]
    numbers = listing.config.numbers
    if listing.class_names is not None:
        source.name_classes(listing.class_names, number_places(listing.class_names, numbers))
        for own in declared:
            match_classes(own, listing.class_names, listing.root, held_out=listing.split == "val")
    elif declared:
        names = declared[0]
        known = {*map(plain, names)}
        for own in declared[1:]:
            names += tuple(name for name in own if plain(name) not in known)
            known.update(map(plain, own))
        if len(names) > len(declared[0]):
            logger.warning(
                "%s: files declare different classes, %d in all", listing.root, len(names)
            )
        source.name_classes(names, number_places(names, numbers))
    else:
        with ThreadPoolExecutor(_FOOTER_THREADS) as executor:
            counts = executor.map(source.label_counts, files, files.values())
            examples = {y: file for file, found in zip(files, counts, strict=True) for y in found}
        where = listing.root if len(files) > 1 else source.url(next(iter(files)))
        source.name_classes(*found_classes(examples, numbers, where))
    return source
