"""Features and BatchNorm moments of real images: a chunk of consecutive images is a unit, whose boundaries the data fix."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch

from wmdd_ray.config import DistillConfig, SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.records import FeatureChunk
from wmdd_ray.spine.rooms import Room, UnitMarker
from wmdd_ray.store import codecs
from wmdd_ray.store.sources import Shard, Source, decoded_chunks
from wmdd_ray.store.sources.chunks import DecodedChunk
from wmdd_ray.units.own_data import class_counts
from wmdd_ray.units.teacher import read_teacher


def chunk_unit(shard_id: str, chunk: int) -> str:
    """Return the unit id of a chunk of a shard."""
    return f"{shard_id}-{chunk:05d}"


class ChunkReader:
    """Reads the chunks of a shard that are not finished, at the network's size."""

    def __init__(self, room: Room, source: Source, config: SourceConfig, chunk_images: int) -> None:
        self._room = room
        self._source = source
        self._config = config
        self._chunk_images = chunk_images

    def read(self, shard: Shard, finished: frozenset[int]) -> Iterator[DecodedChunk]:
        """Yield the chunks of a shard but those that are `finished`, or have become so.

        The attempt is counted: whoever restarts dead processes (Ray Data) would repeat it for ever.
        """
        key = f"shard-{shard.id}"
        if self._room.store.exists(self._room.place("attempts", f"{key}.json")):
            ids = (unit.rpartition("-") for unit in self._room.finished())
            finished |= {int(chunk) for of, _, chunk in ids if of == shard.id}
        self._room.begin_unit(key, point=len(finished))
        yield from decoded_chunks(self._source, shard, self._config, self._chunk_images, finished)


class Embedder:
    """Holds the teacher on a device; embeds a chunk a call and commits it."""

    def __init__(
        self, room: Room, teacher_room: Room, batch_size: int, threads: int, device: torch.device
    ) -> None:
        from wmdd_ray.core.networks import network_of

        torch.set_num_threads(threads)
        self._room = room
        self._batch_size = batch_size
        self._device = device
        self._teacher = read_teacher(teacher_room)
        self._network = network_of(self._teacher, self._device, own_code=True)

    def embed(self, chunk: DecodedChunk) -> UnitMarker:
        """Commit the features and moments of a chunk, unless it is finished, and return its marker."""
        unit = chunk_unit(chunk.shard_id, chunk.chunk)
        attempt = self._room.begin(unit, point=0)
        if attempt is None:
            return self._room.read_unit(unit)
        in_core = time.perf_counter()
        record = self._features(chunk)
        in_core = time.perf_counter() - in_core
        counts = Counter(chunk.labels_N.tolist())
        return attempt.commit(
            {f"chunks/{unit}.safetensors": codecs.encode_feature_chunk(record)},
            metrics={
                "num_images": len(chunk.labels_N),
                "label_counts": {str(label): n for label, n in sorted(counts.items())},
                "last": chunk.last,
                "bad": list(chunk.bad),
                "passed": [asdict(group) for group in chunk.passed],
                "seconds_in_core": round(in_core, 4),
            },
        )

    def _features(self, chunk: DecodedChunk) -> FeatureChunk:
        from wmdd_ray.core.embedding import features_and_moments
        from wmdd_ray.core.views import to_input

        keys, labels_N = chunk.keys, chunk.labels_N
        if not keys:
            empty_ND = np.zeros((0, 0), np.float32)
            return FeatureChunk(keys=(), labels_N=labels_N, features_ND=empty_ND, moments={})
        teacher = self._teacher
        images_NCHW = to_input(chunk.images_NHWC, teacher.mean_C, teacher.std_C, self._device)
        features_ND, moments = features_and_moments(
            self._network, images_NCHW, labels_N, batch_size=self._batch_size
        )
        return FeatureChunk(keys=keys, labels_N=labels_N, features_ND=features_ND, moments=moments)


def check_listed(shards: Sequence[Shard], source: Source, config: DistillConfig) -> None:
    """Refuse classes with too few images before a teacher is trained on them, where listings or columns of labels tell."""
    counts = class_counts(source, shards)
    if counts is not None:
        check_classes(counts, source.class_names, config)


def check_classes(
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
        if not counts[label]:
            raise DataError(
                f'class {label} ("{name}") is among the class names and has no image; take it out of them (classes.txt, the '
                "names that the files declare), or add images of it"
            )
        if counts[label] < config.num_atoms:
            raise DataError(
                f'class {label} ("{name}") has {counts[label]} images but {wanted}; {remedy}'
            )
