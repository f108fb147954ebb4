"""Whether a teacher numbers the classes as the data does: mixed-up class order is the field's most common silent fault.

Legend: Y classes, B batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import logsumexp
from torch import nn

# Random halvings whose stakes are averaged: one unlucky halving then costs little.
_HALVINGS = 8


def confusion(
    network: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], num_classes: int
) -> np.ndarray:
    """Return counts int64 (Y, Y): row = label of the data, column = class that the network names.

    Args:
        network: classifier in eval mode with at least `num_classes` outputs.
        batches: normalized images and their labels.
        num_classes: Y.
    """
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    with torch.inference_mode():
        for images, labels_B in batches:
            named_B = network(images)[:, :num_classes].argmax(dim=1).cpu().numpy()
            np.add.at(counts, (labels_B.cpu().numpy(), named_B), 1)
    return counts


def permuted_classes(counts_YY: np.ndarray, *, false_alarm_rate: float = 1e-3) -> dict[int, int]:
    """Return label -> class that the network means by it, for the labels that are exchanged; empty when none is shown to be.

    Tested is the hypothesis that the order is right: no one-to-one renaming of classes agrees with more images than
    none does. Half of each class's images propose the cycles of labels to rename, by linear assignment; the other half
    are bet on. Of a cycle c an image that is named as proposed multiplies the stake by 1 + b, one that is named by its
    own label by 1 - b, with b = (wins - losses) / (wins + losses + 1) in the first half. If the order is right the
    expected stake is at most exp(sum over c of b times the expected gain) <= 1, whatever the teacher confuses; so it
    exceeds 1 / rate with a probability of at most the rate (Markov), and so does its mean over several halvings.
    A single image of a class proves nothing.

    A significant exchange counts only if it also agrees with twice as many images as the labels do: two classes
    that a teacher cannot tell apart are no permutation, however many images say so.

    References:
        Shafer 2021, Testing by betting. Ramdas et al. 2023, Game-theoretic statistics and safe anytime-valid inference.
    """
    cycles = _proposed(counts_YY)
    if not cycles:
        return {}
    rng = np.random.default_rng(0)
    stakes = [_log_stake(counts_YY, rng) for _ in range(_HALVINGS)]
    if logsumexp(stakes) - np.log(_HALVINGS) < -np.log(false_alarm_rate):
        return {}
    moved = {int(k): int(j) for labels, match in cycles for k, j in zip(labels, match, strict=True)}
    return {k: j for k, j in sorted(moved.items()) if counts_YY[k, j] > counts_YY[k, k]}


def _proposed(counts_YY: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return cycles of labels and what each means, that agree with twice the share of images, of two labels at least."""
    share_YY = counts_YY / np.maximum(counts_YY.sum(axis=1, keepdims=True), 1)
    # On a tie a label keeps its own class.
    _, match_Y = linear_sum_assignment(-(share_YY + 1e-9 * np.eye(len(share_YY))))
    graph = csr_array((np.ones(len(match_Y)), (np.arange(len(match_Y)), match_Y)))
    _, cycle_Y = connected_components(graph, directed=False)
    cycles = []
    for cycle in np.unique(cycle_Y[match_Y != np.arange(len(match_Y))]):
        labels = np.flatnonzero(cycle_Y == cycle)
        wins, losses = share_YY[labels, match_Y[labels]], share_YY[labels, labels]
        if wins.sum() >= 2 * losses.sum() and (wins > losses).sum() >= 2:
            cycles.append((labels, match_Y[labels]))
    return cycles


def _log_stake(counts_YY: np.ndarray, rng: np.random.Generator) -> float:
    """Return the logarithm of what a stake of 1 becomes on a random half of the images."""
    label_N, named_N = np.repeat(np.argwhere(counts_YY), counts_YY[counts_YY > 0], axis=0).T
    order_N = np.lexsort((rng.random(len(label_N)), label_N))
    size_Y = counts_YY.sum(axis=1)
    rank_N = np.arange(len(label_N)) - np.repeat(np.cumsum(size_Y) - size_Y, size_Y)
    first_N = order_N[rank_N < np.repeat(size_Y // 2, size_Y)]
    first_YY = np.zeros_like(counts_YY)
    np.add.at(first_YY, (label_N[first_N], named_N[first_N]), 1)
    second_YY = counts_YY - first_YY
    size_Y = second_YY.sum(axis=1)
    stake = 0.0
    for labels, match in _proposed(first_YY):
        wins, losses = first_YY[labels, match].sum(), first_YY[labels, labels].sum()
        # Smaller bets on larger classes: the expected gain is one of shares, in which all classes weigh the same.
        weight = size_Y[labels].min(where=size_Y[labels] > 0, initial=size_Y.max())
        bets = (wins - losses) / (wins + losses + 1) * weight / np.maximum(size_Y[labels], 1)
        stake += float(second_YY[labels, match] @ np.log1p(bets))
        stake += float(second_YY[labels, labels] @ np.log1p(-bets))
    return stake
