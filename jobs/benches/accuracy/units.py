"""Units of work, each a pure function of what its id is the fingerprint of: teacher, features, images, labels, student.

A unit holds its inputs, so an id changes with everything upstream, and one folder serves tables, seeds and changed options:
what is there already is found. All that a unit is handed to work with is a `Workplace`.

Legend: N images, K images of one class, V views, Y classes, H W pixels, C channels.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from jobs.benches.accuracy.definitions import TeacherRecipe
from jobs.benches.accuracy.splits import Workplace, closed_test
from wmdd_ray.config import (
    BarycenterConfig,
    EvaluateConfig,
    NetworkConfig,
    RecoverConfig,
    RelabelConfig,
)
from wmdd_ray.core.batches import eval_batches, in_memory_batches, steps_of
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.networks import build_network, network_of, weights_of
from wmdd_ray.core.optimizer import State, load_training_state, make_optimizer, training_state
from wmdd_ray.core.soft_labels import (
    compress,
    concatenate_labels,
    decompress,
    label_views,
    take_labels,
)
from wmdd_ray.core.tiles import untile
from wmdd_ray.core.training import accuracy, train_classifier, train_student
from wmdd_ray.core.views import StoredImages, concatenate_views, draw_views, take, to_input
from wmdd_ray.errors import DataError
from wmdd_ray.records import ClassFeatures, SoftLabelBlock, Teacher, Views
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.rooms import UnitMarker
from wmdd_ray.spine.run import fingerprint, unit_seed
from wmdd_ray.store import codecs

Labels = Literal["soft", "hard"]
Speed = Callable[[NetworkConfig, bool], float]
"""Seconds of one image's forward and backward pass through a network, with mixed precision or without."""

_STATE_EVERY_S = 30.0
_BATCH_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class Unit(ABC):
    """Common to all: the data that everything comes from. Subclasses name their room and do their work.

    What `reads_test` works after all training and hands nothing back to it; everything else finds the test split closed.
    """

    room: ClassVar[str]
    reads_test: ClassVar[bool] = False
    data: str

    @property
    def id(self) -> str:
        """Readable beginning, and the fingerprint of all that the unit's bytes depend on."""
        return f"{self.label}-{fingerprint(_without_unused(asdict(self)))[:10]}"

    @property
    @abstractmethod
    def label(self) -> str:
        """What the unit is, in a file name."""

    @abstractmethod
    def seconds(self, place: Workplace, speed: Speed) -> float:
        """Estimate the time that the unit takes."""

    @abstractmethod
    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Return the unit's files by key, and its metrics."""

    def marker(self, place: Workplace) -> UnitMarker:
        """Return what the finished unit left."""
        return place.room(self.room).read_unit(self.id)

    def file(self, place: Workplace, number: int = 0) -> bytes:
        """Return a file of the finished unit, verified."""
        return place.room(self.room).read(self.marker(place).files[number])

    def bring(self, place: Workplace) -> None:
        """Do the unit unless it is finished, and commit it."""
        started = time.perf_counter()
        room = place.room(self.room)
        attempt = room.begin_unit(self.id)
        if attempt is None:
            return
        with nullcontext() if self.reads_test else closed_test():
            files, metrics = self.do(place)
        seconds = time.perf_counter() - started
        metrics = {"seconds": round(seconds, 3), **metrics}
        room.commit_unit(self.id, files, metrics=metrics, attempt=attempt, seconds=seconds)


def _without_unused(value: Any) -> Any:
    """Return a unit's fields without options that came later and are off, so that ids are those of before.

    Which teachers label is said by the units themselves.
    """
    if isinstance(value, list | tuple):
        return [_without_unused(item) for item in value]
    if not isinstance(value, dict):
        return value
    unused = {"teacher_schedule", "teachers"} if "teacher_schedule" in value else set()
    if value.get("sinkhorn_weight") == 0:
        unused |= {"sinkhorn_weight", "sinkhorn_regularization", "sinkhorn_iterations"}
    if value.get("influence_weight") == 0:
        unused |= {name for name in value if name.startswith("influence_")}
    return {name: _without_unused(item) for name, item in value.items() if name not in unused}


# Teacher ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TeacherUnit(Unit):
    """A teacher, trained on `train` or given; its record's top-1 is that on `val`."""

    room = "teacher"
    recipe: TeacherRecipe

    @property
    def label(self) -> str:
        return self.recipe.name

    def seconds(self, place: Workplace, speed: Speed) -> float:
        squeeze = self.recipe.squeeze
        passes = 0 if self.recipe.given else squeeze.epochs * len(place.train.labels_N)
        return passes * speed(squeeze.network, squeeze.mixed_precision)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        teacher = self._given(place) if self.recipe.given else self._trained(place)
        top1 = accuracy(network_of(teacher, place.device), _val_batches(place))[0]
        content = codecs.encode_teacher(replace(teacher, top1=top1))
        return {f"{self.id}.safetensors": content}, {"top1_val": top1}

    def _given(self, place: Workplace) -> Teacher:
        content = place.room("given").store.get(f"{self.recipe.given}.safetensors")
        teacher = codecs.decode_teacher(content)
        found = (teacher.channels, teacher.image_size, teacher.num_classes)
        wanted = (place.source.channels, place.source.image_size, len(place.class_names))
        if found != wanted:
            raise DataError(
                f"--teacher: expected (channels, pixels, classes) {wanted}, got {found}; give a teacher of this data set"
            )
        return teacher

    def _trained(self, place: Workplace) -> Teacher:
        squeeze, source, train = self.recipe.squeeze, place.source, place.train
        seed = unit_seed(self.recipe.seed, "teacher", self.recipe.name)
        torch.manual_seed(seed)
        network = new_network(squeeze.network, place).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(
            network,
            "sgd",
            learning_rate=squeeze.learning_rate,
            weight_decay=squeeze.weight_decay,
            momentum=squeeze.momentum,
        )
        keep = Checkpoints(place.room(self.room), self.id, _STATE_EVERY_S)
        state, first = keep.load(), 0
        if state is not None:
            first = int(state.pop("epoch"))
            load_training_state(network, optimizer, state)

        def get_state(epoch: int) -> State:
            return training_state(network, optimizer) | {"epoch": np.array(epoch)}

        train_classifier(
            network,
            optimizer,
            lambda epoch: in_memory_batches(
                train.images_NHWC,
                train.labels_N,
                batch_size=squeeze.batch_size,
                seed=seed,
                epoch=epoch,
            ),
            squeeze,
            steps_per_epoch=steps_of(len(train.labels_N), squeeze.batch_size),
            mean_C=source.mean,
            std_C=source.std,
            seed=seed,
            start_epoch=first,
            on_epoch=lambda epoch, _: keep.maybe(lambda: get_state(epoch + 1)),
        )
        keep.clear()
        network_config = squeeze.network
        return Teacher(
            arch=network_config.arch,
            width=network_config.width,
            small_stem=network_config.small_stem,
            class_names=place.class_names,
            image_size=source.image_size,
            resize=source.resize,
            channels=source.channels,
            mean_C=source.mean,
            std_C=source.std,
            top1=0.0,
            weights=weights_of(network),
        )


@lru_cache(maxsize=4)
def network_at(place: Workplace, unit: TeacherUnit) -> torch.nn.Module:
    """Return a finished teacher as a network; kept for the next unit of this process."""
    network = network_of(codecs.decode_teacher(unit.file(place)), place.device)
    return network.to(memory_format=torch.channels_last)


# Features ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FeaturesUnit(Unit):
    """Features and BatchNorm moments of `train` in one pass, one file a class."""

    room = "features"
    teacher: TeacherUnit

    @property
    def label(self) -> str:
        return self.teacher.label

    def seconds(self, place: Workplace, speed: Speed) -> float:
        return len(place.train.labels_N) * speed(self.teacher.recipe.squeeze.network, False) / 2

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        network, train = network_at(place, self.teacher), place.train
        files = {}
        for label in range(len(place.class_names)):
            rows_N = train.of_class(label)
            images = to_input(train.images_NHWC[rows_N], place.source.mean, place.source.std)
            features_ND, moments = features_and_moments(
                network, images, train.labels_N[rows_N], batch_size=_BATCH_IMAGES
            )
            record = ClassFeatures(
                label=label,
                keys=tuple(str(row) for row in rows_N),
                features_ND=features_ND,
                moments=moments[label],
            )
            key = f"{self.id}/{label:05d}.safetensors"
            files[key] = codecs.encode_class_features(record)
        return files, {}

    def of_class(self, place: Workplace, label: int) -> ClassFeatures:
        """Return the finished features of a class; its rows are those of `train.of_class`."""
        return codecs.decode_class_features(self.file(place, label))


# Images -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImagesUnit(Unit):
    """The stored images of a row (`images.py` says how they come about); `full` stores none."""

    room = "images"
    name: str
    kind: str
    ipc: int
    seed: int
    features: tuple[FeaturesUnit, ...]
    barycenters: BarycenterConfig
    recover: RecoverConfig

    @property
    def label(self) -> str:
        return f"{self.name}-i{self.ipc:03d}-d{self.seed}"

    def seconds(self, place: Workplace, speed: Speed) -> float:
        num_classes = len(place.class_names)
        if self.kind == "recover":
            passes = self.recover.iterations * num_classes * self.ipc * self.recover.tiles**2
            network = self.features[0].teacher.recipe.squeeze.network
            return passes * speed(network, self.recover.mixed_precision)
        return 0.1 * num_classes

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        from jobs.benches.accuracy.images import make_images

        made = make_images(self, place)
        metrics = {
            "seconds": round(made.seconds, 3),
            "image_bytes": made.image_bytes,
            "num_stored": made.num_stored,
            "num_read": made.num_stored * self.recover.tiles**2,
            "losses": made.losses,
        }
        return made.files, metrics


@dataclass(frozen=True, eq=False)
class Formed:
    """Images as a student reads them: small ones where a stored image is a grid."""

    images_NHWC: np.ndarray
    classes_N: np.ndarray
    weights_N: np.ndarray


@lru_cache(maxsize=2)
def formed_images(place: Workplace, unit: ImagesUnit) -> Formed:
    """Return the finished images of a row as a student reads them."""
    if unit.kind == "full":
        train = place.train
        return Formed(train.images_NHWC, train.labels_N, np.ones(len(train.labels_N)))
    stored_NHWC, labels_N, weights_NT = codecs.decode_images(unit.file(place))
    images_NHWC = untile(stored_NHWC, unit.recover.tiles)
    return Formed(images_NHWC, np.repeat(labels_N, weights_NT.shape[1]), weights_NT.reshape(-1))


# Labels -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LabelsUnit(Unit):
    """Views of a row's images and the teachers' logits on them: computed once for all students of the row.

    The views depend on epoch and image alone: rows with as many images are labeled on the same ones.
    """

    room = "labels"
    images: ImagesUnit
    num_images: int
    teachers: tuple[TeacherUnit, ...]
    relabel: RelabelConfig

    @property
    def label(self) -> str:
        return self.images.label

    def seconds(self, place: Workplace, speed: Speed) -> float:
        passes = self.num_images * self.relabel.epochs / 3
        return passes * sum(speed(t.recipe.squeeze.network, False) for t in self.teachers)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        source, size = place.source, place.source.image_size
        networks = [network_at(place, teacher) for teacher in self.teachers]
        found = formed_images(place, self.images)
        assert len(found.images_NHWC) == self.num_images, "one number of images, planned and made"
        stored = StoredImages(found.images_NHWC, source.mean, source.std, place.device)
        seed = unit_seed(0, "relabel", "")
        views, labels = [], []
        for epoch in range(self.relabel.epochs):
            drawn = draw_views(len(stored), size, self.relabel.views, seed=seed, epoch=epoch)
            logits_VY = label_views(
                networks,
                stored,
                drawn,
                size,
                self.relabel.batch_size,
                batch_statistics=self.relabel.batch_statistics,
            )
            views.append(drawn)
            labels.append(compress(logits_VY, self.relabel))
        block = SoftLabelBlock(
            first_epoch=0,
            num_epochs=self.relabel.epochs,
            views=concatenate_views(views),
            labels=concatenate_labels(labels),
        )
        return {f"{self.id}.parquet": codecs.encode_soft_labels(block)}, {}


@lru_cache(maxsize=1)
def _label_block(place: Workplace, unit: LabelsUnit) -> SoftLabelBlock:
    return codecs.decode_soft_labels(unit.file(place))


# Students ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudentUnit(Unit):
    """A student as it is after its last epoch: weights, and no accuracy. Those of one `seed` start from the same, in every row."""

    room = "students"
    labeled: LabelsUnit
    student: EvaluateConfig
    labels: Labels
    seed: int

    @property
    def label(self) -> str:
        return f"{self.labeled.label}-{self.student.network.arch}-{self.labels}-s{self.seed}"

    def seconds(self, place: Workplace, speed: Speed) -> float:
        passes = self.student.epochs * self.labeled.num_images
        return passes * speed(self.student.network, self.student.mixed_precision)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        source = place.source
        found = formed_images(place, self.labeled.images)
        block = _label_block(place, self.labeled) if self.labels == "soft" else None
        num_images = len(found.images_NHWC)
        images = StoredImages(found.images_NHWC, source.mean, source.std, place.device)
        read = {"views": 0, "steps": 0, "loss": 0.0}

        def label_epoch(epoch: int) -> tuple[Views, np.ndarray | None]:
            if block is None:
                read["views"] += num_images
                return draw_views(
                    num_images,
                    source.image_size,
                    self.student.hard.views,
                    seed=unit_seed(0, "hard_views", ""),
                    epoch=epoch,
                ), None
            start = epoch % block.num_epochs * num_images
            rows = slice(start, start + num_images)
            read["views"] += num_images
            return take(block.views, rows), decompress(take_labels(block.labels, rows))

        seed = unit_seed(0, "student", str(self.seed))
        torch.manual_seed(seed)
        network = new_network(self.student.network, place)
        keep = Checkpoints(place.room(self.room), self.id, _STATE_EVERY_S)
        state = keep.load()
        resumed = 0 if state is None else int(state["epoch"])

        def on_epoch(epoch: int, loss: float, get_state: Callable[[], State]) -> None:
            read["loss"] = loss
            keep.maybe(get_state)

        train_student(
            network,
            images,
            label_epoch,
            found.weights_N,
            self.student,
            epochs=self.student.epochs,
            image_size=source.image_size,
            seed=seed,
            classes_N=found.classes_N,
            labels=self.labels,
            state=state,
            on_epoch=on_epoch,
        )
        keep.clear()
        read["views"] += resumed * num_images
        content = codecs.encode_state(weights_of(network))
        return {f"{self.id}.safetensors": content}, read

    def network(self, place: Workplace) -> torch.nn.Module:
        """Return the finished student, in eval mode."""
        with torch.random.fork_rng([]):
            network = new_network(self.student.network, place)
        weights = codecs.decode_state(self.file(place))
        network.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
        return network.eval()


def new_network(config: NetworkConfig, place: Workplace) -> torch.nn.Module:
    """Return a network with random weights for the data's images, on the device."""
    source = place.source
    return build_network(
        config,
        num_classes=len(place.class_names),
        channels=source.channels,
        image_size=source.image_size,
    ).to(place.device)


def _val_batches(place: Workplace) -> Any:
    return eval_batches(
        place.val.images_NHWC,
        place.val.labels_N,
        mean_C=place.source.mean,
        std_C=place.source.std,
        batch_size=_BATCH_IMAGES,
        device=place.device,
    )
