from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wmdd_ray.config import NetworkConfig, RecoverConfig
from wmdd_ray.core import pixel_adam, synthesis
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import batch_norms, build_network, last_linear
from wmdd_ray.core.optimizer import to_array
from wmdd_ray.core.synthesis import ClassTarget, TeacherTarget, recover_group
from wmdd_ray.core.tiles import shrink
from wmdd_ray.core.views import to_input
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import ClassImages
from wmdd_ray.store import codecs

MEAN, STD, SIZE = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 16
CONFIG = RecoverConfig(iterations=6, learning_rate=0.1, roll_px=1)


def make_network(width: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = NetworkConfig(arch="convnet3", width=width)
        network = build_network(config, num_classes=3, channels=3, image_size=SIZE)
        for norm in batch_norms(network):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(last_linear(network).weight)
        pictures = to_input(smooth_pictures(9), MEAN, STD, "cpu")
    for norm in batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(pictures)
    return network.eval()


def smooth_pictures(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


NETWORK = make_network()
OTHER = make_network(width=5)


def moments_of(network: nn.Module, label: int, ipc: int) -> dict[str, np.ndarray]:
    """Return the true moments and some features of random smooth pictures of a class."""
    images = to_input(smooth_pictures(label), MEAN, STD, "cpu")
    features_ND, moments = features_and_moments(network, images, np.full(12, label), batch_size=12)
    return {
        "atoms_KD": features_ND[-ipc:],
        "mean_S": moments[label].mean_S,
        "var_S": variance_S(moments[label]),
    }


def make_target(label: int, ipc: int = 2, start: bool = True) -> ClassTarget:
    """Return the target of a class of random smooth pictures."""
    weights_K = np.random.default_rng(label).random(ipc) + 0.2
    return ClassTarget(
        label=label,
        weights_K=weights_K / weights_K.sum(),
        start_KHWC=smooth_pictures(label)[:ipc] if start else None,
        **moments_of(NETWORK, label, ipc),
    )


def with_other(target: ClassTarget) -> ClassTarget:
    """Return the target with that of the second, narrower teacher."""
    own = moments_of(OTHER, target.label, len(target.weights_K))
    return replace(target, others=(TeacherTarget(**own),))


def tiled(target: ClassTarget, tiles: int) -> ClassTarget:
    """Return the target with its start at the side of a small image."""
    assert target.start_KHWC is not None
    return replace(target, start_KHWC=shrink(target.start_KHWC, SIZE // tiles))


def recover(targets: list[ClassTarget], config: RecoverConfig, **options: Any) -> list[ClassImages]:
    options = {"networks": NETWORK, "seed": 5, "channels": 3, "device": "cpu"} | options
    shape: dict[str, Any] = {"image_size": SIZE, "mean_C": MEAN, "std_C": STD}
    return recover_group(targets=targets, config=config, **shape, **options)


def first_and_last_losses(config: RecoverConfig, target: ClassTarget) -> tuple[float, float]:
    """Return the total at the first and the last step; without jitter, so that they compare."""
    still = replace(config, crop_scale_min=1.0, flip=False, roll_px=0)
    (result,) = recover([target], still)
    return float(result.curves["total"][0]), result.losses["total"]


def test_no_iterations_return_the_start_pixels_exactly() -> None:
    rng = np.random.default_rng(0)
    for label in (0, 1):
        pixels = rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
        pixels[0, :, :, :] = np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE, 1)
        target = replace(make_target(label), start_KHWC=pixels)
        (result,) = recover([target], replace(CONFIG, iterations=0))
        np.testing.assert_array_equal(result.images_KHWC, pixels)
        assert result.losses == {}


@pytest.mark.parametrize("term", ["wasserstein", "cross_entropy", "mean", "rbf_mmd"])
@pytest.mark.parametrize("start", [True, False])
def test_every_feature_term_is_lowered(term: Any, start: bool) -> None:
    config = replace(CONFIG, iterations=12, feature_term=term, moments="none")
    first, last = first_and_last_losses(config, make_target(1, start=start))
    assert last < 0.7 * first


@pytest.mark.parametrize("moments", ["per_class", "global", "blend"])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_moment_term_is_lowered(moments: Any, weighted: bool) -> None:
    config = replace(CONFIG, iterations=12, feature_term="none", moments=moments)
    target = make_target(1, ipc=3, start=False)
    first, last = first_and_last_losses(replace(config, weighted_moments=weighted), target)
    assert last < 0.7 * first


def test_the_total_is_the_weighted_sum_of_the_active_terms() -> None:
    config = replace(CONFIG, feature_weight=2.0, bn_weight=3.0, ce_weight=0.5)
    (result,) = recover([make_target(0)], config)
    losses = result.losses
    assert list(losses) == ["feature", "bn", "ce", "total"]
    expected = 2 * losses["feature"] + 3 * losses["bn"] + 0.5 * losses["ce"]
    np.testing.assert_allclose(losses["total"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"moments": "none"}, ["feature", "total"]),
        ({"bn_weight": 0.0}, ["feature", "total"]),
        ({"feature_term": "none"}, ["bn", "total"]),
        ({"feature_weight": 0.0, "ce_weight": 1.0}, ["bn", "ce", "total"]),
    ],
)
def test_losses_are_reported_for_active_terms_only(options: Any, names: list[str]) -> None:
    (result,) = recover([make_target(0)], replace(CONFIG, iterations=1, **options))
    assert list(result.losses) == names


def test_the_target_of_global_moments_are_the_running_statistics() -> None:
    config = replace(CONFIG, moments="global", iterations=2)
    target = make_target(0)
    other = replace(target, mean_S=target.mean_S + 1, var_S=target.var_S + 1)
    (one,), (two,) = recover([target], config), recover([other], config)
    np.testing.assert_array_equal(one.images_KHWC, two.images_KHWC)
    assert one.losses == two.losses


def test_weights_change_the_images_only_when_moments_are_weighted() -> None:
    target = make_target(0)
    uniform = replace(target, weights_K=np.array([0.5, 0.5]))
    for weighted in (False, True):
        config = replace(CONFIG, weighted_moments=weighted)
        (one,), (two,) = recover([target], config), recover([uniform], config)
        assert np.array_equal(one.images_KHWC, two.images_KHWC) != weighted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_term": "rbf_mmd", "weighted_moments": True},
        {"feature_term": "mean", "moments": "none"},
        {"feature_term": "cross_entropy", "ce_weight": 1.0},
        {"moments": "blend", "ema_statistics": 0.5},
    ],
)
@pytest.mark.parametrize("start", [True, False])
def test_a_class_gets_the_same_images_alone_and_in_company(options: Any, start: bool) -> None:
    config = replace(CONFIG, **options)
    targets = [make_target(label, start=start) for label in (0, 2, 1)]
    together = recover(targets, config)
    assert [r.label for r in together] == [0, 2, 1]
    for target, got in zip(targets, together, strict=True):
        (alone,) = recover([target], config)
        difference = got.images_KHWC.astype(int) - alone.images_KHWC
        assert np.abs(difference).max() <= 1, "one gray level, for sums in another order"
        np.testing.assert_allclose(
            list(got.losses.values()), list(alone.losses.values()), rtol=1e-3
        )
        np.testing.assert_array_equal(got.weights_K, target.weights_K)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
@pytest.mark.parametrize(
    ("options", "teachers"),
    [
        ({}, 1),
        ({"residual_blends": 1}, 1),
        ({"ema_statistics": 0.6}, 1),
        ({"ema_statistics": 0.6, "residual_blends": 2, "moments": "blend"}, 2),
        ({"tiles": 2, "mixed_precision": True}, 2),
    ],
)
def test_resuming_at_any_iteration_gives_the_same_bytes(
    stop: int, options: Any, teachers: int
) -> None:
    config = replace(CONFIG, **options)
    is_real = config.residual_blends > 0
    targets = [make_target(0), make_target(1, start=is_real)]
    if config.tiles > 1:
        targets[0] = tiled(targets[0], config.tiles)
    if teachers == 2:
        targets = [with_other(target) for target in targets]
    networks = [NETWORK, OTHER][:teachers]
    kept: dict[str, np.ndarray] = {}
    steps: list[int] = []

    def keep(iteration: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        steps.append(iteration)
        if iteration == stop:
            kept.update(get_state())

    expected = recover(targets, config, on_step=keep, networks=networks)
    assert steps == [1, 2, 3, 4, 5, 6]
    steps.clear()
    resumed = recover(targets, config, on_step=keep, state=kept, networks=networks)
    assert steps == list(range(stop + 1, 7))
    for one, two in zip(expected, resumed, strict=True):
        assert one.images_KHWC.tobytes() == two.images_KHWC.tobytes()
        assert one.losses == two.losses
        assert codecs.encode_class_images(one) == codecs.encode_class_images(two)
        assert [len(curve_P) for curve_P in two.curves.values()] == [6] * len(two.losses)


def test_curves_hold_the_losses_of_their_iterations() -> None:
    config = replace(CONFIG, ce_weight=0.5)
    targets = [make_target(0), make_target(2)]
    seen: list[dict[str, np.ndarray]] = []
    results = recover(targets, config, on_step=lambda _, get_state: seen.append(get_state()))
    for g, result in enumerate(results):
        assert result.curve_at_P is not None
        np.testing.assert_array_equal(result.curve_at_P, np.arange(1, 7, dtype=np.int32))
        assert list(result.curves) == list(result.losses) == ["feature", "bn", "ce", "total"]
        for name, curve_P in result.curves.items():
            np.testing.assert_array_equal(
                curve_P, [state[f"curve_{name}"][-1, g] for state in seen]
            )
            assert curve_P[-1] == np.float32(result.losses[name])


@pytest.mark.parametrize(("iterations", "points"), [(1, 1), (200, 200), (201, 200), (2000, 200)])
def test_curves_have_at_most_200_points_from_the_first_iteration_to_the_last(
    iterations: int, points: int
) -> None:
    curves = synthesis._Curves(iterations)
    for i in range(1, iterations + 1):
        curves.add(i, {"total": torch.tensor([float(i), -float(i)])})
    at_P = curves.at_P
    assert (len(at_P), at_P[0], at_P[-1]) == (points, 1, iterations)
    assert np.ptp(np.diff(at_P)) <= 1 if points > 1 else True
    np.testing.assert_array_equal(curves.state()["curve_total"], np.stack([at_P, -at_P], axis=1))


def test_no_step_waits_for_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    steps: list[int] = []

    def count(tensor: torch.Tensor) -> np.ndarray:
        copied.append(len(steps))
        return to_array(tensor)

    monkeypatch.setattr(synthesis, "to_array", count)
    monkeypatch.setattr(pixel_adam, "to_array", count)
    recover([make_target(0)], CONFIG, on_step=lambda i, _: steps.append(i))
    assert set(copied) == {CONFIG.iterations}, "arrays are made after the last step only"


@pytest.mark.parametrize("teachers", [1, 2])
def test_the_features_are_those_that_the_stored_images_have_in_the_first_teacher(
    teachers: int,
) -> None:
    targets = [make_target(0), make_target(1)]
    if teachers == 2:
        targets = [with_other(target) for target in targets]
    results = recover(targets, CONFIG, networks=[NETWORK, OTHER][:teachers])
    for target, result in zip(targets, results, strict=True):
        images = to_input(result.images_KHWC, MEAN, STD)
        expected_KD, _ = features_and_moments(NETWORK, images, np.zeros(2), batch_size=2)
        assert result.features_KD is not None
        np.testing.assert_allclose(result.features_KD, expected_KD, rtol=1e-4, atol=1e-5)
        # They came nearer to the atoms than the start was, so they belong to their images.
        assert target.start_KHWC is not None
        start_KD, _ = features_and_moments(
            NETWORK, to_input(target.start_KHWC, MEAN, STD), np.zeros(2), batch_size=2
        )
        assert np.abs(result.features_KD - start_KD).max() > 1e-3


def test_images_of_no_iterations_have_the_features_of_their_start_and_no_curves() -> None:
    target = make_target(0)
    assert target.start_KHWC is not None
    (result,) = recover([target], replace(CONFIG, iterations=0))
    expected_KD, _ = features_and_moments(
        NETWORK, to_input(target.start_KHWC, MEAN, STD), np.zeros(2), batch_size=2
    )
    assert result.curves == {} and result.features_KD is not None
    np.testing.assert_allclose(result.features_KD, expected_KD, rtol=1e-4, atol=1e-5)


def test_a_state_is_a_copy_that_later_steps_leave_alone() -> None:
    states: list[tuple[dict[str, np.ndarray], np.ndarray]] = []

    def keep(_: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        state = get_state()
        states.append((state, state["images"].copy()))

    recover([make_target(0)], CONFIG, on_step=keep)
    for state, images in states:
        np.testing.assert_array_equal(state["images"], images)
        assert all(isinstance(array, np.ndarray) for array in state.values())


def test_seed_and_class_decide_the_noise() -> None:
    config = replace(CONFIG, iterations=0)
    target = make_target(0, start=False)
    (one,), (two,) = recover([target], config), recover([target], config, seed=6)
    (three,) = recover([replace(target, label=1)], config)
    (again,) = recover([target], config)
    np.testing.assert_array_equal(one.images_KHWC, again.images_KHWC)
    assert not np.array_equal(one.images_KHWC, two.images_KHWC)
    assert not np.array_equal(one.images_KHWC, three.images_KHWC)


def test_pixels_stay_in_the_valid_range_under_an_absurd_rate() -> None:
    config = replace(CONFIG, learning_rate=1e3)
    low = [(0 - m) / s for m, s in zip(MEAN, STD, strict=True)]
    high = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]

    def check(_: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        images_BCHW = get_state()["images"]
        assert (images_BCHW.min(axis=(0, 2, 3)) >= np.array(low) - 1e-6).all()
        assert (images_BCHW.max(axis=(0, 2, 3)) <= np.array(high) + 1e-6).all()

    recover([make_target(0)], config, on_step=check)


def test_the_network_is_left_as_it_was() -> None:
    network = make_network()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recover([make_target(0)], CONFIG, networks=network)
    torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not torch.backends.cudnn.deterministic


def test_gray_images_are_recovered() -> None:
    config = NetworkConfig(arch="convnet3", width=2)
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, num_classes=2, channels=1, image_size=8).eval()
    target = ClassTarget(
        label=1,
        atoms_KD=np.zeros((1, 2), dtype=np.float32),
        weights_K=np.ones(1),
        mean_S=np.zeros(6),
        var_S=np.ones(6),
    )
    (result,) = recover_group(
        network,
        [target],
        replace(CONFIG, iterations=2),
        image_size=8,
        channels=1,
        mean_C=(0.3,),
        std_C=(0.3,),
        seed=0,
        device="cpu",
    )
    assert result.images_KHWC.shape == (1, 8, 8, 1)


def test_a_configuration_without_a_loss_is_refused() -> None:
    config = replace(CONFIG, feature_term="none", moments="none")
    with pytest.raises(ConfigError, match="no loss term is active"):
        recover([make_target(0)], config)
    (result,) = recover([make_target(0)], replace(config, iterations=0))
    np.testing.assert_array_equal(result.images_KHWC, make_target(0).start_KHWC)


def test_divergence_is_an_error_that_names_the_classes() -> None:
    target = make_target(1)
    broken = replace(target, atoms_KD=np.full_like(target.atoms_KD, np.nan))
    with pytest.raises(DataError, match=r"pixels of classes \[1\] became NaN"):
        recover([make_target(0), broken], CONFIG)


def test_a_blend_of_moments_is_half_of_each_loss() -> None:
    config = replace(CONFIG, iterations=1, feature_term="none")
    target = make_target(0, ipc=1)  # one image is a class by itself, and all of its position
    values = []
    for moments in ("per_class", "global", "blend"):
        (result,) = recover([target], replace(config, moments=moments))
        values.append(result.losses["bn"])
    np.testing.assert_allclose(values[2], (values[0] + values[1]) / 2, rtol=1e-6)
    assert abs(values[0] - values[1]) > 0.01 * values[0]


def states_by_step(
    config: RecoverConfig, target: ClassTarget, **options: Any
) -> dict[int, dict[str, np.ndarray]]:
    states: dict[int, dict[str, np.ndarray]] = {}

    def on_step(iteration: int, get_state: Callable[[], dict[str, np.ndarray]]) -> None:
        states[iteration] = get_state()

    recover([target], config, on_step=on_step, **options)
    return states


def test_averaged_statistics_change_the_loss_and_the_images_from_the_second_iteration_on() -> None:
    config = replace(CONFIG, feature_term="none")
    plain = states_by_step(config, make_target(0))
    averaged = states_by_step(replace(config, ema_statistics=0.8), make_target(0))
    for name in ("images", "curve_bn"):
        assert np.array_equal(plain[1][name], averaged[1][name])
        assert not np.array_equal(plain[2][name], averaged[2][name])
    assert plain[1].keys() == averaged[1].keys() - {"average0_mean", "average0_var"}


@pytest.mark.parametrize(("blends", "at"), [(1, [3]), (2, [2, 4]), (3, [1, 3, 4])])
def test_images_become_half_themselves_and_half_their_start_after_each_part_but_the_last(
    blends: int, at: list[int]
) -> None:
    target = make_target(0)
    assert target.start_KHWC is not None
    start = to_input(target.start_KHWC, MEAN, STD).numpy()
    states = states_by_step(replace(CONFIG, residual_blends=blends), target)
    for step in range(2, 7):
        # One step from the state before, without blending.
        alone = states_by_step(CONFIG, target, state=states[step - 1])[step]["images"]
        expected = (alone + start) / 2 if step in at else alone
        np.testing.assert_allclose(states[step]["images"], expected, rtol=0, atol=1e-6)
        assert np.abs(alone - start).max() > 0.01


@pytest.mark.parametrize("tiles", [2, 3])
def test_small_images_are_recovered_at_their_own_side_and_meet_their_atoms(tiles: int) -> None:
    config = replace(CONFIG, tiles=tiles, iterations=12, moments="none")
    target = tiled(make_target(1, ipc=tiles**2), tiles)
    still = replace(config, crop_scale_min=1.0, flip=False, roll_px=0)
    (result,) = recover([target], still)
    assert result.images_KHWC.shape == (tiles**2, SIZE // tiles, SIZE // tiles, 3)
    assert result.losses["total"] < 0.7 * result.curves["total"][0]
    (start,) = recover([target], replace(config, iterations=0))
    np.testing.assert_array_equal(start.images_KHWC, target.start_KHWC)


def test_small_images_begin_from_noise_of_their_own_side() -> None:
    config = replace(CONFIG, tiles=2, start="noise", iterations=2)
    (result,) = recover([make_target(0, ipc=4, start=False)], config)
    assert result.images_KHWC.shape == (4, SIZE // 2, SIZE // 2, 3)
    assert result.images_KHWC.std() > 20


def test_teachers_take_turns_and_each_has_its_own_target() -> None:
    target = make_target(0)
    both = with_other(target)
    narrow = replace(target, **moments_of(OTHER, 0, 2))
    # So small a rate that the images stay: a turn's loss is then that of its teacher alone.
    config = replace(CONFIG, learning_rate=1e-7, iterations=4)
    together, first, second = (
        recover([t], config, networks=networks)[0].curves["total"]
        for t, networks in ((both, [NETWORK, OTHER]), (target, NETWORK), (narrow, OTHER))
    )
    np.testing.assert_allclose(together, [first[0], second[1], first[2], second[3]], rtol=1e-4)
    assert abs(first[0] - second[0]) > 0.1 * first[0]


def test_one_teacher_in_a_list_gives_the_bytes_of_the_teacher_itself() -> None:
    (one,), (two,) = (
        recover([make_target(0)], CONFIG, networks=networks) for networks in (NETWORK, [NETWORK])
    )
    assert one.images_KHWC.tobytes() == two.images_KHWC.tobytes()


def test_targets_for_another_number_of_teachers_are_our_fault() -> None:
    with pytest.raises(AssertionError, match="one target a teacher"):
        recover([make_target(0)], CONFIG, networks=[NETWORK, OTHER])


@pytest.mark.parametrize("term", ["wasserstein", "rbf_mmd"])
def test_mixed_precision_follows_the_losses_of_full_precision(term: Any) -> None:
    config = replace(CONFIG, feature_term=term, ce_weight=0.5, iterations=1)
    target = make_target(0)
    (plain,) = recover([target], config)
    (mixed,) = recover([target], replace(config, mixed_precision=True))
    assert plain.losses != mixed.losses
    np.testing.assert_allclose(
        list(mixed.losses.values()), list(plain.losses.values()), rtol=0.02, atol=2e-3
    )
    longer = replace(config, iterations=12, mixed_precision=True)
    first, last = first_and_last_losses(longer, target)
    assert last < 0.7 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": 0}, "--recover.tiles: expected >= 1, got 0"),
        ({"ema_statistics": 1.0}, r"--recover.ema-statistics: expected in \[0, 1\)"),
        ({"residual_blends": 6}, r"--recover.residual-blends: expected in \[0, 5\].*got 6"),
        ({"residual_blends": -1}, "--recover.residual-blends: expected >= 0"),
        (
            {"residual_blends": 1, "start": "noise"},
            "--recover.start: expected a real start for --recover.residual-blends 1, got 'noise'",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **options)


def test_more_tiles_than_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match="--recover.tiles"):
        recover([make_target(0)], replace(CONFIG, tiles=SIZE + 1))


def test_an_image_matches_the_moments_of_its_own_cell() -> None:
    """So K cells of a class do what K classes of one image each do, but for the names that their draws come from."""
    still = replace(CONFIG, crop_scale_min=1.0, flip=False, roll_px=0, feature_term="none")
    cells = [make_target(label, ipc=1) for label in (0, 2)]
    whole = replace(
        cells[0],
        atoms_KD=np.concatenate([cell.atoms_KD for cell in cells]),
        weights_K=np.array([0.3, 0.7]),
        mean_S=np.stack([cell.mean_S for cell in cells]),
        var_S=np.stack([cell.var_S for cell in cells]),
        start_KHWC=np.concatenate(
            [cell.start_KHWC for cell in cells if cell.start_KHWC is not None]
        ),
    )
    (got,) = recover([whole], still)
    expected = recover(cells, still)
    difference = got.images_KHWC.astype(int)
    difference -= np.concatenate([cell.images_KHWC for cell in expected])
    assert np.abs(difference).max() <= 1, "one gray level, for losses of another scale"
    mean = np.mean([cell.losses["bn"] for cell in expected])
    np.testing.assert_allclose(got.losses["bn"], mean, rtol=1e-3)
    (together,) = recover([replace(whole, mean_S=cells[0].mean_S, var_S=cells[0].var_S)], still)
    assert np.abs(got.images_KHWC.astype(int) - together.images_KHWC).max() > 1


ANCHORED = replace(CONFIG, feature_term="none", moments="none", anchor_weight=1.0)


def test_images_that_are_their_anchors_stay_and_have_no_anchor_loss() -> None:
    target = make_target(0)
    (got,) = recover([replace(target, anchors_KHWC=target.start_KHWC)], ANCHORED)
    assert list(got.losses) == ["anchor", "total"] and got.losses["anchor"] == 0
    assert target.start_KHWC is not None
    np.testing.assert_array_equal(got.images_KHWC, target.start_KHWC)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_every_image_is_pulled_to_its_own_anchor(depth: float) -> None:
    target = replace(make_target(0), anchors_KHWC=smooth_pictures(7)[:2])
    config = replace(ANCHORED, iterations=60, anchor_depth=depth)
    first, last = first_and_last_losses(config, target)
    assert last < 0.5 * first
    (got,) = recover([target], config)
    assert not any(module._forward_hooks for module in NETWORK.modules())
    assert target.anchors_KHWC is not None and target.start_KHWC is not None

    def distances(images_KHWC: np.ndarray) -> np.ndarray:
        ours, real = (
            features_and_moments(NETWORK, to_input(i, MEAN, STD), np.zeros(2), batch_size=2)[0]
            for i in (images_KHWC, target.anchors_KHWC)
        )
        return ((ours[:, None] - real) ** 2).sum(axis=2)

    before_KK, after_KK = distances(target.start_KHWC), distances(got.images_KHWC)
    assert (np.diag(after_KK) < np.diag(before_KK)).all()
    assert (after_KK.argmin(axis=1) == [0, 1]).all()


def test_small_images_are_pulled_to_their_real_image_at_its_full_size() -> None:
    whole = replace(make_target(0), anchors_KHWC=smooth_pictures(7)[:2])
    assert whole.anchors_KHWC is not None
    small = replace(tiled(whole, 2), anchors_KHWC=whole.anchors_KHWC)
    small = replace(small, start_KHWC=shrink(whole.anchors_KHWC, SIZE // 2))
    config = replace(ANCHORED, tiles=2, iterations=60, learning_rate=0.05)
    first, last = first_and_last_losses(config, small)
    assert 0 < last < 0.8 * first, "what shrinking took away is made up for"


def test_anchors_that_do_not_count_change_no_byte() -> None:
    target = make_target(0)
    (plain,) = recover([target], CONFIG)
    (got,) = recover([replace(target, anchors_KHWC=smooth_pictures(7)[:2])], CONFIG)
    assert codecs.encode_class_images(got) == codecs.encode_class_images(plain)


def test_moments_are_those_of_the_images_where_anchors_pass_too() -> None:
    target = replace(make_target(0), anchors_KHWC=smooth_pictures(7)[:2])
    config = replace(CONFIG, iterations=1)
    (plain,), (got,) = (
        recover([target], config),
        recover([target], replace(config, anchor_weight=1)),
    )
    assert got.losses["bn"] == plain.losses["bn"]


def test_anchors_that_count_but_are_not_there_are_an_error() -> None:
    with pytest.raises(ConfigError, match="anchor-weight: expected .* got those of 0 of 1 classes"):
        recover([make_target(0)], ANCHORED)
