"""The files of the assembled data set, copied and encoded from the rooms to its left: a file a unit."""

from __future__ import annotations

import socket
from collections.abc import Callable

import numpy as np

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.tiles import tile
from wmdd_ray.records import ClassImages
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store import codecs
from wmdd_ray.units.images import ClassImagesReader
from wmdd_ray.units.pictures import preview
from wmdd_ray.units.teacher import teacher_key

# Images of one Parquet file: some 10 to 100 MB.
_FILE_IMAGES = 1000
PREVIEW_KEY = "preview.png"


def image_files(config: DistillConfig, num_classes: int) -> dict[str, range]:
    """Return unit id -> the labels of the classes in its Parquet file."""
    size = max(1, _FILE_IMAGES // config.ipc)
    starts = range(0, num_classes, size)
    return {
        f"images-{i:05d}-of-{len(starts):05d}": range(s, min(s + size, num_classes))
        for i, s in enumerate(starts)
    }


class FileWriter:
    """Writes one file of the data set a call."""

    def __init__(
        self,
        room: Room,
        images_room: Room,
        labels_room: Room,
        teacher_room: Room,
        class_names: tuple[str, ...],
        config: DistillConfig,
    ) -> None:
        self._room = room
        self._class_images = ClassImagesReader(images_room)
        self._labels, self._labels_room = labels_room.committed(), labels_room
        self._teacher, self._teacher_room = teacher_room.committed(), teacher_room
        self._class_names = class_names
        self._config = config
        self._files = image_files(config, len(class_names))

    def ready(self) -> str:
        """Return the node's name once the actor can work."""
        return socket.gethostname()

    def work(self, unit: str) -> None:
        """Write the file `unit`, unless it is finished."""
        attempt = self._room.begin(unit)
        if attempt is None:
            return
        kind = unit.partition("-")[0]
        make: dict[str, Callable[[str], tuple[str, bytes]]] = {
            "images": self._images,
            "labels": self._copy_labels,
            "teacher": self._copy_teacher,
            "preview": self._preview,
        }
        key, content = make[kind](unit)
        attempt.commit({key: content})

    def _images(self, unit: str) -> tuple[str, bytes]:
        classes = self._class_images.read(self._files[unit])
        content = codecs.encode_images(
            np.concatenate([self._tiled(record) for record in classes]),
            np.repeat([record.label for record in classes], self._config.ipc).astype(np.int64),
            np.concatenate([record.weights_K for record in classes]).reshape(
                -1, self._config.recover.tiles**2
            ),
            self._class_names,
        )
        return f"data/{unit.replace('images', 'train')}.parquet", content

    def _tiled(self, record: ClassImages) -> np.ndarray:
        return tile(record.images_KHWC, self._config.recover.tiles, self._config.source.image_size)

    def _copy_labels(self, unit: str) -> tuple[str, bytes]:
        entry = self._labels.units[unit.removeprefix("labels-")].files[0]
        return entry.key, self._labels_room.read(entry)

    def _copy_teacher(self, unit: str) -> tuple[str, bytes]:
        return teacher_key(unit), self._teacher_room.read(self._teacher.file(teacher_key(unit)))

    def _preview(self, unit: str) -> tuple[str, bytes]:
        shown = min(len(self._class_names), self._config.assemble.preview_classes)
        labels = np.linspace(0, len(self._class_names) - 1, shown).round().astype(int).tolist()
        classes = self._class_images.read(labels)
        most = self._config.assemble.preview_images
        rows = [(r.label, self._class_names[r.label], self._tiled(r)[:most]) for r in classes]
        return PREVIEW_KEY, preview(rows)
