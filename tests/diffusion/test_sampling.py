"""The sampling loop around a model whose answer is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wmdd_ray.config import DiffusionConfig
from wmdd_ray.core.optimizer import State
from wmdd_ray.diffusion.influence import class_influence
from wmdd_ray.diffusion.sampling import ClassSamples, SampleTarget, sample_group
from wmdd_ray.errors import DataError

SHAPE = (1, 2, 2)
VARIANCE = 0.04
PLAIN = DiffusionConfig(model="none", steps=12, guidance_scale=1.0, sinkhorn_iterations=20)
GUIDED = replace(PLAIN, ot_weight=0.3, window=(0.0, 0.6))


@pytest.fixture(scope="module")
def scheduler() -> Any:
    from diffusers.schedulers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False
    )


def two_modes(scheduler: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the exact noise predictor of data around -1 or around +1 in all values, with equal probability."""

    def predict(x_BCHW: Tensor, timestep: Tensor, classes_B: Tensor) -> Tensor:
        alpha = scheduler.alphas_cumprod[int(timestep)]
        spread = alpha * VARIANCE + 1 - alpha
        mode_B = torch.tanh(alpha.sqrt() * x_BCHW.flatten(1).sum(dim=1) / spread)
        mode_BCHW = mode_B[:, None, None, None].expand_as(x_BCHW)
        share = VARIANCE * alpha.sqrt() / spread
        end_BCHW = mode_BCHW + share * (x_BCHW - alpha.sqrt() * mode_BCHW)
        return (x_BCHW - alpha.sqrt() * end_BCHW) / (1 - alpha).sqrt()

    return predict


def targets(labels: range) -> list[SampleTarget]:
    real = torch.cat([torch.full((8, *SHAPE), -1.0), torch.full((8, *SHAPE), 1.0)])
    return [SampleTarget(label=i, class_id=0, real_MCHW=real) for i in labels]


def sample(
    scheduler: Any, config: DiffusionConfig, labels: range, **more: Any
) -> list[ClassSamples]:
    return sample_group(
        two_modes(scheduler), scheduler, targets(labels), config,
        num_images=more.pop("num_images", 2), shape_CHW=SHAPE, seed=5, device="cpu", **more,
    )  # fmt: skip


def modes(found: list[ClassSamples]) -> np.ndarray:
    """Return the sign of every sample, after checking that it is near one of the modes."""
    ends = torch.stack([one.latents_KCHW for one in found]).flatten(2)
    means = ends.mean(dim=2)
    torch.testing.assert_close(means.abs(), torch.ones_like(means), atol=0.5, rtol=0)
    signs: np.ndarray = means.sign().numpy()
    return signs


def test_guided_samples_cover_both_modes_where_plain_ones_leave_it_to_chance(
    scheduler: Any,
) -> None:
    classes = range(16)
    plain, guided = (modes(sample(scheduler, c, classes)) for c in (PLAIN, GUIDED))
    both_plain, both_guided = ((m.sum(axis=1) == 0).sum() for m in (plain, guided))
    assert 3 <= both_plain <= 13
    assert both_guided >= 15
    covered = sample(scheduler, GUIDED, range(1))[0].transport_K
    assert covered[1] < covered[0]


def test_the_first_samples_of_guided_classes_are_no_less_of_both_modes(scheduler: Any) -> None:
    first = modes(sample(scheduler, GUIDED, range(16), num_images=1))
    assert 3 <= (first > 0).sum() <= 13


def test_no_weight_or_another_window_decides_whether_anything_is_guided(scheduler: Any) -> None:
    def latents(config: DiffusionConfig) -> Tensor:
        return sample(scheduler, config, range(2))[1].latents_KCHW

    plain = latents(PLAIN)
    torch.testing.assert_close(latents(replace(PLAIN, window=(0.0, 1.0))), plain, rtol=0, atol=0)
    assert (latents(GUIDED) - plain).abs().max() > 1e-3
    deviating = replace(PLAIN, diversity_weight=0.5, window=(0.0, 0.6))
    found = sample(scheduler, deviating, range(2))
    torch.testing.assert_close(found[1].latents_KCHW[0], plain[0], rtol=0, atol=0)
    assert (found[1].latents_KCHW[1] - plain[1]).abs().max() > 1e-3


def test_a_diversity_weight_turns_a_sample_from_the_earlier_one(scheduler: Any) -> None:
    def cosines(config: DiffusionConfig) -> Tensor:
        found = sample(scheduler, config, range(16))
        first, second = (
            torch.stack([one.latents_KCHW[i].flatten() for one in found]) for i in (0, 1)
        )
        return torch.cosine_similarity(first, second)

    deviating = replace(PLAIN, diversity_weight=0.5, window=(0.0, 0.6))
    plain, turned = cosines(PLAIN), cosines(deviating)
    assert turned.mean() < plain.mean() - 0.1
    assert (turned < plain + 1e-3).all()


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_an_influence_weight_leads_to_what_teaches_as_the_class_does(
    scheduler: Any, side: float
) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    of = class_influence([network], torch.full((5, *SHAPE), side), 1)
    led = [replace(target, influence=of) for target in targets(range(16))]

    def first_modes(config: DiffusionConfig, of_targets: list[SampleTarget]) -> np.ndarray:
        return modes(
            sample_group(
                two_modes(scheduler), scheduler, of_targets, config,
                num_images=1, shape_CHW=SHAPE, seed=5, device="cpu",
            )
        )  # fmt: skip

    influenced = replace(PLAIN, influence_weight=0.3, window=(0.0, 0.6))
    assert (first_modes(influenced, led) == side).mean() >= 15 / 16
    np.testing.assert_array_equal(first_modes(PLAIN, led), first_modes(PLAIN, targets(range(16))))


@pytest.mark.parametrize("config", [PLAIN, replace(GUIDED, real_per_step=5)])
def test_a_class_has_the_same_samples_alone_and_in_company(
    scheduler: Any, config: DiffusionConfig
) -> None:
    alone, company = sample(scheduler, config, range(3, 4)), sample(scheduler, config, range(5))
    torch.testing.assert_close(alone[0].latents_KCHW, company[3].latents_KCHW, rtol=1e-5, atol=1e-5)
    assert not torch.equal(company[2].latents_KCHW, company[3].latents_KCHW)


def test_from_any_state_the_samples_are_those_of_a_run_that_never_stopped(scheduler: Any) -> None:
    config = replace(GUIDED, real_per_step=5)
    states: list[State] = []
    steps: list[int] = []

    def on_step(step: int, get_state: Callable[[], State]) -> None:
        steps.append(step)
        states.append({name: np.copy(array) for name, array in get_state().items()})

    whole = sample(scheduler, config, range(2), on_step=on_step)
    assert steps == list(range(1, 2 * 12 + 1))
    for at in (1, 12, 13, 23, 24):
        again = sample(scheduler, config, range(2), state=states[at - 1])
        for one, other in zip(again, whole, strict=True):
            assert torch.equal(one.latents_KCHW, other.latents_KCHW), at
            np.testing.assert_array_equal(one.transport_K, other.transport_K)


def test_without_noise_in_the_steps_the_start_alone_decides(scheduler: Any) -> None:
    config = replace(PLAIN, eta=0.0)
    first, second = (sample(scheduler, config, range(1), num_images=n)[0] for n in (1, 2))
    assert torch.equal(first.latents_KCHW[0], second.latents_KCHW[0])
    noisy = sample(scheduler, PLAIN, range(1), num_images=1)[0]
    assert not torch.equal(first.latents_KCHW, noisy.latents_KCHW)


def test_latents_that_are_no_numbers_are_refused_by_class(scheduler: Any) -> None:
    def predict(x_BCHW: Tensor, timestep: Tensor, classes_B: Tensor) -> Tensor:
        return torch.where(classes_B[:, None, None, None] == 1, torch.nan, x_BCHW)

    both = [replace(t, class_id=i) for i, t in enumerate(targets(range(7, 9)))]
    with pytest.raises(DataError, match=r"samples of classes \[8\] became NaN; lower --recover"):
        sample_group(
            predict, scheduler, both, PLAIN, num_images=1, shape_CHW=SHAPE, seed=0, device="cpu"
        )
