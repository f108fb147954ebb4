"""What one worker does to prepare real images: read a shard and commit its parts, or fetch the images of one file and write it."""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from wmdd_ray.errors import ArtifactError, BadImageError, DataError
from wmdd_ray.spine.rooms import Room, UnitMarker
from wmdd_ray.store.documents import FileEntry
from wmdd_ray.store.packing import IMAGE, image_features
from wmdd_ray.store.parts import decode_frame, encode_frame, encode_part, rank_of
from wmdd_ray.store.shrink import kept_image
from wmdd_ray.store.sources import RawImage, Shard, Source
from wmdd_ray.store.sources.files import open_whole, read_ahead, reading
from wmdd_ray.store.sources.passed import PassedOver
from wmdd_ray.store.uris import arrow_filesystem
from wmdd_ray.units.splitting import PrepareConfig

# Records of a part, and bad ones: bounds on what a marker and an index hold.
_PART_RECORDS = 100_000
_PART_BAD = 1000
# One request of an object store costs as long as this many bytes.
_GAP_BYTES = 256 << 10
_SPAN_BYTES = 8 << 20
# What a reader of one image has to read, and most rows of it.
_GROUP_BYTES = 4 << 20
_GROUP_ROWS = 1000
ROW_TYPE = np.dtype([("part", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8")])


def part_unit(split: str, shard: Shard, number: int) -> str:
    """Return the id of a part."""
    return f"{split}-{shard.id}-{number:05d}"


def parts_of(markers: dict[str, UnitMarker], split: str, shard: Shard) -> list[UnitMarker]:
    """Return the finished parts of a shard: they are made one after the other."""
    parts: list[UnitMarker] = []
    while (marker := markers.get(part_unit(split, shard, len(parts)))) is not None:
        parts.append(marker)
    return parts


@dataclass
class _Part:
    """What a scan has read and not committed."""

    records: int = 0
    size_bytes: int = 0
    frames: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    passed: tuple[PassedOver, ...] = ()  # members of an archive, known at its end


class Scanner:
    """Reads one shard and commits its parts. Where a part ends is fixed by the data."""

    def __init__(self, room: Room, sources: dict[str, Source], config: PrepareConfig) -> None:
        self._room = room
        self._sources = sources
        self._config = config

    def work(self, row: dict[str, Any]) -> Iterator[UnitMarker]:
        """Commit the parts of a shard that are not finished, and yield their markers."""
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
            if ahead is None:
                part.passed = self._sources[split].passed_inside
            yield self._commit(unit, part, attempt, last=ahead is None, started=started)
            number += 1
            if ahead is None:
                return

    def _begin(self, split: str, shard: Shard, parts: int, records: int) -> tuple[int, int, int]:
        """Count the attempt, which Ray Data would repeat for ever; return (attempt, parts, records) that are finished by now."""
        key = f"shard-{split}-{shard.id}"
        if self._room.store.exists(self._room.place("attempts", f"{key}.json")):
            prefix = f"{split}-{shard.id}-"
            units = [unit for unit in self._room.finished() if unit.startswith(prefix)]
            done = parts_of(self._room.read_units(units), split, shard)
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
            metrics={
                "records": part.records,
                "bad": part.bad,
                "passed": [asdict(group) for group in part.passed],
                "last": last,
            },
            seconds=time.perf_counter() - started,
        )


class Writer:
    """Fetches the images of one file out of the parts, and commits it."""

    def __init__(
        self, room: Room, scanned: Room, parts: Sequence[FileEntry], class_names: tuple[str, ...]
    ) -> None:
        self._room = room
        self._scanned = scanned
        self._parts = tuple(parts)
        self._class_names = class_names

    def work(self, row: dict[str, Any]) -> Iterator[UnitMarker]:
        """Commit the file, unless it is finished, and yield its marker."""
        attempt = self._room.begin(row["unit"], point=0)
        if attempt is None:
            yield self._room.read_unit(row["unit"])
            return
        rows_N = np.frombuffer(row["rows"], dtype=ROW_TYPE)
        content, metrics = self._table(rows_N)
        yield attempt.commit({row["key"]: content}, metrics={"split": row["split"], **metrics})

    def _table(self, rows_N: np.ndarray) -> tuple[bytes, dict[str, Any]]:
        """Return a Parquet file as Hugging Face `datasets` reads it, and what it holds."""
        columns = [("image", IMAGE), ("label", pa.int64())]
        schema = pa.schema(columns, metadata=image_features(self._class_names))
        sink = io.BytesIO()
        means: list[tuple[float, ...]] = []
        squares: list[tuple[float, ...]] = []
        sides: Counter[int] = Counter()
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
                with Image.open(io.BytesIO(kept.content)) as picture:
                    sides[min(picture.size)] += 1
                group.append({"bytes": kept.content, "path": key})
                labels.append(label)
                held += len(kept.content)
                if held >= _GROUP_BYTES or len(group) >= _GROUP_ROWS or len(means) == len(rows_N):
                    writer.write_table(
                        pa.table({"image": pa.array(group, IMAGE), "label": labels}, schema=schema)
                    )
                    group, labels, held = [], [], 0
        counts = Counter(rows_N["label"].tolist())
        return sink.getvalue(), {
            "num_images": len(rows_N),
            "label_counts": {str(label): n for label, n in sorted(counts.items())},
            "num_gray": num_gray,
            "shorter_sides": {str(side): n for side, n in sorted(sides.items())},
            "mean_sums": [math.fsum(column) for column in zip(*means, strict=True)],
            "square_sums": [math.fsum(column) for column in zip(*squares, strict=True)],
        }

    def _frames(self, rows_N: np.ndarray) -> Iterator[bytes]:
        """Yield the frames of the rows, in their order."""
        filesystem, base = arrow_filesystem(self._scanned.store.uri)

        def read(span: np.ndarray) -> list[bytes]:
            entry = self._parts[int(span["part"][0])]
            key = entry.at or entry.key
            where = self._scanned.store.url(key)
            start = int(span["offset"][0])
            size = int(span["offset"][-1] + span["size"][-1]) - start
            try:
                with (
                    reading(where, "a part"),
                    open_whole(filesystem, f"{base}/{key}", where, entry.size_bytes) as file,
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
