"""Sets whose checksums are right and whose content is not: a stranger seals what he likes.

What a file declares is refused before anything is allocated for it.
"""

from __future__ import annotations

import functools
import io
import struct
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.manifests import manifest_of
from tests.store.hostile import (
    DATA,
    IMAGES,
    LABELS,
    NAMES,
    SIZE,
    N,
    block,
    images,
    labels_with,
    read_whole,
    rewritten,
    with_column,
    with_footer,
    write,
)
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.errors import ArtifactError, DataError, WmddError
from wmdd_ray.product.export import Format, export
from wmdd_ray.store import codecs, packing
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.pages import declared_bytes

MORE_MEMORY_BYTES = 512 << 20


def memory_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) << 10


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Hold a test to some memory. A limit instead would end the process when a library cannot start a thread."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory_bytes("VmRSS")
    yield
    assert memory_bytes("VmHWM") - before < MORE_MEMORY_BYTES


def place() -> str:
    return f"memory://{uuid.uuid4().hex}/set"


@functools.cache
def flat_png(side: int) -> bytes:
    """Return a PNG file of black pixels: a thousandth of its pixels' bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    deflate = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    pixels = b"".join([*(deflate.compress(row) for _ in range(side)), deflate.flush()])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_a_set_that_is_what_it_says_is_read() -> None:
    dataset = read_whole(write(place(), {}))
    np.testing.assert_array_equal(dataset.images, IMAGES)
    by_seed = codecs.encode_soft_labels(block(by_seed=True))
    read_whole(write(place(), {LABELS: by_seed}))


def views_with(name: str, value: Any) -> bytes:
    own = block()
    array = getattr(own.views, name).copy()
    array[1] = value
    return codecs.encode_soft_labels(replace(own, views=replace(own.views, **{name: array})))


def top_k(**changes: Any) -> bytes:
    own = {
        "values_VK": -np.ones((N, 2), np.float16),
        "indices_VK": np.tile(np.array([0, 2], np.uint16), (N, 1)),
        "rest_V": -np.ones(N, np.float16),
    }
    return labels_with(**{**own, **changes})


def stepped(step: float) -> bytes:
    return labels_with(values_VK=np.ones((N, 3), np.uint8), step_V=np.full(N, step, np.float16))


HALF = np.ones((N, 3), np.float16)
WRONG_LABELS: dict[str, Callable[[], bytes]] = {
    "null logits": lambda: rewritten(
        labels_with(), with_column("logits", [b"\0" * 6, None, b"\0" * 6])
    ),
    "null flips": lambda: rewritten(labels_with(), with_column("flip", [True, None, False])),
    "NaN logits": lambda: labels_with(values_VK=HALF * np.float16(np.nan)),
    "infinite logits": lambda: labels_with(values_VK=HALF * np.float16(-np.inf)),
    "logits above the largest": lambda: labels_with(values_VK=HALF),
    "logits of fewer classes than it says": lambda: labels_with(values_VK=-HALF[:, :2]),
    "logits of more classes than it says": lambda: labels_with(values_VK=-HALF, num_classes=2),
    "logits of other classes than the set": lambda: labels_with(
        values_VK=-np.ones((N, 5), np.float16), num_classes=5
    ),
    "classes beyond the last": lambda: top_k(indices_VK=np.full((N, 2), 3, np.uint16)),
    "a rest that is no number": lambda: top_k(rest_V=np.full(N, np.nan, np.float16)),
    "an infinite step": lambda: stepped(np.inf),
    "a step of nothing": lambda: stepped(0.0),
    "a crop outside": lambda: views_with("crop_V4", (0.5, 0.5, 0.75, 0.5)),
    "a crop of nothing": lambda: views_with("crop_V4", (0.5, 0.5, 0.0, 0.5)),
    "a crop that is no number": lambda: views_with("partner_crop_V4", np.nan),
    "a crop before the image": lambda: views_with("partner_crop_V4", (-0.25, 0, 0.5, 0.5)),
    "a negative partner": lambda: views_with("partner_V", -1),
    "a partner beyond the last image": lambda: views_with("partner_V", N),
    "an image beyond the last": lambda: views_with("image_V", N),
    "a share above one": lambda: views_with("share_V", 1.5),
    "a mixed box beyond the view": lambda: views_with("mix_box_V4", (0, 0, SIZE + 1, 4)),
    "a mixed box before the view": lambda: views_with("mix_box_V4", (-3, 0, 2, 4)),
    "a column twice": lambda: rewritten(
        labels_with(), lambda t: t.append_column("share", t["share"])
    ),
    "a column less": lambda: rewritten(labels_with(), lambda t: t.drop_columns(["share"])),
    "another type": lambda: rewritten(
        labels_with(), lambda t: t.set_column(0, t.column_names[0], pa.array(["x"] * N))
    ),
    "a million epochs": lambda: with_footer(
        codecs.encode_soft_labels(block(True)), num_epochs=10**7
    ),
    "a million epochs and their views": lambda: with_footer(
        codecs.encode_soft_labels(block(True)), num_epochs=10**7, num_views=3 * 10**7
    ),
    "views of all numbers": lambda: with_footer(
        codecs.encode_soft_labels(block(True)), index_N=[[0, 2**31 - 1]]
    ),
    "views of all numbers, as it says": lambda: with_footer(
        codecs.encode_soft_labels(block(True)), index_N=[[0, 2**31 - 1]], num_views=2**31 - 1
    ),
    "negative views": lambda: with_footer(
        codecs.encode_soft_labels(block(True)), index_N=[[2**30, 3], [0, 2**30]]
    ),
    "a thousand million classes": lambda: with_footer(labels_with(), num_classes=10**9),
    "a side of any size": lambda: with_footer(
        codecs.encode_soft_labels(block(True)), image_size=10**9
    ),
    "text for a number": lambda: with_footer(labels_with(), num_epochs="1"),
}


@pytest.mark.parametrize("wrong", WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
def test_labels_that_cannot_be_are_refused(wrong: Callable[[], bytes]) -> None:
    uri = write(place(), {LABELS: wrong()})
    with pytest.raises(ArtifactError, match="expected"):
        read_whole(uri)


WRONG_IMAGES: dict[str, Callable[[], bytes]] = {
    "label 99": lambda: images(labels_N=np.array([0, 1, 99])),
    "label -5": lambda: images(labels_N=np.array([0, 1, -5])),
    "a weight that is no number": lambda: images(weights_NT=np.array([[1], [np.nan], [1]])),
    "an infinite weight": lambda: images(weights_NT=np.array([[1], [np.inf], [1]])),
    "a negative weight": lambda: images(weights_NT=np.array([[1], [-0.5], [1]])),
    "no weight at all": lambda: images(weights_NT=np.zeros((N, 1))),
    "weights of tiles": lambda: images(weights_NT=np.full((N, 4), 0.25)),
    "a null image": lambda: rewritten(
        images(), with_column("image", [None, {"bytes": b"x", "path": "x"}, None])
    ),
    "a null file": lambda: rewritten(
        images(), with_column("image", [{"bytes": None, "path": "x"}] * N)
    ),
    "a null label": lambda: rewritten(images(), with_column("label", [0, None, 2])),
    "no PNG": lambda: rewritten(images(), with_column("image", [{"bytes": b"x", "path": "x"}] * N)),
    "images of another side": lambda: images(images_NHWC=np.zeros((N, 16, 16, 3), np.uint8)),
    "gray images": lambda: images(images_NHWC=np.zeros((N, SIZE, SIZE, 1), np.uint8)),
    "no images": lambda: rewritten(images(), lambda t: t.slice(0, 0)),
    "a column twice": lambda: rewritten(images(), lambda t: t.append_column("weight", t["weight"])),
}


@pytest.mark.parametrize("wrong", WRONG_IMAGES.values(), ids=WRONG_IMAGES.keys())
def test_images_that_cannot_be_are_refused_by_who_reads_or_exports_them(
    wrong: Callable[[], bytes],
) -> None:
    uri = write(place(), {DATA: wrong()})
    with pytest.raises(ArtifactError, match="expected"):
        DistilledDataset(uri)
    for layout in ("imagefolder", "webdataset", "huggingface"):
        with pytest.raises(ArtifactError, match="expected"):
            export(uri, f"{uri}-{layout}", layout)


@pytest.mark.parametrize("says", [SIZE, 12_000], ids=["a small side", "the large side"])
def test_a_small_file_of_huge_pictures_is_refused_before_one_is_decoded(says: int) -> None:
    png = flat_png(12_000)
    row = {"bytes": png, "path": "x.png"}
    content = rewritten(images(), with_column("image", [row] * N))
    uri = write(place(), {DATA: content}, manifest_of(image_size=says))
    assert len(content) < 1_500_000
    with pytest.raises(ArtifactError, match="expected"):
        DistilledDataset(uri)
    with pytest.raises(ArtifactError, match="expected"):
        export(uri, f"{uri}-out", "imagefolder")


@pytest.mark.parametrize(
    "entries",
    [
        {"label_epochs": 10**8},
        {"label_epochs": 10**300},
        {"num_images": 10**12},
        {"image_size": 10**9},
        {"tiles": 3},
        {"tiles": 0},
        {"mean": [0.5]},
        {"std": [0.0, 1.0, 1.0]},
        {"mean": [float("nan"), 0.5, 0.5]},
        {"std": [float("inf"), 1.0, 1.0]},
        {"channels": 2},
        {"class_names": []},
        {"class_names": "cat"},
        {"class_names": [1, 2, 3]},
        {"class_names": ["cat", "dog"]},
        {"labels": {"labels": "told", "batch_size": 1}},
        {"source": "s3://bucket"},
        {"provenance": {}},
        {"ipc": True},
    ],
)
def test_a_manifest_that_cannot_be_is_refused(entries: dict[str, Any]) -> None:
    uri = write(place(), {}, manifest_of(**entries))
    with pytest.raises(ArtifactError, match="expected"):
        read_whole(uri)


def test_names_of_label_files_allocate_nothing() -> None:
    labels = codecs.encode_soft_labels(block(by_seed=True))
    files = {"labels/epochs-00001-99999999.parquet": labels}
    uri = write(place(), files, manifest_of(label_epochs=10**8))
    with pytest.raises(ArtifactError, match="a block of label epochs that takes at most 256 MiB"):
        DistilledDataset(uri)


def test_one_value_in_every_row_is_refused_while_it_is_read() -> None:
    rows = pa.array([{"bytes": bytes(100_000), "path": "x.png"}]).take(pa.array([0] * 500))
    table, sink = pa.table({"image": rows}), io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as file:
        for _ in range(8):
            file.write_table(table)
    del table, rows
    assert len(sink.getvalue()) < 100_000
    with pytest.raises(ArtifactError, match="a Parquet file that takes at most 256 MiB"):
        packing.read_parquet(sink.getvalue())


def test_a_page_that_declares_more_than_its_file_may_hold_is_refused_by_its_header() -> None:
    table, sink = pa.table({"x": pa.array([b"a" * 100])}), io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    content = bytearray(sink.getvalue())
    meta = pq.read_metadata(pa.BufferReader(bytes(content)))
    assert declared_bytes(bytes(content))[0] > 100
    at = meta.row_group(0).column(0).data_page_offset
    assert content[at : at + 3] == b"\x15\x00\x15"  # the kind of page, then its size in two bytes
    content[at + 3 : at + 5] = b"\xff\x7f"
    with pytest.raises(ArtifactError, match="a page of -8192 bytes"):
        packing.read_parquet(bytes(content))


def test_a_teacher_that_declares_more_than_it_holds_is_refused() -> None:
    from tests.store.test_codecs import teacher
    from wmdd_ray.core.networks import network_of

    with pytest.raises(DataError, match="do not fit the network"):
        network_of(replace(teacher(), width=60_000))
    for change in ({"width": 10**9}, {"mean_C": (float("nan"),)}, {"arch": 3}, {"top1": 7.0}):
        arrays, meta = packing.unpack(codecs.encode_teacher(teacher()))
        with pytest.raises(ArtifactError, match="expected a teacher"):
            codecs.decode_teacher(packing.pack(arrays, **{**meta, **change}))
    weights = {**teacher().weights, "conv.weight": np.full((2, 1, 3, 3), np.inf, np.float32)}
    with pytest.raises(ArtifactError, match="finite weights"):
        codecs.decode_teacher(codecs.encode_teacher(replace(teacher(), weights=weights)))


@pytest.mark.parametrize("error", [MemoryError, pa.ArrowMemoryError])
def test_a_machine_without_memory_is_told_as_itself_and_no_room_is_blamed(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("malloc of 1 GB failed")

    monkeypatch.setattr("wmdd_ray.store.packing.pq.ParquetFile", fail)
    with pytest.raises(
        WmddError, match="no memory left.*malloc of 1 GB.*may well be whole"
    ) as told:
        codecs.decode_png_rows(images())
    assert not isinstance(told.value, ArtifactError) and "room" not in str(told.value)


@pytest.mark.parametrize("layout", ["imagefolder", "webdataset", "huggingface"])
@pytest.mark.parametrize("path", ["../../victim/family.png", "/tmp/x.png", "\x1b]0;x\x07.png"])
def test_an_export_names_its_files_itself(layout: Format, path: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim" / "family.png"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    rows = [{"bytes": encode_png(image), "path": path} for image in IMAGES]
    uri = write(f"{tmp_path}/set", {DATA: rewritten(images(), with_column("image", rows))})
    export(uri, str(tmp_path / "out" / layout), layout)
    assert victim.read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "set", "out"}
    names = [f"{i:05d}_{i:05d}" for i in range(N)]
    out = tmp_path / "out" / layout
    if layout == "imagefolder":
        assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png")) == [
            f"{NAMES[i]}/{name}.png" for i, name in enumerate(names)
        ]
    elif layout == "webdataset":
        with tarfile.open(out / "train-000000.tar") as archive:
            assert sorted(archive.getnames()) == sorted(
                f"{name}.{ending}" for name in names for ending in ("png", "cls", "json")
            )
    else:
        (part,) = out.glob("data/*.parquet")
        assert [row["path"] for row in pq.read_table(part)["image"].to_pylist()] == [
            f"{name}.png" for name in names
        ]
