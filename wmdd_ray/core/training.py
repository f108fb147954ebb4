"""Training of classifiers: the teacher on hard labels, students on soft labels of stored views.

Nothing here knows a clock, a file or a cluster. Every random choice is keyed by (seed, epoch), and
the learning rate is a function of the step, so training continues at an epoch's boundary from the
weights and the optimizer's state alone (`optimizer.training_state`).

Legend: N images, B batch, V views, Y classes, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wmdd_ray.config import EvaluateConfig, SqueezeConfig
from wmdd_ray.core.batches import AUGMENTATION, Batch, order_of, student_steps
from wmdd_ray.core.curvature import classifier_curvature
from wmdd_ray.core.kernels import deterministic_gradients
from wmdd_ray.core.optimizer import (
    State,
    WeightAverage,
    descend,
    load_training_state,
    make_optimizer,
    take_step,
    training_state,
)
from wmdd_ray.core.split_batch import SplitBatch
from wmdd_ray.core.student_losses import (
    hard_label_loss,
    logit_loss,
    soft_label_loss,
    transport_loss,
)
from wmdd_ray.core.views import (
    Images,
    StoredImages,
    crop,
    draw_crops,
    render_views,
    take,
    to_input,
)
from wmdd_ray.errors import ConfigError
from wmdd_ray.records import Views

# Views are rendered some batches at a time: fewer, larger operations, in at most this many floats.
_RENDER_FLOATS = 1 << 24


def optimizer_and_average(
    network: nn.Module, config: SqueezeConfig | EvaluateConfig
) -> tuple[torch.optim.Optimizer, WeightAverage | None]:
    """Return what a training steps with, and averages by; the network's device and memory format are set before."""
    optimizer = make_optimizer(
        network,
        config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        **({"momentum": config.momentum} if isinstance(config, SqueezeConfig) else {}),
    )
    average = WeightAverage(network, config.ema_decay) if config.ema_decay > 0 else None
    return optimizer, average


def train_classifier(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch_batches: Callable[[int, int], Iterable[Batch]],
    config: SqueezeConfig,
    *,
    steps_per_epoch: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    seed: int,
    rank: int = 0,
    world: int = 1,
    start_epoch: int = 0,
    average: WeightAverage | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    on_curvature: Callable[[int, float], None] | None = None,
) -> None:
    """Train `network` in place on hard labels, from `start_epoch` to `config.epochs`.

    The loss is the cross-entropy, plus `config.curvature_weight` times the curvature of the same augmented images
    (`core.curvature`; the weight is taken as it is, see `SqueezeConfig.at_ipc`).

    The rate rises per step during `config.warmup_epochs`, then falls as a cosine to 0. The images are cropped, resized
    back, shifted and flipped at random. To resume: load the `training_state` that `on_epoch` saved after epoch e, and
    pass `start_epoch` = e + 1; the result is the same to the last bit.

    Args:
        network: classifier on its device, the same on every worker. Channels-last format makes 1.5 times the steps per
            second on CPU.
        optimizer: of `optimizer_and_average`.
        epoch_batches: epoch, part -> a part of each batch, (uint8 NHWC, int64 labels). At most
            `steps_per_epoch` are used; every part needs equally many.
        config: epochs, rate, augmentation, precision.
        steps_per_epoch: batches of an epoch.
        mean_C: per-channel mean of the input in [0, 1].
        std_C: per-channel standard deviation of the input in [0, 1].
        seed: seed of the augmentation.
        rank: this worker, in torch's process group if there are several.
        world: number of workers, which divides `config.batch_parts`; it changes no bit.
        start_epoch: first epoch to train.
        average: of `optimizer_and_average`; updated at every step, and put into the network at the end.
        on_epoch: called with (epoch, mean loss) after every epoch.
        on_curvature: called with (epoch, mean curvature term, without its weight) before `on_epoch`, when the weight is
            positive.

    Raises:
        ConfigError: The loss is not finite.
    """
    num_steps = config.epochs * steps_per_epoch
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    device = next(network.parameters()).device
    split = SplitBatch(network, config.batch_parts, rank, world)
    for epoch in range(start_epoch, config.epochs):
        network.train()
        parts = [_Part(network, config, mean_C, std_C, (seed, epoch, k)) for k in split.own]
        batches = zip(*(epoch_batches(epoch, k) for k in split.own), strict=False)
        count = 0
        for batch_k in islice(batches, steps_per_epoch):
            losses_k = [partial(part.loss, *b) for part, b in zip(parts, batch_k, strict=True)]
            with deterministic_gradients(device):
                split.backward(losses_k)
            step = epoch * steps_per_epoch + count
            descend(optimizer, config.learning_rate, step, num_steps, warmup_steps)
            if average is not None:
                average.update()
            count += 1
        num_losses = max(count, 1) * config.batch_parts
        mean_loss = sum(split.gathered(torch.stack([part.total for part in parts]))) / num_losses
        _require_finite(mean_loss, "squeeze", epoch, config.learning_rate, config.curvature_weight)
        if on_curvature is not None and config.curvature_weight > 0:
            bent = split.gathered(torch.stack([part.bent for part in parts]))
            on_curvature(epoch, sum(bent) / num_losses)
        if on_epoch is not None:
            on_epoch(epoch, mean_loss)
    if average is not None:
        average.put_into_network()


def train_student(
    network: nn.Module,
    images_NCHW: Images,
    label_epochs: Callable[[int], tuple[Views, np.ndarray | None]],
    weights_N: np.ndarray | None,
    config: EvaluateConfig,
    *,
    epochs: int,
    image_size: int,
    seed: int,
    classes_N: np.ndarray | None = None,
    labels: Literal["soft", "hard"] = "soft",
    pixels: Callable[[int], torch.Tensor] | None = None,
    state: State | None = None,
    on_epoch: Callable[[int, float, Callable[[], State]], None] | None = None,
) -> None:
    """Train `network` in place on views and their labels; the last epoch's weights count.

    The rows of an epoch are shuffled by (seed, epoch) and split into `student_steps` batches
    of equal size, up to one image: no image is left out, and no last batch is too small for
    BatchNorm.

    With `config.ema_decay` the network ends as the moving average of its weights and of BatchNorm's
    running moments (`WeightAverage`); `on_epoch` still sees the weights that are trained.

    Args:
        network: classifier on the images' device.
        images_NCHW: normalized images, or `StoredImages`.
        label_epochs: epoch -> (views, logits_VY; None for hard labels); it cycles when fewer are stored.
        weights_N: weight of each image, used (normalized to mean 1) when `config.weighted_loss`.
        config: optimizer, rate, batch size, losses, average, precision.
        epochs: calls of `label_epochs`.
        image_size: side of a view, pixels.
        seed: seed of the order.
        classes_N: class of each image, int; needed for hard labels and for `config.ce_weight`.
        labels: `soft` trains on the teacher's logits by `config.loss` and `config.ce_weight`, `hard`
            on the images' classes alone, mixed as the views are, by cross-entropy.
        pixels: epoch -> `view_bytes` of its views, where those of `StoredImages` were rendered before.
        state: resume from here: what `get_state` gave; the result is that of a training that never stopped.
        on_epoch: called with (epoch, mean loss, get_state) after every epoch.

    Raises:
        ConfigError: The loss is not finite.
    """
    device = next(network.parameters()).device
    # oneDNN's and cuDNN's faster convolutions: 1.5 times the steps per second on CPU.
    network.to(memory_format=torch.channels_last)
    optimizer, average = optimizer_and_average(network, config)
    loss_of = _StudentLoss(config, labels, weights_N, classes_N, device)
    first = 0 if state is None else int(state["epoch"])
    if state is not None:
        load_training_state(network, optimizer, state, average)

    def get_state() -> State:
        return training_state(network, optimizer, average) | {"epoch": np.array(epoch + 1)}

    for epoch in range(first, epochs):
        network.train()
        views, logits_VY = label_epochs(epoch)
        assert labels == "hard" or logits_VY is not None, "soft labels are logits"
        order_V = order_of(len(views), seed=seed, epoch=epoch)
        steps = student_steps(len(views), config.batch_size)
        # Half of a cosine that would be twice as long ends at half its peak.
        horizon = epochs * steps * (2 if config.schedule == "half_cosine" else 1)
        total = torch.zeros((), device=device)
        kept = pixels and pixels(epoch)
        batches = _rendered_batches(images_NCHW, views, kept, logits_VY, order_V, steps, image_size)
        with deterministic_gradients(device), _seeded_dropout(seed, epoch, 0, device):
            for i, rows in enumerate(batches):
                loss = loss_of(network, rows)
                take_step(optimizer, loss, config.learning_rate, epoch * steps + i, horizon)
                if average is not None:
                    average.update()
                total += loss.detach()
        mean_loss = float(total) / steps
        _require_finite(mean_loss, "evaluate", epoch, config.learning_rate)
        if on_epoch is not None:
            on_epoch(epoch, mean_loss, get_state)
    if average is not None:
        average.put_into_network()


class _StudentLoss:
    """The loss of a batch: to the teacher's logits, to the images' classes, or to both, as the options say."""

    def __init__(
        self,
        config: EvaluateConfig,
        labels: Literal["soft", "hard"],
        weights_N: np.ndarray | None,
        classes_N: np.ndarray | None,
        device: torch.device,
    ) -> None:
        self._config, self._labels = config, labels
        self._weights: torch.Tensor | None = None
        if config.weighted_loss:
            assert weights_N is not None, "a weighted loss needs weights"
            weights = weights_N / weights_N.mean()
            self._weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self._classes: torch.Tensor | None = None
        if labels == "hard" or config.ce_weight > 0:
            assert classes_N is not None, "hard labels need the images' classes"
            self._classes = torch.tensor(classes_N, dtype=torch.int64, device=device)

    def __call__(self, network: nn.Module, rows: _Rows) -> torch.Tensor:
        config = self._config
        device, enabled = rows.images_BCHW.device.type, config.mixed_precision
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            student_BY = network(rows.images_BCHW)
        weights_B = None if self._weights is None else self._weights[rows.image_B]
        hard = None
        if self._classes is not None:
            classes_B, partners_B = self._classes[rows.image_B], self._classes[rows.partner_B]
            hard = hard_label_loss(student_BY, classes_B, partners_B, rows.share_B, weights_B)
            if self._labels == "hard":
                return hard
        if config.loss == "mse":
            soft = logit_loss(student_BY, rows.teacher_BY, weights_B)
        else:
            soft = soft_label_loss(student_BY, rows.teacher_BY, config.temperature, weights_B)
        if config.sinkhorn_weight > 0:
            soft = soft + config.sinkhorn_weight * transport_loss(
                student_BY,
                rows.teacher_BY,
                regularization=config.sinkhorn_regularization,
                iterations=config.sinkhorn_iterations,
            )
        return soft if hard is None else soft + config.ce_weight * hard


def accuracy(network: nn.Module, batches: Iterable[Batch]) -> tuple[float, float, np.ndarray]:
    """Return (top-1, top-5, recall_Y) as fractions; top-5 is top-Y when there are fewer than 5 classes.

    The recall of a class is the share of its images that are told right, 0 where it has none.

    Args:
        network: classifier; evaluated in eval mode, and put back into its mode.
        batches: normalized images on the network's device, and their labels.
    """
    was_training = network.training
    network.eval()
    hits, count = [0, 0], 0
    told_Y = of_class_Y = torch.zeros(0)
    with torch.inference_mode():
        for images, labels_B in batches:
            logits_BY = network(images)
            best_BK = logits_BY.topk(min(5, logits_BY.shape[1]), dim=1).indices
            hit_BK = best_BK == labels_B[:, None]
            hits[0] += int(hit_BK[:, 0].sum())
            if not count:
                told_Y, of_class_Y = logits_BY.new_zeros(2, logits_BY.shape[1], dtype=torch.int64)
            of_class_Y += labels_B.bincount(minlength=len(of_class_Y))
            told_Y += labels_B[hit_BK[:, 0]].bincount(minlength=len(told_Y))
            hits[1] += int(hit_BK.sum())
            count += len(labels_B)
    network.train(was_training)
    assert count > 0, "accuracy of no images"
    recall_Y = (told_Y.double() / of_class_Y.clamp(min=1)).cpu().numpy()
    return hits[0] / count, hits[1] / count, recall_Y


class _Part:
    """A part of each batch of an epoch: its random numbers, and its losses and curvature terms, summed."""

    def __init__(
        self,
        network: nn.Module,
        config: SqueezeConfig,
        mean_C: Sequence[float],
        std_C: Sequence[float],
        seeds: tuple[int, int, int],
    ) -> None:
        """Draw from `seeds`: seed, epoch and part."""
        self._network, self._config = network, config
        self._mean_C, self._std_C = mean_C, std_C
        self._device = next(network.parameters()).device
        seed, epoch, part = seeds
        self._rng = np.random.default_rng([seed, epoch, AUGMENTATION, part])
        with _seeded_dropout(*seeds, self._device):
            self._drawn = _drawn(self._device)
        self.total, self.bent = torch.zeros(2, device=self._device)

    def loss(self, images_BHWC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        """Return the loss of the part of a batch."""
        config, device = self._config, self._device
        images = to_input(images_BHWC, self._mean_C, self._std_C, device)
        images = _augment(images, self._rng, config)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _draw_on(self._drawn, device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.mixed_precision):
                logits_BY = self._network(images)
            self._drawn = _drawn(device)
        loss, term = _classifier_loss(self._network, logits_BY, images, labels_B.to(device), config)
        self.total += loss.detach()
        self.bent += term.detach()
        return loss


def _classifier_loss(
    network: nn.Module,
    logits_BY: torch.Tensor,
    images_BCHW: torch.Tensor,
    labels_B: torch.Tensor,
    config: SqueezeConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the curvature term that it holds `config.curvature_weight` times (0 without one)."""
    smoothing = config.label_smoothing
    loss = F.cross_entropy(logits_BY.float(), labels_B, label_smoothing=smoothing)
    if config.curvature_weight == 0:
        return loss, torch.zeros_like(loss)
    term = classifier_curvature(
        network,
        images_BCHW,
        labels_B,
        step=config.curvature_step,
        form=config.curvature_form,
        label_smoothing=smoothing,
    )
    return loss + config.curvature_weight * term, term


def _augment(
    images_BCHW: torch.Tensor, rng: np.random.Generator, config: SqueezeConfig
) -> torch.Tensor:
    """Return random resized crops, shifted, and flipped with probability 1/2, at the images' own size."""
    device, count, side = images_BCHW.device, len(images_BCHW), images_BCHW.shape[-1]
    crop_B4 = draw_crops(rng, count, config.crop_scale_min)
    flip_B = (rng.random(count) < 0.5) & config.flip
    if config.shift_px > 0:
        reach = config.shift_px
        crop_B4[:, :2] += rng.integers(-reach, reach + 1, (count, 2)) / side
    boxes, flips = torch.from_numpy(crop_B4).to(device), torch.from_numpy(flip_B).to(device)
    return crop(images_BCHW, boxes, flips, side)


class _Rows(NamedTuple):
    """Views of one step: pixels, where they come from, and the teacher's logits (no column when there are none)."""

    images_BCHW: torch.Tensor
    image_B: torch.Tensor  # int64
    partner_B: torch.Tensor  # int64
    share_B: torch.Tensor
    teacher_BY: torch.Tensor


def _rendered_batches(
    images_NCHW: Images,
    views: Views,
    rendered_VSSC: torch.Tensor | None,
    logits_VY: np.ndarray | None,
    order_V: np.ndarray,
    steps: int,
    image_size: int,
) -> Iterator[_Rows]:
    """Yield `steps` parts of the rows in `order_V`, of views that are rendered here or were before."""
    if logits_VY is None:
        logits_VY = np.empty((len(views), 0), dtype=np.float32)
    parts = np.array_split(order_V, steps)
    channels = images_NCHW[torch.zeros(1, dtype=torch.int64)].shape[1]
    floats = len(parts[0]) * channels * image_size**2
    together = max(1, _RENDER_FLOATS // floats)
    for first in range(0, steps, together):
        group = parts[first : first + together]
        rows = np.concatenate(group)
        chunk, sizes = take(views, rows), [len(part) for part in group]
        if rendered_VSSC is None:
            pixels = render_views(images_NCHW, chunk, image_size)
        else:
            assert isinstance(images_NCHW, StoredImages), "kept views are normalized here"
            mean_C, std_C = images_NCHW.mean_C, images_NCHW.std_C
            pixels = to_input(rendered_VSSC[rows], mean_C, std_C, images_NCHW.device)

        def on_device(
            array: np.ndarray, dtype: torch.dtype, device: torch.device = pixels.device
        ) -> torch.Tensor:
            return torch.tensor(array, dtype=dtype, device=device)

        together_rows = _Rows(
            images_BCHW=pixels,
            image_B=on_device(chunk.image_V, torch.int64),
            partner_B=on_device(chunk.partner_V, torch.int64),
            share_B=on_device(chunk.share_V, torch.float32),
            teacher_BY=on_device(logits_VY[rows], torch.float32),
        )
        parts_of = (torch.split(tensor, sizes) for tensor in together_rows)
        yield from (_Rows(*tensors) for tensors in zip(*parts_of, strict=True))


def _require_finite(
    loss: float, stage: str, epoch: int, learning_rate: float, curvature_weight: float = 0.0
) -> None:
    if not math.isfinite(loss):
        curved = f", or --squeeze.curvature-weight {curvature_weight:g}" if curvature_weight else ""
        raise ConfigError(
            f"--{stage}.learning-rate: expected a finite loss, got {loss} in epoch {epoch} at rate "
            f"{learning_rate}; lower it{curved}"
        )


@contextmanager
def _seeded_dropout(seed: int, epoch: int, part: int, device: torch.device) -> Iterator[None]:
    """Seed the generator that dropout takes, so that a resumed epoch drops the same, and put its state back after."""
    number = int(np.random.SeedSequence([seed, epoch, part]).generate_state(1)[0])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield


def _drawn(device: torch.device) -> list[torch.Tensor]:
    """Return the state of the generators that dropout takes."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _draw_on(drawn: list[torch.Tensor], device: torch.device) -> None:
    """Put the state of `_drawn` back."""
    torch.set_rng_state(drawn[0])
    if len(drawn) > 1:
        torch.cuda.set_rng_state(drawn[1], device)
