"""How a record lies in bytes: arrays with JSON beside them in safetensors, columns in Parquet with page checksums.

For the codecs of this package alone. A page checksum is verified by the reader: without them one mutation in five of a
Parquet file reads back as different data without an error.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from wmdd_ray.errors import ArtifactError, WmddError
from wmdd_ray.store.pages import declared_bytes

P = ParamSpec("P")
R = TypeVar("R")

BUDGET_BYTES = 256 << 20
"""What a file of any size may decode to: a stranger's small file does not take the machine."""
BUDGET_RATIO = 64
"""How many times its own size a larger file may decode to. Distilled images compress to a half, logits to a tenth."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""A column of images as Hugging Face `datasets` has it: encoded files, and their names."""

_BATCH_ROWS = 64


def pack(arrays: dict[str, np.ndarray], **meta: Any) -> bytes:
    """Return arrays and what JSON can hold as one safetensors file."""
    contiguous = {name: np.array(array, order="C", copy=None) for name, array in arrays.items()}
    return save_safetensors(contiguous, metadata={"json": json.dumps(meta, sort_keys=True)})


def unpack(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `pack` wrote."""
    try:
        # By name: the library hands them out in another order in every process.
        arrays = dict(sorted(load_safetensors(content).items()))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return arrays, json.loads(header["__metadata__"]["json"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"expected a safetensors record of this project: {error}") from error


def check_budget(decoded_bytes: float, stored_bytes: int, what: str) -> None:
    """Raise an ArtifactError when something would take more memory than its stored bytes justify; call it before it does."""
    most = max(BUDGET_BYTES, BUDGET_RATIO * stored_bytes)
    if decoded_bytes > most:
        raise ArtifactError(
            f"expected {what} that takes at most {most >> 20} MiB ({BUDGET_BYTES >> 20} MiB, or {BUDGET_RATIO} times the "
            f"{stored_bytes} bytes that it is stored in), found one that declares {decoded_bytes / 2**20:.0f} MiB; it was made to "
            "exhaust memory, or holds too much for its size"
        )


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Return the SHA-256 of arrays: names, types, shapes, contents."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha256.update(f"{name} {array.dtype.str} {arrays[name].shape}".encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def checked(decode: Callable[P, R]) -> Callable[P, R]:
    """Turn what a decoder misses in a record, or finds there of another kind, into an ArtifactError."""

    @functools.wraps(decode)
    def decode_or_tell(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return decode(*args, **kwargs)
        except MemoryError as error:
            raise WmddError(
                f"this process has no memory left to read a record ({error or 'out of memory'}), which may well be whole; close "
                "other programs, or give the process more"
            ) from error
        except (
            ArithmeticError, AssertionError, AttributeError, LookupError, OSError,
            RecursionError, SyntaxError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise ArtifactError(
                f"expected a record that {decode.__name__} reads, found another or a changed one ({error!r}); delete "
                "the room that holds it and run the stage again"
            ) from error

    return decode_or_tell


def image_features(class_names: Sequence[str], **others: Any) -> dict[bytes, bytes]:
    """Return the schema metadata that tells Hugging Face `datasets` of a column `image`, of `IMAGE`, and of the integers `label`.

    `others` describe the other columns, by their names.
    """
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        **others,
    }
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression="zstd", write_page_checksum=True, row_group_size=1 << 16
    )
    return sink.getvalue()


def read_parquet(content: bytes) -> pa.Table:
    """Read a Parquet file; an ArtifactError when it is none, or was changed."""
    try:
        return _read_parquet(content)
    except MemoryError:  # which Arrow's own is too
        raise
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"expected a Parquet file with valid page checksums: {error}"
        ) from error


def _read_parquet(content: bytes) -> pa.Table:
    """Return the table, within the budget: a dictionary's one long value may stand in every row."""
    what = "a Parquet file"
    pages, dictionary = declared_bytes(content)
    check_budget(pages, len(content), what)
    with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
        meta, schema = file.metadata, file.schema_arrow
        bits = [_bits(field.type) for field in schema]
        check_budget(sum(bits) / 8 * meta.num_rows, len(content), what)
        batches, total = [], 0
        # Where widths are not fixed, as many rows as fit, while they grow, when all hold the longest value that there can be.
        rows = (
            meta.num_rows if all(bits) else min(_BATCH_ROWS, BUDGET_BYTES // (4 * dictionary + 1))
        )
        for batch in file.iter_batches(batch_size=max(1, rows), use_threads=False):
            total += batch.nbytes
            check_budget(total, len(content), what)
            batches.append(batch)
        table = pa.Table.from_batches(batches, schema) if batches else file.read()
    for name, column in zip(table.column_names, table.columns, strict=True):
        if _has_nulls(column):
            raise ArtifactError(
                f"expected a Parquet file without nulls, found some in the column {name!r}: nothing of this project writes them"
            )
    return table


def _bits(kind: pa.DataType) -> int:
    """Return the bits of a value of fixed width; 0 of one without."""
    try:
        return int(kind.bit_width)
    except ValueError:
        return 0


def _has_nulls(column: pa.Array | pa.ChunkedArray) -> bool:
    if isinstance(column, pa.ChunkedArray):
        return any(_has_nulls(chunk) for chunk in column.chunks)
    if column.null_count:
        return True
    if pa.types.is_struct(column.type):
        return any(_has_nulls(column.field(i)) for i in range(column.type.num_fields))
    return bool(pa.types.is_list(column.type)) and _has_nulls(column.flatten())


def check_columns(table: pa.Table, expected: Mapping[str, pa.DataType]) -> None:
    """Raise an ArtifactError when a table has other columns, one of them twice, or one of another type."""
    if sorted(table.column_names) != sorted(expected):
        raise ArtifactError(
            f"expected a Parquet file with the columns {sorted(expected)}, found {sorted(table.column_names)[:20]}"
        )
    for name, kind in expected.items():
        if table[name].type != kind:
            raise ArtifactError(
                f"expected {kind} in the column {name}, found {table[name].type}: the file's schema was changed"
            )


def check_range(name: str, values: np.ndarray, least: float, most: float) -> None:
    """Raise an ArtifactError when a number is not finite, or not in [least, most]."""
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= least) & (values <= most) & np.isfinite(values))
    if wrong.any():
        raise ArtifactError(
            f"expected {name} from {least:g} to {most:g}, found {values[wrong].flat[0]}: nothing of this project writes that"
        )


def binary_rows(array_VK: np.ndarray) -> pa.Array:
    """Return the rows of a 2-D array as fixed-size binary: 20 to 100 times faster than nested lists."""
    array_VK = np.ascontiguousarray(array_VK)
    width = array_VK.shape[1] * array_VK.dtype.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(array_VK), [None, pa.py_buffer(array_VK)]
    )


def from_binary_rows(column: pa.ChunkedArray, dtype: str) -> np.ndarray:
    """Return the rows that `binary_rows` made as an array."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    width = array.type.byte_width
    start = array.offset * width
    raw = np.frombuffer(array.buffers()[1], dtype=np.uint8)[start : start + len(array) * width]
    return raw.view(dtype).reshape(len(array), -1).copy()
