"""Training of a small class-conditional diffusion model on labelled images in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wmdd_ray.options import check, option

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from wmdd_ray.core.optimizer import State


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the weights depend on, beside the images."""

    widths: tuple[int, ...] = (16, 32, 64)
    """Channels at the image's resolution, at its half, and so on; multiples of 8. The last one has attention."""
    layers: int = option(1, ge=1)
    """Blocks at each resolution."""
    epochs: int = option(100, ge=1)
    """Passes over the images; of Fashion-MNIST 3 are as many steps."""
    batch_size: int = option(64, ge=1)
    """Images of a step."""
    learning_rate: float = option(2e-3, gt=0)
    """Peak rate of AdamW; cosine to 0."""
    ema_decay: float = option(0.995, ge=0, lt=1)
    """Decay a step of the weights' moving average, which is what is kept."""
    drop_class: float = option(0.1, ge=0, lt=1)
    """Share of the labels that are left out, for --recover.diffusion.guidance-scale (0.1 in DiT)."""
    flip: bool = False
    """Mirror half of the images (off for digits: a mirrored digit is no digit)."""
    seed: int = option(0, ge=0, lt=2**63)
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check(self)


def train_unet(
    training: Training,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    num_classes: int,
    device: torch.device | str,
    state: State | None,
    on_epoch: Callable[[int, float, Callable[[], State]], None],
) -> tuple[nn.Module, Any]:
    """Return a UNet with the average of its weights, and its scheduler.

    Args:
        training: What the weights depend on, beside the images.
        images_NHWC: uint8, square.
        labels_N: int64.
        num_classes: Classes; one more stands for none.
        device: Where to train.
        state: Resume from here: what `get_state` gave.
        on_epoch: Called as on_epoch(epoch from 0, mean loss, get_state).
    """
    import torch

    from wmdd_ray.core.synthesis import deterministic_convolutions
    from wmdd_ray.diffusion.denoising import train_denoiser
    from wmdd_ray.diffusion.model import new_unet

    with torch.random.fork_rng([]):
        torch.manual_seed(training.seed)
        network, scheduler = new_unet(
            training.widths,
            image_size=images_NHWC.shape[1],
            channels=images_NHWC.shape[3],
            num_classes=num_classes,
            layers=training.layers,
        )
    # A third less time on CPU, and what tensor cores want.
    network = network.to(device, memory_format=torch.channels_last)
    with deterministic_convolutions():
        train_denoiser(
            network,
            scheduler,
            images_NHWC,
            labels_N,
            null_class=num_classes,
            epochs=training.epochs,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            ema_decay=training.ema_decay,
            drop_class=training.drop_class,
            flip=training.flip,
            seed=training.seed,
            state=state,
            on_epoch=on_epoch,
        )
    return network, scheduler
