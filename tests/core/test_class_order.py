from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom
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


def judged(teacher: str, top1: float, num_classes: int) -> np.ndarray:
    """Return the probabilities (Y, Y) that a teacher in the data's order names each class.

    `spread` errs evenly. `twins` errs for one class alone, which it names as often as the right one where it can: the
    hardest to tell from an exchange.
    """
    labels = np.arange(num_classes)
    named_YY = np.zeros((num_classes, num_classes))
    if teacher == "twins":
        named_YY[labels, labels ^ 1] = min(top1, 1 - top1)
    named_YY[labels, labels] = top1
    rest_Y1 = 1 - named_YY.sum(axis=1, keepdims=True)
    named_YY += rest_Y1 * (named_YY == 0) / (named_YY == 0).sum(axis=1, keepdims=True)
    return named_YY


def test_of_teachers_in_order_less_than_one_in_a_thousand_is_called_permuted() -> None:
    rng = np.random.default_rng(0)
    alarms = tests = 0
    for num_classes, repeats in ((10, 50), (20, 40), (50, 20), (100, 8), (200, 5)):
        for teacher in ("spread", "twins"):
            for top1 in (0.3, 0.5, 0.7, 0.9, 0.99):
                named_YY = judged(teacher, top1, num_classes)
                for num_images in (2, 3, 5, 10):
                    for _ in range(repeats):
                        counts_YY = rng.multinomial(num_images, named_YY)
                        alarms += bool(permuted_classes(counts_YY))
                        tests += 1
    # 95 % confidence that the rate is below 1e-3.
    assert binom.cdf(alarms, tests, 1e-3) < 0.05, f"{alarms} alarms in {tests} tests"


def test_false_alarms_are_no_more_than_the_stated_share_when_many_are_allowed() -> None:
    rng = np.random.default_rng(1)
    named_YY = judged("twins", 0.5, 10)
    counts = [rng.multinomial(10, named_YY) for _ in range(200)]
    alarms = sum(bool(permuted_classes(each_YY, false_alarm_rate=0.2)) for each_YY in counts)
    assert binom.sf(alarms - 1, len(counts), 0.2) > 0.05, f"{alarms} alarms"


@pytest.mark.parametrize(
    ("num_moved", "num_classes", "num_images", "top1"),
    [
        *((10, 10, 4, 0.95), (10, 10, 10, 0.8), (10, 10, 50, 0.3), (200, 200, 5, 0.3)),
        *((2, 10, 30, 0.9), (2, 10, 100, 0.5), (3, 200, 20, 0.9), (2, 200, 50, 0.5)),
    ],
)
def test_a_permuted_teacher_is_caught_when_there_are_enough_images(
    num_moved: int, num_classes: int, num_images: int, top1: float
) -> None:
    rng = np.random.default_rng(2)
    meaning_Y = np.arange(num_classes)
    meaning_Y[:num_moved] = np.roll(meaning_Y[:num_moved], 1)
    caught = []
    for _ in range(10):
        counts_YY = rng.multinomial(num_images, judged("spread", top1, num_classes))
        caught.append(permuted_classes(counts_YY[:, np.argsort(meaning_Y)]))
    right = {k: j for k, j in enumerate(meaning_Y) if k != j}
    assert sum(len(moved) > 0 for moved in caught) >= 9
    shown = [moved.get(k) == j for moved in caught if moved for k, j in right.items()]
    # With five images of a weak teacher's classes, a third of the names are lost in its errors.
    assert np.mean(shown) > (0.6 if num_images == 5 else 0.9)


def test_one_image_of_a_class_proves_nothing() -> None:
    assert permuted_classes(np.roll(np.eye(200, dtype=np.int64), 1, axis=1)) == {}


def test_classes_that_nobody_can_tell_apart_are_no_permutation_however_many_images_say_so() -> None:
    counts = 10_000 * np.eye(4, dtype=np.int64)
    counts[:2, :2] = [[4_500, 5_500], [5_500, 4_500]]
    assert permuted_classes(counts) == {}


def test_a_large_class_that_is_taken_for_a_small_one_is_no_exchange() -> None:
    rng = np.random.default_rng(3)
    sizes, named_YY = [400, 4, 50], np.array([[0.2, 0.8, 0], [0.4, 0.6, 0], [0, 0, 1]])
    alarms = [bool(permuted_classes(rng.multinomial(sizes, named_YY))) for _ in range(300)]
    assert not any(alarms)


def test_confusion_counts_what_the_network_names() -> None:
    network = nn.Identity()
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    labels = torch.tensor([0, 1, 1, 2])
    found = confusion(network, [(logits[:2], labels[:2]), (logits[2:], labels[2:])], 3)
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 1, 1], [1, 0, 0]])
