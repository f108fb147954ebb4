"""features: one pass over the real images that keeps features and per-class BatchNorm moments.

Ray Data streams the source: a shard a row -> decode on CPU tasks, a chunk of images a row -> embed on a pool of actors
that hold the teacher. A chunk is the unit of work: its boundaries are fixed by the data, the embedding actor commits
it, and nothing is kept in an actor between two calls, so a retried chunk counts once. What is in memory is what is
in flight between the two steps.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from wmdd_ray.config import DistillConfig, SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.records import FeatureChunk
from wmdd_ray.rooms import Room, UnitMarker, marker_of
from wmdd_ray.run import StageRun, Work
from wmdd_ray.stages.class_features import is_class_unit
from wmdd_ray.stages.cluster import root_cause, width
from wmdd_ray.stages.regroup import regroup_by_class
from wmdd_ray.stages.teacher import feature_width, read_teacher
from wmdd_ray.store import codecs
from wmdd_ray.store.sources import Shard, Source, decoded_chunks, refuse_too_many_bad

# Above this many (class, chunk) reads, one shuffle is cheaper than every class reading its rows out of many chunks.
_REGROUP_READS = 20_000


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the features depend on."""
    return {"source": asdict(config.source), "features": asdict(config.features)}


def plan(stage: StageRun) -> Work:
    """Return the chunks of the source, where their number is known before streaming."""
    chunk_images = stage.config.features.chunk_images
    source = stage.run.source("train")
    units: list[str] = []
    for shard in source.shards(chunk_images):
        if shard.num_images is None:
            return Work(units=None, estimated_bytes=0)
        count = max(1, -(-shard.num_images // chunk_images))
        units += [f"{shard.id}-{chunk:05d}" for chunk in range(count)]
    width_D = feature_width(stage.config, len(source.class_names))
    return Work(units=tuple(units), estimated_bytes=(source.num_images or 0) * width_D * 4)


def work(stage: StageRun) -> dict[str, Any]:
    """Embed every chunk that is not finished, then regroup by class where the source mixes many classes."""
    source: Source = stage.run.source("train")
    config = stage.config.features
    shards = source.shards(config.chunk_images)
    finished = stage.room.read_units(u for u in stage.room.finished() if not is_class_unit(u))
    markers = dict(finished)
    bad = [reason for marker in finished.values() for reason in marker.metrics["bad"]]
    units = plan(stage).units
    stage.progress.start(None if units is None else len(units), len(finished))
    images = sum(marker.metrics["num_images"] for marker in finished.values())
    left = _unfinished(shards, finished)
    if left:
        check_listed(shards, source, stage.config)
        stream = _stream(stage, source, left)
        try:
            for row in stream.iter_rows():
                marker = marker_of(json.loads(row["marker"]))
                markers[marker.unit] = marker
                _tell(stage, marker)
                bad += marker.metrics["bad"]
                refuse_too_many_bad(bad, stage.config.source, source.root)
                images += marker.metrics["num_images"]
                stage.progress.update(len(markers), f"{images} images")
        except Exception as error:
            raise root_cause(error) from error
    refuse_too_many_bad(bad, stage.config.source, source.root)
    counts: Counter[int] = Counter()
    reads = 0
    for marker in markers.values():
        labels = marker.metrics["label_counts"]
        reads += len(labels)
        counts.update({int(label): n for label, n in labels.items()})
    _check_classes(counts, source.class_names, stage.config)
    regroup = config.regroup == "always" or (config.regroup == "auto" and reads > _REGROUP_READS)
    if regroup:
        regroup_by_class(stage, sorted(markers))
    return {
        "num_images": sum(counts.values()),
        "class_counts": [counts[label] for label in range(len(source.class_names))],
        "bad_images": bad,
        "regrouped": regroup,
        "seconds_in_core": round(sum(m.metrics["seconds_in_core"] for m in markers.values()), 3),
    }


def _tell(stage: StageRun, marker: UnitMarker) -> None:
    """Write the events of a chunk, which are known here once it is finished."""
    about = {"unit": marker.unit, "node": marker.host, "attempt": marker.attempt}
    if marker.attempt > 1:
        stage.event("unit_retried", **about, reason="told by the count of its attempts")
    stage.event("unit_done", **about, seconds=marker.seconds)


def _unfinished(shards: Any, finished: dict[str, UnitMarker]) -> dict[int, frozenset[int]]:
    """Return position of every unfinished shard -> its finished chunks."""
    chunks: dict[str, set[int]] = {}
    complete: set[str] = set()
    for unit, marker in finished.items():
        shard, _, chunk = unit.rpartition("-")
        chunks.setdefault(shard, set()).add(int(chunk))
        if marker.metrics["last"]:
            complete.add(shard)
    left = {}
    for position, shard in enumerate(shards):
        done = frozenset(chunks.get(shard.id, ()))
        if shard.id not in complete or len(done) <= max(done):
            left[position] = done
    return left


def _stream(stage: StageRun, source: Source, left: dict[int, frozenset[int]]) -> ray.data.Dataset:
    """Return the Ray Data pipeline whose rows say which unit was committed."""
    config = stage.config
    wide = width(stage.resources)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stage has its own line
    context.execution_options.preserve_order = False
    # As long as Ray Train waits for machines. It ends what would never end: workers that cannot start on a full disk.
    context.execution_no_progress_timeout_s = 900
    # A chunk is larger than this, so it goes on as soon as it is decoded; otherwise a worker holds 128 MiB of them.
    block_bytes, context.target_max_block_size = context.target_max_block_size, 1 << 20
    shards = source.shards(config.features.chunk_images)
    rows = [
        {"shard": shards[position].written(), "skip": sorted(skip)}
        for position, skip in left.items()
    ]
    decode = _Decode(stage.room, source, config.source, config.features.chunk_images)
    gpus = {"num_gpus": wide.gpus} if wide.gpus else {"num_cpus": 1}
    most = max(1, min(stage.resources.max_actors, len(rows), wide.num_workers or 1))
    stream = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(decode, batch_size=1, batch_format="pyarrow")
        .map_batches(
            Embedder,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
            fn_constructor_kwargs={
                "room": stage.room,
                "teacher_room": stage.run.room("teacher"),
                "batch_size": config.features.batch_size,
                "threads": 1,
            },
            **gpus,
        )
    )
    context.target_max_block_size = block_bytes  # the stream has a copy
    return stream


class _Decode:
    """Reads one shard and yields its unfinished chunks, pixels at the network's size. Runs as a plain task."""

    def __init__(self, room: Room, source: Source, config: SourceConfig, chunk_images: int) -> None:
        self._room = room
        self._source = source
        self._config = config
        self._chunk_images = chunk_images

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        row = batch.to_pylist()[0]
        shard = Shard.read(row["shard"])
        skip = self._begin(shard, frozenset(row["skip"]))
        chunks = decoded_chunks(self._source, shard, self._config, self._chunk_images, skip)
        for chunk in chunks:
            yield pa.table(
                {
                    "unit": [f"{chunk.shard_id}-{chunk.chunk:05d}"],
                    "last": [chunk.last],
                    "keys": [json.dumps(chunk.keys)],
                    "bad": [json.dumps(chunk.bad)],
                    "labels": [np.asarray(chunk.labels_N, dtype="<i8").tobytes()],
                    "shape": [list(chunk.images_NHWC.shape)],
                    "pixels": pa.array([chunk.images_NHWC.tobytes()], type=pa.large_binary()),
                }
            )

    def _begin(self, shard: Shard, skip: frozenset[int]) -> frozenset[int]:
        """Count the attempt, which Ray Data would repeat for ever, and return the chunks that are finished by now."""
        key = f"shard-{shard.id}"
        if self._room.store.exists(self._room.place("attempts", f"{key}.json")):
            ids = (unit.rpartition("-") for unit in self._room.finished())
            skip |= {int(chunk) for of, _, chunk in ids if of == shard.id}
        self._room.begin_unit(key, point=len(skip))
        return skip


class Embedder:
    """Holds the teacher on a device; embeds a chunk a call and commits it."""

    def __init__(self, room: Room, teacher_room: Room, batch_size: int, threads: int) -> None:
        import torch

        from wmdd_ray.core.networks import network_of

        torch.set_num_threads(threads)
        self._room = room
        self._batch_size = batch_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._teacher = read_teacher(teacher_room)
        network = network_of(self._teacher, self._device)
        # 1.5 times as fast on CPU, and what tensor cores want.
        self._network = network.to(memory_format=torch.channels_last)

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = {name: batch[name][0] for name in batch.column_names}
        unit, bad = row["unit"].as_py(), row["bad"].as_py()
        labels_N = np.frombuffer(row["labels"].as_buffer(), dtype="<i8")
        pixels = np.frombuffer(row["pixels"].as_buffer(), dtype=np.uint8)
        images_NHWC = pixels.reshape(row["shape"].as_py())
        started = time.perf_counter()
        attempt = self._room.begin_unit(unit, point=0)
        if attempt is None:
            return pa.table({"marker": [json.dumps(asdict(self._room.read_unit(unit)))]})
        in_core = time.perf_counter()
        chunk = self._embed(tuple(json.loads(row["keys"].as_py())), labels_N, images_NHWC)
        in_core = time.perf_counter() - in_core
        counts = Counter(labels_N.tolist())
        marker = self._room.commit_unit(
            unit,
            {f"chunks/{unit}.safetensors": codecs.encode_feature_chunk(chunk)},
            metrics={
                "num_images": len(labels_N),
                "label_counts": {str(label): n for label, n in sorted(counts.items())},
                "last": row["last"].as_py(),
                "bad": json.loads(bad),
                "seconds_in_core": round(in_core, 4),
            },
            attempt=attempt,
            seconds=time.perf_counter() - started,
        )
        return pa.table({"marker": [json.dumps(asdict(marker))]})

    def _embed(
        self, keys: tuple[str, ...], labels_N: np.ndarray, images_NHWC: np.ndarray
    ) -> FeatureChunk:
        from wmdd_ray.core.embedding import features_and_moments
        from wmdd_ray.core.views import to_input

        if not keys:
            empty = np.zeros((0, 0), np.float32)
            return FeatureChunk(keys=(), labels_N=labels_N, features_ND=empty, moments={})
        teacher = self._teacher
        images_NCHW = to_input(images_NHWC, teacher.mean_C, teacher.std_C, self._device)
        features_ND, moments = features_and_moments(
            self._network, images_NCHW, labels_N, batch_size=self._batch_size
        )
        return FeatureChunk(keys=keys, labels_N=labels_N, features_ND=features_ND, moments=moments)


def check_listed(shards: Sequence[Shard], source: Source, config: DistillConfig) -> None:
    """Refuse classes with too few images before a teacher is trained on them, where the listing tells how many there are."""
    counts: Counter[int] = Counter()
    for shard in shards:
        if shard.num_images is None or shard.labels is None or len(shard.labels) != 1:
            return
        counts[shard.labels[0]] += shard.num_images
    _check_classes(counts, source.class_names, config)


def _check_classes(
    counts: Counter[int], class_names: tuple[str, ...], config: DistillConfig
) -> None:
    """Refuse classes with fewer images than atoms before anything is built on them."""
    tiles = config.recover.tiles
    wanted = f"ipc is {config.ipc}"
    remedy = "lower --ipc or drop the class"
    if tiles > 1:
        wanted += f" with {tiles} x {tiles} tiles an image"
        remedy = "lower --ipc or --recover.tiles, or drop the class"
    for label, name in enumerate(class_names):
        if counts[label] < config.num_atoms:
            raise DataError(
                f'class {label} ("{name}") has {counts[label]} images but {wanted}; {remedy}'
            )
