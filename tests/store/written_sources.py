"""The same 24 gray images of three classes, written in the formats of files that are read alike."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wmdd_ray.config import SourceConfig
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.sources import DecodedChunk, decoded_chunks, open_source

CONFIG = SourceConfig(image_size=8, resize=8, channels=1, mean=(0.5,), std=(0.5,))
NAMES = ("ant", "bee", "cat")
IMAGES_NHWC = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
LABELS_N = np.arange(24) % 3
PNGS = tuple(encode_png(image) for image in IMAGES_NHWC)


def write_imagefolder(
    store: Store, split: str = "train", names: Sequence[str] = NAMES, pngs: Sequence[bytes] = PNGS
) -> None:
    for i, (png, label) in enumerate(zip(pngs, LABELS_N, strict=False)):
        store.put(f"{split}/{names[label]}/{i:03d}.png".lstrip("/"), png)


def write_webdataset(
    store: Store, split: str = "train", names: Sequence[str] = NAMES, pngs: Sequence[bytes] = PNGS
) -> None:
    """Two shards of 13 and 11 samples, labels in `.cls`, and `classes.txt` unless `names` is empty."""
    for shard, rows in enumerate((range(13), range(13, len(pngs)))):
        members = [
            (f"{i:03d}.{ending}", content)
            for i in rows
            for ending, content in (("cls", b"%d\n" % LABELS_N[i]), ("png", pngs[i]))
        ]
        store.put(f"{split}-{shard:03d}.tar", tar_of(members))
    if names:
        store.put("classes.txt", "\n".join(names).encode() + b"\n")


def tar_of(
    members: Sequence[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT
) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for member, content in members:
            header = tarfile.TarInfo(member) if isinstance(member, str) else member
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return sink.getvalue()


def write_parquet(
    store: Store, split: str = "train", names: Sequence[str] = NAMES, pngs: Sequence[bytes] = PNGS
) -> None:
    """Two files of 13 and 11 rows in row groups of 5; a ClassLabel unless `names` is empty."""
    for shard, rows in enumerate((slice(0, 13), slice(13, None))):
        content = parquet_of(list(pngs[rows]), LABELS_N[: len(pngs)][rows].tolist(), names)
        store.put(f"data/{split}-0000{shard}-of-00002.parquet", content)


def parquet_of(
    pngs: Sequence[bytes | None], labels: Sequence[int | None], names: Sequence[str] = ()
) -> bytes:
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png, "path": "x.png"} for png in pngs], type=struct_type)
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, "label": label}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(meta)
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=5)
    return sink.getvalue()


def write_idx(store: Store, split: str = "train", names: Sequence[str] = ()) -> None:
    """Images compressed, labels plain, as both occur."""
    prefix = {"train": "train", "val": "t10k"}[split]
    images = idx_of(IMAGES_NHWC[:, :, :, 0])
    store.put(f"{prefix}-images-idx3-ubyte.gz", gzip.compress(images, mtime=0))
    store.put(f"{prefix}-labels-idx1-ubyte", idx_of(LABELS_N))


def idx_of(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


WRITERS: dict[str, Callable[..., None]] = {
    "imagefolder": write_imagefolder,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "idx": write_idx,
}


def read_all(store: Store, **options: Any) -> list[DecodedChunk]:
    source = open_source(store.uri, CONFIG, split="train", **options)
    chunks = [
        chunk
        for shard in source.shards(100)
        for chunk in decoded_chunks(source, shard, CONFIG, 100)
    ]
    source.read_keys([key for chunk in chunks for key in chunk.keys])
    return chunks
