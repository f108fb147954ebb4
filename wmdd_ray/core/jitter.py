"""Random crops, flips and rolls of the images during synthesis: drawn by class, applied to a batch.

Legend: G classes that share a forward pass, K images of each, B = G K, C channels, H W pixels, T iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.views import crop, draw_crops

# Iterations drawn at once: making a generator costs as much as some thousand numbers. Part of the result: another
# value is another random sequence.
_BLOCK = 256
_START, _JITTER = 0, 1


def class_generator(seed: int, label: int, purpose: int, block: int) -> np.random.Generator:
    """Return the stream of (seed, label, purpose, block); its company, order and process do not matter."""
    key = np.array([seed, label], dtype=np.uint64)
    counter = np.array([0, 0, block, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def noise_start(seed: int, label: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal float32 numbers of a class, in normalized pixel units."""
    return class_generator(seed, label, _START, 0).standard_normal(shape, dtype=np.float32)


class Jitter:
    """The augmentation of each image at each iteration; any iteration can be asked for."""

    def __init__(
        self,
        labels: Sequence[int],
        num_atoms: int,
        config: RecoverConfig,
        *,
        image_size: int,
        seed: int,
        device: torch.device | str,
        positions: range | None = None,
    ) -> None:
        """Prepare the streams of `labels`, `num_atoms` images each, as the network sees them: `image_size` pixels a side.

        With `positions` only these of the images of every class are there; each is treated as in the company of all.
        """
        self.labels, self.num_atoms, self.config = tuple(labels), num_atoms, config
        self.of_class = range(num_atoms) if positions is None else positions
        self.image_size, self.seed, self.device = image_size, seed, device
        self._block = -1
        self._crop_TB4 = self._flip_TB = self._roll_TB2 = torch.empty(0)

    def __call__(self, images_BCHW: Tensor, iteration: int) -> Tensor:
        """Return the images cropped and resized to `image_size`, mirrored, then rolled cyclically; differentiable."""
        if iteration // _BLOCK != self._block:
            self._draw(iteration // _BLOCK)
        t = iteration % _BLOCK
        views_BCHW = crop(images_BCHW, self._crop_TB4[t], self._flip_TB[t], self.image_size)
        return roll(views_BCHW, self._roll_TB2[t]) if self.config.roll_px else views_BCHW

    def _draw(self, block: int) -> None:
        shape = (_BLOCK, self.num_atoms)
        reach = self.config.roll_px
        crops, flips, rolls = [], [], []
        for label in self.labels:
            rng = class_generator(self.seed, label, _JITTER, block)
            boxes = draw_crops(rng, _BLOCK * self.num_atoms, self.config.crop_scale_min)
            crops.append(boxes.reshape(*shape, 4)[:, self.of_class])
            flips.append(((rng.random(shape) < 0.5) & self.config.flip)[:, self.of_class])
            rolls.append(rng.integers(-reach, reach + 1, (*shape, 2))[:, self.of_class])
        self._crop_TB4 = self._on_device(crops)
        self._flip_TB = self._on_device(flips)
        self._roll_TB2 = self._on_device(rolls)
        self._block = block

    def _on_device(self, parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts, axis=1)).to(self.device)


def roll(images_BCHW: Tensor, shift_B2: Tensor) -> Tensor:
    """Return every image rolled by its own (rows, columns), as `torch.roll`; differentiable."""
    return _Roll.apply(images_BCHW, shift_B2)


class _Roll(torch.autograd.Function):
    """A permutation of the pixels. Its gradient is the reverse roll: a gather, where a gather's would be a scatter."""

    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor, shift_B2: Tensor) -> Tensor:
        ctx.save_for_backward(shift_B2)
        return _rolled(images_BCHW, shift_B2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (shift_B2,) = ctx.saved_tensors
        return _rolled(grad_outputs[0], -shift_B2), None


def _rolled(images_BCHW: Tensor, shift_B2: Tensor) -> Tensor:
    b, c, h, w = images_BCHW.shape
    row_H = torch.arange(h, device=images_BCHW.device)
    column_W = torch.arange(w, device=images_BCHW.device)
    row_BH = (row_H - shift_B2[:, :1]) % h
    column_BW = (column_W - shift_B2[:, 1:]) % w
    index_BP = (row_BH[:, :, None] * w + column_BW[:, None, :]).view(b, 1, h * w)
    flat_BCP = images_BCHW.reshape(b, c, h * w)
    return flat_BCP.gather(2, index_BP.expand(b, c, h * w)).view(b, c, h, w)
