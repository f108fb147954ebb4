"""Units in this process, one after another, without Ray: for one machine, debuggers, notebooks and benches."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from wmdd_ray.core.device import device_for
from wmdd_ray.executors.queue import UnitQueue, work_through
from wmdd_ray.spine.rooms import UnitMarker
from wmdd_ray.spine.run import OpenWorker, StageRun
from wmdd_ray.store.sources import Shard, Source
from wmdd_ray.units import class_features
from wmdd_ray.units.features import ChunkReader, Embedder
from wmdd_ray.units.teacher import CHUNK_IMAGES, Training, shuffled_stream, train_teacher


def queue_here(stage: StageRun, units: Sequence[str], num_finished: int) -> UnitQueue:
    """Return a queue that tells the stage's progress line and events."""
    return UnitQueue(
        units,
        lambda done, note: stage.progress.update(num_finished + done, note),
        stage.event,
    )


def do_units(
    stage: StageRun, units: Sequence[str], open_worker: OpenWorker, num_finished: int
) -> None:
    """Do the units; `num_finished` others of the stage are done."""
    queue = queue_here(stage, units, num_finished)
    torch.set_num_threads(stage.resources.cpus_per_worker)
    work_through(queue, open_worker(device_for(stage.resources.gpus_per_worker)))
    error = queue.error()
    if error is not None:
        raise error


def train(stage: StageRun, training: Training, source: Source, num_finished: int) -> None:
    """Train a teacher, as `executors.data_parallel.train` does; `num_finished` others are done."""
    streamed = None
    if training.train is None:
        streamed = shuffled_stream(training, source, source.shards(CHUNK_IMAGES))
    do_units(
        stage,
        [training.unit],
        lambda device: (
            lambda _, report: train_teacher(training, report, device=device, streamed=streamed)
        ),
        num_finished,
    )


def count_images(source: Source) -> int:
    """Return the number of images of a source that only reading tells."""
    return sum(1 for shard in source.shards(CHUNK_IMAGES) for _ in source.read_shard(shard))


def do_each(
    stage: StageRun, worker: Any, units: Sequence[str], on_done: Callable[[str], None]
) -> None:
    """Call `worker.work(unit)` for every unit, as `executors.actors.fan_out` does on actors."""
    node = socket.gethostname()
    for unit in units:
        about = {"unit": unit, "node": node, "attempt": 1}
        stage.event("unit_started", **about)
        started = time.monotonic()
        worker.work(unit)
        stage.event("unit_done", **about, seconds=round(time.monotonic() - started, 3))
        on_done(unit)


def embedded(
    stage: StageRun,
    reader: ChunkReader,
    left: Sequence[tuple[Shard, frozenset[int]]],
    arguments: dict[str, Any],
) -> Iterator[UnitMarker]:
    """Yield the markers of embedded chunks, as `executors.streams.embedded` does."""
    device = device_for(stage.resources.gpus_per_worker)
    embedder = Embedder(device=device, **arguments)
    chunks = (chunk for shard, finished in left for chunk in reader.read(shard, finished))
    yield from _with_events(stage, map(embedder.embed, chunks))


def committed(stage: StageRun, rows: list[dict[str, Any]], worker: Any) -> Iterator[UnitMarker]:
    """Yield the markers that `worker.work(row)` commits, as `executors.streams.committed` does."""
    yield from _with_events(stage, (marker for row in rows for marker in worker.work(row)))


def _with_events(stage: StageRun, markers: Iterator[UnitMarker]) -> Iterator[UnitMarker]:
    for marker in markers:
        about = {"unit": marker.unit, "node": marker.host, "attempt": marker.attempt}
        stage.event("unit_done", **about, seconds=marker.seconds)
        yield marker


def regroup_by_class(stage: StageRun, units: list[str]) -> None:
    """Write one file a class, as `executors.streams.regroup_by_class` does; all features are in memory meanwhile."""
    parts: dict[int, list[bytes]] = {}
    for unit in units:
        for label, part in class_features.encoded_parts(stage.room, unit):
            parts.setdefault(label, []).append(part)
    for label, of_class in sorted(parts.items()):
        class_features.commit_class(stage.room, label, of_class)
    stage.progress.update(0, f"regrouped {len(parts)} classes")
