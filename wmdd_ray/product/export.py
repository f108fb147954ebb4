"""A distilled set in the layouts that other libraries load: image folders, WebDataset shards, a Hugging Face data set.

The PNG files are those of the set, byte for byte. Of a set with tiles (several small images in a stored one) what is
exported are the small images, because they are what students see and what weights and labels belong to. `export.json` is
written twice: at the start it claims the folder, at the end it lists every file with size and SHA-256.

Legend: N images, T small images in a stored one, Y classes, H W pixels, C channels.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from wmdd_ray.config import LabelKind
from wmdd_ray.core.networks import labeler_of
from wmdd_ray.core.resample import whole
from wmdd_ray.core.tiles import untile
from wmdd_ray.core.views import to_input
from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.product.card import export_card, published
from wmdd_ray.records import Teacher
from wmdd_ray.redaction import public
from wmdd_ray.spine.claims import is_of, plan_of, read_claim
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import (
    FileEntry,
    dump_json,
    entries_of,
    entry_of,
    read_manifest,
    read_sealed,
    read_verified,
    seal,
    set_id,
)
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import decode_png, encode_png, png_shape
from wmdd_ray.store.packing import IMAGE, check_budget, checked, image_features
from wmdd_ray.store.schemas import check

Format = Literal["imagefolder", "webdataset", "huggingface"]

EXPORT_KEY = "export.json"
_EXPORT_VERSION = 1
_TEACHER_KEY = "teacher.safetensors"
_TEACHER_KEYS = re.compile(r"teacher(-\d+)?\.safetensors")
_PREVIEW_KEY = "preview.png"
_WRITE_THREADS = 8
_TEACHER_BATCH = 256
# What some file system, shell or loader takes for something else; a leading dot hides a folder.
_UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]|^[.\s]|[.\s]$')
_MAX_FOLDER_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class Export:
    """What lies at `uri` now; `found` says that an earlier command had written all of it."""

    uri: str
    num_images: int
    num_classes: int
    side: int
    tiles: int
    files: tuple[FileEntry, ...]
    found: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One image: its name without ending, PNG file, class, weight among its class, and the teacher's logits if asked for."""

    stem: str
    png: bytes
    label: int
    weight: float
    logits_Y: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What the writers of the formats know beside the rows: names, folders, and the place among the parts."""

    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    part: int
    num_parts: int


def export(
    uri: str,
    out: str,
    layout: Format,
    *,
    labels: LabelKind = "hard",
    license_name: str | None = None,
) -> Export:
    """Write the distilled set at `uri` to `out` in another layout, and return what lies there.

    A folder that the same export has written before is left as it is, and one that was begun is finished.

    Args:
        uri: `dataset/` folder of a run: a path, `s3://`, or any URI that fsspec knows.
        out: where to write, likewise.
        layout: `imagefolder` is CLASS/*.png with metadata.jsonl; `webdataset` tar shards of KEY.png, KEY.cls, KEY.json;
            `huggingface` Parquet files with the columns image, label, weight, and a card.
        labels: `soft` adds the teacher's logits on every whole image.
        license_name: identifier for the card; None is what the set says.

    Raises:
        ConfigError: `out` holds something else, or lies inside the set.
        ArtifactError: There is no data set at `uri`, it was changed, or a store cannot be reached.
    """
    source, target = Store(uri), Store(out)
    if f"{target.uri}/".startswith(f"{source.uri}/"):
        raise ConfigError(
            f"--out {out}: expected a folder outside of the data set {source.uri}, which stays as it is committed"
        )
    meta, entries = read_manifest(source)
    names = tuple(meta["class_names"])
    tiles = meta["tiles"]
    side = meta["image_size"] // tiles
    num_images = meta["num_images"] * tiles**2
    head = {
        "export_version": _EXPORT_VERSION,
        "format": layout,
        "labels": labels,
        "set": set_id(entries),
    }
    committed = _claim(target, head)
    documents = _documents(layout, source, meta, entries, labels, license_name)
    about = {
        **head,
        "class_names": list(names),
        "folders": list(folder_names(names)) if layout == "imagefolder" else None,
        "num_images": num_images,
        "image_side": side,
        "tiles": tiles,
        "source": public(source.uri),
        "manifest": published(meta),
    }
    found = committed is not None and not _differing(target, committed, documents)
    written = committed or []
    if not found:
        written = _write_images(source, target, meta, entries, layout, labels)
        for key, content in documents.items():
            target.put(key, content)
            written.append(entry_of(key, content))
        written.sort(key=lambda entry: entry.key)
        target.put(EXPORT_KEY, seal({**about, "files": [entry.document() for entry in written]}))
    return Export(
        uri=target.uri,
        num_images=num_images,
        num_classes=len(names),
        side=side,
        tiles=tiles,
        files=tuple(written),
        found=found,
    )


def folder_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return a folder for each class, such that sorting them keeps the labels' order.

    Loaders number classes in the order of their folders' names. Where the class names themselves sort into the labels'
    order and can be folders, they are the folders; else a number stands before each.
    """
    safe = [_UNSAFE.sub("_", name).encode()[:_MAX_FOLDER_BYTES].decode(errors="ignore") for name in class_names]  # fmt: skip
    # Case is no difference on the disks of Macs and Windows.
    distinct = len({name.casefold() for name in safe}) == len(safe)
    if safe == list(class_names) == sorted(class_names) and distinct and "" not in safe:
        return tuple(safe)
    digits = len(str(len(safe) - 1))
    return tuple(f"{label:0{digits}d}_{name}" for label, name in enumerate(safe))


def _claim(target: Store, head: dict[str, Any]) -> list[FileEntry] | None:
    """Take the folder for this export; return the files of one that was finished before, else None."""
    try:
        there = read_claim(target, EXPORT_KEY, "an earlier export")
        if there is None:
            if target.create(EXPORT_KEY, seal(head)):
                return None
            there = read_sealed(target, EXPORT_KEY)
    except ArtifactError as error:
        raise ConfigError(
            f"--out {target.uri}: expected an empty or new folder, or an earlier export, found an {EXPORT_KEY} that is none "
            f"of ours ({error}); give another --out"
        ) from error
    is_of(target.uri, _plan(there), _plan(head), overwrite=None)
    return entries_of(there["files"], target.url(EXPORT_KEY)) if "files" in there else None


def _plan(head: dict[str, Any]) -> dict[str, Any]:
    """Return what an export's document says of its making, in the form of a plan."""
    options = {name: head.get(name) for name in ("format", "labels")}
    inputs = {"the distilled set": head.get("set")}
    return plan_of({"version": head.get("export_version"), "options": options, "inputs": inputs})


def _differing(target: Store, entries: list[FileEntry], documents: dict[str, bytes]) -> bool:
    """Return whether a file of a finished export is missing or cut, or a card has other figures by now."""
    there = target.list()
    known = {entry.key: entry for entry in entries}
    return any(there.get(entry.key) != entry.size_bytes for entry in entries) or any(
        known.get(key) != entry_of(key, content) for key, content in documents.items()
    )


def _documents(
    layout: Format,
    source: Store,
    meta: dict[str, Any],
    entries: list[FileEntry],
    labels: LabelKind,
    license_name: str | None,
) -> dict[str, bytes]:
    """Return what lies beside the images: card, preview, class names."""
    by_key = {entry.key: entry for entry in entries}
    card = export_card(
        meta,
        table=figures(source),
        layout=layout,
        labels=labels,
        license_name=license_name,
        teacher_sha256=by_key[_TEACHER_KEY].sha256 if _TEACHER_KEY in by_key else None,
    )
    documents = {"README.md": card.encode()}
    if _PREVIEW_KEY in by_key and layout != "imagefolder":
        documents[_PREVIEW_KEY] = read_verified(source, by_key[_PREVIEW_KEY])
    if layout != "huggingface":
        documents["classes.json"] = dump_json(meta["class_names"])
    return documents


def figures(source: Store) -> list[dict[str, Any]] | None:
    """Return the accuracy table of the evaluation that is committed beside a data set, about this very set; else None."""
    root, _, name = source.uri.rpartition("/")
    if not root or root.endswith(":/"):
        return None
    evaluation = Room(Store(root), "evaluation").read_commit()
    own = Room(Store(root), name).read_commit()
    if evaluation is None or own is None or evaluation.inputs.get("dataset") != own.fingerprint:
        return None
    table: list[dict[str, Any]] = evaluation.metrics.get("table", [])
    check(table, "a table of accuracies", f"{root}/evaluation")
    num_classes = len(read_manifest(source)[0]["class_names"])
    if any(len(row.get("recall_per_class", [])) not in (0, num_classes) for row in table):
        raise ArtifactError(
            f"{root}/evaluation: expected a recall for each of the {num_classes} classes, found others; run evaluate again"
        )
    return table


def _write_images(
    source: Store,
    target: Store,
    meta: dict[str, Any],
    entries: list[FileEntry],
    layout: Format,
    labels: LabelKind,
) -> list[FileEntry]:
    """Write all images, one stored Parquet file after the other, and return what was written."""
    by_key = {entry.key: entry for entry in entries}
    names = tuple(meta["class_names"])
    label_rows: Callable[[list[Row]], list[Row]] = list
    if labels == "soft":
        if _TEACHER_KEY not in by_key:
            raise ConfigError(
                f"--labels soft: {source.uri} holds no teacher; export it with --labels hard"
            )
        given = [entry for entry in entries if _TEACHER_KEYS.fullmatch(entry.key)]
        teachers = [
            codecs.decode_teacher_of(meta, read_verified(source, e), source.url(e.key))
            for e in given
        ]
        label_rows = _labeler(teachers, meta["image_size"] // meta["tiles"])
    write = {"imagefolder": _image_folder, "webdataset": _tar_shard, "huggingface": _parquet}[
        layout
    ]
    parts = sorted(key for key in by_key if key.startswith("data/"))
    written: list[FileEntry] = []
    lines: list[bytes] = []
    sizes: dict[str, int] = {}
    keys: set[str] = set()
    read_rows = checked(_rows)
    count = 0
    with ThreadPoolExecutor(_WRITE_THREADS) as pool:
        for part, key in enumerate(parts):
            rows = label_rows(read_rows(read_verified(source, by_key[key]), meta))
            place = _Target(
                class_names=names,
                folders=folder_names(names),
                part=part,
                num_parts=len(parts),
            )
            files = write(rows, place)
            if twice := files.keys() & keys:
                raise ArtifactError(
                    f"{source.url(key)}: expected each class in one file of images, found {min(twice)} twice; run assemble again"
                )
            keys |= files.keys()
            list(pool.map(target.put, files.keys(), files.values()))
            written += [entry_of(k, content) for k, content in files.items()]
            count += len(rows)
            if layout == "imagefolder":
                lines += [
                    json.dumps({"file_name": k, **_about(row, names)}, ensure_ascii=False).encode()
                    for k, row in zip(files, rows, strict=True)
                ]
            elif layout == "webdataset":
                sizes |= {k: len(rows) for k in files}
    expected = meta["num_images"] * meta["tiles"] ** 2
    if count != expected:
        raise ArtifactError(
            f"{source.uri}: expected {expected} images as its manifest says, found {count}; run assemble again"
        )
    index = {}
    if layout == "imagefolder":
        index = {"metadata.jsonl": b"\n".join(lines) + b"\n"}
    elif layout == "webdataset":
        index = {"sizes.json": dump_json(sizes)}
    for k, content in index.items():
        target.put(k, content)
        written.append(entry_of(k, content))
    return written


def _rows(content: bytes, meta: dict[str, Any]) -> list[Row]:
    """Return the images of a stored Parquet file; stored PNG files stay as they are.

    Names are made here, as assemble makes them: those in the file are data, and could lead anywhere.
    """
    tiles, side = meta["tiles"], meta["image_size"]
    shape = (side, side, meta["channels"])
    stored = codecs.decode_png_rows(content, len(meta["class_names"]))
    check_budget(len(stored[0]) * float(np.prod(shape)), len(content), "a file of images")
    rows = []
    for i, (png, label, weights_T) in enumerate(zip(*stored, strict=True)):
        if len(weights_T) != tiles**2 or png_shape(png) != shape:
            raise ArtifactError(
                f"image {i}: expected {tiles**2} weights and a PNG file of {shape} pixels as the manifest says, found "
                f"{len(weights_T)} and {png_shape(png)}; run assemble again"
            )
        stem, label = f"{label:05d}_{i:05d}", int(label)
        if tiles == 1:
            rows.append(Row(stem=stem, png=png, label=label, weight=float(weights_T[0])))
            continue
        small_THWC = untile(decode_png(png, shape)[None], tiles)
        rows += [
            Row(stem=f"{stem}_{t:03d}", png=encode_png(image), label=label, weight=float(w))
            for t, (image, w) in enumerate(zip(small_THWC, weights_T, strict=True))
        ]
    return rows


def _labeler(teachers: Sequence[Teacher], side: int) -> Callable[[list[Row]], list[Row]]:
    """Return a function that adds the mean of the teachers' logits on whole images of a side to rows."""
    network, teacher = labeler_of(teachers), teachers[0]
    shape = (side, side, teacher.channels)

    def label_rows(rows: list[Row]) -> list[Row]:
        labeled = []
        for first in range(0, len(rows), _TEACHER_BATCH):
            batch = rows[first : first + _TEACHER_BATCH]
            images = to_input(
                np.stack([decode_png(row.png, shape) for row in batch]),
                teacher.mean_C,
                teacher.std_C,
            )
            with torch.inference_mode():  # a tile is enlarged as its views are
                logits_BY = network(whole(images, teacher.image_size)).float().numpy()
            if not np.isfinite(logits_BY).all():
                raise ArtifactError(
                    "expected finite logits of the set's teacher, found others: its weights are none of a trained network"
                )
            labeled += [
                replace(row, logits_Y=logits) for row, logits in zip(batch, logits_BY, strict=True)
            ]
        return labeled

    return label_rows


def _about(row: Row, class_names: Sequence[str]) -> dict[str, Any]:
    about = {"label": row.label, "class": class_names[row.label], "weight": row.weight}
    return about if row.logits_Y is None else {**about, "logits": row.logits_Y.tolist()}


def _image_folder(rows: list[Row], place: _Target) -> dict[str, bytes]:
    return {f"{place.folders[row.label]}/{row.stem}.png": row.png for row in rows}


def _tar_shard(rows: list[Row], place: _Target) -> dict[str, bytes]:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            about = json.dumps(_about(row, place.class_names)).encode()
            for ending, content in (
                ("png", row.png),
                ("cls", str(row.label).encode()),
                ("json", about),
            ):
                member = tarfile.TarInfo(f"{row.stem}.{ending}")  # time and owner 0: same bytes
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return {f"train-{place.part:06d}.tar": sink.getvalue()}


def _parquet(rows: list[Row], place: _Target) -> dict[str, bytes]:
    columns: dict[str, pa.Array] = {
        "image": pa.array([{"bytes": r.png, "path": f"{r.stem}.png"} for r in rows], type=IMAGE),
        "label": pa.array([r.label for r in rows], type=pa.int64()),
        "weight": pa.array([r.weight for r in rows], type=pa.float64()),
    }
    others: dict[str, Any] = {"weight": {"dtype": "float64", "_type": "Value"}}
    if rows[0].logits_Y is not None:
        logits = [row.logits_Y for row in rows]
        columns["logits"] = pa.array(logits, type=pa.list_(pa.float32()))
        others["logits"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
    sink = io.BytesIO()
    about = image_features(place.class_names, **others)
    table = pa.table(columns).replace_schema_metadata(about)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return {f"data/train-{place.part:05d}-of-{place.num_parts:05d}.parquet": sink.getvalue()}
