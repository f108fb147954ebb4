"""How the images of a row come about, by the core functions that the pipeline's stages call; nothing but `train` is seen.

Legend: N images, K images of one class as a student reads them (ipc tiles^2), D feature width, C channels, H W pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import nn

from jobs.benches.accuracy.splits import Workplace
from jobs.benches.accuracy.units import FeaturesUnit, ImagesUnit, network_at
from wmdd_ray.core.barycenter import nearest_images
from wmdd_ray.core.crops import easiest_crops
from wmdd_ray.core.joint import solve_joint
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import last_linear
from wmdd_ray.core.selection import herding, margin_of, solve_with_margin
from wmdd_ray.core.synthesis import ClassTarget, TeacherTarget, recover_group
from wmdd_ray.core.tiles import shrink, tile, tile_side
from wmdd_ray.core.transport import squared_distances_KN
from wmdd_ray.errors import DataError
from wmdd_ray.records import Barycenter, ClassFeatures, ClassImages
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.run import unit_seed
from wmdd_ray.store import codecs

# Real images of a class that RDED draws its crops from.
_MOSAIC_IMAGES = 300


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """The files of a row's images, what they weigh, and the seconds of selection and optimization."""

    files: dict[str, bytes]
    num_stored: int
    image_bytes: int
    seconds: float
    losses: dict[str, float] = field(default_factory=dict)


def make_images(unit: ImagesUnit, place: Workplace) -> Made:
    """Return the stored images of a row, class after class, and the weights of the images that students read."""
    train, num_classes = place.train, len(place.class_names)
    if unit.kind == "full":
        ones_N1 = np.ones((len(train.labels_N), 1))
        content = codecs.encode_images(
            train.images_NHWC, train.labels_N, ones_N1, place.class_names
        )
        return Made(files={}, num_stored=len(ones_N1), image_bytes=len(content), seconds=0.0)
    classes, seconds = _Maker(unit, place).classes()
    tiles, side = unit.recover.tiles, place.source.image_size
    stored_NHWC = np.concatenate([tile(c.images_KHWC, tiles, side) for c in classes])
    weights_N = np.concatenate([c.weights_K for c in classes])
    content = codecs.encode_images(
        stored_NHWC,
        np.repeat(np.arange(num_classes), unit.ipc),
        weights_N.reshape(-1, tiles**2),
        place.class_names,
    )
    return Made(
        files={f"{unit.id}.parquet": content},
        num_stored=len(stored_NHWC),
        image_bytes=len(content),
        seconds=seconds,
        losses={
            name: float(np.mean([c.losses[name] for c in classes])) for name in classes[0].losses
        },
    )


class _Maker:
    """Makes the images of all classes of a unit; the seconds of what an earlier attempt finished count too."""

    def __init__(self, unit: ImagesUnit, place: Workplace) -> None:
        self.unit, self.place = unit, place
        self.count = unit.ipc * unit.recover.tiles**2
        self.side = tile_side(place.source.image_size, unit.recover.tiles)

    def classes(self) -> tuple[list[ClassImages], float]:
        labels = list(range(len(self.place.class_names)))
        if self.unit.kind != "recover":
            started = time.perf_counter()
            return [self._real(label) for label in labels], time.perf_counter() - started
        together = max(1, self.unit.recover.images_per_group // self.count)
        groups = [labels[i : i + together] for i in range(0, len(labels), together)]
        found = [self._recovered(number, group) for number, group in enumerate(groups)]
        return [c for classes, _ in found for c in classes], sum(s for _, s in found)

    def _real(self, label: int) -> ClassImages:
        """Return a class of real images, shrunk where several share a stored one."""
        unit, train = self.unit, self.place.train
        rows_N = train.of_class(label)
        weights_K = np.full(self.count, 1 / self.count)
        if unit.kind == "random":
            chosen = self._random(len(rows_N), label)
        elif unit.kind == "herding":
            chosen = herding(self._features(label)[0].features_ND, self.count)
        elif unit.kind == "nearest":
            features_ND = self._features(label)[0].features_ND
            solved = self._solve(unit.features[0], features_ND, label)
            weights_K, chosen = solved.weights_K, nearest_images(solved.atoms_KD, features_ND)
        elif unit.kind == "mosaic":
            return self._class_images(label, self._crops(label), weights_K)
        else:
            raise AssertionError(f"no images of kind {unit.kind}")
        pixels = shrink(train.images_NHWC[rows_N[chosen]], self.side)
        return self._class_images(label, pixels, weights_K)

    def _recovered(self, number: int, labels: list[int]) -> tuple[list[ClassImages], float]:
        """Return a group of classes; each is committed by itself, so that a kill costs a part of one at most."""
        unit, place = self.unit, self.place
        room, name = place.room(unit.room), f"{unit.id}-g{number:02d}"
        if (attempt := room.begin_unit(name)) is not None:
            keep = Checkpoints(room, name, unit.recover.checkpoint_s)
            networks = self._networks()
            targets = [self._target(label) for label in labels]
            source = place.source
            images = recover_group(
                networks,
                targets,
                unit.recover,
                image_size=source.image_size,
                channels=source.channels,
                mean_C=source.mean,
                std_C=source.std,
                seed=unit_seed(unit.seed, "recover", ""),
                device=place.device,
                state=keep.load(),
                on_step=lambda _, get_state: keep.maybe(get_state),
            )
            files = {
                f"{name}/{c.label:05d}.safetensors": codecs.encode_class_images(c) for c in images
            }
            room.commit_unit(name, files, attempt=attempt, seconds=keep.seconds)
            keep.clear()
        marker = room.read_unit(name)
        return [codecs.decode_class_images(room.read(f)) for f in marker.files], marker.seconds

    def _target(self, label: int) -> ClassTarget:
        """Return what a class shall meet in the first teacher, and in the others at the same real images' atoms."""
        unit, train = self.unit, self.place.train
        first, *others = self._features(label)
        solved = self._solve(unit.features[0], first.features_ND, label)
        nearest = nearest_images(solved.atoms_KD, first.features_ND)
        rows_N = train.of_class(label)
        start = unit.recover.start
        pixels = None
        if start == "mosaic":
            pixels = self._crops(label)
        elif start != "noise":
            chosen = nearest if start == "nearest" else self._random(len(rows_N), label)
            pixels = shrink(train.images_NHWC[rows_N[chosen]], self.side)
        cells_N = _cells(solved.atoms_KD, first.features_ND) if others else np.empty(0)
        return ClassTarget(
            label=label,
            atoms_KD=solved.atoms_KD,
            weights_K=solved.weights_K,
            mean_S=first.moments.mean_S,
            var_S=variance_S(first.moments),
            start_KHWC=pixels,
            others=tuple(
                TeacherTarget(
                    atoms_KD=_means(other.features_ND, cells_N, nearest),
                    mean_S=other.moments.mean_S,
                    var_S=variance_S(other.moments),
                )
                for other in others
            ),
        )

    def _solve(self, features: FeaturesUnit, features_ND: np.ndarray, label: int) -> Barycenter:
        config, margin_N = self.unit.barycenters, np.zeros(len(features_ND))
        if config.label_weight is not None:
            return self._joint[label]
        if config.margin_fraction > 0:
            margin_N = margin_of(features_ND, *self._last_layer(features), label)
        return solve_with_margin(
            features_ND,
            margin_N,
            self.count,
            config,
            seed=self._seed(label),
            where=self._where(label),
        )

    @cached_property
    def _joint(self) -> tuple[Barycenter, ...]:
        """The barycenters of images and labels together, of all classes."""
        first, labels = self.unit.features[0], range(len(self.place.class_names))
        return solve_joint(
            [first.of_class(self.place, label).features_ND for label in labels],
            self._last_layer(first)[0],
            self.count,
            self.unit.barycenters,
            seeds=[self._seed(label) for label in labels],
            where=[self._where(label) for label in labels],
        )

    def _last_layer(self, features: FeaturesUnit) -> tuple[np.ndarray, np.ndarray]:
        linear = last_linear(network_at(self.place, features.teacher))
        return linear.weight.detach().cpu().numpy(), linear.bias.detach().cpu().numpy()

    def _seed(self, label: int) -> int:
        return unit_seed(self.unit.seed, "barycenters", str(label))

    def _crops(self, label: int) -> np.ndarray:
        """Return the easiest crops of a class: one a tile, and without tiles 2 x 2 in each image, as RDED stores them."""
        unit, source, train = self.unit, self.place.source, self.place.train
        factor = 2 if unit.recover.tiles == 1 else 1
        count = self.count * factor**2
        rows_N = train.of_class(label)
        seed = unit_seed(unit.seed, "mosaic", str(label))
        drawn = min(len(rows_N), max(_MOSAIC_IMAGES, 4 * self.count))
        chosen = np.random.default_rng(seed).choice(rows_N, drawn, replace=False)
        crops = easiest_crops(
            self._networks()[0],
            train.images_NHWC[chosen],
            label,
            count,
            side=tile_side(source.image_size, unit.recover.tiles * factor),
            image_size=source.image_size,
            mean_C=source.mean,
            std_C=source.std,
            seed=unit_seed(unit.seed, "mosaic", ""),
            crop_scale_min=unit.recover.crop_scale_min,
        )
        return tile(crops, factor, self.side)

    def _random(self, num_images: int, label: int) -> np.ndarray:
        if num_images < self.count:
            raise DataError(
                f"{self._where(label)} has {num_images} images, {self.count} are needed; lower --ipc"
            )
        rng = np.random.default_rng(unit_seed(self.unit.seed, "random", str(label)))
        return rng.choice(num_images, self.count, replace=False)

    def _features(self, label: int) -> list[ClassFeatures]:
        return [features.of_class(self.place, label) for features in self.unit.features]

    def _networks(self) -> list[nn.Module]:
        return [network_at(self.place, features.teacher) for features in self.unit.features]

    def _class_images(
        self, label: int, pixels_KHWC: np.ndarray, weights_K: np.ndarray
    ) -> ClassImages:
        return ClassImages(label=label, images_KHWC=pixels_KHWC, weights_K=weights_K)

    def _where(self, label: int) -> str:
        return f'class {label} ("{self.place.class_names[label]}")'


def _cells(atoms_KD: np.ndarray, features_ND: np.ndarray) -> np.ndarray:
    """Return the nearest atom of every image (N,)."""
    return squared_distances_KN(atoms_KD, features_ND).argmin(axis=0)


def _means(features_ND: np.ndarray, cells_N: np.ndarray, nearest_K: np.ndarray) -> np.ndarray:
    """Return another teacher's atoms: the means of the cells, and of an empty one the real image that was nearest."""
    atoms_KD = features_ND[nearest_K].copy()
    for k in np.unique(cells_N):
        atoms_KD[k] = features_ND[cells_N == k].mean(axis=0)
    return atoms_KD
