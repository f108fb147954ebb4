"""The distilled images of a group of classes: optimized against the teacher, or made by another method behind `Maker`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.crops import easiest_crops
from wmdd_ray.core.groups import Group, join_positions, plan_groups
from wmdd_ray.core.jitter import noise_start
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import network_of
from wmdd_ray.core.optimizer import State
from wmdd_ray.core.other_teachers import targets_in
from wmdd_ray.core.synthesis import ClassTarget, TeacherTarget, recover_group
from wmdd_ray.core.tiles import shrink, tile, tile_side
from wmdd_ray.diffusion.recovery import Sampler
from wmdd_ray.records import ClassBarycenter, ClassImages, Teacher
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import DoUnit, Report, unit_seed
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import FileEntry
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources import Source
from wmdd_ray.store.sources.files import read_ahead
from wmdd_ray.units import atoms
from wmdd_ray.units.class_features import ClassFeaturesReader
from wmdd_ray.units.teacher import read_teacher, units_of

OnStep = Callable[[int, Callable[[], State]], None]

_IMAGES_KEY = re.compile(r"classes/(\d{5,})(-\d{5,})?\.safetensors")


class Maker(Protocol):
    """A way to make the images of some classes. What it keeps (networks, a generative model) is loaded once a worker."""

    num_steps: int
    """Steps of a group, for the progress line."""

    def prepare(self, unit: str, report: Report) -> bool:
        """Do a unit that comes before all groups; return whether `unit` was one."""
        return False

    def make(
        self, group: Group, *, state: State | None, on_step: OnStep
    ) -> tuple[list[ClassImages], float]:
        """Return the images of a group and the seconds inside core; goes on from `state`, calls `on_step` after steps."""


def groups(config: DistillConfig, num_classes: int) -> dict[str, Group]:
    """Return unit id -> the classes, and the positions of their images, that it makes. Fixed by ipc and the options alone."""
    recover = config.recover
    if recover.method != "inversion":
        recover = replace(recover, moments="per_class")  # nothing is matched together
    planned = plan_groups(num_classes, config.num_atoms, recover)
    return {f"g{i:05d}": group for i, group in enumerate(planned)}


def images_key(label: int, first: int = 0) -> str:
    """Return the key of a class's images, or of those from position `first` on, where several units make them."""
    part = f"-{first:05d}" if first else ""
    return f"classes/{label:05d}{part}.safetensors"


def open_image_maker(
    device: torch.device,
    *,
    room: Room,
    teacher_room: Room,
    features_room: Room,
    barycenter_room: Room,
    source: Source,
    config: DistillConfig,
    units: dict[str, Group],
    model_identity: str = "",
) -> DoUnit:
    """Load what images are made with, and return the function that makes one group of classes."""
    inputs = Inputs(teacher_room, features_room, barycenter_room, source, config, device)
    maker: Maker
    if config.recover.method == "inversion":
        maker = Inversion(inputs)
    elif config.recover.method == "real":
        maker = Selection(inputs)
    else:
        maker = Sampler(
            config,
            room,
            inputs.network,
            inputs.teacher,
            inputs.real_at,
            model_identity=model_identity,
            seed=recover_seed(config),
            device=device,
        )

    def do_unit(unit: str, report: Report) -> None:
        if maker.prepare(unit, report):
            return
        attempt = room.begin(unit)
        if attempt is None:
            return
        keep = Checkpoints(room, unit, config.recover.checkpoint_s)

        def on_step(step: int, get_state: Callable[[], State]) -> None:
            keep.maybe(get_state)
            report(step / max(1, maker.num_steps), f"step {step}/{maker.num_steps} of {unit}")

        group = units[unit]
        images, in_core = maker.make(group, state=keep.load(), on_step=on_step)
        attempt.commit(
            {
                images_key(record.label, group.positions.start): codecs.encode_class_images(record)
                for record in images
            },
            metrics={
                "labels": [record.label for record in images],
                "losses": [record.losses for record in images],
                "seconds_in_core": round(in_core, 4),
            },
        )
        keep.clear()

    return do_unit


class Inputs:
    """What images are made from: the teachers, the classes' barycenters, and the real images."""

    def __init__(
        self,
        teacher_room: Room,
        features_room: Room,
        barycenter_room: Room,
        source: Source,
        config: DistillConfig,
        device: torch.device,
    ) -> None:
        self.teacher = read_teacher(teacher_room)
        self.features = ClassFeaturesReader(features_room)
        self.network = network_of(self.teacher, device, own_code=True)
        others = units_of(config)[1 : config.recover.teachers]
        self.others = [
            network_of(read_teacher(teacher_room, unit), device, own_code=True) for unit in others
        ]
        self.source, self.config, self.device = source, config, device
        self._barycenters = barycenter_room
        self._files = barycenter_room.committed().files

    def barycenter(self, label: int) -> ClassBarycenter:
        """Return a class's atoms, moments and real images by key."""
        return atoms.read_barycenter(self._barycenters, self._files, label)

    def start(self, solved: ClassBarycenter) -> np.ndarray | None:
        """Return the start images of a class at the tiles' side, or None for a noise start."""
        return _start(solved, self.source, self.network, self.config, self.features)

    def stood_for(self, solved: ClassBarycenter) -> np.ndarray:
        """Return the real images of a class that its images stand for, whole: (K, H, W, C), uint8."""
        return read_real(self.source, _keys(solved, self.config, self.features), self.config)

    def real_at(self, label: int, config: DistillConfig, most: int | None = None) -> np.ndarray:
        """Return up to `most` random real images of a class as `config` reads them."""
        return read_real(self.source, self.barycenter(label).random_keys[:most], config)


class Inversion(Maker):
    """Images whose features meet the atoms, and whose BatchNorm inputs meet the class's moments (`core/synthesis.py`)."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.num_steps = inputs.config.recover.iterations

    def make(
        self, group: Group, *, state: State | None, on_step: OnStep
    ) -> tuple[list[ClassImages], float]:
        inputs, teacher = self._inputs, self._inputs.teacher
        targets = [*map(self._target, read_ahead(inputs.barycenter, group.labels))]
        started = time.perf_counter()
        images = recover_group(
            [inputs.network, *inputs.others],
            targets,
            inputs.config.recover,
            image_size=teacher.image_size,
            channels=teacher.channels,
            mean_C=teacher.mean_C,
            std_C=teacher.std_C,
            seed=recover_seed(inputs.config),
            device=inputs.device,
            positions=group.positions,
            state=state,
            on_step=on_step,
        )
        return images, time.perf_counter() - started

    def _target(self, solved: ClassBarycenter) -> ClassTarget:
        counts_S = np.repeat(solved.moments.count_L, solved.moments.channels_L)
        assert (counts_S > 0).all(), f"class {solved.label} has no moments"
        anchored = self._inputs.config.recover.anchor_weight > 0
        return ClassTarget(
            label=solved.label,
            atoms_KD=solved.barycenter.atoms_KD,
            weights_K=solved.barycenter.weights_K,
            mean_S=solved.moments.mean_S,
            var_S=variance_S(solved.moments),
            start_KHWC=self._inputs.start(solved),
            anchors_KHWC=self._inputs.stood_for(solved) if anchored else None,
            others=self._in_others(solved.label, solved.barycenter.atoms_KD),
        )

    def _in_others(self, label: int, atoms_KD: np.ndarray) -> tuple[TeacherTarget, ...]:
        """Return what the images of a class shall meet in the teachers beside the first, measured on its real images."""
        inputs = self._inputs
        if not inputs.others:
            return ()
        real, batch = inputs.features.read(label), inputs.config.features.batch_size

        def batches() -> Iterator[np.ndarray]:
            for first in range(0, len(real.keys), batch):
                yield read_real(inputs.source, real.keys[first : first + batch], inputs.config)

        return targets_in(
            inputs.others,
            batches(),
            real.features_ND,
            atoms_KD,
            mean_C=inputs.teacher.mean_C,
            std_C=inputs.teacher.std_C,
        )


class Selection(Maker):
    """Real images as they are, or the teacher's easiest crops of them: what recover would begin from."""

    num_steps = 0

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def make(
        self, group: Group, *, state: State | None, on_step: OnStep
    ) -> tuple[list[ClassImages], float]:
        started = time.perf_counter()
        images = [self._class(label) for label in group.labels]
        return images, time.perf_counter() - started

    def _class(self, label: int) -> ClassImages:
        solved, config = self._inputs.barycenter(label), self._inputs.config
        images_KHWC = self._inputs.start(solved)
        assert images_KHWC is not None, "real images have a real start"
        # An image stands for as much of its class as its atom does; those that no atom chose count alike.
        equal_K = np.full(config.num_atoms, 1 / config.num_atoms)
        by_atom = config.recover.start == "nearest"
        weights_K = solved.barycenter.weights_K if by_atom else equal_K
        return ClassImages(label=label, images_KHWC=images_KHWC, weights_K=weights_K)


def _start(
    solved: ClassBarycenter,
    source: Source,
    network: torch.nn.Module,
    config: DistillConfig,
    features: ClassFeaturesReader | None = None,
) -> np.ndarray | None:
    """Return the start images of a class, or None for a noise start; herding needs the features."""
    if config.recover.start == "noise":
        return None
    if config.recover.start == "mosaic":
        return _mosaic(solved, source, network, config)
    real_KHWC = read_real(source, _keys(solved, config, features), config)
    return shrink(real_KHWC, tile_side(config.source.image_size, config.recover.tiles))


def _keys(
    solved: ClassBarycenter, config: DistillConfig, features: ClassFeaturesReader | None
) -> tuple[str, ...]:
    """Return the real images that the images of a class stand for: those that they start from, else the nearest to the atoms."""
    kind, k = config.recover.start, config.num_atoms
    if kind == "random":
        return solved.random_keys[:k]
    if kind != "herding":
        return solved.nearest_keys
    from wmdd_ray.core.selection import herding  # it loads POT, which nothing else here needs

    assert features is not None, "herding chooses by features"
    real = features.read(solved.label)
    return tuple(real.keys[i] for i in herding(real.features_ND, k))


def _mosaic(
    solved: ClassBarycenter, source: Source, network: torch.nn.Module, config: DistillConfig
) -> np.ndarray:
    """Return the teacher's easiest crops: one a tile, and without tiles 2 x 2 in each image, as RDED stores them."""
    tiles, image_size = config.recover.tiles, config.source.image_size
    factor = 2 if tiles == 1 else 1
    crops = easiest_crops(
        network,
        read_real(source, solved.random_keys, config),
        solved.label,
        config.num_atoms * factor**2,
        side=tile_side(image_size, tiles * factor),
        image_size=image_size,
        mean_C=config.source.mean,
        std_C=config.source.std,
        seed=unit_seed(config.seed, "mosaic", ""),
        crop_scale_min=config.recover.crop_scale_min,
    )
    return tile(crops, factor, tile_side(image_size, tiles))


def start_images(
    solved: ClassBarycenter, source: Source | None, teacher: Teacher, config: DistillConfig
) -> np.ndarray:
    """Return what the images of a class begin from (K, H, W, C), uint8, for people to look at; noise needs no source."""
    if config.recover.start != "noise":
        assert source is not None, "a real start needs the real images"
        # Only easy crops are chosen by the teacher.
        needed = config.recover.start == "mosaic"
        network = network_of(teacher, own_code=True) if needed else torch.nn.Identity()
        start_KHWC = _start(solved, source, network, config)
        assert start_KHWC is not None
        return start_KHWC
    side = tile_side(teacher.image_size, config.recover.tiles)
    shape_KCHW = (config.num_atoms, teacher.channels, side, side)
    noise_KHWC = noise_start(recover_seed(config), solved.label, shape_KCHW).transpose(0, 2, 3, 1)
    fraction_KHWC = noise_KHWC * np.array(teacher.std_C) + np.array(teacher.mean_C)
    return (fraction_KHWC.clip(0, 1) * 255).round().astype(np.uint8)


def recover_seed(config: DistillConfig) -> int:
    """Return the seed that all groups share, so that a class's draws do not depend on its group."""
    return unit_seed(config.seed, "recover", "")


def read_real(source: Source, keys: tuple[str, ...], config: DistillConfig) -> np.ndarray:
    """Return real images (K, H, W, C) uint8 by key, as the network sees them."""
    raws = source.read_keys(keys)
    return np.stack([decode_image(raw.content, config.source, raw.key) for raw in raws])


class ClassImagesReader:
    """Reads the distilled images of classes from a committed room, whatever units made them; lists its files once."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._files = files_by_class(room.committed().files)

    def read(self, labels: Iterable[int]) -> list[ClassImages]:
        """Return the images of some classes, verified, in the order given; several are read at a time."""
        return [*read_ahead(self._read_class, list(labels))]

    def _read_class(self, label: int) -> ClassImages:
        files = self._files[label]
        return join_positions([codecs.decode_class_images(self._room.read(file)) for file in files])


def files_by_class(files: Mapping[str, FileEntry]) -> dict[int, list[FileEntry]]:
    """Return label -> the files of a class's images among those of some units (`images_key`), in the order of the images."""
    by_class: dict[int, list[FileEntry]] = {}
    # Without its ending the key of the first images is the beginning of the others', and so before them.
    for key in sorted(files, key=lambda key: key.removesuffix(".safetensors")):
        if match := _IMAGES_KEY.fullmatch(key):
            by_class.setdefault(int(match[1]), []).append(files[key])
    return by_class
