"""The images of many classes are as many objects, and are read several at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.testing import assert_array_equal

from wmdd_ray.records import ClassImages
from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import FileEntry, entry_of
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units.images import ClassImagesReader, files_by_class, images_key


class Together(Room):
    """A room whose every read waits for a second one."""

    pair = threading.Barrier(2, timeout=20)

    def read(self, entry: FileEntry) -> bytes:
        self.pair.wait()
        return super().read(entry)


def room_of_classes(room: Room) -> Room:
    """Commit six classes of an image each, whose pixels are their label."""
    for label in range(6):
        pixels = np.full((1, 2, 2, 3), label, dtype=np.uint8)
        record = ClassImages(label=label, images_KHWC=pixels, weights_K=np.ones(1), losses={})
        content = {images_key(label): codecs.encode_class_images(record)}
        room.commit_unit(f"g{label:05d}", content, attempt=1)
    about = {"stage": "recover", "version": 1, "fingerprint": "", "seconds": 0.0, "host": ""}
    units = room.read_units(sorted(room.finished()))
    room.commit(
        StageCommit(**about, options={}, inputs={}, units=units, metrics={}, run="", finished="")
    )
    return room


def test_objects_of_classes_are_read_together_and_come_in_the_order_asked(tmp_path: Path) -> None:
    room = room_of_classes(Together(Store(str(tmp_path)), "images"))
    images = ClassImagesReader(room).read([4, 0, 5, 2])
    assert [record.label for record in images] == [4, 0, 5, 2]
    assert_array_equal([record.images_KHWC[0, 0, 0, 0] for record in images], [4, 0, 5, 2])


def test_parts_of_a_class_come_in_the_order_of_its_images() -> None:
    keys = [images_key(label, first) for label in (0, 1) for first in (0, 1, 12)]
    files = {key: entry_of(key, b"") for key in sorted([*keys, "surrogate.safetensors"])}
    found = files_by_class(files)
    assert [entry.key for label in found for entry in found[label]] == keys
    assert list(found) == [0, 1]


def test_a_commit_is_read_once_whatever_is_read_of_it(tmp_path: Path) -> None:
    room = room_of_classes(Room(Store(str(tmp_path)), "images"))
    reader = ClassImagesReader(room)
    (tmp_path / "images" / "stage.json").unlink()
    for label in range(6):
        assert [record.label for record in reader.read([label])] == [label]
