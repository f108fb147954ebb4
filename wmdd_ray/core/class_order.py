"""Whether a teacher numbers the classes as the data does: mixed-up class order is the field's most common silent fault.

Legend: Y classes, B batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn


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


def permuted_classes(counts_YY: np.ndarray) -> dict[int, int]:
    """Return label -> class that the network means by it, for the labels that look exchanged; empty when none does.

    The classes are matched one to one so that most images agree (linear assignment). A label counts as exchanged when
    the match is another class that takes at least half of its images; a single one is a confusion, not a permutation.
    """
    _, match_Y = linear_sum_assignment(-counts_YY)
    total_Y = np.maximum(counts_YY.sum(axis=1), 1)
    share_Y = counts_YY[np.arange(len(counts_YY)), match_Y] / total_Y
    moved = {int(k): int(j) for k, j in enumerate(match_Y) if k != j and share_Y[k] >= 0.5}
    return moved if len(moved) >= 2 else {}
