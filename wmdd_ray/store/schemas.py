"""What JSON documents must look like before anything in them is used: types, ranges, and no entry missing.

A checksum tells that a document was not changed, not that its writer meant well.
"""

from __future__ import annotations

import math
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from wmdd_ray.config import READING
from wmdd_ray.errors import ArtifactError

_MOST = 2**53
_SHOWN = 200

Schema = dict[str, Any]


def _object(required: Schema, optional: Schema | None = None, *, closed: bool = False) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": [*required],
        "additionalProperties": not closed,
    }


def _number(least: float, most: float = _MOST, kind: str = "number") -> Schema:
    return {"type": kind, "minimum": least, "maximum": most}


def _array(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


_COUNT, _POSITIVE, _SIDE = (
    _number(least, most, "integer") for least, most in ((0, _MOST), (1, _MOST), (1, 1 << 16))
)
_FRACTION, _TEXT, _FLAG, _ANY = (
    _number(0, 1),
    {"type": "string"},
    {"type": "boolean"},
    {"type": "object"},
)
_MEAN = _array(_number(-1e6, 1e6), 1)
_STD = _array({**_number(0, 1e6), "exclusiveMinimum": 0}, 1)
_NAMES = _array(_TEXT, 1)

_FILES = _array(
    _object(
        {
            "key": _TEXT,
            "size_bytes": _COUNT,
            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        },
        {"at": _TEXT},
        closed=True,
    )
)
_MARKER = _object(
    {
        **{"unit": _TEXT, "files": _FILES, "metrics": _ANY, "seconds": _number(0), "host": _TEXT},
        **{"run": _TEXT, "attempt": _COUNT, "finished": _TEXT},
    },
    closed=True,
)
_COMMIT = _object(
    {
        **{"stage": _TEXT, "version": _COUNT, "fingerprint": _TEXT, "options": _ANY},
        "inputs": {"type": "object", "additionalProperties": _TEXT},
        "units": _ANY,  # each is checked as a marker
        **{"metrics": _ANY, "seconds": _number(0), "host": _TEXT, "run": _TEXT, "finished": _TEXT},
    },
    {"space": _TEXT},
    closed=True,
)
_MANIFEST = _object(
    {
        **{"class_names": _NAMES, "image_size": _SIDE, "channels": {"enum": [1, 3]}},
        **{"mean": _MEAN, "std": _STD, "ipc": _POSITIVE, "num_images": _POSITIVE, "tiles": _SIDE},
        **{"label_epochs": _POSITIVE, "image_bytes": _COUNT, "label_bytes": _COUNT},
        **{"teacher_bytes": _COUNT, "teacher_top1": _FRACTION},
        "source": _object(
            {"uri": _TEXT, "num_images": _COUNT, "stored_bytes": _COUNT, "bad_images": _COUNT}
        ),
        "provenance": _object(
            {
                **{"recipe": _TEXT, "seed": _COUNT, "git_revision": {"type": ["string", "null"]}},
                "versions": {"type": "object", "additionalProperties": _TEXT},
            },
            {
                "options": _object(
                    {},
                    {"source": _object({}, dict.fromkeys(READING, {"type": ["string", "null"]}))},
                ),
                "teacher_sha256": _TEXT,
            },
        ),
    },
    {
        "labels": _object(
            {"labels": {"enum": ["stored", "online"]}, "batch_size": _POSITIVE},
            {
                **{"compression": {"enum": ["full", "top_k"]}, "top_k": _POSITIVE},
                **{"precision": {"enum": ["fp16", "int8"]}, "step": _number(0)},
            },
        ),
        "teachers_top1": _array(_FRACTION, 1),
    },
)
_LABEL_FOOTER = _object(
    {
        **{
            "format": _COUNT,
            "first_epoch": _COUNT,
            "num_epochs": _POSITIVE,
            "num_classes": _POSITIVE,
        },
        **{"num_views": _POSITIVE, "num_logits": _COUNT},
    },
    {
        "draw": _object(
            {
                **{"seed": _number(0, 2**64 - 1, "integer"), "image_size": _SIDE, "flip": _FLAG},
                "index_N": _array(
                    {**_array(_number(0, 2**31 - 1, "integer"), 2), "maxItems": 2}, 1
                ),
                "crop_scale_min": {**_FRACTION, "exclusiveMinimum": 0},
                "mix": {"enum": ["none", "cutmix", "mixup"]},
                "mix_alpha": {**_number(0), "exclusiveMinimum": 0},
            },
            closed=True,
        ),
        "views_sha256": _TEXT,
    },
)
_TEACHER = _object(
    {
        **{
            "arch": {"type": "string", "minLength": 1, "maxLength": 200},
            "width": _SIDE,
            "small_stem": _FLAG,
            "class_names": _NAMES,
            "image_size": _SIDE,
        },
        **{
            "resize": _SIDE,
            "channels": {"enum": [1, 3]},
            "mean_C": _MEAN,
            "std_C": _STD,
            "top1": _FRACTION,
        },
    },
    {"interpolation": {"enum": ["bilinear", "bicubic"]}, "exif_orientation": _FLAG},
    closed=True,
)
_TABLE = _array(
    _object(
        {
            **{"row": _TEXT, "labels": _TEXT, "num_images": _COUNT, "epochs": _COUNT},
            **{"top1_mean": _FRACTION, "top1_std": _FRACTION, "num_seeds": _POSITIVE},
        },
        {"student": _TEXT, "recall_per_class": _array(_FRACTION, 1)},
    ),
    1,
)


def _is_finite(_: Any, value: Any) -> bool:
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    )


# JSON has no NaN and no infinity, Python's has, and they pass every comparison of a range.
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("number", _is_finite),
)
_VALIDATORS = {
    "the files of a set": _Validator(_FILES),
    "the marker of a unit": _Validator(_MARKER),
    "the commit of a stage": _Validator(_COMMIT),
    "the manifest of a data set": _Validator(_MANIFEST),
    "a soft-label file's footer": _Validator(_LABEL_FOOTER),
    "a teacher": _Validator(_TEACHER),
    "a table of accuracies": _Validator(_TABLE),
}


def check(document: Any, what: str, where: str) -> None:
    """Raise an ArtifactError that names `where` and the entry, when a document is not what `what` (a schema's name) says."""
    error = next(_VALIDATORS[what].iter_errors(document), None)
    if error is not None:
        raise ArtifactError(
            f"{where}: expected {what}, found another at {error.json_path[:_SHOWN]}: {error.message[:_SHOWN]}; another "
            "wmdd_ray wrote it (install that version, or run what made it again with --overwrite), or somebody else"
        )
