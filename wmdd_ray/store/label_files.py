"""Soft labels and their views in Parquet files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wmdd_ray.errors import ArtifactError
from wmdd_ray.records import SoftLabelBlock, SoftLabels, ViewDraw, Views
from wmdd_ray.store.documents import seal, unseal
from wmdd_ray.store.packing import (
    binary_rows,
    check_budget,
    check_columns,
    check_range,
    checked,
    digest,
    from_binary_rows,
    read_parquet,
)
from wmdd_ray.store.schemas import check

_WMDD = b"wmdd"
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
VIEW_BYTES = 54
"""Bytes of a view besides its logits: two boxes, a mix box, indices, flips, share."""


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
            columns[name.removesuffix("_V4")] = binary_rows(
                getattr(block.views, name).astype(dtype)
            )
    else:
        meta["draw"] = {**vars(block.draw), "index_N": _runs_of(block.draw.index_N)}
        meta["views_sha256"] = digest(vars(block.views))
    if labels.values_VK.shape[1]:
        if labels.step_V is None:
            columns["logits"] = binary_rows(labels.values_VK.astype("<f2"))
        else:
            columns["logits"] = binary_rows(labels.values_VK.astype("u1"))
            columns["step"] = pa.array(labels.step_V)
        if labels.indices_VK is not None and labels.rest_V is not None:
            columns["classes"] = binary_rows(labels.indices_VK.astype("<u2"))
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


@checked
def decode_soft_labels(
    content: bytes,
    draw_block: Callable[[ViewDraw, range], Views] | None = None,
    most_views: int | None = None,
) -> SoftLabelBlock:
    """Read what `encode_soft_labels` wrote.

    Args:
        content: the file.
        draw_block: (what views are drawn from, label epochs) -> views: `core.views.draw_block`, for files without views.
        most_views: those that the images of its set justify; None are as many as the file's own bytes do, which without logits
            are few.

    Raises:
        ArtifactError: The file was changed, or is of another format, or its views come out differently here, or it holds
            what no teacher says and no image has.
    """
    table = read_parquet(content)
    # The footer is outside the pages that have checksums, so it has its own.
    sealed = (table.schema.metadata or {}).get(_WMDD, b"")
    if b'"format"' not in sealed:
        raise ArtifactError(
            f"expected a soft-label file of format {_LABEL_FORMAT}, found one that an earlier wmdd_ray wrote, or no "
            "soft-label file; run relabel and assemble again (--overwrite)"
        )
    meta = unseal(sealed, "a soft-label file's footer")
    check(meta, "a soft-label file's footer", "a soft-label file")
    if meta["format"] != _LABEL_FORMAT:
        raise ArtifactError(
            f"expected a soft-label file of format {_LABEL_FORMAT}, found format {meta['format']}; install the "
            "wmdd_ray version that wrote it"
        )
    if most_views is None:
        check_budget(meta["num_views"] * VIEW_BYTES, len(content), "a label file")
    elif meta["num_views"] > most_views:
        raise ArtifactError(
            f"expected at most {most_views} views in a soft-label file, found {meta['num_views']}: it is of another set; run "
            "relabel and assemble again"
        )
    labels = _labels_of(table, meta)
    draw = None
    if "draw" in meta:
        runs = meta["draw"]["index_N"]
        num_images = sum(stop - first for first, stop in runs)
        if meta["num_views"] != num_images * meta["num_epochs"]:
            raise ArtifactError(
                f"expected {meta['num_views']} views as a soft-label file's footer says, found {num_images} images in "
                f"{meta['num_epochs']} epochs there"
            )
        draw = ViewDraw(**{**meta["draw"], "index_N": _from_runs(runs)})
        _refuse_mixup(draw.mix == "mixup")
        views = _redrawn(draw, meta, draw_block)
    else:
        arrays = {
            name: table[name.removesuffix("_V")].to_numpy(zero_copy_only=False)
            for name in _VIEW_VECTORS
        }
        for name, dtype in _VIEW_MATRICES.items():
            arrays[name] = from_binary_rows(table[name.removesuffix("_V4")], dtype)
        views = Views(**arrays)
        has_box_V = (views.mix_box_V4[:, 2:] > views.mix_box_V4[:, :2]).all(axis=1)
        _refuse_mixup(bool(((views.share_V < 1) & ~has_box_V).any()))
        _check_views(views)
    return SoftLabelBlock(
        first_epoch=meta["first_epoch"],
        num_epochs=meta["num_epochs"],
        views=views,
        labels=labels,
        draw=draw,
    )


def _check_views(views: Views) -> None:
    """Raise an ArtifactError of views that no image has, whatever the images."""
    for name in ("crop_V4", "partner_crop_V4"):
        box_V4 = getattr(views, name)
        check_range("crops", box_V4, 0, 1)
        check_range(
            "heights and widths of crops", box_V4[:, 2:], float(np.finfo(np.float32).tiny), 1
        )
        check_range("lower and right ends of crops", box_V4[:, :2] + box_V4[:, 2:], 0, 1 + 1e-6)
    for name in ("image_V", "partner_V"):
        check_range("images of views", getattr(views, name), 0, np.iinfo(np.int32).max)
    check_range("shares of mixed views", views.share_V, 0, 1)
    check_range("mixed boxes", views.mix_box_V4, 0, np.iinfo(np.int16).max)


def _refuse_mixup(blended: bool) -> None:
    if blended:
        raise ArtifactError(
            "expected views mixed by CutMix or not at all, found MixUp's, which earlier versions of wmdd_ray drew; run relabel "
            "and assemble again (--overwrite)"
        )


def _redrawn(
    draw: ViewDraw,
    meta: dict[str, Any],
    draw_block: Callable[[ViewDraw, range], Views] | None,
) -> Views:
    assert draw_block is not None, "views that are not stored need core.views.draw_block"
    first = meta["first_epoch"]
    views = draw_block(draw, range(first, first + meta["num_epochs"]))
    if digest(vars(views)) != meta["views_sha256"]:
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
    check_columns(table, types)
    num_classes = meta["num_classes"]
    if num_logits > num_classes or (num_logits not in (0, num_classes) and not top_k):
        raise ArtifactError(
            f"expected logits of {num_classes} classes, found {num_logits} in a row: the file's schema was changed"
        )
    if not num_logits:
        return SoftLabels(
            num_classes=meta["num_classes"], values_VK=np.empty((num_views, 0), np.float16)
        )
    labels = SoftLabels(
        num_classes=num_classes,
        values_VK=from_binary_rows(table["logits"], "u1" if steps else "<f2"),
        indices_VK=from_binary_rows(table["classes"], "<u2") if top_k else None,
        rest_V=table["rest"].to_numpy() if top_k else None,
        step_V=table["step"].to_numpy() if steps else None,
    )
    if labels.values_VK.shape != (num_views, num_logits):
        raise ArtifactError(
            f"expected {num_views} x {num_logits} logits, found {labels.values_VK.shape}: the file's schema was changed"
        )
    # Relative to the largest, which is 0; of top-k labels the rest can be nothing at all.
    most = float(np.finfo(np.float16).max)
    if labels.step_V is None:
        check_range("logits", labels.values_VK, -most, 0)
    else:
        check_range(
            "steps of logits", labels.step_V, float(np.finfo(np.float16).smallest_subnormal), most
        )
    if labels.indices_VK is not None and labels.rest_V is not None:
        check_range("classes of logits", labels.indices_VK, 0, num_classes - 1)
        check_range("the rest of logits", labels.rest_V, -most, most)
    return labels


def _runs_of(index_N: np.ndarray) -> list[list[int]]:
    """Return an ascending array as [first, one past the last] of each run of consecutive numbers."""
    starts = np.flatnonzero(np.diff(index_N, prepend=index_N[0] - 2) != 1)
    stops = [*starts[1:], len(index_N)]
    return [[int(index_N[a]), int(index_N[b - 1]) + 1] for a, b in zip(starts, stops, strict=True)]


def _from_runs(runs: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.arange(first, stop, dtype=np.int32) for first, stop in runs])
