from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_synthesis import CONFIG, make_target, recover
from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.groups import Group, join_positions, plan_groups


@given(
    num_classes=st.integers(1, 60),
    num_images=st.integers(1, 12),
    most=st.integers(1, 70),
    moments=st.sampled_from(["per_class", "global", "blend", "none"]),
)
def test_groups_make_every_image_once_and_are_not_too_large(
    num_classes: int, num_images: int, most: int, moments: Any
) -> None:
    config = RecoverConfig(moments=moments, images_per_group=most)
    groups = plan_groups(num_classes, num_images, config)
    made = [(label, k) for group in groups for label in group.labels for k in group.positions]
    assert sorted(made) == [(label, k) for label in range(num_classes) for k in range(num_images)]
    sizes = [len(group.labels) * len(group.positions) for group in groups]
    whole_class = 1 if moments == "global" else num_images
    assert max(sizes) <= max(most, whole_class)
    if moments != "global":
        assert all(group.positions == range(num_images) for group in groups)


def test_global_moments_take_one_position_of_a_hundred_classes_at_a_time() -> None:
    groups = plan_groups(200, 3, RecoverConfig(moments="global"))
    expected = [Group(range(a, a + 100), range(k, k + 1)) for a in (0, 100) for k in range(3)]
    assert list(groups) == expected
    (all_in_one,) = plan_groups(10, 10, RecoverConfig(moments="global"))
    assert all_in_one == Group(range(10), range(10))


def test_no_range_of_classes_is_much_smaller_than_another() -> None:
    groups = plan_groups(101, 1, RecoverConfig(moments="global"))
    assert [len(group.labels) for group in groups] == [50, 51]


@pytest.mark.parametrize("start", [True, False])
def test_images_of_a_position_are_the_same_in_any_group_that_has_all_classes(start: bool) -> None:
    config = replace(CONFIG, moments="global", ema_statistics=0.5)
    targets = [make_target(label, ipc=3, start=start) for label in (0, 2, 1)]
    together = recover(targets, config)
    parts = [recover(targets, config, positions=at) for at in (range(2), range(2, 3))]
    for whole, *pieces in zip(together, *parts, strict=True):
        joined = join_positions(pieces)
        difference = joined.images_KHWC.astype(int) - whole.images_KHWC
        assert np.abs(difference).max() <= 1, "one gray level, for sums in another order"
        np.testing.assert_array_equal(joined.weights_K, whole.weights_K)
        np.testing.assert_allclose(joined.features_KD, whole.features_KD, rtol=1e-2, atol=1e-2)
        for name, value in whole.losses.items():
            np.testing.assert_allclose(joined.losses[name], value, rtol=1e-3)
            np.testing.assert_allclose(joined.curves[name], whole.curves[name], rtol=1e-3)
    (only,) = recover(targets[:1], config)
    assert not np.array_equal(only.images_KHWC, together[0].images_KHWC), "company matters"


def test_one_part_is_the_class() -> None:
    (whole,) = recover([make_target(0)], replace(CONFIG, iterations=1))
    assert join_positions([whole]) is whole


def test_a_class_whose_own_moments_are_matched_is_not_split() -> None:
    with pytest.raises(AssertionError, match="a class is matched by all its images"):
        recover([make_target(0)], CONFIG, positions=range(1))


def test_weights_of_positions_are_those_of_their_class_in_any_group() -> None:
    config = replace(CONFIG, moments="global", weighted_moments=True)
    shares = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.0, 1.0, 0.0]])
    targets = [
        replace(make_target(label, ipc=3), weights_K=weights_K)
        for label, weights_K in enumerate(shares)
    ]
    together = recover(targets, config)
    parts = [recover(targets, config, positions=range(k, k + 1)) for k in range(3)]
    for whole, *pieces in zip(together, *parts, strict=True):
        joined = join_positions(pieces)
        difference = joined.images_KHWC.astype(int) - whole.images_KHWC
        assert np.abs(difference).max() <= 1, "one gray level, for sums in another order"
        np.testing.assert_allclose(joined.losses["bn"], whole.losses["bn"], rtol=1e-3)


def test_a_position_without_any_weight_is_matched_by_its_images_alike() -> None:
    config = replace(CONFIG, moments="global", weighted_moments=True)
    even = [replace(make_target(label), weights_K=np.array([0.5, 0.5])) for label in range(2)]
    none = [replace(target, weights_K=np.array([1.0, 0.0])) for target in even]
    for one, other in zip(
        *(recover(t, config, positions=range(1, 2)) for t in (even, none)), strict=True
    ):
        np.testing.assert_array_equal(one.images_KHWC, other.images_KHWC)
