"""scan and write: any source of real images becomes class-contiguous Parquet files, in two passes of Ray Data.

scan reads the source shard by shard, checks and shrinks every image, and commits *parts*: what fits into one file's size,
sorted by class. The driver then knows the class and size of every image (32 bytes each, all that it keeps), chooses the
held-out ones and cuts both splits into files. write fetches the images of a file out of the parts, a request for each run of
neighbors. So a worker holds one part or one file, whatever the data set's size, and a finished part or file is never made again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from statistics import median_low
from typing import Any, cast

import numpy as np

from wmdd_ray.errors import DataError
from wmdd_ray.executors.dispatch import ray_or_here
from wmdd_ray.spine.rooms import Room, UnitMarker
from wmdd_ray.spine.run import Stage, StageRun, Work
from wmdd_ray.store.documents import FileEntry
from wmdd_ray.store.parts import decode_index
from wmdd_ray.store.sources import Source, refuse_too_many_bad
from wmdd_ray.store.sources.base import told_counts
from wmdd_ray.store.sources.classes import one_line
from wmdd_ray.store.sources.files import read_ahead
from wmdd_ray.store.sources.passed import Tally
from wmdd_ray.units.prepared import ROW_TYPE, Scanner, Writer, parts_of
from wmdd_ray.units.splitting import (
    DEFAULT_VAL_FRACTION,
    SPLITS,
    PrepareConfig,
    held_out,
    output_files,
)

PARTS_ROOM = ".scan"  # hidden: whoever lists the output sees Parquet files only
DATA_ROOM = "data"
BAD_KEY = "bad_images.jsonl"

# Images of a shard of the formats that have a file an image, or are one array that a task loads whole.
_CHUNK_IMAGES = 2048


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
            done = parts_of(markers, split, shard)
            if not (done and done[-1].metrics["last"]):
                left.append({"split": split, "shard": shard.written(), **_progress(done)})
    known = [source.num_images for source in sources.values()]
    total = None if None in known else sum(n or 0 for n in known)
    records = sum(marker.metrics["records"] for marker in markers.values())
    bad = sum(len(marker.metrics["bad"]) for marker in markers.values())
    stage.progress.start(total, records)
    if left and bad <= config.max_bad_images:
        scanner = Scanner(stage.room, sources, config)
        for marker in ray_or_here(stage, "streams").committed(stage, left, scanner):
            records += marker.metrics["records"]
            bad += len(marker.metrics["bad"])
            stage.progress.update(records, f"{bad} bad" if bad else "")
            if bad > config.max_bad_images:
                break
        # A reader that took over from a dead one tells nothing of the parts that it found finished.
        markers = stage.room.read_units(sorted(stage.room.finished()))
    reasons = _report_bad(stage, markers)
    refuse_too_many_bad(
        reasons,
        config.source,
        f"{sources['train'].root} ({stage.run.store.url(BAD_KEY)} names them)",
    )
    if records == len(reasons):
        root, named = sources["train"].root, stage.run.store.url(BAD_KEY)
        why = (
            f": all {records} are bad, the first is {reasons[0]} ({named} names them)"
            if reasons
            else ", it holds none"
        )
        raise DataError(f"{root}: expected images, found no good one{why}")
    seen = {split: _told_counts(sources[split], split, markers) for split in sources}
    return {
        "num_images": records - len(reasons),
        "bad_images": len(reasons),
        "files_seen": seen,
    }


def _told_counts(source: Source, split: str, markers: dict[str, UnitMarker]) -> str:
    metrics = [m.metrics for unit, m in markers.items() if unit.startswith(f"{split}-")]
    inside = Tally()
    for of_part in metrics:
        inside.add_all(of_part.get("passed", ()))
    bad = sum(len(of_part["bad"]) for of_part in metrics)
    images = sum(of_part["records"] for of_part in metrics) - bad
    return told_counts(source, images, bad, inside.groups())


def _names(stage: StageRun) -> tuple[str, ...]:
    """Return the splits that the source itself has: `train`, and `val` where there are held-out images."""
    return ("train",) if isinstance(stage.run.source("val"), NoHeldOut) else ("train", "val")


def _progress(done: Sequence[UnitMarker]) -> dict[str, int]:
    return {"parts": len(done), "records": sum(m.metrics["records"] for m in done)}


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
        writer = Writer(stage.room, scanned, parts, class_names)
        for marker in ray_or_here(stage, "streams").committed(stage, left, writer):
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
        rows_N = np.empty(len(index.labels_N), dtype=ROW_TYPE)
        rows_N["part"], rows_N["label"], rows_N["size"] = part, index.labels_N, index.sizes_N
        rows_N["offset"] = np.cumsum(index.sizes_N) - index.sizes_N
        rows.append(rows_N)
        ranks.append(index.ranks_N)
    return [blob for blob, _ in pairs], np.concatenate(rows), np.concatenate(ranks)


def _summary(markers: Sequence[UnitMarker], num_classes: int) -> dict[str, Any]:
    """Return what all files hold together. Every training image counts alike in mean and std, whatever its size."""
    by_split: dict[str, Any] = {}
    for split in SPLITS:
        counts: Counter[int] = Counter()
        for marker in markers:
            if marker.metrics["split"] == split:
                counts.update({int(y): n for y, n in marker.metrics["label_counts"].items()})
        by_split[split] = {
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
    total = by_split["train"]["num_images"]
    mean_C = [math.fsum(m["mean_sums"][c] for m in train) / total for c in range(3)]
    square_C = [math.fsum(m["square_sums"][c] for m in train) / total for c in range(3)]
    std_C = [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean_C, square_C, strict=True)]
    channels = 1 if all(m["num_gray"] == m["num_images"] for m in train) else 3
    sides: Counter[int] = Counter()
    for m in train:
        sides.update({int(side): n for side, n in m["shorter_sides"].items()})
    return {
        **by_split,
        "shorter_side": median_low(sides.elements()),
        "channels": channels,
        "mean": [round(value, 6) for value in mean_C[:channels]],
        "std": [round(value, 6) for value in std_C[:channels]],
    }


def _plan(_: StageRun) -> Work:
    return Work(units=None, estimated_bytes=0)


SCAN = Stage(
    name="scan",
    room=PARTS_ROOM,
    reads_data=True,
    options=lambda config: cast(PrepareConfig, config).scan_options(),
    plan=_plan,
    work=scan,
)
WRITE = Stage(
    name="write",
    room=DATA_ROOM,
    inputs=(PARTS_ROOM,),
    options=lambda config: {name: getattr(config, name) for name in ("shard_mb", "val_fraction")},
    plan=_plan,
    work=write,
)
