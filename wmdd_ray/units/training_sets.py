"""What students are trained on: the distilled set, and real images with labels from the same teachers on the same views."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch

from wmdd_ray.config import DistillConfig, LabelKind
from wmdd_ray.core.networks import labeler_of
from wmdd_ray.core.tiles import shrink, tile_side
from wmdd_ray.core.views import (
    Images,
    StoredImages,
    concatenate_views,
    draw_views,
    renamed,
    take,
    view_bytes,
)
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.errors import ConfigError
from wmdd_ray.records import Teacher, Views
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import unit_seed
from wmdd_ray.store.sources import Source
from wmdd_ray.store.sources.files import read_ahead
from wmdd_ray.units import atoms
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.images import read_real
from wmdd_ray.units.labels import blocks, logits_of, rows_of, slice_name, stored_logits, views_of

_ALL_REAL_BYTES = 4 << 30
# Views and labels are kept for the next pass and the next seed up to so many bytes, and rendered views up to as many again.
_KEPT_BYTES = 128 << 20
_VIEW_BYTES = 64
_TOGETHER_BYTES = 1 << 24

# Baselines of real images at the tiles' resolution, as many as the distilled set has tiles.
TILED = ("random_tiles", "nearest_tiles")

LabelEpoch = Callable[[int], tuple[Views, np.ndarray | None]]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Images and their classes, epoch -> (views, teacher's logits), the images' weights, and a student's passes over them.

    After `cycle` passes the same views come again; `pixels` is epoch -> `view_bytes` of its views, where these are kept.
    """

    images: Images
    classes_N: np.ndarray
    label_epoch: LabelEpoch
    weights_N: np.ndarray
    epochs: int
    cycle: int
    pixels: Callable[[int], torch.Tensor] | None = None

    def kept(self, shown: Input) -> TrainingSet:
        """Return the set with views and labels that are made once, and rendered once, where all of them fit into memory."""
        images, cycle, side = self.images, self.cycle, shown.image_size
        num_views, view_size = len(images) * min(cycle, self.epochs), side**2 * shown.channels
        if num_views * (4 * shown.num_classes + _VIEW_BYTES) > _KEPT_BYTES:
            return self
        made = cache(self.label_epoch)
        same = replace(self, label_epoch=lambda epoch: made(epoch % cycle))
        too_many = num_views * view_size > _KEPT_BYTES
        if isinstance(images, torch.Tensor) or images.in_float or too_many:
            return same

        @cache
        def rendered(epoch: int) -> torch.Tensor:
            views, _ = made(epoch)
            together = max(1, _TOGETHER_BYTES // view_size)
            parts = (
                take(views, slice(first, first + together))
                for first in range(0, len(views), together)
            )
            return torch.cat([view_bytes(images, part, side) for part in parts])

        return replace(same, pixels=lambda epoch: rendered(epoch % cycle))


@dataclass(frozen=True)
class Input:
    """What a student is shown: square images, how they are normalized, and how many classes there are."""

    num_classes: int
    channels: int
    image_size: int
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]

    @classmethod
    def of(cls, teacher: Teacher) -> Input:
        """Return the input of a teacher, which its students share."""
        return cls(
            teacher.num_classes,
            teacher.channels,
            teacher.image_size,
            teacher.mean_C,
            teacher.std_C,
        )


class Sets(abc.ABC):
    """What students are trained on, by the row of the table, and what they are shown; keeps the last set for the next seed."""

    def __init__(self, shown: Input) -> None:
        self.input = shown
        self._held: dict[tuple[str, LabelKind], TrainingSet] = {}

    def get(self, row: str, labels: LabelKind) -> TrainingSet:
        if (row, labels) not in self._held:
            self._held.clear()
            self._held[row, labels] = self._make(row, labels).kept(self.input)
        return self._held[row, labels]

    @abc.abstractmethod
    def _make(self, row: str, labels: LabelKind) -> TrainingSet:
        """Return the training set of a row, made anew."""


OpenSets = Callable[[torch.device], Sets]
"""Opens the sets in a worker, on its device. Picklable."""


class TrainingSets(Sets):
    """A run's distilled set (`distilled`), and its baselines (`EvaluateConfig.baselines`)."""

    def __init__(
        self,
        device: torch.device,
        *,
        dataset_uri: str,
        barycenter_room: Room,
        source: Source,
        train: Listed | None,
        config: DistillConfig,
    ) -> None:
        self._dataset = DistilledDataset(dataset_uri)
        self._teachers = self._dataset.teachers()
        super().__init__(Input.of(self._teachers[0]))
        self._barycenter_room, self._source, self._train = barycenter_room, source, train
        self._config, self._device = config, device

    def _make(self, row: str, labels: LabelKind) -> TrainingSet:
        config, teachers, device = self._config, self._teachers, self._device
        teacher = teachers[0]
        epochs = config.evaluate.epochs
        if row == "distilled":
            pixels, classes_N = self._dataset.images, self._dataset.labels
            label_epoch: LabelEpoch = self._dataset.label_epoch
            cycle = self._dataset.label_epochs
        elif row == "all_real":
            assert self._train is not None
            pixels, classes_N = load_all_real(self._train)
            epochs = config.evaluate.all_real_epochs
            label_epoch, cycle = fresh_labels(pixels, teachers, config, device), epochs
        else:
            # Whole images are fewer than tiles: as many more label epochs make as many views and labels. Steps are as many where
            # the batch size divides the whole images, and otherwise may be more: an epoch is at least one.
            tiles = config.recover.tiles if row in TILED else 1
            repeats = (config.recover.tiles // tiles) ** 2
            epochs *= repeats
            own = replace(
                config,
                recover=replace(config.recover, tiles=tiles),
                relabel=replace(config.relabel, epochs=config.relabel.epochs * repeats),
                evaluate=replace(config.evaluate, epochs=epochs),
            )
            pixels = _baseline_images(
                row, self._barycenter_room, self._source, own, teacher.num_classes
            )
            classes_N = np.repeat(np.arange(teacher.num_classes), own.num_atoms)
            label_epoch, cycle = _stored_labels(pixels, teachers, own, device), own.relabel.epochs
        weights_N = self._dataset.weights if row == "distilled" else np.ones(len(pixels))
        if labels == "hard":
            label_epoch, cycle = hard_views(len(pixels), teacher.image_size, config), epochs
        images = StoredImages(pixels, teacher.mean_C, teacher.std_C, device)
        if row == "distilled" and labels == "soft":
            images = self._dataset.stored_images(device)
        return TrainingSet(images, classes_N, label_epoch, weights_N, epochs, cycle)


def hard_views(num_images: int, image_size: int, config: DistillConfig) -> LabelEpoch:
    """Return epoch -> views for hard labels, which need no teacher."""
    seed, views = unit_seed(config.seed, "hard_views", ""), config.evaluate.hard.views
    return lambda epoch: (
        draw_views(num_images, image_size, views, seed=seed, epoch=epoch),
        None,
    )


def load_all_real(train: Listed) -> tuple[np.ndarray, np.ndarray]:
    """Return all real images and their classes; a ConfigError when they are too large for one worker."""
    loaded = train.load(_ALL_REAL_BYTES)
    if loaded is None:
        raise ConfigError(
            "--evaluate.baselines all_real: the real images take more than 4 GiB decoded; leave this row out (the teacher's "
            "top-1 stands for it), e.g. --evaluate.baselines random_real nearest_real"
        )
    return loaded


def _baseline_images(
    row: str, room: Room, source: Source, config: DistillConfig, num_classes: int
) -> np.ndarray:
    """Return as many real images as the distilled set stores, in its order of classes."""
    files, side = room.committed().files, tile_side(config.source.image_size, config.recover.tiles)
    chosen = []
    for barycenter in read_ahead(partial(atoms.read_barycenter, room, files), range(num_classes)):
        keys = {
            "random_real": barycenter.random_keys[: config.ipc],
            "nearest_real": barycenter.whole_keys,
            "random_tiles": barycenter.random_keys[: config.num_atoms],
            "nearest_tiles": barycenter.nearest_keys,
        }[row]
        chosen.append(shrink(read_real(source, keys, config), side))
    return np.concatenate(chosen)


def fresh_labels(
    pixels_NHWC: np.ndarray,
    teachers: Sequence[Teacher],
    config: DistillConfig,
    device: torch.device,
) -> LabelEpoch:
    """Return epoch -> new views of all images and the teachers' logits, made when asked for."""
    network, teacher = labeler_of(teachers, device, own_code=True), teachers[0]
    images = StoredImages(pixels_NHWC, teacher.mean_C, teacher.std_C, device)

    def label_epoch(epoch: int) -> tuple[Views, np.ndarray | None]:
        views = views_of(config, len(images), teacher.image_size, "all_real", epoch)
        return views, logits_of(network, images, views, teacher.image_size, config)

    return label_epoch


def _stored_labels(
    pixels_NHWC: np.ndarray,
    teachers: Sequence[Teacher],
    config: DistillConfig,
    device: torch.device,
) -> LabelEpoch:
    """Return epoch -> views and labels of other images on the very views of the distilled set, compressed alike."""
    network, teacher = labeler_of(teachers, device, own_code=True), teachers[0]
    images = StoredImages(pixels_NHWC, teacher.mean_C, teacher.std_C, device)
    slices_of_epoch: dict[int, list[tuple[str, np.ndarray]]] = {}
    for unit, (epochs, labels) in blocks(config, teacher.num_classes).items():
        for epoch in epochs:
            slices_of_epoch.setdefault(epoch, []).append((slice_name(unit), labels))

    def label_epoch(epoch: int) -> tuple[Views, np.ndarray | None]:
        epoch %= config.relabel.epochs
        parts, logits = [], []
        for name, labels in slices_of_epoch[epoch]:
            index_N = rows_of(labels, config)
            drawn = views_of(config, len(index_N), teacher.image_size, name, epoch)
            parts.append(renamed(drawn, index_N))
            # A slice is labeled by itself, as the distilled set's: with the batch's statistics its company is in the label.
            logits.append(stored_logits(network, images, parts[-1], teacher.image_size, config))
        return concatenate_views(parts), np.concatenate(logits)

    return label_epoch
