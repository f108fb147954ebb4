"""All features of one class, out of the chunks of the features room or its regrouped file. Light: no torch, no Ray Data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

import numpy as np

from wmdd_ray.core.moments import merge_moments
from wmdd_ray.records import ClassFeatures, FeatureChunk
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store import codecs

_CACHED_CHUNKS = 64


def class_unit(label: int) -> str:
    """Return the unit id of a class's regrouped features."""
    return f"class-{label:05d}"


def is_class_unit(unit: str) -> bool:
    """Return whether a unit of the features room is a regrouped class, and not a chunk."""
    return unit.startswith("class-")


def class_key(label: int) -> str:
    """Return the key of a class's regrouped features."""
    return f"classes/{label:05d}.safetensors"


def merge_class_features(parts: list[ClassFeatures]) -> ClassFeatures:
    """Return the features of one class from its parts, in the order given."""
    return ClassFeatures(
        label=parts[0].label,
        keys=tuple(key for part in parts for key in part.keys),
        features_ND=np.concatenate([part.features_ND for part in parts]),
        moments=merge_moments([part.moments for part in parts]),
    )


class ClassFeaturesReader:
    """Reads one class after another from a committed features room; keeps the last few chunks."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._commit = room.committed()
        self._chunk = lru_cache(maxsize=_CACHED_CHUNKS)(self._read_chunk)

    def read(self, label: int) -> ClassFeatures:
        """Return the features of a class in source order, verified."""
        if class_unit(label) in self._commit.units:
            entry = self._commit.file(class_key(label))
            return codecs.decode_class_features(self._room.read(entry))
        parts = [class_part(self._chunk(unit), label) for unit in self._units_of[label]]
        return merge_class_features(parts)

    @cached_property
    def _units_of(self) -> dict[int, list[str]]:
        """Class -> the chunks that hold images of it, in source order; ten thousand classes ask one after another."""
        units_of: dict[int, list[str]] = defaultdict(list)
        for unit, marker in sorted(self._commit.units.items()):
            for label in marker.metrics.get("label_counts", ()):
                units_of[int(label)].append(unit)
        return units_of

    def _read_chunk(self, unit: str) -> FeatureChunk:
        entry = self._commit.units[unit].files[0]
        return codecs.decode_feature_chunk(self._room.read(entry))


def class_part(chunk: FeatureChunk, label: int) -> ClassFeatures:
    """Return what a chunk holds of one class."""
    rows = np.flatnonzero(chunk.labels_N == label)
    return ClassFeatures(
        label=label,
        keys=tuple(chunk.keys[i] for i in rows),
        features_ND=chunk.features_ND[rows],
        moments=chunk.moments[label],
    )


def encoded_parts(room: Room, unit: str) -> Iterator[tuple[int, bytes]]:
    """Yield (label, encoded features) of every class in a committed chunk."""
    chunk = codecs.decode_feature_chunk(room.read(room.read_unit(unit).files[0]))
    for label in chunk.moments:
        yield label, codecs.encode_class_features(class_part(chunk, label))


def commit_class(room: Room, label: int, parts: Sequence[bytes]) -> None:
    """Merge a class's encoded parts, in the order of their chunks, and commit them, unless that is done."""
    attempt = room.begin(class_unit(label), point=0)
    if attempt is None:
        return
    decoded = [codecs.decode_class_features(part) for part in parts]
    attempt.commit(
        {class_key(label): codecs.encode_class_features(merge_class_features(decoded))},
        metrics={"num_images": sum(len(part.keys) for part in decoded)},
    )
