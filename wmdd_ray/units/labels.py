"""Soft labels: the teachers' logits on self-contained views, a block of label epochs of a slice of the data set a unit."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.networks import labeler_of
from wmdd_ray.core.soft_labels import compress, concatenate_labels, decompress, label_views
from wmdd_ray.core.views import (
    Images,
    StoredImages,
    concatenate_views,
    draw_block,
    draw_views,
    renamed,
)
from wmdd_ray.records import SoftLabelBlock, SoftLabels, ViewDraw, Views
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import DoUnit, Report, unit_seed
from wmdd_ray.store import codecs
from wmdd_ray.units.images import ClassImagesReader
from wmdd_ray.units.teacher import labelers_of, read_teacher


def blocks(config: DistillConfig, num_classes: int) -> dict[str, tuple[range, np.ndarray]]:
    """Return unit id -> (label epochs, labels of the classes in its slice)."""
    relabel = config.relabel
    size = max(1, relabel.slice_images // config.num_atoms)
    num_slices = -(-num_classes // size)
    units: dict[str, tuple[range, np.ndarray]] = {}
    for first in range(0, relabel.epochs, relabel.epochs_per_unit):
        epochs = range(first, min(first + relabel.epochs_per_unit, relabel.epochs))
        order = np.arange(num_classes)
        if num_slices > 1:
            rng = np.random.Generator(
                np.random.Philox(key=unit_seed(config.seed, "slices", str(first)))
            )
            order = rng.permutation(num_classes)
        for i in range(num_slices):
            unit = f"e{epochs.start:05d}-{epochs.stop - 1:05d}-s{i:04d}"
            units[unit] = (epochs, np.sort(order[i * size : (i + 1) * size]))
    return units


def by_seed(config: DistillConfig) -> bool:
    """Whether views are drawn again by the reader."""
    return config.relabel.stored_views == "seed"


def open_labeler(
    device: torch.device,
    *,
    room: Room,
    teacher_room: Room,
    images_room: Room,
    config: DistillConfig,
    units: dict[str, tuple[range, np.ndarray]],
) -> DoUnit:
    """Load the teachers and return the function that labels one block."""
    teachers = [read_teacher(teacher_room, unit) for unit in labelers_of(config)]
    teacher = teachers[0]
    network = labeler_of(teachers, device, own_code=True)
    reader = ClassImagesReader(images_room)
    held: dict[bytes, StoredImages] = {}

    def images_of(labels: np.ndarray) -> StoredImages:
        if labels.tobytes() not in held:
            held.clear()
            classes = reader.read(labels.tolist())
            pixels = torch.from_numpy(np.concatenate([record.images_KHWC for record in classes]))
            held[labels.tobytes()] = StoredImages(
                pixels.to(device), teacher.mean_C, teacher.std_C, device
            )
        return held[labels.tobytes()]

    def do_unit(unit: str, report: Report) -> None:
        attempt = room.begin(unit)
        if attempt is None:
            return
        epochs, labels = units[unit]
        index_N, name = rows_of(labels, config), slice_name(unit)
        draw = draw_of(config, index_N, image_size=teacher.image_size, name=name)
        in_core = time.perf_counter()
        if config.relabel.labels == "online":
            block = unlabeled_block(draw, epochs, num_classes=teacher.num_classes)
        else:
            images = images_of(labels)
            in_core = time.perf_counter()
            block = label_block(
                network,
                images,
                epochs,
                config,
                image_size=teacher.image_size,
                name=name,
                report=report,
            )
            block = replace(block, views=renamed(block.views, index_N))
        in_core = time.perf_counter() - in_core
        if by_seed(config):
            block = replace(block, draw=draw)
        attempt.commit(
            {f"labels/{unit}.parquet": codecs.encode_soft_labels(block)},
            {"epochs": [epochs.start, epochs.stop], "seconds_in_core": round(in_core, 4)},
        )

    return do_unit


def slice_name(unit: str) -> str:
    """Return the name of the slice that a block is of, which its views are drawn by."""
    return unit.partition("-s")[2]


def rows_of(labels: np.ndarray, config: DistillConfig) -> np.ndarray:
    """Return where the images of classes stand in the data set, int32 (N,)."""
    rows_CK = labels[:, None] * config.num_atoms + np.arange(config.num_atoms)
    return rows_CK.reshape(-1).astype(np.int32)


def views_of(
    config: DistillConfig, num_images: int, image_size: int, name: str, epoch: int
) -> Views:
    """Draw the views of one epoch of the slice `name`, which depend on it, the seed and the epoch alone, not on the images."""
    seed = unit_seed(config.seed, "relabel", name)
    return draw_views(num_images, image_size, config.relabel.views, seed=seed, epoch=epoch)


def stored_logits(
    network: torch.nn.Module, images: Images, views: Views, image_size: int, config: DistillConfig
) -> np.ndarray:
    """Return `logits_of` as they are after they were stored, rounded and cut off alike."""
    logits_VY = logits_of(network, images, views, image_size, config)
    return decompress(compress(logits_VY, config.relabel))


def draw_of(config: DistillConfig, index_N: np.ndarray, *, image_size: int, name: str) -> ViewDraw:
    """Return what the views of a slice are drawn from: (seed, `name` of the slice, positions of its images)."""
    views = config.relabel.views
    return ViewDraw(
        seed=unit_seed(config.seed, "relabel", name),
        image_size=image_size,
        index_N=index_N,
        crop_scale_min=views.crop_scale_min,
        flip=views.flip,
        mix=views.mix,
    )


def unlabeled_block(draw: ViewDraw, epochs: range, *, num_classes: int) -> SoftLabelBlock:
    """Return a block of views without logits: whoever reads it asks the teacher."""
    views = draw_block(draw, epochs)
    return SoftLabelBlock(
        first_epoch=epochs.start,
        num_epochs=len(epochs),
        views=views,
        labels=SoftLabels(num_classes=num_classes, values_VK=np.empty((len(views), 0), np.float16)),
    )


def logits_of(
    network: torch.nn.Module, images: Images, views: Views, image_size: int, config: DistillConfig
) -> np.ndarray:
    """Return the logits of a labeler on views, float32 (V, Y), as the options of relabel have them."""
    how = config.relabel
    return label_views(
        network, images, views, image_size, how.batch_size, batch_statistics=how.batch_statistics
    )


def label_block(
    network: torch.nn.Module,
    images: StoredImages,
    epochs: range,
    config: DistillConfig,
    *,
    image_size: int,
    name: str,
    report: Report,
) -> SoftLabelBlock:
    """Draw the views of every image in every epoch of a block of the slice `name`, and label them."""
    views, labels = [], []
    for epoch in epochs:
        drawn = views_of(config, len(images), image_size, name, epoch)
        views.append(drawn)
        # Epoch by epoch: with 10,000 classes the logits of a block are 4 GB, and 20 on their way through compression.
        labels.append(
            compress(logits_of(network, images, drawn, image_size, config), config.relabel)
        )
        report((epoch - epochs.start + 1) / len(epochs), f"label epoch {epoch}")
    return SoftLabelBlock(
        first_epoch=epochs.start,
        num_epochs=len(epochs),
        views=concatenate_views(views),
        labels=concatenate_labels(labels),
    )
