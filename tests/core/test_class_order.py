from __future__ import annotations

import numpy as np
import torch
from torch import nn

from wmdd_ray.core.class_order import confusion, permuted_classes


def test_a_teacher_in_the_datas_order_has_nothing_exchanged() -> None:
    assert permuted_classes(100 * np.eye(5, dtype=np.int64)) == {}


def test_two_exchanged_classes_are_found_among_many() -> None:
    counts = 90 * np.eye(6, dtype=np.int64) + 2
    counts[[1, 4]] = counts[[4, 1]]
    assert permuted_classes(counts) == {1: 4, 4: 1}


def test_a_cycle_of_classes_is_found() -> None:
    assert permuted_classes(np.roll(50 * np.eye(4, dtype=np.int64), 1, axis=1)) == {
        0: 1,
        1: 2,
        2: 3,
        3: 0,
    }


def test_a_weak_teacher_that_confuses_classes_is_not_called_permuted() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(30, np.full(10, 0.1), size=10)
    assert permuted_classes(counts) == {}


def test_one_class_taken_for_another_is_a_confusion_and_no_permutation() -> None:
    counts = 100 * np.eye(3, dtype=np.int64)
    counts[0] = [10, 90, 0]
    assert permuted_classes(counts) == {}


def test_classes_without_images_do_not_count() -> None:
    counts = 100 * np.eye(4, dtype=np.int64)
    counts[2:] = 0
    assert permuted_classes(counts) == {}


def test_confusion_counts_what_the_network_names() -> None:
    network = nn.Identity()
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    labels = torch.tensor([0, 1, 1, 2])
    found = confusion(network, [(logits[:2], labels[:2]), (logits[2:], labels[2:])], 3)
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 1, 1], [1, 0, 0]])
