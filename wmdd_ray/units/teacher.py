"""A teacher: trained on real images, measured on held-out ones, and committed; read by the later stages."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from wmdd_ray.config import DistillConfig, NetworkConfig, SourceConfig
from wmdd_ray.core.batches import ORDER, Batch, in_memory_batches, steps_of
from wmdd_ray.core.class_order import confusion, permuted_classes
from wmdd_ray.core.networks import build_network, empty_network, last_linear, weights_of
from wmdd_ray.core.optimizer import State, WeightAverage, load_training_state, training_state
from wmdd_ray.core.training import optimizer_and_average, train_classifier
from wmdd_ray.errors import DataError
from wmdd_ray.options import require
from wmdd_ray.records import Teacher
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.rooms import Attempt, Room
from wmdd_ray.spine.run import Report, unit_seed
from wmdd_ray.store import codecs
from wmdd_ray.store.sources import Shard, Source
from wmdd_ray.store.sources.chunks import DecodedChunk, decoded_shards
from wmdd_ray.units.held_out import HeldOut, Listed

UNIT = "teacher"
TEACHER_KEY = "teacher.safetensors"

_STATE_EVERY_S = 20.0
# Of images that are streamed: records of a shard that are decoded at once, and images that are shuffled among each other.
CHUNK_IMAGES = 256
SHUFFLED_IMAGES = 4096

BatchesOfEpoch = Callable[[int, int], Iterator[Batch]]
"""Epoch, part -> a part of each of its batches (images uint8 NHWC, labels int64)."""

Decode = Callable[[Sequence[Shard]], Iterator[DecodedChunk]]
"""Decodes the images of shards, in their order."""


def units_of(config: DistillConfig) -> tuple[str, ...]:
    """Return a unit a teacher of the run: the one that images are made for, then those that only label."""
    return (UNIT, *(f"{UNIT}-{number}" for number in range(1, config.num_teachers)))


def labelers_of(config: DistillConfig) -> tuple[str, ...]:
    """Return the units of the teachers that label, the first among them."""
    return units_of(config)[: config.num_labelers]


def teacher_key(unit: str) -> str:
    """Return the key of a teacher."""
    return f"{unit}.safetensors"


def read_teacher(room: Room, unit: str = UNIT) -> Teacher:
    """Return a teacher of a committed room, verified."""
    return codecs.decode_teacher(room.read(room.committed().file(teacher_key(unit))))


def source_of(teacher: Teacher, source: SourceConfig) -> SourceConfig:
    """Return `source` with real images brought to the input of a teacher as its own were."""
    return replace(
        source,
        image_size=teacher.image_size,
        resize=teacher.resize,
        channels=cast(Any, teacher.channels),
        mean=teacher.mean_C,
        std=teacher.std_C,
        interpolation=teacher.interpolation,
        exif_orientation=teacher.exif_orientation,
    )


def feature_width(config: DistillConfig, num_classes: int) -> int:
    """Return D, the width of the features of the network that the options name."""
    shape = config.source.shape
    network = empty_network(config.squeeze.network, num_classes=num_classes, **shape, device="meta")
    return last_linear(network).in_features


def measure(
    network: torch.nn.Module,
    val: Listed,
    config: DistillConfig,
    name: str,
    device: torch.device,
    *,
    check_order: bool,
) -> float:
    """Return the top-1 on held-out images, in [0, 1].

    `check_order` tests the order of its classes too: of a teacher that was trained elsewhere, for one of this run has
    learned the data's own labels.

    Raises:
        DataError: It is at chance level, below `squeeze.min_top1`, or its classes are shown to be in another order.
    """
    class_names = val.source.class_names
    num_classes = len(class_names)
    held_out = HeldOut(val, config.source.mean, config.source.std, device)
    counts_YY = confusion(network, held_out, num_classes)
    top1 = float(np.trace(counts_YY) / counts_YY.sum())
    moved = permuted_classes(counts_YY) if check_order else {}
    if moved:
        shown = ", ".join(
            f'class {k} ("{class_names[k]}") is its class {j}' for k, j in list(moved.items())[:3]
        )
        raise DataError(
            f"{name}: its classes are in another order than the data's: {len(moved)} of {num_classes} are exchanged "
            f"({shown}); its top-1 is {top1:.3f} as it is. Reorder the class names of the data or the teacher's last layer, or go "
            "on as it is by --squeeze.no-check-class-order"
        )
    needed = config.squeeze.min_top1 or min(3 / num_classes, (1 + 1 / num_classes) / 2)
    if top1 < needed:
        raise DataError(
            f"{name}: top-1 {top1:.3f} on {int(counts_YY.sum())} held-out images, expected at least {needed:.3f} "
            f"(chance is {1 / num_classes:.3f}); check the data, its normalization, and the training, or set "
            "--squeeze.min-top1"
        )
    return top1


def commit_teacher(
    attempt: Attempt,
    config: DistillConfig,
    network_config: NetworkConfig,
    network: torch.nn.Module,
    class_names: tuple[str, ...],
    top1: float,
    metrics: dict[str, Any],
) -> None:
    """Store a measured network as a teacher of this run, with everything that is needed to feed it."""
    source = config.source
    teacher = Teacher(
        arch=network_config.arch,
        width=network_config.width,
        small_stem=network_config.small_stem,
        class_names=class_names,
        image_size=source.image_size,
        resize=source.resize,
        channels=source.channels,
        mean_C=source.mean,
        std_C=source.std,
        interpolation=source.interpolation,
        exif_orientation=source.exif_orientation,
        top1=top1,
        weights=weights_of(network),
    )
    in_core = round(time.perf_counter() - attempt.began, 3)
    about = {"top1": top1, "arch": network_config.arch, "seconds_in_core": in_core}
    attempt.commit({teacher_key(attempt.unit): codecs.encode_teacher(teacher)}, about | metrics)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A teacher to be trained, as it travels to the workers. `train` are all real images where they fit into memory."""

    unit: str
    room: Room
    config: DistillConfig
    class_names: tuple[str, ...]
    num_images: int
    train: Listed | None
    val: Listed

    @property
    def seed(self) -> int:
        """The seed of weights, order and augmentation."""
        return unit_seed(self.config.seed, "squeeze", self.unit)


def train_teacher(
    training: Training,
    report: Report,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    streamed: BatchesOfEpoch | None = None,
) -> None:
    """Train a teacher on one of `world` workers, which share the parts of each batch.

    Rank 0 keeps the resumable state, tells `report` how far the unit is, measures the result and commits it. `streamed` are the
    batches, where the images do not fit into memory. A teacher that an earlier attempt has finished is left as it is.

    Raises:
        DataError: The teacher is no better than chance, or its classes are in another order (`measure`).
    """
    config, unit, room = training.config, training.unit, training.room
    attempt = room.begin(unit) if rank == 0 else None
    torch.set_num_threads(1)  # gradients of a convolution are summed in another order on more
    torch.manual_seed(training.seed)
    num_classes, shape = len(training.class_names), config.source.shape
    network = build_network(config.squeeze.network, num_classes=num_classes, **shape)
    network.to(device).to(memory_format=torch.channels_last)
    squeeze = config.squeeze.at_ipc(config.ipc)
    optimizer, average = optimizer_and_average(network, squeeze)
    keep = Checkpoints(room, unit, _STATE_EVERY_S)
    course = _Course(network, optimizer, average)
    # Of rank 0 alone: two looks at a store can find two states, and all workers have to begin at one, or not at all.
    is_left, state = _of_first(
        (attempt is not None, keep.load()) if rank == 0 else None, world, device
    )
    if not is_left:
        return
    first_epoch = course.resume(state)

    def on_epoch(epoch: int, loss: float) -> None:
        course.losses.append(round(loss, 4))
        if rank == 0:
            report(
                (epoch + 1) / (squeeze.epochs + 1),
                f"{_epoch_of(training, epoch)}, {course}",
                epoch=epoch + 1,
                loss=loss,
            )
            keep.maybe(lambda: course.state(epoch + 1))

    batches = streamed or _in_memory(training)
    train_classifier(
        network,
        optimizer,
        _told(batches, training, course, report) if rank == 0 else batches,
        squeeze,
        steps_per_epoch=steps_of(training.num_images, squeeze.batch_size),
        mean_C=config.source.mean,
        std_C=config.source.std,
        seed=training.seed,
        rank=rank,
        world=world,
        start_epoch=first_epoch,
        average=average,
        on_epoch=on_epoch,
        on_curvature=lambda _, term: course.curvatures.append(round(term, 4)),
    )
    if attempt is not None:
        _commit(training, network, course, device, attempt)
        keep.clear()


def _commit(
    training: Training,
    network: torch.nn.Module,
    course: _Course,
    device: torch.device,
    attempt: Attempt,
) -> None:
    """Measure a trained teacher and commit it, with the course that its training took."""
    config, unit = training.config, training.unit
    squeeze = config.squeeze.at_ipc(config.ipc)
    network.eval()
    name = f"the trained {unit}"
    top1 = measure(network, training.val, config, name, device, check_order=False)
    metrics: dict[str, Any] = {"losses": course.losses}
    if course.curvatures:
        metrics |= {"curvatures": course.curvatures, "curvature_weight": squeeze.curvature_weight}
    commit_teacher(attempt, config, squeeze.network, network, training.class_names, top1, metrics)


class _Course:
    """A training under way: what it changes, and its losses and curvature terms by epoch."""

    def __init__(
        self,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
    ) -> None:
        self._network, self._optimizer, self._average = network, optimizer, average
        self.losses: list[float] = []
        self.curvatures: list[float] = []

    def __str__(self) -> str:
        curvature = f", curvature {self.curvatures[-1]:.3f}" if self.curvatures else ""
        return f"loss {self.losses[-1]:.3f}{curvature}"

    def state(self, epoch: int) -> State:
        """Return all that the training goes on from at the beginning of an epoch."""
        state = training_state(self._network, self._optimizer, self._average)
        state |= {"epoch": np.array(epoch), "losses": np.array(self.losses)}
        return state | ({"curvatures": np.array(self.curvatures)} if self.curvatures else {})

    def resume(self, state: State | None) -> int:
        """Load the state of an interrupted training, and return the epoch that it goes on with."""
        if state is None:
            return 0
        epoch, self.losses = int(state.pop("epoch")), state.pop("losses").tolist()
        self.curvatures = state.pop("curvatures", np.zeros(0)).tolist()
        load_training_state(self._network, self._optimizer, state, self._average)
        return epoch


def _of_first(value: Any, world: int, device: torch.device) -> Any:
    """Return the value of rank 0 on every worker."""
    held = [value]
    if world > 1:
        torch.distributed.broadcast_object_list(held, src=0, device=device)
    return held[0]


def _epoch_of(training: Training, epoch: int) -> str:
    prefix = "" if training.unit == UNIT else f"{training.unit}, "
    return f"{prefix}epoch {epoch + 1}/{training.config.squeeze.epochs}"


def _told(
    batches: BatchesOfEpoch, training: Training, course: _Course, report: Report
) -> BatchesOfEpoch:
    """Return the batches, and tell at each how far the training is: an epoch may take an hour."""
    squeeze = training.config.squeeze
    steps = steps_of(training.num_images, squeeze.batch_size)

    def told(epoch: int, part: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(epoch, part)):
            if part == 0:
                note = f"{_epoch_of(training, epoch)}, step {step}/{steps}"
                note += f", {course}" if course.losses else ""
                report((epoch + step / steps) / (squeeze.epochs + 1), note)
            yield batch

    return told


def _in_memory(training: Training) -> BatchesOfEpoch:
    assert training.train is not None, "images that are not streamed are in memory"
    loaded = training.train.load(1 << 62)
    assert loaded is not None
    images_NHWC, labels_N = loaded
    return lambda epoch, part: in_memory_batches(
        images_NHWC,
        labels_N,
        batch_size=training.config.squeeze.batch_size,
        seed=training.seed,
        epoch=epoch,
        part=part,
        num_parts=training.config.squeeze.batch_parts,
    )


def shuffled_stream(
    training: Training, source: Source, shards: Sequence[Shard], decode: Decode | None = None
) -> BatchesOfEpoch:
    """Return the batches of images that do not fit into memory.

    The order of the shards, and that of the images within a buffer of `SHUFFLED_IMAGES`, are drawn from (seed, epoch). Of
    several parts each reads shards of its own, and those with fewer images again.

    `shards` are all of the source, of `CHUNK_IMAGES` or whole files, as the driver lists them. Without `decode` they are decoded
    one after another in this process.

    Raises:
        ConfigError: There are fewer shards than parts of a batch.
    """
    squeeze = training.config.squeeze
    num_parts = squeeze.batch_parts
    require(
        num_parts == 1 or num_parts <= len(shards),
        "squeeze.batch-parts",
        f"at most the {len(shards)} shards that the images are streamed by",
        num_parts,
    )
    decode = decode or partial(decoded_shards, source, training.config.source, CHUNK_IMAGES)
    share, shuffled = squeeze.batch_size // num_parts, SHUFFLED_IMAGES // num_parts

    def batches(epoch: int, part: int) -> Iterator[Batch]:
        rng = np.random.default_rng([training.seed, epoch, ORDER])
        order = [shards[i] for i in rng.permutation(len(shards))[part::num_parts]]
        rng = [rng, *rng.spawn(num_parts - 1)][part]
        images: list[np.ndarray] = []
        labels: list[int] = []
        for _ in itertools.count() if num_parts > 1 else range(1):
            num_read = 0
            for chunk in decode(order):
                images += list(chunk.images_NHWC)
                labels += chunk.labels_N.tolist()
                num_read += len(chunk.labels_N)
                while len(images) >= shuffled + share:
                    yield _draw(images, labels, share, rng)
            if not num_read:
                raise DataError(
                    f"part {part} of the batches: expected images in its {len(order)} shards, found none; lower "
                    "--squeeze.batch-parts"
                )
            while len(images) >= share:
                yield _draw(images, labels, share, rng)

    return batches


def _draw(
    images: list[np.ndarray], labels: list[int], count: int, rng: np.random.Generator
) -> Batch:
    """Take `count` random images out of the buffer; the last ones move into their places."""
    chosen = []
    for _ in range(count):
        i = int(rng.integers(len(images)))
        chosen.append((images[i], labels[i]))
        images[i], labels[i] = images[-1], labels[-1]
        images.pop()
        labels.pop()
    pixels, classes = zip(*chosen, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(classes)
