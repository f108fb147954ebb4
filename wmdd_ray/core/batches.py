"""Batches of images that lie in memory.

Legend: N images, B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from wmdd_ray.core.views import to_input
from wmdd_ray.errors import ConfigError

Batch = tuple[torch.Tensor, torch.Tensor]

# What a stream of random numbers is for. Each has its own word in the seed, never 0: numpy pads
# seeds with zeros, so [seed, epoch] and [seed, epoch, 0] are the same stream.
ORDER, AUGMENTATION = 1, 2


def order_of(num_images: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled order of one epoch: a permutation of the images, int64 (N,)."""
    return np.random.default_rng([seed, epoch, ORDER]).permutation(num_images)


def steps_of(num_images: int, batch_size: int) -> int:
    """Return the batches of an epoch of `in_memory_batches`: whole ones, and at least one."""
    return max(1, num_images // batch_size)


def student_steps(num_views: int, batch_size: int) -> int:
    """Return the steps of a student's epoch: batches of equal size up to one view, of `batch_size` at most.

    Where the last of batches of two would be of one, which BatchNorm refuses, one of them is of three.
    """
    return max(1, min(math.ceil(num_views / batch_size), num_views // min(2, batch_size)))


def in_memory_batches(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    part: int = 0,
    num_parts: int = 1,
) -> Iterator[Batch]:
    """Yield one part of each batch of one shuffled epoch: (images uint8 NHWC, labels int64).

    The order is drawn from (seed, epoch). Every part has `steps_of(N, batch_size)` batches of the same size, and those of a step
    are disjoint. `batch_size` images are those of all parts of a step; a remainder of their division by `num_parts` is left out,
    as is an incomplete last batch.

    Raises:
        ConfigError: A batch has fewer images than parts.
    """
    num_images = len(images_NHWC)
    share = min(batch_size, num_images) // num_parts
    if share < 1:
        raise ConfigError(
            f"--squeeze.batch-parts: expected at most one part an image of a batch, got {num_parts} parts of batches of "
            f"{min(batch_size, num_images)} images; lower it"
        )
    order_N = order_of(num_images, seed=seed, epoch=epoch)
    for step in range(steps_of(num_images, batch_size)):
        start = step * batch_size + part * share
        index_B = order_N[start : start + share]
        yield torch.from_numpy(images_NHWC[index_B]), torch.from_numpy(labels_N[index_B])


def eval_batches(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield (normalized float32 NCHW, int64 labels) of uint8 images, in order; mean in [0, 1], deviation in (0, 1], by channel."""
    for start in range(0, len(images_NHWC), batch_size):
        part = slice(start, start + batch_size)
        labels_B = torch.tensor(labels_N[part], device=device)
        yield to_input(images_NHWC[part], mean_C, std_C, device), labels_B


class EpochBatches(Sampler[list[int]]):
    """Batches of one pass over the images for each iteration: shuffled, of equal size up to one image, none left out.

    Their number is `student_steps`, so that no last batch is too small for BatchNorm. With several ranks each has an equal share
    of every batch, and a remainder of its division by `world` is left out.

    Attributes:
        epoch: the pass that the next iteration gives, from 0; it grows by one an iteration.
    """

    def __init__(
        self, num_images: int, cycle: int, batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        self._steps = student_steps(num_images, batch_size)
        if num_images // self._steps < world:
            raise ConfigError(
                f"batch_size: expected an image or more for each of {world} processes, got {batch_size}, which makes batches of "
                f"{num_images // self._steps}"
            )
        self._num_images, self._cycle = num_images, cycle
        self._seed, self._rank, self._world = seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order_N = order_of(self._num_images, seed=self._seed, epoch=epoch)
        first = epoch % self._cycle * self._num_images
        for batch_B in np.array_split(first + order_N, self._steps):
            share = len(batch_B) // self._world
            yield batch_B[self._rank * share :][:share].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration give this pass: to resume, or to repeat one."""
        self.epoch = epoch
