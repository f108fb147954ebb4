"""Which columns of a Parquet file are the image and the label, and what its classes are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.classes import shown

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "class_name", "category", "target")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the two columns that are read, the class names where the file holds them, and how large values can be."""

    image: str
    label: str
    is_struct: bool
    class_names: tuple[str, ...] | None
    image_bytes: int = 0
    label_bytes: int = 0

    @property
    def image_path(self) -> str:
        """Path of the column of encoded images: of a struct the bytes alone."""
        return f"{self.image}.bytes" if self.is_struct else self.image

    def images(self, batch: pa.RecordBatch) -> pa.Array:
        """Return the binary array of encoded images of a batch."""
        column = batch.column(self.image)
        return pc.struct_field(column, "bytes") if self.is_struct else column


def find_columns(schema: pa.Schema, config: SourceConfig, where: str) -> Columns:
    """Find the image and the label: those that the user names, else that the file declares, else by usual name.

    Never a label by its type alone: an index of rows or a width is an integer too.

    Raises:
        DataError: There is none, or several that nothing tells apart.
    """
    features = _features(schema)
    image = _choose(
        schema, config.image_column, "image", _IMAGE_NAMES, _is_image,
        _declared(features, "Image"), where,
    )  # fmt: skip
    label = _choose(
        schema, config.label_column, "label", _LABEL_NAMES, _is_label,
        _declared(features, "ClassLabel"), where,
    )  # fmt: skip
    return Columns(
        image, label, pa.types.is_struct(schema.field(image).type), _names(features.get(label))
    )


def _choose(
    schema: pa.Schema,
    named: str | None,
    what: str,
    usual_names: Sequence[str],
    fits: Callable[[pa.DataType], bool],
    declared: Sequence[str],
    where: str,
) -> str:
    expected = {
        "image": "an image column (struct<bytes, path> or binary)",
        "label": "a label column (numbers or text, one a row)",
    }[what]
    fitting = [field.name for field in schema if fits(field.type)]
    usual = [name for name in usual_names if name in schema.names]
    if named is not None:
        columns = [named] if named in schema.names else []
    elif declared:
        others = [name for name in usual[:1] if name in fitting and name not in declared]
        columns = [*declared, *(others if what == "label" else [])]
    else:
        columns = usual[:1]
        # A picture can be told by decoding it.
        if what == "image" and not columns and len(fitting) == 1:
            columns = fitting
    if len(columns) == 1 and columns[0] in fitting and schema.names.count(columns[0]) == 1:
        return columns[0]
    if len(columns) > 1:
        raise DataError(
            f"{where}: expected one {what} column, found {len(columns)}: {shown(columns)}; name one by --source.{what}-column"
        )
    there = ", ".join(f"{field.name}: {field.type}" for field in schema) or "no columns"
    raise DataError(
        f"{where}: expected {expected} named {' or '.join(columns or usual_names[:4])}; found {there}; name the right one by "
        f"--source.{what}-column"
    )


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_binary(kind)
    return (
        is_text
        or pa.types.is_string_view(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_floating(kind)
    )


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the feature descriptions that `datasets` stores; empty when not understood."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: value for name, value in features.items() if name in schema.names}


def _declared(features: dict[str, Any], feature_type: str) -> list[str]:
    return [
        name
        for name, value in features.items()
        if isinstance(value, dict) and value.get("_type") == feature_type
    ]


def _names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
