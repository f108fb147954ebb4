"""One encode/decode pair a record: safetensors for arrays, Parquet for tables and images.

Every function maps a record to bytes or back, and does no input or output of its own. Equal records give equal bytes.
Never a pickle. `packing` says how a record lies in bytes; `label_files` has the one pair that is long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from wmdd_ray.errors import ArtifactError
from wmdd_ray.records import (
    Barycenter,
    ClassBarycenter,
    ClassFeatures,
    ClassImages,
    FeatureChunk,
    Moments,
    Teacher,
)
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.label_files import decode_soft_labels as decode_soft_labels
from wmdd_ray.store.label_files import encode_soft_labels as encode_soft_labels
from wmdd_ray.store.packing import (
    IMAGE,
    check_columns,
    check_range,
    checked,
    digest,
    image_features,
    pack,
    read_parquet,
    unpack,
    write_parquet,
)
from wmdd_ray.store.schemas import check

# Teacher ---------------------------------------------------------------------------------------


def encode_teacher(teacher: Teacher) -> bytes:
    """Return the teacher as one safetensors file; everything but the weights is in its metadata."""
    meta = {
        name: getattr(teacher, name)
        for name in (
            "arch", "width", "small_stem", "class_names", "image_size", "resize", "channels", "mean_C", "std_C", "top1",
        )
    }  # fmt: skip
    # Later options stand in a file where they are not as they always were.
    for name in ("interpolation", "exif_orientation"):
        if getattr(teacher, name) != getattr(Teacher, name):
            meta[name] = getattr(teacher, name)
    return pack(teacher.weights, **meta)


@checked
def decode_teacher(content: bytes) -> Teacher:
    """Read what `encode_teacher` wrote."""
    weights, meta = unpack(content)
    check(meta, "a teacher", "a teacher's file")
    for name, array in weights.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ArtifactError(f"expected a teacher with finite weights, found others in {name}")
    for name in ("class_names", "mean_C", "std_C"):
        meta[name] = tuple(meta[name])
    return Teacher(weights=weights, **meta)


def decode_teacher_of(meta: dict[str, Any], content: bytes, where: str) -> Teacher:
    """Return a teacher that fits the set whose manifest says `meta`; an ArtifactError names `where` of another."""
    teacher = decode_teacher(content)
    expected = (meta["class_names"], meta["image_size"], meta["channels"])
    if ([*teacher.class_names], teacher.image_size, teacher.channels) != expected:
        raise ArtifactError(
            f"{where}: expected a teacher of the {len(expected[0])} classes, size and channels of its data set, found another"
        )
    return teacher


# Features --------------------------------------------------------------------------------------


_MOMENTS = ("count_L", "mean_S", "m2_S")


def _moments_arrays(moments: Moments) -> dict[str, np.ndarray]:
    return {name: getattr(moments, name) for name in _MOMENTS}


def _moments_of(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Moments:
    channels_L = tuple(meta["channels_L"])
    return Moments(channels_L=channels_L, **{name: arrays[name] for name in _MOMENTS})


def encode_feature_chunk(chunk: FeatureChunk) -> bytes:
    """Return a chunk; the moments of its M classes are stacked along a first axis."""
    labels = sorted(chunk.moments)
    first = chunk.moments[labels[0]] if labels else None
    arrays = {"labels_N": chunk.labels_N, "features_ND": chunk.features_ND}
    for name in _MOMENTS if labels else ():
        arrays[f"moments.{name}"] = np.stack([getattr(chunk.moments[k], name) for k in labels])
    channels = first.channels_L if first else ()
    return pack(arrays, keys=chunk.keys, moment_labels=labels, channels_L=channels)


@checked
def decode_feature_chunk(content: bytes) -> FeatureChunk:
    """Read what `encode_feature_chunk` wrote."""
    arrays, meta = unpack(content)
    moments = {
        label: _moments_of({name: arrays[f"moments.{name}"][i] for name in _MOMENTS}, meta)
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
    return pack(
        arrays, label=features.label, keys=features.keys, channels_L=features.moments.channels_L
    )


@checked
def decode_class_features(content: bytes) -> ClassFeatures:
    """Read what `encode_class_features` wrote."""
    arrays, meta = unpack(content)
    return ClassFeatures(
        label=meta["label"],
        keys=tuple(meta["keys"]),
        features_ND=arrays["features_ND"],
        moments=_moments_of(arrays, meta),
    )


# Barycenters and images ------------------------------------------------------------------------


def encode_class_barycenter(record: ClassBarycenter) -> bytes:
    """Return one class's atoms, weights, moments and evidence."""
    barycenter = record.barycenter
    arrays = {
        "atoms_KD": barycenter.atoms_KD,
        "weights_K": barycenter.weights_K,
        **_moments_arrays(record.moments),
    }
    return pack(
        arrays,
        label=record.label,
        num_images=record.num_images,
        nearest_keys=record.nearest_keys,
        whole_keys=record.whole_keys,
        random_keys=record.random_keys,
        channels_L=record.moments.channels_L,
        cost=barycenter.cost,
        cost_history=barycenter.cost_history,
        num_iters=barycenter.num_iters,
        converged=barycenter.converged,
    )


@checked
def decode_class_barycenter(content: bytes) -> ClassBarycenter:
    """Read what `encode_class_barycenter` wrote."""
    arrays, meta = unpack(content)
    barycenter = Barycenter(
        atoms_KD=arrays["atoms_KD"],
        weights_K=arrays["weights_K"],
        cost=meta["cost"],
        cost_history=tuple(meta["cost_history"]),
        num_iters=meta["num_iters"],
        converged=meta["converged"],
    )
    keys = ("nearest_keys", "whole_keys", "random_keys")
    return ClassBarycenter(
        label=meta["label"],
        num_images=meta["num_images"],
        barycenter=barycenter,
        moments=_moments_of(arrays, meta),
        **{name: tuple(meta[name]) for name in keys},
    )


def encode_class_images(record: ClassImages) -> bytes:
    """Return the distilled images of one class, uncompressed."""
    arrays = {"images_KHWC": record.images_KHWC, "weights_K": record.weights_K}
    arrays |= {f"curve.{name}": curve_P for name, curve_P in record.curves.items()}
    optional = {"curve_at_P": record.curve_at_P, "features_KD": record.features_KD}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    return pack(arrays, label=record.label, losses=record.losses)


@checked
def decode_class_images(content: bytes) -> ClassImages:
    """Read what `encode_class_images` wrote."""
    arrays, meta = unpack(content)
    curves = {name: arrays.pop(name) for name in list(arrays) if name.startswith("curve.")}
    return ClassImages(
        label=meta["label"],
        losses=meta["losses"],
        curves={name.removeprefix("curve."): curve_P for name, curve_P in curves.items()},
        **arrays,
    )


def encode_state(arrays: dict[str, np.ndarray]) -> bytes:
    """Return the resumable state of an unfinished unit, with a checksum: no marker vouches for it."""
    return pack(arrays, sha256=digest(arrays))


@checked
def decode_state(content: bytes) -> dict[str, np.ndarray]:
    """Read what `encode_state` wrote; an ArtifactError when it was changed."""
    arrays, meta = unpack(content)
    if meta.get("sha256") != digest(arrays):
        raise ArtifactError(
            "expected a state with the checksum of its content, found another content"
        )
    return arrays


# Images of the data set ------------------------------------------------------------------------


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
    number = {"dtype": "float64", "_type": "Value"}
    one_each = weights_NT.shape[1] == 1
    weights = (
        pa.array(weights_NT[:, 0], type=pa.float64())
        if one_each
        else pa.array(weights_NT.tolist(), type=pa.list_(pa.float64()))
    )
    table = pa.table(
        {
            "image": pa.array(rows, type=IMAGE),
            "label": pa.array(labels_N, type=pa.int64()),
            "weight": weights,
        }
    )
    weight = number if one_each else {"feature": number, "_type": "List"}
    return write_parquet(table.replace_schema_metadata(image_features(class_names, weight=weight)))


@checked
def decode_png_rows(
    content: bytes, num_classes: int | None = None
) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Return the PNG files, labels_N and weights_NT of an `encode_images` table, the files as they are.

    Args:
        content: the table.
        num_classes: Y, which labels are below; None takes any.

    Raises:
        ArtifactError: It is no such table, or holds what nobody can train on.
    """
    table = read_parquet(content)
    types = {field.name: field.type for field in table.schema}
    # One number of a stored image, or a list of those of its tiles.
    weight = pa.float64() if types.get("weight") == pa.float64() else pa.list_(pa.float64())
    check_columns(table, {"image": IMAGE, "label": pa.int64(), "weight": weight})
    pngs = [row["bytes"] for row in table["image"].to_pylist()]
    labels_N = table["label"].to_numpy()
    check_range("labels", labels_N, 0, num_classes - 1 if num_classes else np.iinfo(np.int32).max)
    weights_NT = np.array(table["weight"].to_pylist(), dtype=np.float64).reshape(len(pngs), -1)
    check_range("weights", weights_NT, 0, 1 + 1e-6)
    if not (pngs and weights_NT.any()):
        raise ArtifactError("expected distilled images with weights, found none")
    return pngs, labels_N, weights_NT
