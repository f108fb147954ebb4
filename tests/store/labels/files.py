"""Small files of labeled images in every format, for the table of what labels become: image i is `PNGS[i]`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.store.written_sources import CONFIG, IMAGES_NHWC, PNGS, idx_of, tar_of
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources import open_source

Files = dict[str, bytes]


def table(
    columns: Mapping[str, Any], features: Mapping[str, Any] | None = None, file: str = "x.parquet"
) -> Files:
    """Return a Parquet file; a column called `image` is added unless one is there, features are the metadata of `datasets`."""
    length = max(len(column) for column in columns.values() if column is not None)
    arrays = {"image": pa.array(PNGS[:length]), **columns}
    written = pa.table({name: column for name, column in arrays.items() if column is not None})
    if features is not None:
        info = json.dumps({"info": {"features": features}})
        written = written.replace_schema_metadata({"huggingface": info})
    sink = io.BytesIO()
    pq.write_table(written, sink)
    return {file: sink.getvalue()}


def declared(names: Sequence[str], column: str = "label") -> dict[str, Any]:
    """Return the features of an image and a ClassLabel."""
    return {"image": {"_type": "Image"}, column: {"_type": "ClassLabel", "names": list(names)}}


def shard(first: int, labels: Sequence[Any], names: Sequence[str] | None, file: str) -> Files:
    """Return a Parquet file that begins with another image than the first."""
    images = pa.array(PNGS[first : first + len(labels)])
    features = None if names is None else declared(names)
    return table({"image": images, "label": labels}, features, file)


def parquet(labels: Sequence[Any]) -> Files:
    """Return a Parquet file with a plain label column."""
    return table({"label": pa.array(labels)})


def cls(labels: Sequence[Any], file: str = "x.tar") -> Files:
    """Return a shard with labels as text."""
    return {file: tar_of([m for i, y in enumerate(labels) for m in _sample(i, "cls", f"{y}\n")])}


def jsons(labels: Sequence[Any], key: str = "label") -> Files:
    """Return a shard with labels in JSON."""
    said = (json.dumps({key: label, "width": 8}) for label in labels)
    return {"x.tar": tar_of([m for i, text in enumerate(said) for m in _sample(i, "json", text)])}


def _sample(i: int, ending: str, text: str) -> list[tuple[str, bytes]]:
    return [(f"{i:02d}.{ending}", text.encode()), (f"{i:02d}.png", PNGS[i])]


def csv(labels: Sequence[Any], header: str = "path,label") -> Files:
    """Return loose images and their table."""
    rows = "".join(f"{i:02d}.png,{label}\n" for i, label in enumerate(labels))
    images = {f"{i:02d}.png": PNGS[i] for i in range(len(labels))}
    return {"labels.csv": f"{header}\n{rows}".encode(), **images}


def idx(labels: Sequence[int], split: str = "train", folder: str = "") -> Files:
    """Return a pair of IDX files."""
    return {
        f"{folder}{split}-images-idx3-ubyte": idx_of(IMAGES_NHWC[: len(labels), :, :, 0]),
        f"{folder}{split}-labels-idx1-ubyte": idx_of(np.array(labels)),
    }


def folders(labels: Sequence[str]) -> Files:
    """Return folders of images."""
    return {f"{label}/{i:02d}.png": PNGS[i] for i, label in enumerate(labels)}


def classes(files: Files, text: str, name: str = "classes.txt") -> Files:
    """Return files with a list of names beside them."""
    return {**files, name: text.encode()}


def cifar(labels: Sequence[Sequence[int]], order: str = "C") -> bytes:
    """Return records of the binary version: image i has the value i everywhere, plus 100 in its green channel."""
    records = []
    for i, label in enumerate(labels):
        pixels_CHW = np.full((3, 32, 32), i, np.uint8)
        pixels_CHW[1] += 100
        records.append(bytes(label) + pixels_CHW.tobytes(order))
    return b"".join(records)


def outcome(
    store: Store, files: Files, *, classes_are: Sequence[str] | None = None, **config: Any
) -> tuple[tuple[str, ...], list[str | None]]:
    """Return the class names, and what class each image is read as: None is a bad image, or one that is not there.

    Args:
        store: Where the files are put.
        files: Content by key.
        classes_are: The training classes; then the images are held out.
        config: Options of the source.
    """
    for key, content in files.items():
        store.put(key, content)
    options = replace(CONFIG, **config)
    held_out = classes_are is not None
    source = open_source(
        store.uri,
        options,
        split="val" if held_out else "train",
        class_names=tuple(classes_are) if classes_are is not None else None,
        dedicated=held_out,
    )
    found: dict[int, str] = {}
    for of_shard in source.shards(100):
        for raw in source.read_shard(of_shard):
            if not raw.problem:
                pixels_HWC = decode_image(raw.content, options, raw.key)
                (place,) = np.flatnonzero((pixels_HWC == IMAGES_NHWC).all(axis=(1, 2, 3)))
                found[int(place)] = source.class_names[raw.label]
                assert source.read_keys([raw.key])[0].label == raw.label
    return source.class_names, [found.get(i) for i in range(max(found, default=-1) + 1)]
