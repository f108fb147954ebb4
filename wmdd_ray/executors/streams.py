"""Streams of Ray Data whose rows say what was committed: decode and embed, scan and write, and the shuffle by class."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from wmdd_ray.core.device import device_for
from wmdd_ray.executors.causes import root_cause
from wmdd_ray.executors.cluster import Width, await_room, width
from wmdd_ray.executors.heap import return_freed_memory
from wmdd_ray.spine.rooms import UnitMarker, marker_of
from wmdd_ray.spine.run import StageRun
from wmdd_ray.store.sources import Shard
from wmdd_ray.store.sources.chunks import DecodedChunk
from wmdd_ray.store.sources.passed import PassedOver
from wmdd_ray.units import class_features
from wmdd_ray.units.features import ChunkReader, Embedder

# As long as Ray Train waits for machines. It ends what would never end: workers that cannot start on a full disk.
_NO_PROGRESS_S = 900
_MAX_PARTITIONS = 256


@contextlib.contextmanager
def _settings(block_bytes: int | None = None) -> Iterator[None]:
    """Make Ray Data hand a row on once it has `block_bytes`, if given; a stream that is built inside keeps the settings."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stage has its own line
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    before = context.target_max_block_size
    context.target_max_block_size = before if block_bytes is None else block_bytes
    try:
        yield
    finally:
        context.target_max_block_size = before


def _marker_row(marker: UnitMarker) -> pa.Table:
    """Return the row that tells the driver of a finished unit."""
    return pa.table({"marker": [json.dumps(asdict(marker))]})


def _markers(stage: StageRun, stream: ray.data.Dataset) -> Iterator[UnitMarker]:
    """Yield the markers of a stream as they come, and write their events, which are known only now."""
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


def committed(stage: StageRun, rows: list[dict[str, Any]], worker: Any) -> Iterator[UnitMarker]:
    """Yield the markers that `worker.work(row)` commits, a plain task a row, as they come."""

    def work(batch: pa.Table) -> Iterator[pa.Table]:
        return_freed_memory()
        for marker in worker.work(batch.to_pylist()[0]):
            yield _marker_row(marker)

    with _settings(1):  # a marker goes on as soon as it is written
        stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            work, batch_size=1, batch_format="pyarrow"
        )
    return _markers(stage, stream)


def embedded(
    stage: StageRun,
    reader: ChunkReader,
    left: Sequence[tuple[Shard, frozenset[int]]],
    arguments: dict[str, Any],
) -> Iterator[UnitMarker]:
    """Yield the markers of embedded chunks: shards are decoded by tasks, and embedded by a pool of actors with the teacher.

    `left` are shards with the chunks of each that are finished, `arguments` those of `Embedder` but the device.
    """
    wide = width(stage.resources)
    gpus = {"num_gpus": wide.gpus} if wide.gpus else {"num_cpus": 1}
    most = max(1, min(stage.resources.max_actors, len(left), wide.num_workers or 1))
    await_room(stage, Width(most, cpus=1, gpus=wide.gpus))
    rows = [{"shard": shard.written(), "skip": sorted(finished)} for shard, finished in left]

    def decode(batch: pa.Table) -> Iterator[pa.Table]:
        row = batch.to_pylist()[0]
        for chunk in reader.read(Shard.read(row["shard"]), frozenset(row["skip"])):
            yield _packed(chunk)

    # A chunk is larger than this, so it goes on as soon as it is decoded; otherwise a worker holds 128 MiB of them.
    with _settings(1 << 20):
        stream = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(decode, batch_size=1, batch_format="pyarrow")
            .map_batches(
                EmbeddingActor,
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
                fn_constructor_kwargs={"gpus": wide.gpus, **arguments},
                **gpus,
            )
        )
    return _markers(stage, stream)


class EmbeddingActor:
    """Keeps an `Embedder`; Ray's statistics and errors show its name."""

    def __init__(self, gpus: float, **arguments: Any) -> None:
        self._embedder = Embedder(device=device_for(gpus), **arguments)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _marker_row(self._embedder.embed(_unpacked(batch)))


def _packed(chunk: DecodedChunk) -> pa.Table:
    return pa.table(
        {
            "about": [
                json.dumps(
                    [
                        *(chunk.shard_id, chunk.chunk, chunk.last, chunk.keys, chunk.bad),
                        [asdict(group) for group in chunk.passed],
                    ]
                )
            ],
            "labels": [np.asarray(chunk.labels_N, dtype="<i8").tobytes()],
            "shape": [list(chunk.images_NHWC.shape)],
            "pixels": pa.array([chunk.images_NHWC.tobytes()], type=pa.large_binary()),
        }
    )


def _unpacked(batch: pa.Table) -> DecodedChunk:
    row = {name: batch[name][0] for name in batch.column_names}
    shard_id, chunk, last, keys, bad, passed = json.loads(row["about"].as_py())
    pixels = np.frombuffer(row["pixels"].as_buffer(), dtype=np.uint8)
    return DecodedChunk(
        shard_id=shard_id,
        chunk=chunk,
        last=last,
        keys=tuple(keys),
        labels_N=np.frombuffer(row["labels"].as_buffer(), dtype="<i8"),
        images_NHWC=pixels.reshape(row["shape"].as_py()),
        bad=tuple(bad),
        passed=tuple(PassedOver(**group) for group in passed),
    )


def regroup_by_class(stage: StageRun, units: list[str]) -> None:
    """Shuffle the features of a source that mixes many classes into one file a class, with Ray Data's own group-by."""
    room = stage.room
    num_classes = len(stage.run.source("train").class_names)
    rows = [{"order": i, "unit": unit} for i, unit in enumerate(units)]

    def split(batch: pa.Table) -> Iterator[pa.Table]:
        row = batch.to_pylist()[0]
        # Counted, or Ray Data would repeat it for ever.
        room.begin_unit(f"split-{row['unit']}", point=0)
        for label, part in class_features.encoded_parts(room, row["unit"]):
            column = pa.array([part], pa.large_binary())
            yield pa.table({"label": [label], "order": [row["order"]], "part": column})

    def merge(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        label = int(group["label"][0])
        parts = [bytes(group["part"][i]) for i in np.argsort(group["order"])]
        class_features.commit_class(room, label, parts)
        return {"label": np.array([label])}

    with _settings():
        dataset = (
            ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
            .map_batches(split, batch_size=1, batch_format="pyarrow")
            .groupby("label", num_partitions=min(num_classes, _MAX_PARTITIONS))
            .map_groups(merge, batch_format="numpy")
        )
    try:
        done = sum(1 for _ in dataset.iter_rows())
    except Exception as error:
        raise root_cause(error) from error
    stage.progress.update(0, f"regrouped {done} classes")
