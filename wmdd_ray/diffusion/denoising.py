"""Training of a small class-conditional diffusion model, a noise predictor, on labelled images in memory.

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
from wmdd_ray.core.kernels import deterministic_gradients
from wmdd_ray.core.optimizer import (
    State,
    WeightAverage,
    load_training_state,
    make_optimizer,
    take_step,
    training_state,
)
from wmdd_ray.diffusion.model import new_unet
from wmdd_ray.diffusion.training import Training
from wmdd_ray.errors import ConfigError

OnEpoch = Callable[[int, float, Callable[[], State]], None]
"""on_epoch(epoch from 0, mean loss, get_state): from what `get_state` gives the result is that of a training that never stopped."""


def train_unet(
    training: Training,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    num_classes: int,
    device: torch.device | str,
    state: State | None,
    on_epoch: OnEpoch,
) -> tuple[nn.Module, Any]:
    """Return a UNet with the average of its weights, and its scheduler."""
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
    with deterministic_gradients(device):
        train_denoiser(
            network,
            scheduler,
            images_NHWC,
            labels_N,
            training,
            null_class=num_classes,
            state=state,
            on_epoch=on_epoch,
        )
    return network, scheduler


def train_denoiser(
    network: nn.Module,
    scheduler: Any,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    training: Training,
    *,
    null_class: int,
    state: State | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train `network` in place by AdamW at a cosine rate, and leave the average of its weights in it.

    It has `null_class` + 1 class embeddings at least, and the scheduler predicts noise.

    Raises:
        ConfigError: The loss is not finite.
    """
    device = next(network.parameters()).device
    epochs, peak, seed = training.epochs, training.learning_rate, training.seed
    optimizer = make_optimizer(network, "adamw", learning_rate=peak, weight_decay=0.0)
    average = WeightAverage(network, training.ema_decay)
    first = 0
    if state is not None:
        first = int(state["epoch"]) + 1
        load_training_state(network, optimizer, state)
        average.load(state)
    steps = steps_of(len(labels_N), training.batch_size)
    for epoch in range(first, epochs):
        network.train()
        rng = np.random.default_rng([seed, epoch, AUGMENTATION])
        total = torch.zeros((), device=device)
        batches = in_memory_batches(
            images_NHWC, labels_N, batch_size=training.batch_size, seed=seed, epoch=epoch
        )
        for step, (images_BHWC, labels_B) in enumerate(batches):
            x_BCHW = _pixels(images_BHWC, training.flip, rng, device)
            y_B = labels_B.to(device)
            loss = _loss(network, scheduler, x_BCHW, y_B, null_class, training.drop_class, rng)
            take_step(optimizer, loss, peak, epoch * steps + step, epochs * steps)
            average.update()
            total += loss.detach()
        mean_loss = float(total) / steps
        if not np.isfinite(mean_loss):
            raise ConfigError(
                f"training of the diffusion model: the loss of epoch {epoch} is {mean_loss}; lower --learning-rate "
                f"(now {peak:g})"
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
