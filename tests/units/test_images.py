"""The images of many classes are as many objects, and are read several at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.testing import assert_array_equal

from wmdd_ray.records import ClassImages
from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import FileEntry
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units.images import images_key, read_images


class Together(Room):
    """A room whose every read waits for a second one."""

    pair = threading.Barrier(2, timeout=20)

    def read(self, entry: FileEntry) -> bytes:
        self.pair.wait()
        return super().read(entry)


def test_objects_of_classes_are_read_together_and_come_in_the_order_asked(tmp_path: Path) -> None:
    room = Together(Store(str(tmp_path)), "images")
    for label in range(6):
        pixels = np.full((1, 2, 2, 3), label, dtype=np.uint8)
        record = ClassImages(label=label, images_KHWC=pixels, weights_K=np.ones(1), losses={})
        content = {images_key(label): codecs.encode_class_images(record)}
        room.commit_unit(f"g{label:05d}", content, attempt=1)
    about = {"stage": "recover", "version": 1, "fingerprint": "", "seconds": 0.0, "host": ""}
    units = room.read_units(sorted(room.finished()))
    room.commit(
        StageCommit(**about, options={}, inputs={}, units=units, metrics={}, run="", finished="")  # type: ignore[arg-type]
    )
    images = read_images(room, [4, 0, 5, 2])
    assert [record.label for record in images] == [4, 0, 5, 2]
    assert_array_equal([record.images_KHWC[0, 0, 0, 0] for record in images], [4, 0, 5, 2])
