"""Adam on the pixels of synthetic images, with its whole state in the open.

Legend: B images, C color channels, H W pixels.

References:
    Kingma and Ba 2015, Adam, algorithm 1. Loshchilov and Hutter 2017, SGDR (the cosine, here without restarts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.optimizer import State, to_array


class PixelAdam:
    """Adam with cosine rate, elementwise on the images, with its whole state in the open.

    `torch.optim.Adam` keeps its step and schedule apart and hidden; here three arrays and one number are all.
    """

    def __init__(
        self,
        images_BCHW: Tensor,
        config: RecoverConfig,
        mean_C: Sequence[float],
        std_C: Sequence[float],
    ) -> None:
        """Start from `images_BCHW`: normalized by a mean and a standard deviation a channel, and overwritten."""
        self.images_BCHW, self.config, self.iteration = images_BCHW, config, 0
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float32, device=images_BCHW.device)[:, None, None]
            for v in (mean_C, std_C)
        )
        self.low, self.high = (0 - self.mean) / self.std, (1 - self.mean) / self.std
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(images_BCHW), torch.zeros_like(images_BCHW)

    def load(self, state: State) -> None:
        shape, device = self.images_BCHW.shape, self.images_BCHW.device
        assert state["images"].shape == shape, (state["images"].shape, shape)
        self.images_BCHW, self.exp_avg, self.exp_avg_sq = (
            torch.tensor(state[name], device=device) for name in ("images", "exp_avg", "exp_avg_sq")
        )
        self.iteration = int(state["iteration"])

    def state(self) -> State:
        """Return copies of everything that the next step depends on."""
        arrays = {name: to_array(getattr(self, name)) for name in ("exp_avg", "exp_avg_sq")}
        images = to_array(self.images_BCHW)
        return {"images": images, "iteration": np.array(self.iteration), **arrays}

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Move the images against `gradient`, and clamp them to the range of valid pixels."""
        config = self.config
        rate = 0.5 * config.learning_rate
        rate *= 1 + math.cos(math.pi * self.iteration / config.iterations)
        self.iteration += 1
        self.exp_avg.lerp_(gradient, 1 - config.beta1)
        self.exp_avg_sq.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        scale = math.sqrt(1 - config.beta2**self.iteration)
        divisor = self.exp_avg_sq.sqrt().div_(scale).add_(1e-8)
        rate /= 1 - config.beta1**self.iteration
        self.images_BCHW.addcdiv_(self.exp_avg, divisor, value=-rate)
        self.images_BCHW.clamp_(self.low, self.high)

    @torch.no_grad()
    def blend(self, start_BCHW: Tensor) -> None:
        """Make the images half themselves and half `start_BCHW`; the averages of the gradient stay."""
        self.images_BCHW.lerp_(start_BCHW, 0.5)

    @torch.no_grad()
    def pixels(self) -> np.ndarray:
        """Return the images as they are stored: uint8 BHWC."""
        fraction_BCHW = (self.images_BCHW * self.std + self.mean).clamp(0, 1)
        return to_array((fraction_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
