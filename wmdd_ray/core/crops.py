"""The crops of real images that the teacher finds easiest: a start of recover, and a distilled set by themselves.

Legend: N images, B of a batch, P crops of an image, H W pixels, C channels.

References:
    Sun et al. 2024, RDED, On the Diversity and Realism of Distilled Dataset, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wmdd_ray.core.jitter import class_generator
from wmdd_ray.core.resample import crop, whole
from wmdd_ray.core.tiles import shrink
from wmdd_ray.core.views import draw_crops, to_input
from wmdd_ray.errors import DataError

# Purposes 0 and 1 of a class's streams are those of `jitter.py`.
_CROPS = 2


def easiest_crops(
    network: nn.Module,
    images_NHWC: np.ndarray,
    label: int,
    count: int,
    *,
    side: int,
    image_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    seed: int,
    crop_scale_min: float,
    crops_per_image: int = 5,
    batch_size: int = 256,
) -> np.ndarray:
    """Return the easiest crop of each of the `count` easiest images, easiest first: uint8 (count, side, side, C).

    Of a class of fewer images than `count` each gives several, the easiest of all of them first.

    Ease is the teacher's cross-entropy on what will be stored: the crop at `side` pixels, enlarged to the network's
    input as a view of it is. (RDED pads a small crop with zeros for its teacher, and draws square boxes only.) At side
    image_size // t, `tiles.tile` makes RDED's mosaic of t x t of them. RDED takes 300
    real images at random, five crops of each, of 0.08 of the area or more.

    Raises:
        DataError: not enough images, though each gives all its crops.
    """
    assert not network.training, "crops are scored by a network in eval mode"
    num_images = len(images_NHWC)
    crops_each = -(-count // num_images)
    if crops_each > crops_per_image:
        raise DataError(
            f"class {label} has {num_images} images to crop, at most {crops_per_image} times each, but {count} crops are needed; "
            "lower --ipc or --recover.tiles, or drop the class"
        )
    rng = class_generator(seed, label, _CROPS, 0)
    crop_NP4 = draw_crops(rng, num_images * crops_per_image, crop_scale_min)
    crop_NP4 = crop_NP4.reshape(num_images, crops_per_image, 4)
    device = next(network.parameters()).device
    at_once = max(1, batch_size // crops_per_image)
    crops, losses = [], []
    with torch.inference_mode():
        for first in range(0, num_images, at_once):
            rows = slice(first, first + at_once)
            pixels = _cropped(images_NHWC[rows], crop_NP4[rows], side, image_size)
            inputs = whole(to_input(pixels, mean_C, std_C, device), image_size)
            label_B = torch.full((len(pixels),), label, device=device)
            loss_B = F.cross_entropy(network(inputs).float(), label_B, reduction="none")
            loss_NP = loss_B.view(-1, crops_per_image).cpu().numpy()
            best_NE = loss_NP.argsort(axis=1, kind="stable")[:, :crops_each]
            each_N1 = np.arange(len(best_NE))[:, None]
            crops.append(pixels.reshape(-1, crops_per_image, *pixels.shape[1:])[each_N1, best_NE])
            losses.append(loss_NP[each_N1, best_NE])
    # The easiest of each image first, then the second of each.
    images_EN = np.concatenate(losses).argsort(axis=0, kind="stable").T
    picked = np.concatenate(crops)[images_EN, np.arange(crops_each)[:, None]]
    return picked.reshape(-1, *picked.shape[2:])[:count]


def _cropped(
    images_NHWC: np.ndarray, crop_NP4: np.ndarray, side: int, image_size: int
) -> np.ndarray:
    """Return all crops of some images as stored, uint8 (N P, side, side, C), one image's after the other's."""
    crop_B4 = torch.from_numpy(crop_NP4.reshape(-1, 4))
    images = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).float()
    repeated = images.repeat_interleave(crop_NP4.shape[1], dim=0)
    # A crop is enlarged as a rule, and then shrunk with antialiasing, which `crop` has not.
    large = crop(repeated, crop_B4, torch.zeros(len(crop_B4), dtype=torch.bool), image_size)
    large_NHWC = large.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return shrink(large_NHWC.numpy(), side)
