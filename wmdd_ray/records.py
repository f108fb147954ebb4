"""What crosses a stage boundary: dataclasses over numpy arrays, shape-checked when made.

Legend of the shape suffixes, here and in `core/`: N images, K = ipc x tiles^2 atoms or images of one class, D feature width,
L BatchNorm layers, S channels summed over those layers, Y classes, E label epochs, B batch, C color channels,
H W pixels, V views (one epoch of one image each).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Array = np.ndarray


def _shape(name: str, array: Array, expected: tuple[int | None, ...]) -> None:
    """Assert that `array` has `expected` shape; None matches any length."""
    ok = array.ndim == len(expected) and all(
        e is None or e == s for e, s in zip(expected, array.shape, strict=True)
    )
    assert ok, f"{name}: expected shape {expected}, got {array.shape}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A classifier at rest, with everything that is needed to feed it.

    `weights` maps state-dict names to arrays; `top1` is measured on held-out images, in [0, 1].
    """

    arch: str
    width: int
    small_stem: bool
    class_names: tuple[str, ...]
    image_size: int
    resize: int
    channels: int
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    top1: float
    weights: dict[str, Array]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        assert len(self.mean_C) == len(self.std_C) == self.channels, (
            "mean/std need one value a channel"
        )
        assert 0.0 <= self.top1 <= 1.0, f"top1 is a fraction, got {self.top1}"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Count, mean and centered second moment of the input of every BatchNorm layer; mergeable (Chan et al. 1979).

    `channels_L[l]` channels of layer l lie next to each other in the S axis, in network order. `count_L[l]` is the
    number of values per channel (images x height x width). Variance is m2 / count.
    """

    channels_L: tuple[int, ...]
    count_L: Array  # int64
    mean_S: Array  # float64
    m2_S: Array  # float64

    def __post_init__(self) -> None:
        total = sum(self.channels_L)
        _shape("count_L", self.count_L, (len(self.channels_L),))
        _shape("mean_S", self.mean_S, (total,))
        _shape("m2_S", self.m2_S, (total,))


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureChunk:
    """Features and per-class moments of one chunk of the source: the unit of the features stage.

    `keys` name the images inside the source (`Source.read_keys` finds them again).
    """

    keys: tuple[str, ...]
    labels_N: Array  # int64
    features_ND: Array  # float32
    moments: dict[int, Moments]

    def __post_init__(self) -> None:
        n = len(self.keys)
        _shape("labels_N", self.labels_N, (n,))
        _shape("features_ND", self.features_ND, (n, None))


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassFeatures:
    """All features of one class in source order, and its merged moments."""

    label: int
    keys: tuple[str, ...]
    features_ND: Array  # float32
    moments: Moments

    def __post_init__(self) -> None:
        _shape("features_ND", self.features_ND, (len(self.keys), None))


@dataclass(frozen=True, kw_only=True, eq=False)
class Barycenter:
    """A weighted point set, with the evidence of its solver.

    `cost` is W2^2 between the atoms and the class's features, in squared feature units, by exact transport.
    """

    atoms_KD: Array  # float32
    weights_K: Array  # float64, sum 1
    cost: float
    cost_history: tuple[float, ...]
    num_iters: int
    converged: bool

    def __post_init__(self) -> None:
        _shape("atoms_KD", self.atoms_KD, (len(self.weights_K), None))
        assert abs(float(self.weights_K.sum()) - 1) < 1e-6, f"weights sum to {self.weights_K.sum()}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassBarycenter:
    """What recover needs to know of one class.

    `nearest_keys` are distinct real images, one an atom, of least total squared distance; `random_keys` are as many
    and more drawn at random, in random order: starts and baselines. `whole_keys` are ipc nearest real images for a baseline without
    tiles: one an atom of a barycenter of ipc atoms; the same as `nearest_keys` where there are no tiles.
    """

    label: int
    num_images: int
    barycenter: Barycenter
    nearest_keys: tuple[str, ...]
    whole_keys: tuple[str, ...]
    random_keys: tuple[str, ...]
    moments: Moments


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassImages:
    """The distilled images of one class, pixels as stored, and how recover got there.

    `losses` are the last value of every loss term, `curves` its values (float32) after the iterations `curve_at_P`
    (int32, ascending). `features_KD` are what the stored images reach in the (first) teacher. Images that were not
    recovered have no curves and no features.
    """

    label: int
    images_KHWC: Array  # uint8
    weights_K: Array  # float64
    losses: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Array] = field(default_factory=dict)
    curve_at_P: Array | None = None
    features_KD: Array | None = None

    def __post_init__(self) -> None:
        assert self.images_KHWC.dtype == np.uint8, self.images_KHWC.dtype
        _shape("images_KHWC", self.images_KHWC, (len(self.weights_K), None, None, None))
        if self.features_KD is not None:
            _shape("features_KD", self.features_KD, (len(self.weights_K), None))
        for name, curve_P in self.curves.items():
            assert self.curve_at_P is not None, "curves need their iterations"
            _shape(f"curve {name}", curve_P, (len(self.curve_at_P),))


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """V self-contained views: each row replays to the same pixels without its neighbors.

    Crops are (top, left, height, width) as fractions of the image; rendering rounds them (`core.rendering`). A view is mixed with
    the view of a partner image: `mix_box_V4` = (top, left, bottom, right) in pixels of the output is taken from the partner
    (CutMix). `share_V` is the image's own share in [0, 1].
    """

    image_V: Array  # int32, index into the data set
    crop_V4: Array  # float32
    flip_V: Array  # bool
    partner_V: Array  # int32
    partner_crop_V4: Array  # float32
    partner_flip_V: Array  # bool
    mix_box_V4: Array  # int16
    share_V: Array  # float32

    def __post_init__(self) -> None:
        v = len(self.image_V)
        for name in ("crop_V4", "partner_crop_V4", "mix_box_V4"):
            _shape(name, getattr(self, name), (v, 4))
        for name in ("flip_V", "partner_V", "partner_flip_V", "share_V"):
            _shape(name, getattr(self, name), (v,))

    def __len__(self) -> int:
        return len(self.image_V)


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewDraw:
    """All that a block's views are drawn again from (`core.views.draw_block`), with the label epochs.

    `index_N` are the positions in the data set of the images that mix among themselves; the rest is as in `ViewConfig`.
    """

    seed: int
    image_size: int
    index_N: Array  # int32
    crop_scale_min: float
    flip: bool
    mix: str
    mix_alpha: float = 1.0  # always; label files have it


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftLabels:
    """Teacher logits of V views, compressed; each row relative to its largest logit.

    Full: `values_VK` holds all Y logits and `indices_VK` is None. Top-k: the k largest, their class indices, and
    `rest_V`, the log of the remaining softmax mass relative to the kept logits' own scale. `values_VK` are the logits
    themselves as float16; or as uint8 the distance below the largest in steps of `step_V`.
    """

    num_classes: int
    values_VK: Array  # float16 or uint8
    indices_VK: Array | None = None  # uint16
    rest_V: Array | None = None  # float16
    step_V: Array | None = None  # float16


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftLabelBlock:
    """The unit of relabel: consecutive label epochs, every distilled image once an epoch, image-major inside.

    With `draw`, only that is stored of the views. Logits of no columns are not stored: the reader computes them.
    """

    first_epoch: int
    num_epochs: int
    views: Views
    labels: SoftLabels
    draw: ViewDraw | None = None

    def __post_init__(self) -> None:
        assert len(self.views) == len(self.labels.values_VK), "one label a view"
