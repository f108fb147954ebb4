from __future__ import annotations

import numpy as np
import torch

from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.pixel_adam import PixelAdam


def test_the_steps_are_those_of_torch_s_adam_under_its_cosine_schedule() -> None:
    config = RecoverConfig(iterations=5, learning_rate=0.3)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((2, 1, 3, 3), generator=generator) * 0.1
    mine = PixelAdam(start.clone(), config, (0.5,), (1e-3,))
    theirs = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([theirs], lr=0.3, betas=(0.5, 0.9), eps=1e-8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=5)
    for _ in range(5):
        gradient = torch.randn(start.shape, generator=generator)
        mine.step(gradient)
        theirs.grad = gradient
        adam.step()
        schedule.step()
    torch.testing.assert_close(mine.images_BCHW, theirs.detach())


def test_pixels_are_rounded_and_clamped() -> None:
    fractions = torch.tensor([-0.2, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.7])
    images = ((fractions - 0.5) / 0.25).view(1, 1, 1, 5)
    got = PixelAdam(images, RecoverConfig(), (0.5,), (0.25,)).pixels()
    np.testing.assert_array_equal(
        got, np.array([0, 0, 1, 255, 255], dtype=np.uint8).reshape(1, 1, 5, 1)
    )
