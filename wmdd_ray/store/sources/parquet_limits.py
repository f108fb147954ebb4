"""What a Parquet file may unpack to: bounded by its own size before anything is read.

Images do not shrink when they are packed, so a column that unpacks to a hundred times its size is none of images. And one value
of a dictionary can stand in all rows, so few enough are unpacked at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.parquet_columns import Columns

_MAX_RATIO = 100
_MAX_BATCH_BYTES = 256 << 20
# Of a label, and what a column may have in any case.
_LABEL_BYTES, _FREE_BYTES = 64, 1 << 20


def batches(
    parquet: pq.ParquetFile, columns: Columns, most: int, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file, or of some row groups, in batches of at most `most`."""
    rows = batch_rows(parquet, columns.image_path, most)
    paths = [columns.image_path, columns.label]
    yield from parquet.iter_batches(rows, row_groups=groups, columns=paths, use_threads=False)


def batch_rows(parquet: pq.ParquetFile, path: str, most: int) -> int:
    """Return how many rows may hold the largest value that there can be: one of a dictionary stands in any number of them."""
    largest = max((chunk.total_uncompressed_size for chunk in _chunks(parquet, path)), default=0)
    return max(1, min(most, _MAX_BATCH_BYTES // max(1, largest)))


def _chunks(parquet: pq.ParquetFile, path: str) -> list[pq.ColumnChunkMetaData]:
    """Return the column's piece in every row group."""
    groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
    if not groups:
        return []
    paths = [groups[0].column(i).path_in_schema for i in range(groups[0].num_columns)]
    return [group.column(paths.index(path)) for group in groups if path in paths]


def check_unpacked(parquet: pq.ParquetFile, columns: Columns, where: str) -> None:
    """Refuse columns that would unpack to much more than what they are made of."""
    for path in (columns.image_path, columns.label):
        for chunk in _chunks(parquet, path):
            most = _FREE_BYTES + (
                _LABEL_BYTES * chunk.num_values
                if path == columns.label
                else _MAX_RATIO * chunk.total_compressed_size
            )
            if chunk.total_uncompressed_size > most:
                raise DataError(
                    f"{where}: column {path} says that {chunk.total_compressed_size} bytes unpack to "
                    f"{chunk.total_uncompressed_size}, expected at most {most}; images and labels do not shrink like that, so "
                    "the file is damaged or made to fill the memory"
                )
