"""The classes that a page shows in full: pictures, weights, projection and loss curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wmdd_ray.core.groups import join_positions
from wmdd_ray.errors import WmddError
from wmdd_ray.product.pages.facts import RunFacts
from wmdd_ray.product.pages.projection import project
from wmdd_ray.product.pages.thumbnails import fit, thumbnail
from wmdd_ray.records import ClassBarycenter, ClassFeatures, ClassImages
from wmdd_ray.store import codecs
from wmdd_ray.store.sources import Source
from wmdd_ray.units.atoms import barycenter_key
from wmdd_ray.units.class_features import ClassFeaturesReader
from wmdd_ray.units.images import files_by_class, read_real, start_images
from wmdd_ray.units.teacher import read_teacher

PICTURE_BYTES = 9_000_000
"""Bytes of all pictures in a page, about; the rest of it takes 2 to 4 MB."""
MOST_CLASSES = 40
_MOST_IMAGES = 24
# Classes whose pictures tell how large pictures are.
_SAMPLED = 5


@dataclass(kw_only=True, eq=False)
class ShownClass:
    """One class, as far as it is there. `order` lists its atoms, heaviest first."""

    label: int
    images: ClassImages | None = None
    barycenter: ClassBarycenter | None = None
    features: ClassFeatures | None = None

    @property
    def weights_K(self) -> np.ndarray:
        known = self.barycenter.barycenter if self.barycenter else self.images
        assert known is not None
        return known.weights_K

    @property
    def order(self) -> list[int]:
        return np.argsort(-self.weights_K, kind="stable").tolist()


def chosen_labels(num_classes: int, wanted: tuple[int, ...]) -> list[int]:
    """Return the classes to show: those asked for, else all, or of many some that are evenly spread."""
    if wanted:
        return sorted(set(wanted))
    shown = min(num_classes, MOST_CLASSES)
    return np.linspace(0, num_classes - 1, shown).round().astype(int).tolist()


def shown_classes(
    facts: RunFacts, source: Source | None, labels: list[int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what the page shows of each class, and what of it is missing, in sentences.

    `source` are the real training images, None when they cannot be read.
    """
    reader = _Reader(facts, source)
    side, most = reader.picture_size(labels)
    share = PICTURE_BYTES // max(1, len(labels))
    shown = [reader.class_of(label, side, most, share) for label in labels]
    return [one for one in shown if one], list(dict.fromkeys(reader.missing))


class _Reader:
    """Reads one class after another; what cannot be read is noted in `missing`."""

    def __init__(self, facts: RunFacts, source: Source | None) -> None:
        self._facts, self._source, self._config = facts, source, facts.config
        self.missing: list[str] = []
        self._files = {
            name: {f.key: f for marker in stage.units.values() for f in marker.files}
            for name, stage in facts.stages.items()
        }
        self._images = files_by_class(self._files["recover"])
        features, squeeze = facts.stages["features"], facts.stages["squeeze"]
        self._features = ClassFeaturesReader(features.room) if features.commit else None
        self._teacher = read_teacher(squeeze.room) if squeeze.commit else None

    def read(self, label: int) -> ShownClass | None:
        """Return a class, None when nothing of it is there."""
        shown = ShownClass(label=label)
        stages = self._facts.stages
        if files := self._images.get(label):
            room = stages["recover"].room
            parts = [codecs.decode_class_images(room.read(file)) for file in files]
            shown.images = join_positions(parts)
        key = barycenter_key(label)
        if key in self._files["barycenters"]:
            content = stages["barycenters"].room.read(self._files["barycenters"][key])
            shown.barycenter = codecs.decode_class_barycenter(content)
        return shown if shown.images or shown.barycenter else None

    def pictures(self, shown: ShownClass, atoms: list[int]) -> list[dict[str, np.ndarray]]:
        """Return `distilled`, `start` and `real` of some atoms, as far as they are there."""
        parts: dict[str, np.ndarray] = {}
        if shown.images is not None:
            parts["distilled"] = shown.images.images_KHWC[atoms]
        if shown.barycenter is not None:
            keys = tuple(shown.barycenter.nearest_keys[j] for j in atoms)
            try:
                if self._source is not None:
                    parts["real"] = read_real(self._source, keys, self._config)
                if shown.images is not None and self._shows_start and self._teacher is not None:
                    start_KHWC = start_images(
                        shown.barycenter, self._source, self._teacher, self._config
                    )
                    parts["start"] = start_KHWC[atoms]
            except WmddError as error:
                self.missing.append(f"Real images cannot be read any more: {error}.")
                self._source = None
        return [{kind: part[i] for kind, part in parts.items()} for i in range(len(atoms))]

    @property
    def _shows_start(self) -> bool:
        """Whether a start is another picture than the real image nearest to the atom, and can be had."""
        recover = self._config.recover
        if recover.method == "diffusion":
            return False  # it is the sampler's noise
        if recover.start == "noise":
            return True
        if recover.method == "real" or recover.start == "herding":
            return False
        return self._source is not None and (recover.start != "nearest" or recover.tiles > 1)

    def picture_size(self, labels: list[int]) -> tuple[int, int]:
        """Return (side, images of a class) such that the pictures of all classes fit."""
        sample: list[np.ndarray] = []
        most = 1
        for label in labels[:: max(1, len(labels) // _SAMPLED)][:_SAMPLED]:
            shown = self.read(label)
            if shown is None:
                continue
            most = max(most, min(_MOST_IMAGES, len(shown.order)))
            trio = list(self.pictures(shown, shown.order[:1])[0].values())
            sample = max(sample, trio, key=_bytes_of)
        return fit(sample, len(labels), most, PICTURE_BYTES)

    def class_of(self, label: int, side: int, most: int, share_bytes: int) -> dict[str, Any] | None:
        """Return what the page shows of a class; None when nothing of it is there."""
        shown = self.read(label)
        if shown is None:
            return None
        if self._features is not None:
            shown.features = self._features.read(label)
        atoms = shown.order[:most]
        distances = _distances(shown)
        images: list[dict[str, Any]] = []
        used = 0
        for j, parts in zip(atoms, self.pictures(shown, atoms), strict=True):
            uris = {kind: thumbnail(image, side) for kind, image in parts.items()}
            used += sum(map(len, uris.values()))
            if images and used > share_bytes:
                break
            images.append({"atom": j, **uris, **{name: d[j] for name, d in distances.items()}})
        return {
            "label": label,
            "weights": [float(f"{w:.4g}") for w in shown.weights_K],
            "images": images,
            "curves": self._curves(shown),
            "projection": self._projection(shown),
        }

    def _projection(self, shown: ShownClass) -> dict[str, Any] | None:
        if shown.features is None or shown.barycenter is None:
            return None
        atoms_KD = shown.barycenter.barycenter.atoms_KD
        reached_KD = shown.images.features_KD if shown.images else None
        return project(shown.features.features_ND, atoms_KD, reached_KD)

    def _curves(self, shown: ShownClass) -> dict[str, Any] | None:
        images = shown.images
        if images is None or images.curve_at_P is None:
            return None
        terms = {
            name: [float(f"{v:.4g}") for v in curve_P] for name, curve_P in images.curves.items()
        }
        return {"at": images.curve_at_P.tolist(), "terms": terms}


def _distances(shown: ShownClass) -> dict[str, list[float]]:
    """Return the squared distance of every image, and of its real image, to its atom, in feature units."""
    distances: dict[str, np.ndarray] = {}
    if shown.barycenter is None:
        return {}
    atoms_KD = shown.barycenter.barycenter.atoms_KD
    if shown.images is not None and shown.images.features_KD is not None:
        difference_KD = shown.images.features_KD - atoms_KD
        distances["image_distance"] = np.square(difference_KD).sum(axis=1)
    if shown.features is not None:
        # Keys of one room are found in the other unless features/ was replaced since.
        row = {key: i for i, key in enumerate(shown.features.keys)}
        rows = [row.get(key, -1) for key in shown.barycenter.nearest_keys]
        difference_KD = shown.features.features_ND[rows] - atoms_KD
        if min(rows) >= 0:
            distances["real_distance"] = np.square(difference_KD).sum(axis=1)
    return {name: [float(f"{v:.4g}") for v in values] for name, values in distances.items()}


def _bytes_of(pictures: list[np.ndarray]) -> int:
    return sum(len(thumbnail(picture, max(picture.shape))) for picture in pictures)
