"""Attacks on networks whose robustness is known, and the checks on what attacks report."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wmdd_ray.config import AttackConfig, AttackName
from wmdd_ray.errors import ConfigError, WmddError
from wmdd_ray.robustness import attacks
from wmdd_ray.robustness.attacks import (
    Attacked,
    attack,
    contradictions,
    require_libraries,
    robust_to_cw,
    worst_case,
)

MEAN, STD = (0.5,), (0.25,)
ALL: tuple[AttackName, ...] = ("pgd", "square", "autoattack", "cw", "mim")


class Columns(nn.Module):
    """Class = the brightest of five columns, in logits of normalized pixels: linear, so its margins are known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, normalized: Tensor) -> Tensor:
        return self.scale * normalized.mean(dim=(1, 2))


def columns(margins_of_255: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return 5 x 5 images whose class's column is brighter by so many 255ths, and their classes."""
    labels_N = np.arange(len(margins_of_255)) % 5
    images_NHWC = np.full((len(labels_N), 5, 5, 1), 100, dtype=np.uint8)
    for image, label, margin in zip(images_NHWC, labels_N, margins_of_255, strict=True):
        image[:, label] += margin
    return images_NHWC, labels_N


def attacked(name: AttackName, eps: float, margins_of_255: list[int], seed: int = 0) -> Attacked:
    images_NHWC, labels_N = columns(margins_of_255)
    return attack(
        name, Columns(), images_NHWC, labels_N, eps=eps, mean_C=MEAN, std_C=STD, seed=seed
    )


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attacks.SETTINGS, "square", {"queries": 1000})


@pytest.mark.parametrize("name", ALL)
def test_an_image_falls_when_its_margin_is_less_than_twice_eps_in_pixels(name: AttackName) -> None:
    # eps 8/255 lowers one column by 8 and raises another by 8.
    margins = [4, 12, 12, 40, 40, 60]
    found = attacked(name, 8 / 255, margins)
    assert found.clean_N.all()
    robust_N = found.robust_N
    if name == "cw":
        # The shortest way lowers 5 pixels by half the margin and raises 5 by it.
        shortest_N = np.array(margins) / 255 / 2 * math.sqrt(10)
        np.testing.assert_allclose(found.change_N, shortest_N, rtol=0.15)
        assert not robust_N.any()
        box = 8 / 255 * 5  # the ball around the box: sqrt(25) eps
        np.testing.assert_array_equal(robust_to_cw(found, 8 / 255, 25), found.change_N > box)
    else:
        assert robust_N.tolist() == [False, False, False, True, True, True]


def test_images_that_are_wrong_from_the_start_are_not_attacked_and_do_not_count() -> None:
    images_NHWC, labels_N = columns([40, 40, 40, 40])
    labels_N = (labels_N + 1) % 5
    found = attack(
        "pgd", Columns(), images_NHWC, labels_N, eps=8 / 255, mean_C=MEAN, std_C=STD, seed=0
    )
    assert not found.clean_N.any() and not found.robust_N.any() and not found.change_N.any()


def test_one_survivor_alone_can_be_attacked() -> None:
    assert attacked("autoattack", 2 / 255, [3]).robust_N.tolist() == [False]


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_a_seed_gives_the_same_images_whatever_was_drawn_before_and_leaves_no_trace(
    name: AttackName,
) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = (torch.rand(2), np.random.rand(2))
    torch.manual_seed(1)
    np.random.seed(1)
    first = attacked(name, 8 / 255, [2, 40], seed=5)
    drawn = (torch.rand(2), np.random.rand(2))
    torch.testing.assert_close(drawn[0], expected[0], rtol=0, atol=0)
    np.testing.assert_array_equal(drawn[1], expected[1])
    again = attacked(name, 8 / 255, [2, 40], seed=5)
    np.testing.assert_array_equal(again.change_N, first.change_N)
    assert first.change_N[0] > 0


def test_normalization_is_inside_the_attacked_network() -> None:
    images_NHWC, labels_N = columns([14])
    for mean, std in (((0.0,), (1.0,)), ((0.9,), (0.01,))):
        found = attack(
            "pgd", Columns(), images_NHWC, labels_N, eps=8 / 255, mean_C=mean, std_C=std, seed=0
        )
        assert found.robust_N.tolist() == [False]
        assert found.change_N[0] <= 8 / 255 * 5 + 1e-5


def test_an_attack_that_goes_beyond_eps_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_far(name: str, model: nn.Module, pixels: Tensor, labels: Tensor, eps: float) -> Tensor:
        return pixels + 2 * eps

    monkeypatch.setattr(attacks, "_by_art", too_far)
    with pytest.raises(WmddError, match=r"PGD-100: expected pixels in \[0, 1\] that change by at"):
        attacked("pgd", 8 / 255, [4])


def test_what_autoattack_warns_of_is_kept() -> None:
    class Flat(Columns):
        """Right about class 0, and without any gradient."""

        def forward(self, normalized: Tensor) -> Tensor:
            return super().forward(normalized) * 0 + torch.tensor([1.0, 0, 0, 0, 0])

    images_NHWC, _ = columns([4, 4])
    found = attack(
        "autoattack", Flat(), images_NHWC, np.zeros(2, int), eps=8 / 255, mean_C=MEAN, std_C=STD,
        seed=0,
    )  # fmt: skip
    assert found.robust_N.all()
    assert any("zero gradient" in note for note in found.notes)


# Checks


def flags(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def test_consistent_results_have_no_contradiction() -> None:
    robust = {
        ("pgd", 0.1): flags("11100"),
        ("square", 0.1): flags("11110"),
        ("autoattack", 0.1): flags("11000"),
        ("autoattack", 0.2): flags("01000"),
    }
    assert contradictions(flags("11110"), robust) == []


def test_every_contradiction_is_found_image_by_image_even_where_the_accuracies_look_right() -> None:
    # AutoAttack and PGD have one accuracy here, and other images.
    robust = {
        ("pgd", 0.1): flags("0110"),
        ("autoattack", 0.1): flags("1010"),
        ("autoattack", 0.2): flags("0001"),
        ("square", 0.1): flags("1111"),
    }
    found = contradictions(flags("1110"), robust)
    told = {(c["what"], c["eps"]): c["images"] for c in found}
    assert told == {
        ("AutoAttack exceeds PGD-100", 0.1): 1,
        ("AutoAttack rises with eps", 0.2): 1,
        ("AutoAttack exceeds clean accuracy", 0.2): 1,
        ("Square exceeds clean accuracy", 0.1): 1,
    }
    assert {c["share"] for c in found} == {0.25}


def test_the_worst_case_counts_every_attack_up_to_eps_but_not_cw() -> None:
    robust = {
        ("pgd", 0.1): flags("1110"),
        ("pgd", 0.2): flags("1011"),
        ("autoattack", 0.1): flags("0111"),
        ("cw", 0.1): flags("0000"),
    }
    assert worst_case(robust, 0.1).tolist() == [False, True, True, False]
    assert worst_case(robust, 0.2).tolist() == [False, False, True, False]


def test_missing_libraries_and_too_few_classes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries(ALL, 4)
    with pytest.raises(ConfigError, match="--attacks autoattack: expected at least 4 classes"):
        require_libraries(("autoattack",), 3)
    require_libraries(("pgd",), 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="no art and no pyautoattack; pip install adversarial"):
        require_libraries(("pgd",), 10)
    require_libraries((), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": ("8",)}, "--eps: expected fractions between 0 and 1, as 8/255, got '8'"),
        ({"eps": ("1/0",)}, "--eps: expected fractions"),
        ({"eps": ("nan",)}, "--eps: expected fractions"),
        ({"eps": ("1/255", "2/510")}, "--eps: expected each budget once"),
        ({"eps": ()}, "--eps: expected at least one"),
        ({"images": 0}, "--attack-images: expected >= 1"),
    ],
)
def test_budgets_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackConfig(**options)
