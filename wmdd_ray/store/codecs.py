"""One encode/decode pair a record: safetensors for arrays, Parquet for tables and images.

Every function maps a record to bytes or back, and does no input or output of its own. Equal records give equal bytes.
Never a pickle. Parquet carries page checksums, and the reader verifies them: without them one mutation in five of a
Parquet file reads back as different data without an error.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from wmdd_ray.errors import ArtifactError
from wmdd_ray.records import (
    Barycenter,
    ClassBarycenter,
    ClassFeatures,
    ClassImages,
    FeatureChunk,
    Moments,
    SoftLabelBlock,
    SoftLabels,
    Teacher,
    ViewDraw,
    Views,
)
from wmdd_ray.store.documents import seal, unseal
from wmdd_ray.store.images import encode_png

R = TypeVar("R")
_HUGGINGFACE = b"huggingface"
_WMDD = b"wmdd"


def _pack(arrays: dict[str, np.ndarray], **meta: Any) -> bytes:
    contiguous = {name: np.array(array, order="C", copy=None) for name, array in arrays.items()}
    return save_safetensors(contiguous, metadata={"json": json.dumps(meta, sort_keys=True)})


def _unpack(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        # By name: the library hands them out in another order in every process.
        arrays = dict(sorted(load_safetensors(content).items()))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return arrays, json.loads(header["__metadata__"]["json"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"expected a safetensors record of this project: {error}") from error


def _checked(decode: Callable[[bytes], R]) -> Callable[[bytes], R]:
    """Turn what a decoder misses in a record, or finds there of another kind, into an ArtifactError."""

    @functools.wraps(decode)
    def checked(content: bytes) -> R:
        try:
            return decode(content)
        except (
            ArithmeticError, AssertionError, AttributeError, LookupError, OSError,
            RecursionError, SyntaxError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise ArtifactError(
                f"expected a record that {decode.__name__} reads, found another or a changed one ({error!r}); delete "
                "the room that holds it and run the stage again"
            ) from error

    return checked


# Teacher ---------------------------------------------------------------------------------------


def encode_teacher(teacher: Teacher) -> bytes:
    """Return the teacher as one safetensors file; everything but the weights is in its metadata."""
    meta = {
        name: getattr(teacher, name)
        for name in (
            "arch", "width", "small_stem", "class_names", "image_size", "resize", "channels", "mean_C", "std_C", "top1",
        )
    }  # fmt: skip
    return _pack(teacher.weights, **meta)


@_checked
def decode_teacher(content: bytes) -> Teacher:
    """Read what `encode_teacher` wrote."""
    weights, meta = _unpack(content)
    for name in ("class_names", "mean_C", "std_C"):
        meta[name] = tuple(meta[name])
    return Teacher(weights=weights, **meta)


# Features --------------------------------------------------------------------------------------


def _moments_arrays(moments: Moments) -> dict[str, np.ndarray]:
    return {"count_L": moments.count_L, "mean_S": moments.mean_S, "m2_S": moments.m2_S}


def encode_feature_chunk(chunk: FeatureChunk) -> bytes:
    """Return a chunk; the moments of its M classes are stacked along a first axis."""
    labels = sorted(chunk.moments)
    first = chunk.moments[labels[0]] if labels else None
    arrays = {"labels_N": chunk.labels_N, "features_ND": chunk.features_ND}
    for name in ("count_L", "mean_S", "m2_S"):
        if labels:
            arrays[f"moments.{name}"] = np.stack([getattr(chunk.moments[k], name) for k in labels])
    channels = first.channels_L if first else ()
    return _pack(arrays, keys=chunk.keys, moment_labels=labels, channels_L=channels)


@_checked
def decode_feature_chunk(content: bytes) -> FeatureChunk:
    """Read what `encode_feature_chunk` wrote."""
    arrays, meta = _unpack(content)
    moments = {
        label: Moments(
            channels_L=tuple(meta["channels_L"]),
            count_L=arrays["moments.count_L"][i],
            mean_S=arrays["moments.mean_S"][i],
            m2_S=arrays["moments.m2_S"][i],
        )
        for i, label in enumerate(meta["moment_labels"])
    }
    return FeatureChunk(
        keys=tuple(meta["keys"]),
        labels_N=arrays["labels_N"],
        features_ND=arrays["features_ND"],
        moments=moments,
    )


def encode_class_features(features: ClassFeatures) -> bytes:
    """Return the regrouped features of one class."""
    arrays = {"features_ND": features.features_ND, **_moments_arrays(features.moments)}
    return _pack(
        arrays, label=features.label, keys=features.keys, channels_L=features.moments.channels_L
    )


@_checked
def decode_class_features(content: bytes) -> ClassFeatures:
    """Read what `encode_class_features` wrote."""
    arrays, meta = _unpack(content)
    return ClassFeatures(
        label=meta["label"],
        keys=tuple(meta["keys"]),
        features_ND=arrays.pop("features_ND"),
        moments=Moments(channels_L=tuple(meta["channels_L"]), **arrays),
    )


# Barycenters and images ------------------------------------------------------------------------


def encode_class_barycenter(record: ClassBarycenter) -> bytes:
    """Return one class's atoms, weights, moments and evidence."""
    found = record.barycenter
    arrays = {
        "atoms_KD": found.atoms_KD,
        "weights_K": found.weights_K,
        **_moments_arrays(record.moments),
    }
    return _pack(
        arrays,
        label=record.label,
        num_images=record.num_images,
        nearest_keys=record.nearest_keys,
        whole_keys=record.whole_keys,
        random_keys=record.random_keys,
        channels_L=record.moments.channels_L,
        cost=found.cost,
        cost_history=found.cost_history,
        num_iters=found.num_iters,
        converged=found.converged,
    )


@_checked
def decode_class_barycenter(content: bytes) -> ClassBarycenter:
    """Read what `encode_class_barycenter` wrote."""
    arrays, meta = _unpack(content)
    barycenter = Barycenter(
        atoms_KD=arrays["atoms_KD"],
        weights_K=arrays["weights_K"],
        cost=meta["cost"],
        cost_history=tuple(meta["cost_history"]),
        num_iters=meta["num_iters"],
        converged=meta["converged"],
    )
    moments = Moments(
        channels_L=tuple(meta["channels_L"]),
        count_L=arrays["count_L"],
        mean_S=arrays["mean_S"],
        m2_S=arrays["m2_S"],
    )
    return ClassBarycenter(
        label=meta["label"],
        num_images=meta["num_images"],
        barycenter=barycenter,
        nearest_keys=tuple(meta["nearest_keys"]),
        whole_keys=tuple(meta["whole_keys"]),
        random_keys=tuple(meta["random_keys"]),
        moments=moments,
    )


def encode_class_images(record: ClassImages) -> bytes:
    """Return the distilled images of one class, uncompressed."""
    arrays = {"images_KHWC": record.images_KHWC, "weights_K": record.weights_K}
    arrays |= {f"curve.{name}": curve_P for name, curve_P in record.curves.items()}
    optional = {"curve_at_P": record.curve_at_P, "features_KD": record.features_KD}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    return _pack(arrays, label=record.label, losses=record.losses)


@_checked
def decode_class_images(content: bytes) -> ClassImages:
    """Read what `encode_class_images` wrote."""
    arrays, meta = _unpack(content)
    curves = {name: arrays.pop(name) for name in list(arrays) if name.startswith("curve.")}
    return ClassImages(
        label=meta["label"],
        losses=meta["losses"],
        curves={name.removeprefix("curve."): curve_P for name, curve_P in curves.items()},
        **arrays,
    )


def encode_state(arrays: dict[str, np.ndarray]) -> bytes:
    """Return the resumable state of an unfinished unit, with a checksum: no marker vouches for it."""
    return _pack(arrays, sha256=_digest(arrays))


@_checked
def decode_state(content: bytes) -> dict[str, np.ndarray]:
    """Read what `encode_state` wrote; an ArtifactError when it was changed."""
    arrays, meta = _unpack(content)
    if meta.get("sha256") != _digest(arrays):
        raise ArtifactError(
            "expected a state with the checksum of its content, found another content"
        )
    return arrays


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {arrays[name].shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# Tables ----------------------------------------------------------------------------------------


def _write_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression="zstd", write_page_checksum=True, row_group_size=1 << 16
    )
    return sink.getvalue()


def _read_parquet(content: bytes) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"expected a Parquet file with valid page checksums: {error}"
        ) from error


def _check_columns(table: pa.Table, expected: set[str]) -> None:
    if set(table.column_names) != expected:
        raise ArtifactError(
            f"expected a Parquet file with the columns {sorted(expected)}, found {sorted(table.column_names)}"
        )


def _binary_rows(array_VK: np.ndarray) -> pa.Array:
    """Return the rows of a 2-D array as fixed-size binary: 20 to 100 times faster than nested lists."""
    array_VK = np.ascontiguousarray(array_VK)
    width = array_VK.shape[1] * array_VK.dtype.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(array_VK), [None, pa.py_buffer(array_VK)]
    )


def _from_binary_rows(column: pa.ChunkedArray, dtype: str) -> np.ndarray:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    width = array.type.byte_width
    start = array.offset * width
    raw = np.frombuffer(array.buffers()[1], dtype=np.uint8)[start : start + len(array) * width]
    return raw.view(dtype).reshape(len(array), -1).copy()


_VIEW_MATRICES = {"crop_V4": "<f4", "partner_crop_V4": "<f4", "mix_box_V4": "<i2"}
_VIEW_VECTORS = ("image_V", "flip_V", "partner_V", "partner_flip_V", "share_V")
_VIEW_TYPES = {
    **{"image": pa.int32(), "flip": pa.bool_(), "partner": pa.int32(), "partner_flip": pa.bool_()},
    **{"share": pa.float32(), "crop": pa.binary(16), "partner_crop": pa.binary(16)},
    "mix_box": pa.binary(8),
}
# Of zstd, for halves and floats by byte stream split: 4 to 10 % smaller than at level 1. Steps are noise with a skewed histogram: a
# search for repetitions costs bytes there (455 a view of 1000 classes at level 1, 494 at level 12).
_LABEL_LEVEL = 12
# 1 had no number; it stored every view and the logits as float16.
_LABEL_FORMAT = 2


def encode_soft_labels(block: SoftLabelBlock) -> bytes:
    """Return a Parquet table with one row a view: the teacher's logits on it, and how to draw it.

    Boxes and logits are little-endian fixed-size binary columns: `logits` K x float16, or uint8 in multiples of `step`
    (float16); of top-k labels also `classes` K x uint16 and `rest` float16. The boxes (`crop`, `partner_crop` 4 x float32,
    `mix_box` 4 x int16) and the other fields of `Views` are left out of a block with `draw`; then the footer holds that,
    and a SHA-256 of the views. The footer's `wmdd` entry is JSON with a checksum of its own.

    Encodings (bytes a view, Fashion-MNIST, files of 2500 views): whole rows of steps of 1 logit take 5.1 as they are, where the
    entropy is 4.7; a column a class takes 7.1 with a dictionary and 9.7 without. Columns of more than one byte a number
    are smallest by byte stream split: top-10 classes of 1000 take 13.0 instead of 14.9, boxes 33 instead of 38.
    """
    columns: dict[str, Any] = {}
    labels = block.labels
    meta: dict[str, Any] = {
        "format": _LABEL_FORMAT,
        "first_epoch": block.first_epoch,
        "num_epochs": block.num_epochs,
        "num_classes": labels.num_classes,
        "num_views": len(block.views),
        "num_logits": labels.values_VK.shape[1],
    }
    if block.draw is None:
        for name in _VIEW_VECTORS:
            columns[name.removesuffix("_V")] = pa.array(getattr(block.views, name))
        for name, dtype in _VIEW_MATRICES.items():
            columns[name.removesuffix("_V4")] = _binary_rows(
                getattr(block.views, name).astype(dtype)
            )
    else:
        meta["draw"] = {**vars(block.draw), "index_N": _runs_of(block.draw.index_N)}
        meta["views_sha256"] = _digest(vars(block.views))
    if labels.values_VK.shape[1]:
        if labels.step_V is None:
            columns["logits"] = _binary_rows(labels.values_VK.astype("<f2"))
        else:
            columns["logits"] = _binary_rows(labels.values_VK.astype("u1"))
            columns["step"] = pa.array(labels.step_V)
        if labels.indices_VK is not None and labels.rest_V is not None:
            columns["classes"] = _binary_rows(labels.indices_VK.astype("<u2"))
            columns["rest"] = pa.array(labels.rest_V)
    sealed = json.dumps(json.loads(seal(meta)), separators=(",", ":"), sort_keys=True)
    table, sink = pa.table(columns), io.BytesIO()
    # A step is the same in most rows; flips are bits; of a logit in steps there is one byte only.
    whole = {"step", "flip", "partner_flip", *(["logits"] if labels.step_V is not None else [])}
    split = [name for name in columns if name not in whole]
    # Without Arrow's own copy of the schema, nor statistics: a third of a kilobyte and more a file.
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level={name: 1 if name in whole else _LABEL_LEVEL for name in columns},
        write_page_checksum=True,
        use_dictionary=["step"] if "step" in columns else False,
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=1 << 16)
        writer.add_key_value_metadata({_WMDD.decode(): sealed})
    return sink.getvalue()


def decode_soft_labels(
    content: bytes, draw_block: Callable[[ViewDraw, range], Views] | None = None
) -> SoftLabelBlock:
    """Read what `encode_soft_labels` wrote.

    Args:
        content: the file.
        draw_block: (what views are drawn from, label epochs) -> views: `core.views.draw_block`, for files without views.

    Raises:
        ArtifactError: The file was changed, or is of another format, or its views come out differently here.
    """

    @_checked
    def decode_soft_labels(content: bytes) -> SoftLabelBlock:
        table = _read_parquet(content)
        # The footer is outside the pages that have checksums, so it has its own.
        sealed = (table.schema.metadata or {}).get(_WMDD, b"")
        if b'"format"' not in sealed:
            raise ArtifactError(
                f"expected a soft-label file of format {_LABEL_FORMAT}, found one that an earlier wmdd_ray wrote, or no "
                "soft-label file; run relabel and assemble again (--overwrite)"
            )
        meta = unseal(sealed, "a soft-label file's footer")
        if meta["format"] != _LABEL_FORMAT:
            raise ArtifactError(
                f"expected a soft-label file of format {_LABEL_FORMAT}, found format {meta['format']}; install the "
                "wmdd_ray version that wrote it"
            )
        labels = _labels_of(table, meta)
        draw = None
        if "draw" in meta:
            draw = ViewDraw(**{**meta["draw"], "index_N": _from_runs(meta["draw"]["index_N"])})
            views = _redrawn(draw, meta, draw_block)
        else:
            arrays = {
                name: table[name.removesuffix("_V")].to_numpy(zero_copy_only=False)
                for name in _VIEW_VECTORS
            }
            for name, dtype in _VIEW_MATRICES.items():
                arrays[name] = _from_binary_rows(table[name.removesuffix("_V4")], dtype)
            views = Views(**arrays)
        return SoftLabelBlock(
            first_epoch=meta["first_epoch"],
            num_epochs=meta["num_epochs"],
            views=views,
            labels=labels,
            draw=draw,
        )

    return decode_soft_labels(content)


def _redrawn(
    draw: ViewDraw,
    meta: dict[str, Any],
    draw_block: Callable[[ViewDraw, range], Views] | None,
) -> Views:
    assert draw_block is not None, "views that are not stored need core.views.draw_block"
    first = meta["first_epoch"]
    views = draw_block(draw, range(first, first + meta["num_epochs"]))
    if _digest(vars(views)) != meta["views_sha256"]:
        raise ArtifactError(
            "expected to draw the very views that the labels belong to, drew others: this machine's arithmetic or numpy "
            "differs from the writer's; relabel with --relabel.stored-views rows"
        )
    return views


def _labels_of(table: pa.Table, meta: dict[str, Any]) -> SoftLabels:
    """Return the labels of a file, of no logits where none are stored."""
    num_views, num_logits = meta["num_views"], meta["num_logits"]
    top_k, steps = "classes" in table.column_names, "step" in table.column_names
    types = {} if "draw" in meta else dict(_VIEW_TYPES)
    if num_logits:
        types["logits"] = pa.binary(num_logits * (1 if steps else 2))
    types |= {"step": pa.float16()} if steps else {}
    types |= {"classes": pa.binary(num_logits * 2), "rest": pa.float16()} if top_k else {}
    _check_columns(table, set(types))
    for name, expected in types.items():
        if table[name].type != expected:
            raise ArtifactError(
                f"expected {expected} in the column {name}, found {table[name].type}: the file's schema was changed"
            )
    if not num_logits:
        return SoftLabels(
            num_classes=meta["num_classes"], values_VK=np.empty((num_views, 0), np.float16)
        )
    labels = SoftLabels(
        num_classes=meta["num_classes"],
        values_VK=_from_binary_rows(table["logits"], "u1" if steps else "<f2"),
        indices_VK=_from_binary_rows(table["classes"], "<u2") if top_k else None,
        rest_V=table["rest"].to_numpy() if top_k else None,
        step_V=table["step"].to_numpy() if steps else None,
    )
    if labels.values_VK.shape != (num_views, num_logits):
        raise ArtifactError(
            f"expected {num_views} x {num_logits} logits, found {labels.values_VK.shape}: the file's schema was changed"
        )
    return labels


def _runs_of(index_N: np.ndarray) -> list[list[int]]:
    """Return an ascending array as [first, one past the last] of each run of consecutive numbers."""
    starts = np.flatnonzero(np.diff(index_N, prepend=index_N[0] - 2) != 1)
    stops = [*starts[1:], len(index_N)]
    return [[int(index_N[a]), int(index_N[b - 1]) + 1] for a, b in zip(starts, stops, strict=True)]


def _from_runs(runs: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.arange(first, stop, dtype=np.int32) for first, stop in runs])


def encode_images(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    weights_NT: np.ndarray,
    class_names: tuple[str, ...],
) -> bytes:
    """Return a Parquet table that Hugging Face `datasets` opens as images with class labels.

    Args:
        images_NHWC: stored images, uint8.
        labels_N: their classes.
        weights_NT: weights of the T images that each of them holds; one of one is a number there, more are a list.
        class_names: names of the classes.
    """
    rows = [
        {"bytes": encode_png(image), "path": f"{label:05d}_{i:05d}.png"}
        for i, (image, label) in enumerate(zip(images_NHWC, labels_N, strict=True))
    ]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    number = {"dtype": "float64", "_type": "Value"}
    one_each = weights_NT.shape[1] == 1
    weights = (
        pa.array(weights_NT[:, 0], type=pa.float64())
        if one_each
        else pa.array(weights_NT.tolist(), type=pa.list_(pa.float64()))
    )
    table = pa.table(
        {
            "image": pa.array(rows, type=struct),
            "label": pa.array(labels_N, type=pa.int64()),
            "weight": weights,
        }
    )
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        "weight": number if one_each else {"feature": number, "_type": "List"},
    }
    meta = {_HUGGINGFACE: json.dumps({"info": {"features": features}}).encode()}
    return _write_parquet(table.replace_schema_metadata(meta))


@_checked
def decode_images(content: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (images_NHWC uint8, labels_N int64, weights_NT float64) of an `encode_images` table."""
    table = _read_parquet(content)
    _check_columns(table, {"image", "label", "weight"})
    images = []
    for row in table["image"].to_pylist():
        with Image.open(io.BytesIO(row["bytes"]), formats=("PNG",)) as picture:
            pixels = np.asarray(picture)
        images.append(pixels if pixels.ndim == 3 else pixels[:, :, None])
    weights_NT = np.array(table["weight"].to_pylist(), dtype=np.float64).reshape(len(images), -1)
    return np.stack(images), table["label"].to_numpy(), weights_NT
