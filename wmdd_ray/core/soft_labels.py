"""The teacher's logits on views, and their compressed form.

A row of logits matters only up to a constant, since softmax ignores it. Each row is shifted so that
its largest logit is 0 before it is rounded. `fp16`: the error of a logit is at most 2^-11 of its
distance from the largest, so the likely classes are the exact ones. `int8`: whole steps below the
largest, all of one size, so that the error is at most half a step everywhere. Equal steps whose
numbers are then entropy coded (by zstd, in the file) come within a quarter of a bit of the best
that any quantizer can do at that squared error, which a scale of its own for every row does not:
it would spend all 8 bits on rows of a small range. A row wider than 255 steps has larger steps.

At temperature T a step adds about step^2 / 24 T^2 to the divergence, by the variance of its rounding. The softmax
of a large T is nearly even, and what it tells is the order of all logits: top-k labels throw that away, whichever
level the others get. Kept of KL(teacher || uniform), simulated logits of standard deviation 2.7, and bytes a view:

    classes  labels                T = 1     4    20   bytes
    200      all, steps of 1       99.7%  99.5  99.0     108
    200      all, steps of 2       98.9   97.8  95.9      84
    200      50 largest, halves    99.8   89.3  65.2     112
    1000     all, steps of 1       99.7   99.2  98.9     524
    1000     all, steps of 2       98.8   96.7  95.5     406
    1000     50 largest, halves    98.4   58.4  26.9     129
    1000     100 largest, halves   99.3   68.9  39.2     248

Legend: V views, N images, Y classes, K kept logits, C channels, H W pixels.

References:
    Shen and Xing 2022, FKD, section 3 (stored soft labels and their top-k compression with the rest
    of the mass spread evenly). Gish and Pierce 1968 (uniform quantization with entropy coding). Cui
    et al. 2025, CV-DD (several teachers, and BSSL: labels by the statistics of the batch).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from scipy.special import entr, logsumexp
from torch import nn

from wmdd_ray.config import RelabelConfig
from wmdd_ray.core.kernels import deterministic_convolutions, full_float32
from wmdd_ray.core.networks import required_batch_norms
from wmdd_ray.core.views import Images, render_views, take
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import SoftLabels, Views

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_MOST_STEPS = 255
# Numbers of the labels whose statistics are computed at once.
_BLOCK_NUMBERS = 1 << 18


def label_views(
    network: nn.Module,
    images_NCHW: Images,
    views: Views,
    image_size: int,
    batch_size: int,
    *,
    batch_statistics: bool = False,
) -> np.ndarray:
    """Return the network's logits on the views, float32 (V, Y).

    With `batch_statistics` the batch is part of the label: the same views in other company, or
    under another `batch_size`, have other labels. Views are in the order of their images and so of
    the classes, and a batch of few classes would lose by the normalization what tells them from
    others: batch b of n therefore takes the views b, b + n, b + 2n, ...

    Args:
        network: classifier in eval mode, on the images' device.
        images_NCHW: `StoredImages`, or normalized images, of any side.
        views: rows that index into the images.
        image_size: side of a rendered view, pixels.
        batch_size: most views of one pass. It can change the last bit, so a unit of work fixes it.
        batch_statistics: BatchNorm layers normalize by the moments of the batch, and keep theirs.
    """
    assert not network.training, "soft labels come from a network in eval mode"
    num_batches = -(-len(views) // batch_size)
    batches = [
        slice(b, None, num_batches)
        if batch_statistics
        else slice(b * batch_size, (b + 1) * batch_size)
        for b in range(num_batches)
    ]
    logits = []
    with (
        torch.inference_mode(),
        deterministic_convolutions(),
        full_float32(),
        _batch_statistics(network) if batch_statistics else nullcontext(),
    ):
        for rows in batches:
            pixels = render_views(images_NCHW, take(views, rows), image_size)
            logits.append(network(pixels).float().cpu().numpy())
    logits_VY = np.empty((len(views), logits[0].shape[1]), dtype=np.float32)
    for rows, part in zip(batches, logits, strict=True):
        logits_VY[rows] = part
    return logits_VY


@contextmanager
def _batch_statistics(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers normalize by their input's moments, without a trace in their buffers."""
    norms = required_batch_norms(network)
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        # A layer that trains but does not track neither reads nor writes its running moments.
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracks


def compress(logits_VY: np.ndarray, config: RelabelConfig) -> SoftLabels:
    """Return the logits in float16 or in steps: all of them, or the k largest and the mass of the rest.

    `full`: all logits. `top_k`: the K largest in descending order, and rest = log sum exp of the
    others. Both relative to the row's largest; values beyond float16 saturate. With K >= Y `top_k`
    is `full`.

    `int8` is off by at most max(step / 2, range / 509), of a row's range of kept logits, but for
    the rounding of the step itself to half precision (2^-10 of it).

    Args:
        logits_VY: float logits.
        config: `compression`, `top_k`, `precision` and `step`.

    Raises:
        ConfigError: `top_k` with more classes than uint16 can name.
        DataError: A logit is not finite.
    """
    num_classes = logits_VY.shape[1]
    if not np.isfinite(logits_VY).all():
        row = int(np.flatnonzero(~np.isfinite(logits_VY).all(axis=1))[0])
        raise DataError(
            f"relabel: expected finite teacher logits, found {logits_VY[row]} for view {row}; "
            "the teacher's weights or the images are not finite: check its accuracy"
        )
    logits_VY = logits_VY.astype(np.float64)
    logits_VY -= logits_VY.max(axis=1, keepdims=True)
    if config.compression == "full" or config.top_k >= num_classes:
        return _rounded(SoftLabels(num_classes=num_classes, values_VK=logits_VY), config)
    if num_classes > 2**16:
        raise ConfigError(
            f"--relabel.compression: top_k names classes by 16 bits, so at most {2**16} classes, "
            f"got {num_classes}; use --relabel.compression full"
        )
    k = config.top_k
    split_VY = np.argpartition(-logits_VY, k - 1, axis=1)
    kept_VK = np.take_along_axis(logits_VY, split_VY[:, :k], axis=1)
    order_VK = np.argsort(-kept_VK, axis=1, kind="stable")
    kept_VK = np.take_along_axis(kept_VK, order_VK, axis=1)
    indices_VK = np.take_along_axis(split_VY[:, :k], order_VK, axis=1)
    rest_V = logsumexp(np.take_along_axis(logits_VY, split_VY[:, k:], axis=1), axis=1)
    labels = SoftLabels(
        num_classes=num_classes,
        values_VK=kept_VK,
        indices_VK=indices_VK.astype(np.uint16),
        rest_V=_to_float16(rest_V),
    )
    return _rounded(labels, config)


def _rounded(labels: SoftLabels, config: RelabelConfig) -> SoftLabels:
    """Return the labels with float64 values <= 0 rounded as they are stored."""
    values_VK = labels.values_VK
    if config.precision == "fp16":
        return replace(labels, values_VK=_to_float16(values_VK))
    step_V = _to_float16(np.maximum(config.step, -values_VK.min(axis=1) / _MOST_STEPS))
    steps_VK = np.rint(-values_VK / step_V.astype(np.float64)[:, None])
    return replace(labels, values_VK=steps_VK.clip(0, _MOST_STEPS).astype(np.uint8), step_V=step_V)


def decompress(labels: SoftLabels) -> np.ndarray:
    """Return logits, float32 (V, Y), each row up to a constant.

    Of top-k labels the softmax at temperature 1 has the kept probabilities, and the rest of the
    mass spread evenly over the other classes. At a higher temperature the same level is a little too
    high for them (the right one at T = 20 keeps 3 points more of the table above); the loss is their
    order.
    """
    values_VK = labels.values_VK.astype(np.float32)
    if labels.step_V is not None:
        values_VK *= -labels.step_V.astype(np.float32)[:, None]
    if labels.indices_VK is None or labels.rest_V is None:
        return values_VK
    num_rest = labels.num_classes - values_VK.shape[1]
    each_V = labels.rest_V.astype(np.float32) - np.float32(np.log(num_rest))
    logits_VY = np.repeat(each_V[:, None], labels.num_classes, axis=1)
    np.put_along_axis(logits_VY, labels.indices_VK.astype(np.int64), values_VK, axis=1)
    return logits_VY


def take_labels(labels: SoftLabels, index: np.ndarray | slice) -> SoftLabels:
    """Return the rows `index` of `labels`, still compressed."""
    return SoftLabels(
        num_classes=labels.num_classes,
        values_VK=labels.values_VK[index],
        indices_VK=None if labels.indices_VK is None else labels.indices_VK[index],
        rest_V=None if labels.rest_V is None else labels.rest_V[index],
        step_V=None if labels.step_V is None else labels.step_V[index],
    )


def concatenate_labels(parts: Sequence[SoftLabels]) -> SoftLabels:
    """Return the rows of all `parts`, in order; all are compressed in the same way."""
    first = parts[0]

    def stacked(name: str) -> np.ndarray | None:
        arrays = [getattr(part, name) for part in parts]
        return None if getattr(first, name) is None else np.concatenate(arrays)

    return SoftLabels(
        num_classes=first.num_classes,
        values_VK=np.concatenate([part.values_VK for part in parts]),
        indices_VK=stacked("indices_VK"),
        rest_V=stacked("rest_V"),
        step_V=stacked("step_V"),
    )


def label_statistics(
    epochs: Iterable[tuple[Views, np.ndarray | None]], num_images: int
) -> dict[str, float]:
    """Return what labels tell a student at temperature 1, as `label_entropy` and `label_diversity`, nats.

    The first is the mean entropy of a view's label: 0 where the teacher is sure of everything, log Y where it knows nothing. The
    second is what its labels tell of an image beyond their mean: the entropy of an image's mean label minus the mean entropy of its
    labels, which is 0 where all its views have the same (the Jensen-Shannon divergence of an image's labels, the mean over images).

    Args:
        epochs: label epochs: V views, and their logits (V, Y).
        num_images: N; an image without a view counts as one of equal labels.
    """
    count_N, entropy_N = np.zeros(num_images), np.zeros(num_images)
    sums_NY: np.ndarray | None = None
    for views, logits_VY in epochs:
        assert logits_VY is not None, "labels have logits"
        if sums_NY is None:
            sums_NY = np.zeros((num_images, logits_VY.shape[1]))
        for rows in _blocks_of_rows(logits_VY):
            log_VY = logits_VY[rows].astype(np.float64)
            log_VY -= logsumexp(log_VY, axis=1, keepdims=True)
            share_VY = np.exp(log_VY)
            np.add.at(sums_NY, views.image_V[rows], share_VY)
            np.add.at(entropy_N, views.image_V[rows], -(share_VY * log_VY).sum(axis=1))
        np.add.at(count_N, views.image_V, 1)
    assert sums_NY is not None, "at least one label epoch"
    of_mean_N = np.empty(num_images)
    for rows in _blocks_of_rows(sums_NY):
        mean_NY = sums_NY[rows] / np.maximum(count_N[rows], 1)[:, None]
        of_mean_N[rows] = entr(mean_NY).sum(axis=1)
    diversity_N = of_mean_N - entropy_N / np.maximum(count_N, 1)
    return {
        "label_entropy": float(entropy_N.sum() / max(1.0, count_N.sum())),
        "label_diversity": float(np.maximum(diversity_N, 0).mean()),
    }


def _blocks_of_rows(array_VY: np.ndarray) -> Iterator[slice]:
    """Yield the rows of an array, some at a time: what is computed of them takes a few megabytes."""
    size = max(1, _BLOCK_NUMBERS // array_VY.shape[1])
    for first in range(0, len(array_VY), size):
        yield slice(first, first + size)


def _to_float16(values: np.ndarray) -> np.ndarray:
    return values.clip(-_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
