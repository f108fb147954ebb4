"""features: one pass over the real images that keeps features and per-class BatchNorm moments.

Ray Data streams the source: a shard a row -> decode on CPU tasks, a chunk of images a row -> embed on a pool of actors
that hold the teacher. A chunk is the unit of work: its boundaries are fixed by the data, the embedding actor commits
it, and nothing is kept in an actor between two calls, so a retried chunk counts once. What is in memory is what is
in flight between the two steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from wmdd_ray.config import DistillConfig
from wmdd_ray.executors.dispatch import is_small, ray_or_here
from wmdd_ray.options import fingerprint_options
from wmdd_ray.spine.rooms import Room, UnitMarker, seconds_in_core
from wmdd_ray.spine.run import StageRun, Work
from wmdd_ray.store.sources import Shard, Source, refuse_too_many_bad
from wmdd_ray.store.sources.base import told_counts
from wmdd_ray.store.sources.passed import Tally
from wmdd_ray.units.class_features import is_class_unit
from wmdd_ray.units.features import ChunkReader, check_classes, check_listed, chunk_unit
from wmdd_ray.units.teacher import TEACHER_KEY, feature_width

# Above this many (class, chunk) reads, one shuffle is cheaper than every class reading its rows out of many chunks.
_REGROUP_READS = 20_000


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the features depend on."""
    return {name: fingerprint_options(getattr(config, name)) for name in ("source", "features")}


def plan(stage: StageRun) -> Work:
    """Return the chunks of the source, where their number is known before streaming."""
    chunk_images = stage.config.features.chunk_images
    source = stage.run.source("train")
    units: list[str] = []
    for shard in source.shards(chunk_images):
        if shard.num_images is None:
            return Work(units=None, estimated_bytes=0)
        count = max(1, -(-shard.num_images // chunk_images))
        units += [chunk_unit(shard.id, chunk) for chunk in range(count)]
    width_D = feature_width(stage.config, len(source.class_names))
    return Work(units=tuple(units), estimated_bytes=(source.num_images or 0) * width_D * 4)


def work(stage: StageRun) -> dict[str, Any]:
    """Embed every chunk that is not finished, then regroup by class where the source mixes many classes."""
    source: Source = stage.run.source("train")
    config = stage.config.features
    shards = source.shards(config.chunk_images)
    finished = stage.room.read_units(_chunks(stage.room))
    markers = dict(finished)
    bad = [reason for marker in finished.values() for reason in marker.metrics["bad"]]
    units = plan(stage).units
    stage.progress.start(None if units is None else len(units), len(finished))
    images = sum(marker.metrics["num_images"] for marker in finished.values())
    left = _unfinished(shards, finished)
    executor = ray_or_here(stage, "streams", small=is_small(stage, source.num_images))
    if left:
        check_listed(shards, source, stage.config)
        reader = ChunkReader(stage.room, source, stage.config.source, config.chunk_images)
        embedder = {
            "room": stage.room,
            "teacher_room": stage.run.room("teacher"),
            "batch_size": config.batch_size,
            "threads": 1,
        }
        for marker in executor.embedded(stage, reader, left, embedder):
            markers[marker.unit] = marker
            bad += marker.metrics["bad"]
            refuse_too_many_bad(bad, stage.config.source, source.root)
            images += marker.metrics["num_images"]
            stage.progress.update(len(markers), f"{images} images")
        # The reader passes over what another driver has done meanwhile.
        markers |= stage.room.read_units(u for u in _chunks(stage.room) if u not in markers)
    bad = [reason for marker in markers.values() for reason in marker.metrics["bad"]]
    images = sum(marker.metrics["num_images"] for marker in markers.values())
    refuse_too_many_bad(bad, stage.config.source, source.root)
    counts: Counter[int] = Counter()
    reads = 0
    inside = Tally()
    for marker in markers.values():
        inside.add_all(marker.metrics.get("passed", ()))
        labels = marker.metrics["label_counts"]
        reads += len(labels)
        counts.update({int(label): n for label, n in labels.items()})
    check_classes(counts, source.class_names, stage.config)
    regroup = config.regroup == "always" or (config.regroup == "auto" and reads > _REGROUP_READS)
    if regroup:
        executor.regroup_by_class(stage, sorted(markers))
    return {
        "num_images": sum(counts.values()),
        "teacher_sha256": stage.inputs["teacher"].file(TEACHER_KEY).sha256,
        "class_counts": [counts[label] for label in range(len(source.class_names))],
        "bad_images": bad,
        "files_seen": told_counts(source, images, len(bad), inside.groups()),
        "regrouped": regroup,
        "seconds_in_core": seconds_in_core(markers),
    }


def _chunks(room: Room) -> list[str]:
    """Return the finished units of a room that are chunks."""
    return [unit for unit in room.finished() if not is_class_unit(unit)]


def _unfinished(
    shards: Sequence[Shard], finished: dict[str, UnitMarker]
) -> list[tuple[Shard, frozenset[int]]]:
    """Return every unfinished shard, with its finished chunks."""
    chunks: dict[str, set[int]] = {}
    complete: set[str] = set()
    for unit, marker in finished.items():
        shard_id, _, chunk = unit.rpartition("-")
        chunks.setdefault(shard_id, set()).add(int(chunk))
        if marker.metrics["last"]:
            complete.add(shard_id)
    left = []
    for shard in shards:
        done = frozenset(chunks.get(shard.id, ()))
        if shard.id not in complete or len(done) <= max(done):
            left.append((shard, done))
    return left
