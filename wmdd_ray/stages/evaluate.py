"""evaluate: students trained from `dataset/` alone, and the real-image baselines under the identical recipe.

Students are independent: one (row, seed) is a unit, and units run side by side on Ray Train workers. The held-out
images are opened once a worker and used after training only; the last epoch is what counts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.class_order import confusion
from wmdd_ray.core.networks import build_network, network_of
from wmdd_ray.core.soft_labels import compress, decompress, label_views
from wmdd_ray.core.training import accuracy, train_student
from wmdd_ray.core.views import StoredImages, concatenate_views, draw_views
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.errors import ConfigError
from wmdd_ray.provenance import hardware, versions
from wmdd_ray.records import StudentResult, Teacher, Views
from wmdd_ray.rooms import Room
from wmdd_ray.run import StageRun, Work, unit_seed
from wmdd_ray.stages import barycenters
from wmdd_ray.stages.held_out import HeldOut, Listed
from wmdd_ray.stages.recover import read_real
from wmdd_ray.stages.relabel import blocks, renamed
from wmdd_ray.stages.workers import DoUnit, Report, do_units
from wmdd_ray.store import codecs
from wmdd_ray.store.sources import Source

_ALL_REAL_BYTES = 4 << 30
# Labels of a baseline are kept for the next seed up to this many logits.
_KEPT_LOGITS = 1 << 25

LabelEpoch = Callable[[int], tuple[Views, np.ndarray]]


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the results depend on."""
    return {"seed": config.seed, "evaluate": asdict(config.evaluate)}


def rows(config: DistillConfig) -> tuple[str, ...]:
    """Return the rows of the table: the distilled set first."""
    return ("distilled", *config.evaluate.baselines)


def unit_ids(config: DistillConfig) -> tuple[str, ...]:
    """Return one unit a (row, seed), the longest first."""
    order = sorted(rows(config), key=lambda row: row != "all_real")
    return tuple(f"{row}-s{seed:03d}" for row in order for seed in range(config.evaluate.num_seeds))


def key_of(unit: str) -> str:
    """Return the key of a student's result."""
    return f"results/{unit}.json"


def plan(stage: StageRun) -> Work:
    """Return one unit a student."""
    units = unit_ids(stage.config)
    return Work(units=units, estimated_bytes=2000 * len(units))


def work(stage: StageRun) -> dict[str, Any]:
    """Train every student that is not trained yet, and return the table."""
    config = stage.config
    _check_label_epochs(config)
    units = unit_ids(config)
    worker = partial(
        open_worker,
        room=stage.room,
        dataset_uri=stage.run.room("dataset").store.uri,
        barycenter_room=stage.run.room("barycenters"),
        source=stage.run.source("train"),
        # Its listing can be long, and only this row reads all of it.
        train=Listed.of(stage.run.source("train"), config.source)
        if "all_real" in config.evaluate.baselines
        else None,
        val=Listed.of(stage.run.source("val"), config.source),
        config=config,
    )
    do_units(stage, units, worker)
    markers = stage.room.read_units(units)
    results = {u: codecs.load_json(stage.room.read(m.files[0]), u) for u, m in markers.items()}
    table = []
    for row in rows(config):
        found = [r for u, r in results.items() if u.rpartition("-s")[0] == row]
        top1 = np.array([r["top1"] for r in found])
        table.append(
            {
                "row": row,
                "num_images": found[0]["num_images"],
                "epochs": found[0]["epochs"],
                "labels": found[0]["labels"],
                "top1_mean": float(top1.mean()),
                "top1_std": float(top1.std(ddof=1)) if len(top1) > 1 else 0.0,
                "top1": top1.tolist(),
                "num_seeds": len(found),
                "seconds_per_student": float(np.mean([r["seconds"] for r in found])),
            }
        )
    return {
        "table": table,
        "student": asdict(config.evaluate),
        "teacher_top1": stage.inputs["teacher"].metrics["top1"],
        "hardware": hardware(),
        **versions(),
        "seconds_in_core": round(sum(m.metrics["seconds_in_core"] for m in markers.values()), 3),
    }


def _check_label_epochs(config: DistillConfig) -> None:
    if (
        config.evaluate.epochs % config.relabel.epochs
        and config.evaluate.epochs > config.relabel.epochs
    ):
        raise ConfigError(
            f"--evaluate.epochs {config.evaluate.epochs}: expected at most the {config.relabel.epochs} stored label epochs "
            "or a multiple of them, so that every image counts equally"
        )


@dataclass(frozen=True, eq=False)
class _TrainingSet:
    """What a student is trained on."""

    images: StoredImages
    label_epoch: LabelEpoch
    weights_N: np.ndarray
    epochs: int


def open_worker(
    device: torch.device,
    *,
    room: Room,
    dataset_uri: str,
    barycenter_room: Room,
    source: Source,
    train: Listed | None,
    val: Listed,
    config: DistillConfig,
) -> DoUnit:
    """Open the data set and the held-out images, and return the function that trains one student."""
    dataset = DistilledDataset(dataset_uri)
    teacher = dataset.teacher()
    held_out = HeldOut(val, teacher.mean_C, teacher.std_C, device)
    held: dict[str, _TrainingSet] = {}

    def training_set(row: str) -> _TrainingSet:
        if row not in held:
            held.clear()
            if row == "distilled":
                pixels = dataset.images
                label_epoch = _cycled(dataset)
                weights_N, epochs = dataset.weights, config.evaluate.epochs
            elif row == "all_real":
                assert train is not None
                pixels = _all_real(train)
                label_epoch = _fresh_labels(pixels, teacher, config, device)
                weights_N, epochs = np.ones(len(pixels)), config.evaluate.all_real_epochs
            else:
                pixels = _baseline_images(row, barycenter_room, source, config, teacher.num_classes)
                label_epoch = _stored_labels(pixels, teacher, config, device)
                weights_N, epochs = np.ones(len(pixels)), config.evaluate.epochs
            images = StoredImages(pixels, teacher.mean_C, teacher.std_C, device)
            held[row] = _TrainingSet(images, label_epoch, weights_N, epochs)
        return held[row]

    def do_unit(unit: str, report: Report) -> None:
        started = time.perf_counter()
        row, _, number = unit.rpartition("-s")
        chosen = training_set(row)
        in_core = time.perf_counter()
        # The seed is of the student alone: student 0 of every row starts from the same weights.
        seed = unit_seed(config.seed, "student", number)
        torch.manual_seed(seed)
        network = build_network(
            config.evaluate.network,
            num_classes=teacher.num_classes,
            channels=teacher.channels,
            image_size=teacher.image_size,
        ).to(device)

        def on_epoch(epoch: int, loss: float) -> None:
            report(
                (epoch + 1) / (chosen.epochs + 1),
                f"{row} seed {int(number)}, epoch {epoch + 1}/{chosen.epochs}",
            )

        train_student(
            network,
            chosen.images,
            chosen.label_epoch,
            chosen.weights_N,
            config.evaluate,
            epochs=chosen.epochs,
            image_size=teacher.image_size,
            seed=seed,
            on_epoch=on_epoch,
        )
        top1, top5 = accuracy(network, held_out)
        in_core = time.perf_counter() - in_core
        per_class = _recall(network.eval(), held_out, teacher.num_classes)
        result = StudentResult(
            row=row,
            arch=config.evaluate.network.arch,
            seed=int(number),
            top1=top1,
            top5=top5,
            epochs=chosen.epochs,
            num_images=len(chosen.images),
            seconds=round(in_core, 3),
            labels="soft",
            hardware=hardware(),
            versions=versions()["versions"],
        )
        content = codecs.dump_json({**asdict(result), "recall_per_class": per_class})
        room.commit_unit(
            unit,
            {key_of(unit): content},
            metrics={"top1": top1, "seconds_in_core": round(in_core, 4)},
            seconds=time.perf_counter() - started,
            host=socket.gethostname(),
        )

    return do_unit


def _cycled(dataset: DistilledDataset) -> LabelEpoch:
    return lambda epoch: dataset.label_epoch(epoch % dataset.label_epochs)


def _recall(network: torch.nn.Module, held_out: HeldOut, num_classes: int) -> list[float]:
    counts_YY = confusion(network, held_out, num_classes)
    return [round(float(r), 4) for r in np.diag(counts_YY) / np.maximum(counts_YY.sum(axis=1), 1)]


def _all_real(train: Listed) -> np.ndarray:
    loaded = train.load(_ALL_REAL_BYTES)
    if loaded is None:
        raise ConfigError(
            "--evaluate.baselines all_real: the real images take more than 4 GiB decoded; leave this row out (the teacher's "
            "top-1 stands for it), e.g. --evaluate.baselines random_real nearest_real"
        )
    return loaded[0]


def _baseline_images(
    row: str, room: Room, source: Source, config: DistillConfig, num_classes: int
) -> np.ndarray:
    """Return as many real images as the distilled set has, in its order of classes."""
    files = {f.key: f for m in room.committed().units.values() for f in m.files}
    chosen = []
    for label in range(num_classes):
        found = barycenters.read_barycenter(room, files, label)
        keys = found.random_keys if row == "random_real" else found.nearest_keys
        chosen.append(read_real(source, keys, config))
    return np.concatenate(chosen)


def _fresh_labels(
    pixels_NHWC: np.ndarray, teacher: Teacher, config: DistillConfig, device: torch.device
) -> LabelEpoch:
    """Return epoch -> new views of all images and the teacher's labels, made when asked for."""
    network = network_of(teacher, device)
    images = StoredImages(pixels_NHWC, teacher.mean_C, teacher.std_C, device)
    seed = unit_seed(config.seed, "relabel", "all_real")

    def label_epoch(epoch: int) -> tuple[Views, np.ndarray]:
        views = draw_views(
            len(images), teacher.image_size, config.relabel.views, seed=seed, epoch=epoch
        )
        return views, label_views(
            network, images, views, teacher.image_size, config.relabel.batch_size
        )

    return label_epoch


def _stored_labels(
    pixels_NHWC: np.ndarray, teacher: Teacher, config: DistillConfig, device: torch.device
) -> LabelEpoch:
    """Return epoch -> views and labels of other images on the very views of the distilled set, compressed alike."""
    network = network_of(teacher, device)
    images = StoredImages(pixels_NHWC, teacher.mean_C, teacher.std_C, device)
    slices_of_epoch: dict[int, list[tuple[str, np.ndarray]]] = {}
    for unit, (epochs, labels) in blocks(config, teacher.num_classes).items():
        for epoch in epochs:
            slices_of_epoch.setdefault(epoch, []).append((unit.partition("-s")[2], labels))
    kept: dict[int, tuple[Views, np.ndarray]] = {}
    keep = len(images) * config.relabel.epochs * teacher.num_classes <= _KEPT_LOGITS

    def label_epoch(epoch: int) -> tuple[Views, np.ndarray]:
        epoch %= config.relabel.epochs
        if epoch in kept:
            return kept[epoch]
        parts = []
        for name, labels in slices_of_epoch[epoch]:
            index_N = (labels[:, None] * config.ipc + np.arange(config.ipc)).reshape(-1)
            seed = unit_seed(config.seed, "relabel", name)
            drawn = draw_views(
                len(index_N), teacher.image_size, config.relabel.views, seed=seed, epoch=epoch
            )
            parts.append(renamed(drawn, index_N.astype(np.int32)))
        views = concatenate_views(parts)
        logits = label_views(network, images, views, teacher.image_size, config.relabel.batch_size)
        found = views, decompress(compress(logits, config.relabel))
        if keep:
            kept[epoch] = found
        return found

    return label_epoch
