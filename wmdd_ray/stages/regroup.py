"""The features of a source that mixes many classes, sorted into one file a class by Ray Data's own shuffle."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray.data

from wmdd_ray.executors.cluster import root_cause
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import StageRun
from wmdd_ray.store import codecs
from wmdd_ray.units.class_features import class_key, class_part, class_unit, merge_class_features

_MAX_PARTITIONS = 256


def regroup_by_class(stage: StageRun, units: list[str]) -> None:
    """Shuffle the features into one file a class, with Ray Data's own group-by."""
    room = stage.room
    num_classes = len(stage.run.source("train").class_names)
    rows = [{"order": i, "unit": unit} for i, unit in enumerate(units)]

    def merge(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _merge(room, group)

    dataset = (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
        .map_batches(_Split(room), batch_size=1, batch_format="pyarrow")
        .groupby("label", num_partitions=min(num_classes, _MAX_PARTITIONS))
        .map_groups(merge, batch_format="numpy")
    )
    try:
        done = sum(1 for _ in dataset.iter_rows())
    except Exception as error:
        raise root_cause(error) from error
    stage.progress.update(0, f"regrouped {done} classes")


class _Split:
    """Reads a committed chunk and yields its part of every class, encoded."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        row = batch.to_pylist()[0]
        self._room.begin_unit(
            f"split-{row['unit']}", point=0
        )  # or Ray Data would repeat it for ever
        entry = self._room.read_unit(row["unit"]).files[0]
        chunk = codecs.decode_feature_chunk(self._room.read(entry))
        for label in chunk.moments:
            part = class_part(chunk, label)
            payload = codecs.encode_class_features(part)
            yield pa.table(
                {
                    "label": [label],
                    "order": [row["order"]],
                    "part": pa.array([payload], pa.large_binary()),
                }
            )


def _merge(room: Room, group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Merge a class's parts in chunk order and commit them."""
    label = int(group["label"][0])
    attempt = room.begin_unit(class_unit(label), point=0)
    if attempt is None:
        return {"label": np.array([label])}
    order = np.argsort(group["order"])
    parts = [codecs.decode_class_features(bytes(group["part"][i])) for i in order]
    payload = codecs.encode_class_features(merge_class_features(parts))
    room.commit_unit(
        class_unit(label),
        {class_key(label): payload},
        attempt=attempt,
        metrics={"num_images": sum(len(p.keys) for p in parts)},
    )
    return {"label": np.array([label])}
