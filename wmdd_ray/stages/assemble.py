"""assemble: images, labels, weights, class names and teacher as one data set that needs nothing else.

`dataset/manifest.json` names every file with size and checksum and is written last: a reader sees a whole data set
or none.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import ray

from wmdd_ray.card import dataset_card, options_of
from wmdd_ray.config import DistillConfig
from wmdd_ray.core.tiles import tile
from wmdd_ray.errors import LostRaceError
from wmdd_ray.pictures import preview
from wmdd_ray.provenance import versions
from wmdd_ray.records import ClassImages
from wmdd_ray.rooms import Room, StageCommit
from wmdd_ray.run import StageRun, Work
from wmdd_ray.stages import recover
from wmdd_ray.stages.actors import fan_out
from wmdd_ray.stages.cluster import width
from wmdd_ray.stages.teacher import TEACHER_KEY, key_of, units_of
from wmdd_ray.store import codecs, documents

# Images of one Parquet file: some 10 to 100 MB.
_FILE_IMAGES = 1000
CARD_KEY = "README.md"
PREVIEW_KEY = "preview.png"


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the assembled set depends on."""
    return {"assemble": asdict(config.assemble)}


def image_files(config: DistillConfig, num_classes: int) -> dict[str, range]:
    """Return unit id -> the labels of the classes in its Parquet file."""
    size = max(1, _FILE_IMAGES // config.ipc)
    starts = range(0, num_classes, size)
    return {
        f"images-{i:05d}-of-{len(starts):05d}": range(s, min(s + size, num_classes))
        for i, s in enumerate(starts)
    }


def plan(stage: StageRun) -> Work:
    """Return one unit an images file, one a labels file, and one a teacher; known once the labels are."""
    config = stage.config
    num_classes = len(stage.run.source("train").class_names)
    commit = stage.run.room("labels").read_commit()
    size = sum(f.size_bytes for m in commit.units.values() for f in m.files) if commit else 0
    units = [*image_files(config, num_classes), *units_of(config), "preview"]
    return Work(
        units=(*units, *(f"labels-{unit}" for unit in commit.units)) if commit else None,
        estimated_bytes=size
        + num_classes * config.ipc * config.source.image_size**2 * config.source.channels // 2,
    )


def work(stage: StageRun) -> dict[str, Any]:
    """Write every file that is not finished, then the manifest."""
    units = plan(stage).units
    assert units is not None, "labels are committed before they are assembled"
    finished = stage.room.finished()
    left = [unit for unit in units if unit not in finished]
    done = len(units) - len(left)
    stage.progress.start(len(units), done)

    def show(unit: str, seconds: float) -> None:
        nonlocal done
        done += 1
        stage.progress.update(done)

    class_names = stage.run.source("train").class_names
    arguments = (
        stage.room,
        *(stage.run.room(r) for r in ("images", "labels", "teacher")),
        class_names,
        stage.config,
    )
    wide = width(stage.resources)
    if wide.num_workers == 0:
        writer = AssembleActor(*arguments)
        for unit in left:
            stage.event("unit_started", unit=unit, node=writer.ready(), attempt=1)
            seconds = writer.work(unit)
            stage.event(
                "unit_done", unit=unit, node=writer.ready(), attempt=1, seconds=round(seconds, 3)
            )
            show(unit, seconds)
    elif left:
        fan_out(
            stage,
            ray.remote(num_cpus=1)(AssembleActor),
            arguments,
            left,
            max_actors=stage.resources.max_actors,
            on_done=show,
        )
    return _publish(stage, units, class_names)


def _publish(
    stage: StageRun, units: tuple[str, ...], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Write the card, then the manifest that makes the data set visible."""
    config = stage.config
    markers = stage.room.read_units(units)
    files = [entry for marker in markers.values() for entry in marker.files]
    total = {
        kind: sum(f.size_bytes for f in files if f.key.startswith(kind))
        for kind in ("data/", "labels/", "teacher")
    }
    features = stage.inputs["features"].metrics
    several = stage.inputs["teacher"].metrics.get("teachers_top1")
    source = stage.run.source("train")
    meta = {
        "class_names": list(class_names),
        "image_size": config.source.image_size,
        "channels": config.source.channels,
        "mean": list(config.source.mean),
        "std": list(config.source.std),
        "ipc": config.ipc,
        "num_images": config.ipc * len(class_names),
        "tiles": config.recover.tiles,
        "label_epochs": config.relabel.epochs,
        "labels": {
            name: getattr(config.relabel, name)
            for name in ("labels", "compression", "top_k", "precision", "step", "batch_size")
        },
        "image_bytes": total["data/"],
        "label_bytes": total["labels/"],
        "teacher_bytes": total["teacher"],
        "teacher_top1": stage.inputs["teacher"].metrics["top1"],
        **({"teachers_top1": several} if several else {}),
        "source": {
            "uri": config.data,
            "num_images": features["num_images"],
            "stored_bytes": source.total_bytes,
            "bad_images": len(features["bad_images"]),
        },
        "provenance": {
            "recipe": config.recipe,
            "seed": config.seed,
            "teacher_sha256": next(f.sha256 for f in files if f.key == TEACHER_KEY),
            # Students come later, and may be trained again by others.
            "options": {k: v for k, v in options_of(config).items() if k != "evaluate"},
            "fingerprints": {name: commit.fingerprint for name, commit in stage.inputs.items()},
            **versions(),
        },
    }
    stage.room.store.put(CARD_KEY, dataset_card(meta, config, None).encode())
    content = documents.encode_manifest(meta, files)
    if not stage.room.store.create(documents.MANIFEST_KEY, content):
        old_meta, old_files = documents.read_manifest(stage.room.store)
        if old_files != files:
            raise LostRaceError(
                f"{stage.room.store.uri} holds another data set's manifest; give each run its own --out"
            )
    return {
        k: meta[k] for k in ("image_bytes", "label_bytes", "teacher_bytes", "num_images", "source")
    }


class AssembleActor:
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
        self._images_room = images_room
        self._labels, self._labels_room = labels_room.committed(), labels_room
        self._teacher, self._teacher_room = teacher_room.committed(), teacher_room
        self._class_names = class_names
        self._config = config
        self._files = image_files(config, len(class_names))

    def ready(self) -> str:
        """Return the node's name once the actor can work."""
        return socket.gethostname()

    def work(self, unit: str) -> float:
        """Write the file `unit` and return the seconds it took."""
        started = time.perf_counter()
        attempt = self._room.begin_unit(unit)
        if attempt is None:
            return 0.0
        kind = unit.partition("-")[0]
        make: dict[str, Callable[[str], tuple[str, bytes]]] = {
            "images": self._images,
            "labels": self._copy_labels,
            "teacher": self._copy_teacher,
            "preview": self._preview,
        }
        key, content = make[kind](unit)
        seconds = time.perf_counter() - started
        self._room.commit_unit(
            unit, {key: content}, attempt=attempt, seconds=seconds, published=True
        )
        return seconds

    def _images(self, unit: str) -> tuple[str, bytes]:
        classes = recover.read_images(self._images_room, self._files[unit])
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
        return key_of(unit), self._teacher_room.read(self._teacher.file(key_of(unit)))

    def _preview(self, unit: str) -> tuple[str, bytes]:
        shown = min(len(self._class_names), self._config.assemble.preview_classes)
        labels = np.linspace(0, len(self._class_names) - 1, shown).round().astype(int).tolist()
        classes = recover.read_images(self._images_room, labels)
        most = self._config.assemble.preview_images
        rows = [(r.label, self._class_names[r.label], self._tiled(r)[:most]) for r in classes]
        return PREVIEW_KEY, preview(rows)


def write_card(run_room: Room, config: DistillConfig, commit: StageCommit) -> None:
    """Write the card again, now with the results of an evaluation."""
    meta, _ = documents.read_manifest(run_room.store)
    run_room.store.put(CARD_KEY, dataset_card(meta, config, commit.metrics["table"]).encode())
