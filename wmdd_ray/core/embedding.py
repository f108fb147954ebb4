"""Features, and exact per-class moments of every BatchNorm input, in one pass over the images.

Each image gives its mean and centered second moment per channel; everything after that is float64 and merged with
the formula of Chan et al. (`core/moments.py`), so neither the batches nor the chunks that the images came in change the
result. (The method's reference averages within-batch variances, which drops the spread between the batch means.)

Legend: N images, B batch, C channels of one layer, H W its pixels, S channels summed over the layers, L layers,
D feature width, G classes present in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.core.kernels import deterministic_convolutions, full_float32
from wmdd_ray.core.moments import merge_moments
from wmdd_ray.core.networks import (
    batch_norms,
    features_and_logits,
    last_linear,
    required_batch_norms,
)
from wmdd_ray.records import Moments


def running_moments(network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean_S, var_S), float64: the statistics that the teacher's BatchNorm layers normalize by."""
    mean_S, var_S = [], []
    for norm in required_batch_norms(network):
        assert norm.running_mean is not None and norm.running_var is not None
        mean_S.append(norm.running_mean.double().cpu().numpy())
        var_S.append(norm.running_var.double().cpu().numpy())
    return np.concatenate(mean_S), np.concatenate(var_S)


def features_and_moments(
    network: nn.Module, images_NCHW: Tensor, labels_N: np.ndarray, *, batch_size: int
) -> tuple[np.ndarray, dict[int, Moments]]:
    """Return the features of all images, and the BatchNorm-input moments of every class among them.

    Args:
        network: classifier in eval mode.
        images_NCHW: normalized float images; batches are moved to the network's device.
        labels_N: int, any order.
        batch_size: images of one forward pass.

    Returns:
        features_ND float32, and the moments by label in ascending order.
    """
    assert len(images_NCHW) == len(labels_N), f"{len(images_NCHW)} images, {len(labels_N)} labels"
    assert not network.training, "moments are those of the network in eval mode"
    device = next(network.parameters()).device
    features: list[np.ndarray] = []
    parts: dict[int, list[Moments]] = {}
    with (
        torch.no_grad(),
        deterministic_convolutions(),
        full_float32(),
        _image_moments(network) as caught,
    ):
        for start in range(0, len(images_NCHW), batch_size):
            batch = images_NCHW[start : start + batch_size].to(device)
            features_BD, _ = features_and_logits(network, batch)
            features.append(features_BD.float().cpu().numpy())
            for label, moments in _by_class(caught, labels_N[start : start + batch_size]):
                parts.setdefault(label, []).append(moments)
    empty_ND = np.zeros((0, last_linear(network).in_features), dtype=np.float32)
    return (
        np.concatenate([empty_ND, *features]),
        {label: merge_moments(parts[label]) for label in sorted(parts)},
    )


@contextmanager
def _image_moments(network: nn.Module) -> Iterator[list[tuple[int, Tensor, Tensor, Tensor]]]:
    """Yield a list that after each forward pass holds (H W, mean_BC, residual_BC, m2_BC) of every layer.

    The mean of an image's channel is mean + residual, the latter being what is left after subtracting the float32
    mean; m2 is centered at the float32 mean.
    """
    norms = batch_norms(network)
    nothing = torch.empty(0)
    caught = [(0, nothing, nothing, nothing)] * len(norms)

    def catch(layer: int, x_BCHW: Tensor) -> None:
        pixels = x_BCHW[0, 0].numel()
        # Pixels on one axis, as they lie in memory: three times faster in channels-last format.
        channels_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
        flat = x_BCHW.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else x_BCHW.flatten(2)
        axis = 1 if channels_last else 2
        mean = flat.mean(dim=axis, keepdim=True)
        centered = flat - mean
        residual_BC = centered.mean(dim=axis)
        m2_BC = _square_sum(centered, axis)
        caught[layer] = (pixels, mean.squeeze(axis), residual_BC, m2_BC)

    handles = [
        norm.register_forward_pre_hook(lambda _, args, layer=layer: catch(layer, args[0]))
        for layer, norm in enumerate(norms)
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _square_sum(values: Tensor, axis: int) -> Tensor:
    """Return the sum of squares along `axis`, overwriting `values`; a norm is quicker on the last axis only."""
    if axis == values.ndim - 1:
        return torch.linalg.vector_norm(values, dim=axis) ** 2
    return values.square_().sum(dim=axis)


def _by_class(
    caught: list[tuple[int, Tensor, Tensor, Tensor]], labels_B: np.ndarray
) -> list[tuple[int, Moments]]:
    """Return (label, moments) of every class in a batch; moments of no layer where a network has no BatchNorm."""
    channels_L = tuple(mean.shape[1] for _, mean, _, _ in caught)
    pixels_L = np.array([pixels for pixels, _, _, _ in caught], dtype=np.int64)
    pixels_S = np.repeat(pixels_L, channels_L)
    order_B = np.argsort(labels_B, kind="stable")
    labels_G, first_G, count_G = np.unique(labels_B[order_B], return_index=True, return_counts=True)

    def joined(parts_BC: list[Tensor]) -> np.ndarray:
        if not parts_BC:
            return np.zeros((len(labels_B), 0))
        return torch.cat(parts_BC, dim=1).double().cpu().numpy()[order_B]

    residual_BS = joined([residual for _, _, residual, _ in caught])
    mean_BS = joined([mean for _, mean, _, _ in caught]) + residual_BS
    m2_BS = joined([m2 for _, _, _, m2 in caught]) - pixels_S * residual_BS**2
    mean_GS = np.add.reduceat(mean_BS, first_G, axis=0) / count_G[:, None]
    between_BS = (mean_BS - np.repeat(mean_GS, count_G, axis=0)) ** 2
    m2_GS = np.add.reduceat(m2_BS + pixels_S * between_BS, first_G, axis=0)
    return [
        (
            int(label),
            Moments(
                channels_L=channels_L,
                count_L=pixels_L * int(count),
                mean_S=mean_S,
                m2_S=np.maximum(m2_S, 0),
            ),
        )
        for label, count, mean_S, m2_S in zip(labels_G, count_G, mean_GS, m2_GS, strict=True)
    ]
