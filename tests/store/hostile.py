"""Small distilled sets with right sizes and checksums, and any content: a stranger seals what he likes."""

from __future__ import annotations

import io
import json
import math
import random
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.manifests import manifest_of
from wmdd_ray.config import NetworkConfig, ViewConfig
from wmdd_ray.core.networks import build_network, weights_of
from wmdd_ray.core.views import draw_block
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.product.export import Format, export
from wmdd_ray.records import SoftLabelBlock, SoftLabels, Teacher, ViewDraw
from wmdd_ray.spine.rooms import StageCommit
from wmdd_ray.store import codecs, documents, packing
from wmdd_ray.store.filesystem import Store

NAMES, SIZE, N = ("cat", "dog", "emu"), 8, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
DATA, LABELS = "data/train-00000-of-00001.parquet", "labels/epochs-00000-00000.parquet"
TEACHER = "teacher.safetensors"


class Canary:
    """Unpickled by a careless reader, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def teacher() -> Teacher:
    torch.manual_seed(0)
    config = NetworkConfig(arch="convnet3", width=2)
    network = build_network(config, num_classes=len(NAMES), channels=3, image_size=SIZE)
    return Teacher(
        arch="convnet3", width=2, small_stem=False, class_names=NAMES, image_size=SIZE, resize=SIZE, channels=3,
        mean_C=(0.5,) * 3, std_C=(0.25,) * 3, top1=0.5, weights=weights_of(network),
    )  # fmt: skip


def images(**changes: Any) -> bytes:
    given = {"images_NHWC": IMAGES, "labels_N": np.arange(N), "weights_NT": np.ones((N, 1))}
    return codecs.encode_images(**{**given, **changes}, class_names=NAMES)


def block(by_seed: bool = False) -> SoftLabelBlock:
    views = ViewConfig()
    draw = ViewDraw(
        seed=0, image_size=SIZE, index_N=np.arange(N, dtype=np.int32), flip=views.flip,
        crop_scale_min=views.crop_scale_min, mix=views.mix, mix_alpha=views.mix_alpha,
    )  # fmt: skip
    values_VK = -np.arange(9, dtype=np.float16).reshape(N, 3)
    labels = SoftLabels(num_classes=3, values_VK=values_VK)
    return SoftLabelBlock(
        first_epoch=0, num_epochs=1, views=draw_block(draw, range(1)), labels=labels,
        draw=draw if by_seed else None,
    )  # fmt: skip


def labels_with(**changes: Any) -> bytes:
    own = block()
    return codecs.encode_soft_labels(replace(own, labels=replace(own.labels, **changes)))


def write(uri: str, files: dict[str, bytes], manifest: Any = None) -> str:
    """Write a set with right sizes and checksums; `manifest` stands for that of `manifest_of`."""
    whole = {DATA: images(), LABELS: labels_with(), TEACHER: codecs.encode_teacher(teacher())}
    files = {**whole, **files}
    store = Store(uri)
    for key, content in files.items():
        store.put(key, content)
    listed = [documents.entry_of(key, content).document() for key, content in files.items()]
    about = manifest_of() if manifest is None else manifest
    if isinstance(about, dict):
        about = {"format_version": documents.FORMAT_VERSION, "files": listed, **about}
    store.put(documents.MANIFEST_KEY, sealed(about))
    return store.uri


def read_whole(uri: str) -> DistilledDataset:
    """Read all that a student or a program reads, and check that nobody can be harmed by it."""
    dataset = DistilledDataset(uri)
    for item in (dataset[0], dataset[len(dataset) - 1]):
        assert all(bool(torch.isfinite(part).all()) for part in item)
    views, logits_VY = dataset.label_epoch(0)
    assert np.isfinite(logits_VY).all() and logits_VY.shape == (
        len(views),
        len(dataset.class_names),
    )
    assert views.image_V.max() < dataset.num_images > views.partner_V.max()
    assert 0 <= dataset.labels.min() <= dataset.labels.max() < len(dataset.class_names)
    assert np.isfinite(dataset.weights).all()
    return dataset


def sealed(document: Any) -> bytes:
    """Return a document with a right checksum, whatever is in it."""
    if not isinstance(document, dict):
        return json.dumps(document).encode()
    plain = json.loads(json.dumps(document))
    return json.dumps({**plain, "checksum": documents._checksum(plain)}).encode()


def rewritten(content: bytes, change: Callable[[pa.Table], pa.Table]) -> bytes:
    """Return a Parquet file with another table and the same footer."""
    table = pq.read_table(pa.BufferReader(content))
    sink = io.BytesIO()
    changed = change(table).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, sink, write_page_checksum=True, store_schema=False)
    return sink.getvalue()


def with_column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.array(values, type=table[name].type))

    return change


def footer_of(content: bytes) -> dict[str, Any]:
    return documents.unseal(pq.read_schema(pa.BufferReader(content)).metadata[b"wmdd"], "")


def with_footer(content: bytes, **entries: Any) -> bytes:
    meta = footer_of(content)
    for name, value in entries.items():
        (meta if name in meta else meta["draw"])[name] = value
    return with_footer_of(content, meta)


def with_footer_of(content: bytes, meta: Any) -> bytes:
    table = pq.read_table(pa.BufferReader(content))
    sink = io.BytesIO()
    table = table.replace_schema_metadata({b"wmdd": sealed(meta)})
    pq.write_table(table, sink, write_page_checksum=True, store_schema=False)
    return sink.getvalue()


# Any number of them ----------------------------------------------------------------------------

_DEEP: Any = "x"
for _ in range(300):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 99, 2**31, 10**9, 10**300, 0.5, -0.5, 1e308, math.nan, math.inf),
    *("", "x", "../../x", "/etc/passwd", "\x1b[2J", "\ud83d", "a" * 5000, "online", "2" * 5000),
    *([], {}, [[0, 2**31 - 1]], [1, 2, 3], {"x": 1}, _DEEP),
)


def odd_of(value: Any, rng: random.Random) -> Any:
    """Return JSON in which one entry is another, missing, or there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.1:
            del changed[name]
        else:
            changed[name] = odd_of(value[name], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], odd_of(value[at], rng), *value[at:][rng.random() < 0.8 :]]
    return rng.choice(ODD)


def odd_table(content: bytes, rng: random.Random) -> bytes:
    """Return a Parquet file in which some values, a type or a column are others."""

    def change(table: pa.Table) -> pa.Table:
        at = rng.randrange(table.num_columns)
        name, kind = table.column_names[at], table.schema.types[at]
        rows = table[name].to_pylist()
        match rng.randrange(6):
            case 0:
                return table.append_column(name, table[name])
            case 1:
                return table.drop_columns([name])
            case 2:
                return table.slice(0, rng.randrange(len(rows)))
            case 3:
                rows[rng.randrange(len(rows))] = None
            case 4 if pa.types.is_fixed_size_binary(kind):
                rows = [rng.randbytes(kind.byte_width) for _ in rows]
            case _:
                odd = rng.choice((*ODD[:15], b"x", {"bytes": b"x", "path": "../../x"}))
                rows[rng.randrange(len(rows))] = odd
        try:
            return table.set_column(at, name, pa.array(rows, type=kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return table.set_column(at, name, pa.array([str(row)[:9] for row in rows]))

    return rewritten(content, change)


def odd_set(content: bytes, root: str) -> dict[str, Any]:
    """Write the set that `content` is the seed of, under `root`; return what is written beside it."""
    rng = random.Random(content)
    files: dict[str, bytes] = {}
    manifest: Any = None
    labels = codecs.encode_soft_labels(block(rng.random() < 0.5))
    files[LABELS] = labels
    commits: Any = {"dataset": commit_of("d", {}), "evaluation": commit_of("e", {"dataset": "d"})}
    match rng.randrange(7):
        case 0:
            manifest = odd_of(manifest_of(), rng)
        case 1:
            files[LABELS] = with_footer_of(labels, odd_of(footer_of(labels), rng))
        case 2:
            arrays, meta = packing.unpack(codecs.encode_teacher(teacher()))
            name = rng.choice(sorted(arrays))
            if rng.random() < 0.3:
                odd = (arrays[name].reshape(-1)[:1], arrays[name] * math.nan, np.zeros(0))
                arrays[name] = rng.choice(odd)
            else:
                meta = odd_of(meta, rng)
            files[TEACHER] = packing.pack(arrays, **meta) if isinstance(meta, dict) else b"x"
        case 3:
            files[DATA] = odd_table(images(), rng)
        case 4:
            files[LABELS] = odd_table(labels, rng)
        case _:
            commits = odd_of(commits, rng)
    write(f"{root}/dataset", files, manifest)
    store = Store(root)
    for name in ("dataset", "evaluation"):
        commit = commits.get(name) if isinstance(commits, dict) else None
        store.put(f"{name}/stage.json", sealed(commit))
    return {
        "layout": rng.choice(("imagefolder", "webdataset", "huggingface")),
        "soft": rng.random() < 0.3,
    }


def commit_of(fingerprint: str, inputs: dict[str, str]) -> dict[str, Any]:
    row = {"row": "distilled", "labels": "soft", "num_images": N, "epochs": 1, "num_seeds": 1}
    row |= {"top1_mean": 0.5, "top1_std": 0.0, "recall_per_class": [0.5] * N}
    return asdict(
        StageCommit(
            **{"stage": "evaluate", "version": 1, "fingerprint": fingerprint, "options": {}},
            **{"inputs": inputs, "units": {}, "metrics": {"table": [row]}, "seconds": 1.0},
            **{"host": "h", "run": "r", "finished": "2026-01-01T00:00:00+00:00"},
        )
    )


def read_odd_sets() -> tuple[Callable[[bytes], str], list[bytes]]:
    """Return who reads and exports the set of a seed; nothing may be written outside of the export."""
    root = f"memory://{uuid.uuid4().hex}"

    def read(content: bytes) -> str:
        about = (
            odd_set(content, f"{root}/run")
            if content != _WHOLE
            else {"layout": "webdataset", "soft": True}
        )
        if content == _WHOLE:
            write(f"{root}/run/dataset", {})
        before = Store(root).list()
        try:
            layout: Format = about["layout"]
            try:
                read_whole(f"{root}/run/dataset")
            finally:
                export(
                    f"{root}/run/dataset",
                    f"{root}/out",
                    layout,
                    labels="soft" if about["soft"] else "hard",
                )
            return "good"
        finally:
            Store(f"{root}/out").delete("")
            assert Store(root).list() == before, "written outside of the export"

    return read, [_WHOLE]


_WHOLE = bytes(range(64))
