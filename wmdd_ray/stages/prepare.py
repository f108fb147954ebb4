"""scan and write: any source of real images becomes class-contiguous Parquet files, in two passes of Ray Data.

scan reads the source shard by shard, checks and shrinks every image, and commits *parts*: what fits into one file's size,
sorted by class. The driver then knows the class and size of every image (32 bytes each, all that it keeps), chooses the
held-out ones and cuts both splits into files. write fetches the images of a file out of the parts, a request for each run of
neighbors. So a worker holds one part or one file, whatever the data set's size, and a finished part or file is never made again.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from wmdd_ray.errors import ArtifactError, BadImageError, DataError
from wmdd_ray.prepare import DEFAULT_VAL_FRACTION, SPLITS, PrepareConfig, held_out, output_files
from wmdd_ray.rooms import Room, UnitMarker, marker_of
from wmdd_ray.run import Stage, StageRun, Work
from wmdd_ray.stages.cluster import root_cause
from wmdd_ray.stages.heap import return_freed_memory
from wmdd_ray.store.documents import FileEntry
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.parts import decode_frame, decode_index, encode_frame, encode_part, rank_of
from wmdd_ray.store.shrink import kept_image
from wmdd_ray.store.sources import RawImage, Shard, Source, refuse_too_many_bad
from wmdd_ray.store.sources.classes import one_line
from wmdd_ray.store.sources.files import open_whole, read_ahead, reading
from wmdd_ray.store.uris import arrow_filesystem

PARTS_ROOM = ".scan"  # hidden: whoever lists the output sees Parquet files only
DATA_ROOM = "data"
BAD_KEY = "bad_images.jsonl"

# Images of a shard of the formats that have a file an image, or are one array that a task loads whole.
_CHUNK_IMAGES = 2048
# Records of a part, and bad ones: bounds on what a marker and an index hold.
_PART_RECORDS = 100_000
_PART_BAD = 1000
# One request of an object store costs as long as this many bytes.
_GAP_BYTES = 256 << 10
_SPAN_BYTES = 8 << 20
# What a reader of one image has to read, and most rows of it.
_GROUP_BYTES = 4 << 20
_GROUP_ROWS = 1000
_ROW_TYPE = np.dtype([("part", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8")])


class NoHeldOut:
    """Stands for the held-out images of a source that has none, or whose own are put aside."""

    def fingerprint(self) -> str:
        """Return what the plan says of them."""
        return "none"


def config_of(stage: StageRun) -> PrepareConfig:
    """Return the options: the spine carries them where those of the pipeline stand, and reads none."""
    return cast(PrepareConfig, stage.config)


def scan(stage: StageRun) -> dict[str, Any]:
    """Commit every part that is not finished; return how many images are good and which are bad.

    Raises:
        DataError: More bad images than allowed, whose names are then in bad_images.jsonl, or no good one.
    """
    config = config_of(stage)
    sources = {
        split: stage.run.source(name) for split, name in zip(SPLITS, _names(stage), strict=False)
    }
    shards = {split: source.shards(_CHUNK_IMAGES) for split, source in sources.items()}
    markers = stage.room.read_units(sorted(stage.room.finished()))
    left = []
    for split, of_split in shards.items():
        for shard in of_split:
            done = _parts_of(markers, split, shard)
            if not (done and done[-1].metrics["last"]):
                left.append({"split": split, "shard": shard.written(), **_progress(done)})
    known = [source.num_images for source in sources.values()]
    total = None if None in known else sum(n or 0 for n in known)
    records = sum(marker.metrics["records"] for marker in markers.values())
    bad = sum(len(marker.metrics["bad"]) for marker in markers.values())
    stage.progress.start(total, records)
    if left and bad <= config.max_bad_images:
        work = _Scan(stage.room, sources, config)
        for marker in _committed(stage, left, work):
            markers[marker.unit] = marker
            records += marker.metrics["records"]
            bad += len(marker.metrics["bad"])
            stage.progress.update(records, f"{bad} bad" if bad else "")
            if bad > config.max_bad_images:
                break
    reasons = _report_bad(stage, markers)
    refuse_too_many_bad(
        reasons,
        config.source,
        f"{sources['train'].root} ({stage.run.store.url(BAD_KEY)} names them)",
    )
    if records == len(reasons):
        raise DataError(f"{sources['train'].root}: expected images, found no good one")
    return {"num_images": records - len(reasons), "bad_images": len(reasons)}


def _names(stage: StageRun) -> tuple[str, ...]:
    """Return the splits that the source itself has: `train`, and `val` where there are held-out images."""
    return ("train",) if isinstance(stage.run.source("val"), NoHeldOut) else ("train", "val")


def _parts_of(markers: dict[str, UnitMarker], split: str, shard: Shard) -> list[UnitMarker]:
    """Return the finished parts of a shard: they are made one after the other."""
    found: list[UnitMarker] = []
    while (marker := markers.get(part_unit(split, shard, len(found)))) is not None:
        found.append(marker)
    return found


def part_unit(split: str, shard: Shard, number: int) -> str:
    """Return the id of a part."""
    return f"{split}-{shard.id}-{number:05d}"


def _progress(done: Sequence[UnitMarker]) -> dict[str, int]:
    return {"parts": len(done), "records": sum(m.metrics["records"] for m in done)}


def _committed(stage: StageRun, rows: list[dict[str, Any]], work: Any) -> Iterator[UnitMarker]:
    """Yield the markers that `work` commits for the rows, by Ray Data, as they come."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stage has its own line
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = 900
    # A marker goes on as soon as it is written.
    block_bytes, context.target_max_block_size = context.target_max_block_size, 1
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        work, batch_size=1, batch_format="pyarrow"
    )
    context.target_max_block_size = block_bytes  # the stream has a copy
    try:
        for row in stream.iter_rows():
            marker = marker_of(json.loads(row["marker"]))
            about = {"unit": marker.unit, "node": marker.host, "attempt": marker.attempt}
            if marker.attempt > 1:
                stage.event("unit_retried", **about, reason="told by the count of its attempts")
            stage.event("unit_done", **about, seconds=marker.seconds)
            yield marker
    except Exception as error:
        raise root_cause(error) from error


def _report_bad(stage: StageRun, markers: dict[str, UnitMarker]) -> list[str]:
    """Write the name and the reason of every bad image so far, a JSON line each, and return them as text."""
    bad = [
        (unit.partition("-")[0], key, reason)
        for unit in sorted(markers)
        for key, reason in markers[unit].metrics["bad"]
    ]
    lines = [
        json.dumps({"split": split, "key": key, "reason": reason}, ensure_ascii=False) + "\n"
        for split, key, reason in bad
    ]
    if lines:
        stage.run.store.put(BAD_KEY, "".join(lines).encode("utf-8", "backslashreplace"))
    else:
        stage.run.store.delete(BAD_KEY)
    return [f"{one_line(key)}: {reason}" for _, key, reason in bad]


@dataclass
class _Part:
    """What a scan has read and not committed."""

    records: int = 0
    size_bytes: int = 0
    frames: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


class _Scan:
    """Reads one shard and commits its parts. Runs as a plain task; where a part ends is fixed by the data."""

    def __init__(self, room: Room, sources: dict[str, Source], config: PrepareConfig) -> None:
        self._room = room
        self._sources = sources
        self._config = config

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        return_freed_memory()
        row = batch.to_pylist()[0]
        split, shard = row["split"], Shard.read(row["shard"])
        attempt, number, skip = self._begin(split, shard, row["parts"], row["records"])
        records = islice(self._sources[split].read_shard(shard), skip, None)
        ahead = next(records, None)
        while True:
            started = time.perf_counter()
            part = _Part()
            while ahead is not None and not self._is_full(part):
                self._add(part, ahead)
                ahead = next(records, None)
            unit = part_unit(split, shard, number)
            marker = self._commit(unit, part, attempt, last=ahead is None, started=started)
            yield pa.table({"marker": [json.dumps(asdict(marker))]})
            number += 1
            if ahead is None:
                return

    def _begin(self, split: str, shard: Shard, parts: int, records: int) -> tuple[int, int, int]:
        """Count the attempt, which Ray Data would repeat for ever; return (attempt, parts, records) that are finished by now."""
        key = f"shard-{split}-{shard.id}"
        if self._room.store.exists(self._room.place("attempts", f"{key}.json")):
            prefix = f"{split}-{shard.id}-"
            units = [unit for unit in self._room.finished() if unit.startswith(prefix)]
            done = _parts_of(self._room.read_units(units), split, shard)
            parts, records = len(done), sum(marker.metrics["records"] for marker in done)
        attempt = self._room.begin_unit(key, point=parts)
        assert attempt is not None, "no unit has the name of a shard"
        return attempt, parts, records

    def _is_full(self, part: _Part) -> bool:
        return (
            part.size_bytes >= self._config.shard_bytes
            or part.records >= _PART_RECORDS
            or len(part.bad) >= _PART_BAD
        )

    def _add(self, part: _Part, record: RawImage) -> None:
        part.records += 1
        try:
            if record.problem:
                raise BadImageError(record.problem)
            kept = kept_image(
                record.content,
                max_side=self._config.max_side,
                max_pixels=self._config.max_image_pixels,
                where="",
            )
        except BadImageError as error:
            part.bad.append((record.key, str(error).removeprefix(": ")))
            return
        frame = encode_frame(record.key, kept)
        part.frames.append(frame)
        part.size_bytes += len(frame)
        part.labels.append(record.label)
        part.ranks.append(rank_of(self._config.seed, record.key))

    def _commit(
        self, unit: str, part: _Part, attempt: int, *, last: bool, started: float
    ) -> UnitMarker:
        payloads = {}
        if part.frames:
            content, index = encode_part(part.frames, part.labels, part.ranks)
            part.frames.clear()
            payloads = {f"parts/{unit}.bin": content, f"parts/{unit}.safetensors": index}
        return self._room.commit_unit(
            unit,
            payloads,
            attempt=attempt,
            metrics={"records": part.records, "bad": part.bad, "last": last},
            seconds=time.perf_counter() - started,
        )


def write(stage: StageRun) -> dict[str, Any]:
    """Write every file that is not finished; return class names, counts, and the statistics of the training images."""
    config = config_of(stage)
    scanned = stage.run.room(PARTS_ROOM)
    parts, rows_N, ranks_N = _read_indexes(scanned, stage)
    own = np.array([not entry.key.startswith("parts/train-") for entry in parts], dtype=bool)
    held_out_N = own[rows_N["part"]]
    fraction = config.val_fraction if config.val_fraction is not None else DEFAULT_VAL_FRACTION
    if len(_names(stage)) == 1:
        held_out_N = held_out(rows_N["label"], ranks_N, fraction)
    class_names = stage.run.source("train").class_names
    files = output_files(rows_N["label"], rows_N["size"], held_out_N, config.shard_bytes)
    markers = stage.room.read_units(sorted(stage.room.finished()))
    stage.progress.start(len(files), len(markers))
    left = [
        {"unit": f.unit, "key": f.key, "split": f.split, "rows": rows_N[f.rows_N].tobytes()}
        for f in files
        if f.unit not in markers
    ]
    if left:
        for marker in _committed(stage, left, _Write(stage.room, scanned, parts, class_names)):
            markers[marker.unit] = marker
            stage.progress.update(len(markers))
    return _summary([markers[f.unit] for f in files], len(class_names))


def _read_indexes(room: Room, stage: StageRun) -> tuple[list[FileEntry], np.ndarray, np.ndarray]:
    """Return the parts, and part, label, offset and size (and rank) of every image in their order."""
    commit = stage.inputs[PARTS_ROOM]
    pairs = [commit.units[unit].files for unit in sorted(commit.units) if commit.units[unit].files]
    rows, ranks = [], []
    # Tens of megabytes in all for a million images, a request each: several at a time.
    for part, content in enumerate(read_ahead(room.read, (index for _, index in pairs))):
        index = decode_index(content, room.store.url(pairs[part][1].key))
        rows_N = np.empty(len(index.labels_N), dtype=_ROW_TYPE)
        rows_N["part"], rows_N["label"], rows_N["size"] = part, index.labels_N, index.sizes_N
        rows_N["offset"] = np.cumsum(index.sizes_N) - index.sizes_N
        rows.append(rows_N)
        ranks.append(index.ranks_N)
    return [blob for blob, _ in pairs], np.concatenate(rows), np.concatenate(ranks)


def _summary(markers: Sequence[UnitMarker], num_classes: int) -> dict[str, Any]:
    """Return what all files hold together. Every training image counts alike in mean and std, whatever its size."""
    found: dict[str, Any] = {}
    for split in SPLITS:
        counts: Counter[int] = Counter()
        for marker in markers:
            if marker.metrics["split"] == split:
                counts.update({int(y): n for y, n in marker.metrics["label_counts"].items()})
        found[split] = {
            "num_images": counts.total(),
            "num_files": sum(marker.metrics["split"] == split for marker in markers),
            "size_bytes": sum(
                m.files[0].size_bytes for m in markers if m.metrics["split"] == split
            ),
            "class_counts": [counts[label] for label in range(num_classes)],
        }
    train = [marker.metrics for marker in markers if marker.metrics["split"] == "train"]
    if not train:
        raise DataError("expected training images, found none; lower --val-fraction")
    total = found["train"]["num_images"]
    mean_C = [math.fsum(m["mean_sums"][c] for m in train) / total for c in range(3)]
    square_C = [math.fsum(m["square_sums"][c] for m in train) / total for c in range(3)]
    std_C = [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean_C, square_C, strict=True)]
    channels = 1 if all(m["num_gray"] == m["num_images"] for m in train) else 3
    return {
        **found,
        "channels": channels,
        "mean": [round(value, 6) for value in mean_C[:channels]],
        "std": [round(value, 6) for value in std_C[:channels]],
    }


class _Write:
    """Fetches the images of one file out of the parts, and commits it. Runs as a plain task."""

    def __init__(
        self, room: Room, scanned: Room, parts: Sequence[FileEntry], class_names: tuple[str, ...]
    ) -> None:
        self._room = room
        self._scanned = scanned
        self._parts = tuple(parts)
        self._class_names = class_names

    def __call__(self, batch: pa.Table) -> pa.Table:
        return_freed_memory()
        row = batch.to_pylist()[0]
        started = time.perf_counter()
        attempt = self._room.begin_unit(row["unit"], point=0)
        if attempt is None:
            marker = self._room.read_unit(row["unit"])
        else:
            rows_N = np.frombuffer(row["rows"], dtype=_ROW_TYPE)
            content, metrics = self._table(rows_N)
            marker = self._room.commit_unit(
                row["unit"],
                {row["key"]: content},
                attempt=attempt,
                metrics={"split": row["split"], **metrics},
                seconds=time.perf_counter() - started,
                published=True,
            )
        return pa.table({"marker": [json.dumps(asdict(marker))]})

    def _table(self, rows_N: np.ndarray) -> tuple[bytes, dict[str, Any]]:
        """Return a Parquet file as Hugging Face `datasets` reads it, and what it holds."""
        features = {
            "image": {"_type": "Image"},
            "label": {"names": list(self._class_names), "_type": "ClassLabel"},
        }
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema(
            [("image", image), ("label", pa.int64())],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        sink = io.BytesIO()
        means: list[tuple[float, ...]] = []
        squares: list[tuple[float, ...]] = []
        num_gray = 0
        # Images are compressed already.
        with pq.ParquetWriter(
            sink, schema, compression="none", write_page_checksum=True, use_dictionary=["label"],
            write_statistics=["label"],
        ) as writer:  # fmt: skip
            group: list[dict[str, Any]] = []
            labels: list[int] = []
            held = 0
            for label, frame in zip(rows_N["label"].tolist(), self._frames(rows_N), strict=True):
                key, kept = decode_frame(frame, self._scanned.store.url("parts"))
                means.append(kept.mean_C)
                squares.append(kept.mean_square_C)
                num_gray += kept.is_gray
                group.append({"bytes": kept.content, "path": key})
                labels.append(label)
                held += len(kept.content)
                if held >= _GROUP_BYTES or len(group) >= _GROUP_ROWS or len(means) == len(rows_N):
                    writer.write_table(
                        pa.table({"image": pa.array(group, image), "label": labels}, schema=schema)
                    )
                    group, labels, held = [], [], 0
        counts = Counter(rows_N["label"].tolist())
        return sink.getvalue(), {
            "num_images": len(rows_N),
            "label_counts": {str(label): n for label, n in sorted(counts.items())},
            "num_gray": num_gray,
            "mean_sums": [math.fsum(column) for column in zip(*means, strict=True)],
            "square_sums": [math.fsum(column) for column in zip(*squares, strict=True)],
        }

    def _frames(self, rows_N: np.ndarray) -> Iterator[bytes]:
        """Yield the frames of the rows, in their order."""
        filesystem, base = arrow_filesystem(self._scanned.store.uri)

        def read(span: np.ndarray) -> list[bytes]:
            entry = self._parts[int(span["part"][0])]
            where = self._scanned.store.url(entry.key)
            start = int(span["offset"][0])
            size = int(span["offset"][-1] + span["size"][-1]) - start
            try:
                with (
                    reading(where, "a part"),
                    open_whole(filesystem, f"{base}/{entry.key}", where, entry.size_bytes) as file,
                ):
                    file.seek(start)
                    content = file.read(size)
            except DataError as error:
                raise ArtifactError(str(error)) from error
            places = zip((span["offset"] - start).tolist(), span["size"].tolist(), strict=True)
            return [content[offset : offset + size] for offset, size in places]

        for frames in read_ahead(read, spans(rows_N)):
            yield from frames


def spans(rows_N: np.ndarray) -> Iterator[np.ndarray]:
    """Yield rows that are read by one request: neighbors in one part with small gaps, up to some megabytes."""
    start = 0
    for i in range(1, len(rows_N) + 1):
        if i < len(rows_N) and rows_N["part"][i] == rows_N["part"][start]:
            end = rows_N["offset"][i - 1] + rows_N["size"][i - 1]
            reach = rows_N["offset"][i] + rows_N["size"][i] - rows_N["offset"][start]
            if 0 <= rows_N["offset"][i] - end <= _GAP_BYTES and reach <= _SPAN_BYTES:
                continue
        yield rows_N[start:i]
        start = i


def _scan_options(config: Any) -> dict[str, Any]:
    return dict(config.scan_options())


def _write_options(config: Any) -> dict[str, Any]:
    return {"shard_mb": config.shard_mb, "val_fraction": config.val_fraction}


def _plan(stage: StageRun) -> Work:
    return Work(units=None, estimated_bytes=0)


SCAN = Stage(
    name="scan",
    room=PARTS_ROOM,
    version=1,
    inputs=(),
    reads_data=True,
    options=_scan_options,
    plan=_plan,
    work=scan,
)
WRITE = Stage(
    name="write",
    room=DATA_ROOM,
    version=1,
    inputs=(PARTS_ROOM,),
    reads_data=False,
    options=_write_options,
    plan=_plan,
    work=write,
)


def delete_parts(store: Store) -> None:
    """Remove the parts, which the files have made superfluous."""
    store.delete(PARTS_ROOM)
