"""Which columns of a Parquet file are the image and the label, and what its classes are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wmdd_ray.errors import DataError

_IMAGE_NAMES = ("image", "img", "jpg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the two columns that are read, and the class names where the file holds them."""

    image: str
    label: str
    is_struct: bool
    class_names: tuple[str, ...] | None

    @property
    def paths(self) -> list[str]:
        """Column paths to read: of a struct the bytes alone."""
        return [f"{self.image}.bytes" if self.is_struct else self.image, self.label]

    def images(self, batch: pa.RecordBatch) -> pa.Array:
        """Return the binary array of encoded images of a batch."""
        column = batch.column(self.image)
        return pc.struct_field(column, "bytes") if self.is_struct else column


def find_columns(schema: pa.Schema, where: str) -> Columns:
    """Find the image and the label by usual name, else by metadata, else the only column that fits.

    Raises:
        DataError: There is none, or several and none has a usual name.
    """
    features = _features(schema)
    images = [field.name for field in schema if _is_image(field.type)]
    labels = [field.name for field in schema if pa.types.is_integer(field.type)]
    image = _choose(images, _IMAGE_NAMES, features, "Image")
    label = _choose(labels, _LABEL_NAMES, features, "ClassLabel")
    if image is None or label is None:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema) or "no columns"
        raise DataError(
            f"{where}: expected one image column (struct<bytes, path> or binary) and one integer "
            f"label column, named `image` and `label` where there are several; found {found}"
        )
    return Columns(
        image, label, pa.types.is_struct(schema.field(image).type), _names(features.get(label))
    )


def _choose(
    fitting: list[str], usual_names: tuple[str, ...], features: dict[str, Any], feature_type: str
) -> str | None:
    for name in usual_names:
        if name in fitting:
            return name
    declared = [
        name
        for name in fitting
        if isinstance(features.get(name), dict) and features[name].get("_type") == feature_type
    ]
    # CIFAR-100 declares its fine labels first and its coarse ones second.
    if declared:
        return declared[0]
    return fitting[0] if len(fitting) == 1 else None


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the feature descriptions that `datasets` stores; empty when not understood."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
