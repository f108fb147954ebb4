"""Training of a noise predictor on labelled images, so that it can be sampled by class and without one.

Minimized is the mean of |noise - network(x_t, t, y)|^2 over images, times t and noise; a tenth of the labels, drawn anew
every step, is replaced by the class that stands for none. What is kept is a moving average of the weights.

Every random choice is keyed by (seed, epoch) and the rate is a function of the step, so training continues at an epoch's
boundary from the state alone.

Legend: N images, B batch, Y classes, C channels, H W pixels.

References:
    Ho et al. 2020, DDPM, algorithm 1. Ho and Salimans 2021, Classifier-free diffusion guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_ray.core.batches import AUGMENTATION, in_memory_batches, steps_of
from wmdd_ray.core.optimizer import (
    State,
    WeightAverage,
    load_training_state,
    make_optimizer,
    take_step,
    training_state,
)
from wmdd_ray.errors import ConfigError


def train_denoiser(
    network: nn.Module,
    scheduler: Any,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    null_class: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float = 0.999,
    drop_class: float = 0.1,
    flip: bool = False,
    seed: int = 0,
    state: State | None = None,
    on_epoch: Callable[[int, float, Callable[[], State]], None] | None = None,
) -> None:
    """Train `network` in place by AdamW at a cosine rate, and leave the average of its weights in it.

    Args:
        network: UNet2DModel with `null_class` + 1 class embeddings at least, on its device.
        scheduler: a scheduler of diffusers that predicts noise, for `add_noise` and its number of steps.
        images_NHWC: uint8.
        labels_N: int64.
        null_class: what stands for no class.
        epochs: passes over the images.
        batch_size: images of a step.
        learning_rate: peak rate.
        ema_decay: a step's, of the average.
        drop_class: share of the labels that are replaced.
        flip: mirror half of the images, drawn anew every epoch.
        seed: of everything random.
        state: resume from here: what `get_state` gave; the result is that of a training that never stopped.
        on_epoch: called as on_epoch(epoch from 0, mean loss, get_state).

    Raises:
        ConfigError: The loss is not finite.
    """
    device = next(network.parameters()).device
    optimizer = make_optimizer(network, "adamw", learning_rate=learning_rate, weight_decay=0.0)
    average = WeightAverage(network, ema_decay)
    first = 0
    if state is not None:
        first = int(state["epoch"]) + 1
        load_training_state(network, optimizer, state)
        average.load(state)
    steps = steps_of(len(labels_N), batch_size)
    for epoch in range(first, epochs):
        network.train()
        rng = np.random.default_rng([seed, epoch, AUGMENTATION])
        total = torch.zeros((), device=device)
        batches = in_memory_batches(
            images_NHWC, labels_N, batch_size=batch_size, seed=seed, epoch=epoch
        )
        for step, (images_BHWC, labels_B) in enumerate(batches):
            x_BCHW = _pixels(images_BHWC, flip, rng, device)
            y_B = labels_B.to(device)
            loss = _loss(network, scheduler, x_BCHW, y_B, null_class, drop_class, rng)
            take_step(optimizer, loss, learning_rate, epoch * steps + step, epochs * steps)
            average.update()
            total += loss.detach()
        mean_loss = float(total) / steps
        if not np.isfinite(mean_loss):
            raise ConfigError(
                f"training of the diffusion model: the loss of epoch {epoch} is {mean_loss}; lower --learning-rate "
                f"(now {learning_rate:g})"
            )
        if on_epoch is not None:

            def get_state(epoch: int = epoch) -> State:
                state = training_state(network, optimizer) | average.state()
                return state | {"epoch": np.array(epoch)}

            on_epoch(epoch, mean_loss, get_state)
    average.put_into_network()
    network.eval()


def _loss(
    network: nn.Module,
    scheduler: Any,
    x_BCHW: Tensor,
    labels_B: Tensor,
    null_class: int,
    drop_class: float,
    rng: np.random.Generator,
) -> Tensor:
    """Return how far the predicted noise is from that which is added here, at random times and to some without their class."""
    device, count = x_BCHW.device, len(x_BCHW)
    noise_BCHW = _drawn(rng.standard_normal(tuple(x_BCHW.shape), dtype=np.float32), device)
    t_B = _drawn(rng.integers(int(scheduler.config.num_train_timesteps), size=count), device)
    without_B = _drawn(rng.random(count) < drop_class, device)
    classes_B = torch.where(without_B, null_class, labels_B)
    noisy_BCHW = scheduler.add_noise(x_BCHW, noise_BCHW, t_B)
    predicted = network(noisy_BCHW, t_B, class_labels=classes_B, return_dict=False)[0]
    return F.mse_loss(predicted, noise_BCHW)


def _pixels(
    images_BHWC: Tensor, flip: bool, rng: np.random.Generator, device: torch.device
) -> Tensor:
    """Return uint8 images as float32 in [-1, 1] (B, C, H, W), half of them mirrored with `flip`."""
    x = images_BHWC.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    if flip:
        mirrored_B = _drawn(rng.random(len(x)) < 0.5, device)
        x = torch.where(mirrored_B[:, None, None, None], x.flip(3), x)
    return x


def _drawn(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
