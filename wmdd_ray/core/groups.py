"""Which images are optimized together: fixed by the data and the options, never by the cluster.

Moments of a class belong to all its images, so a group then is whole classes. The teacher's running moments (`moments="global"`)
are those of the mixture of classes: they are matched by one image of every class, so a group is a range of image positions
over a range of classes, as SRe2L makes image j of 100 classes at a time.

Legend: K images of a class.

References:
    Yin et al. 2023, SRe2L (its batches are of 100 images of consecutive classes, for one image position after another).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wmdd_ray.config import RecoverConfig
from wmdd_ray.records import ClassImages


class Group(NamedTuple):
    """Images `positions` of the classes `labels`."""

    labels: range
    positions: range


def plan_groups(num_classes: int, num_images: int, config: RecoverConfig) -> tuple[Group, ...]:
    """Return the groups that make each of the K images of every class once, in the order of their classes, then positions.

    For `moments="global"` the classes are split into the fewest nearly equal ranges of at most `images_per_group` (SRe2L leaves
    the last of its ranges short: a range of one class would match the mixture by a single image). `num_images` is K.
    """
    most = config.images_per_group
    if config.moments == "global":
        num_parts = -(-num_classes // most)
        cuts = [num_classes * part // num_parts for part in range(num_parts + 1)]
        positions_at_once = max(1, most // max(b - a for a, b in zip(cuts, cuts[1:], strict=False)))
        if needs_whole_classes(config):
            positions_at_once = num_images
    else:
        cuts = [*range(0, num_classes, max(1, most // num_images)), num_classes]
        positions_at_once = num_images
    return tuple(
        Group(range(first, last), range(k, min(k + positions_at_once, num_images)))
        for first, last in zip(cuts, cuts[1:], strict=False)
        for k in range(0, num_images, positions_at_once)
    )


def needs_whole_classes(config: RecoverConfig) -> bool:
    """Return whether a term is of all images of a class together."""
    return config.moments in ("per_class", "blend") or config.feature_term in ("mean", "rbf_mmd")


def join_positions(parts: Sequence[ClassImages]) -> ClassImages:
    """Return the images of one class out of those of its groups, in order; losses and curves are means over the images."""
    first = parts[0]
    if len(parts) == 1:
        return first
    assert len({part.label for part in parts}) == 1, "parts of one class"
    share = np.array([len(part.weights_K) for part in parts], dtype=np.float64)
    share /= share.sum()
    features = [part.features_KD for part in parts if part.features_KD is not None]
    return ClassImages(
        label=first.label,
        images_KHWC=np.concatenate([part.images_KHWC for part in parts]),
        weights_K=np.concatenate([part.weights_K for part in parts]),
        losses={
            name: float(share @ [part.losses[name] for part in parts]) for name in first.losses
        },
        curves={
            name: (share @ [part.curves[name] for part in parts]).astype(np.float32)
            for name in first.curves
        },
        curve_at_P=first.curve_at_P,
        features_KD=np.concatenate(features) if len(features) == len(parts) else None,
    )
