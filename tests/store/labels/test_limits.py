# ruff: noqa: E501  (a line a case)
"""What a small file declares is bounded by its own size before anything of that size is made."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.store.labels.files import Files, cls, idx, outcome, table
from tests.store.written_sources import CONFIG, PNGS
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import base, open_source, parquet_limits
from wmdd_ray.store.sources.parquet_columns import find_columns

BUDGET_BYTES = 64 << 20


def zeros_of(size_bytes: int, rows: int) -> Files:
    """Return a Parquet file of a few KB whose images are zeros."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": bytes(size_bytes), "path": "x"}] * rows, kind)
    sink = io.BytesIO()
    written = pa.table({"image": images, "label": [0] * rows})
    pq.write_table(written, sink, compression="zstd", dictionary_pagesize_limit=1 << 30)
    return {"x.parquet": sink.getvalue()}


def long_label(size_bytes: int, rows: int) -> Files:
    label = pa.array(["a" * size_bytes] * rows)
    return table({"image": pa.array([PNGS[0]] * rows), "label": label})


def gzipped_idx(num_images: int) -> Files:
    header = struct.pack(">HBB3I", 0, 8, 3, num_images, 1000, 1000)
    files = idx([0])
    del files["train-images-idx3-ubyte"]
    packed = gzip.compress(header + bytes(num_images * 1_000_000), 9)
    return {**files, "train-images-idx3-ubyte.gz": packed}


def index(*patterns: str) -> Files:
    split = {"filenames": list(patterns), "shard_lengths": [1]}
    return {**cls([0]), "_info.json": json.dumps({"splits": {"train": split}}).encode()}


CASES: dict[str, tuple[Callable[[], Files], Any]] = {
    "equal images of zeros": (lambda: zeros_of(4 << 20, 20), r"x\.parquet: column image\.bytes says that \d+ bytes unpack to \d+, expected at most"),
    "an image of zeros": (lambda: zeros_of(64 << 20, 1), r"x\.parquet: column image\.bytes"),
    "long equal labels": (lambda: long_label(4 << 20, 20), r"x\.parquet: column label says that"),
    "IDX of zeros": (lambda: gzipped_idx(100), r"train-images-idx3-ubyte\.gz: expected 100000000 bytes .* found fewer"),
    "an index of long names": (lambda: index("{000000..099999}" + "x" * 30_000), ["0"]),
    "an index of many patterns": (lambda: index(*["{00000..09999}.tar"] * 1000), ["0"]),
    "a list of names that is none": (lambda: {**cls([0]), "classes.txt": b"x" * (2 << 20)}, r"classes\.txt: expected a file of at most 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_small_files_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, expected = CASES[case]
    files = make()
    if "names that is none" in case:
        monkeypatch.setattr(base, "_MAX_BESIDE_BYTES", 1 << 20)
    else:
        assert sum(map(len, files.values())) < 1 << 20, "small, or nothing is shown"
    store = Store(str(tmp_path))
    for key, content in files.items():
        store.put(key, content)
    del files
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        if isinstance(expected, str):
            with pytest.raises(DataError, match=expected):
                outcome(store, {})
        else:
            assert outcome(store, {})[1] == expected
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BUDGET_BYTES
    assert pa.total_allocated_bytes() - arrow_before < BUDGET_BYTES


def test_a_value_that_stands_in_many_rows_is_unpacked_in_few_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_limits, "_MAX_BATCH_BYTES", 10_000)
    image = PNGS[0] + bytes(range(256)) * 8
    (content,) = table({"image": pa.array([image] * 40), "label": [0] * 40}).values()
    parquet = pq.ParquetFile(io.BytesIO(content))
    found = find_columns(parquet.schema_arrow, CONFIG, "x")
    columns = parquet_limits.Bounds().bounded(
        pa.BufferReader(content), parquet, lambda: found, "x", nearby=True
    )
    assert len(image) <= columns.image_bytes < 4 * len(image)
    rows = [len(batch) for batch in parquet_limits.batches(parquet, columns, 32)]
    assert sum(rows) == 40 and max(rows) <= 10_000 // len(image)


def test_a_file_is_looked_at_once_and_again_when_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = parquet_limits.bounded
    monkeypatch.setattr(parquet_limits, "bounded", lambda *a, **k: looks.append(a) or look(*a, **k))
    (content,) = table({"image": pa.array(PNGS[:2]), "label": [0, 1]}).values()
    (tmp_path / "x.parquet").write_bytes(content)
    source = open_source(str(tmp_path), CONFIG, split="train")
    before = len(looks)
    assert [source.read_keys([f"x.parquet#{row}"])[0].content for row in (0, 1)] == [*PNGS[:2]]
    assert len(looks) == before, "opening it has looked"
    (content,) = long_label(4 << 20, 20).values()
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match="column label says that"):
        source.read_keys(["x.parquet#0"])


def test_images_that_shrink_as_real_ones_do_are_read(tmp_path: Path) -> None:
    """A drawing may well have a tenth of its size, and the same picture stand in many rows."""
    store = Store(str(tmp_path))
    rows = 500
    files = table({"image": pa.array([PNGS[i % 2] for i in range(rows)]), "label": [0, 1] * 250})
    store.put("x.parquet", files["x.parquet"])
    assert open_source(store.uri, CONFIG, split="train").num_images == rows


def test_a_footer_that_tells_too_little_is_not_believed_on_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of values is read where the footer says what a column unpacks to."""
    monkeypatch.setattr(parquet_limits, "_UNPACKED", parquet_limits._NUM_VALUES)
    Store(str(tmp_path)).put("x.parquet", zeros_of(4 << 20, 20)["x.parquet"])
    with pytest.raises(
        DataError, match=r"column image\.bytes says that \d+ bytes unpack to 4\d{6}"
    ):
        open_source(str(tmp_path), CONFIG, split="train")
