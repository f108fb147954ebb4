"""Images of some classes by a diffusion model, one after another, each led by those before it (OTG).

The loop is around a noise predictor and a DDIM scheduler of diffusers, of which only `set_timesteps`, `timesteps` and
`step` are used. In a guided step the update is
    x_(t-1) <- step(x_t) - ot_weight * transport direction - diversity_weight * deviation direction
                         + influence_weight * influence direction
with the directions (`diffusion/guidance.py`, `diffusion/influence.py`) taken at the end that the model predicts from x_t: noise is
compared with nothing. The model itself is not differentiated.

Classes of a group go through the model together, image j of each at a time, and share nothing else: noise and real
batches are drawn from streams of (seed, label, image).

Legend: G classes, K images of each, M real latents, D = C H W values of a latent.

References:
    Song et al. 2021, DDIM. Cui et al. 2025, arXiv 2512.00308 (OTG). Chen et al. 2025, IGD (window, steps, sequence,
    deviation, influence).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmdd_ray.config import DiffusionConfig
from wmdd_ray.core.jitter import class_generator
from wmdd_ray.core.optimizer import State
from wmdd_ray.core.pixel_adam import to_array
from wmdd_ray.diffusion.guidance import (
    deviation_direction,
    mean_spacing,
    transport_direction,
    transport_distance,
)
from wmdd_ray.diffusion.influence import ClassInfluence, influence_direction
from wmdd_ray.errors import DataError

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents, timestep, the model's classes) -> what the scheduler wants to know."""

# What the streams of a class are for; core/jitter.py has 0 and 1.
_NOISE, _REAL = 2, 3


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleTarget:
    """A class to sample: its label in the data, its class in the model, and real latents of it, float32 on the device.

    `influence` is what the surrogate knows of it, needed with an influence weight.
    """

    label: int
    class_id: int
    real_MCHW: Tensor
    influence: ClassInfluence | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassSamples:
    """Latents of a class in the order of their making, and after each the transport distance of all so far to the real ones.

    The distance is a share of the mean distance between the real latents.
    """

    label: int
    latents_KCHW: Tensor  # float32
    transport_K: np.ndarray  # float32


def sample_group(
    predict: Predict,
    scheduler: Any,
    targets: Sequence[SampleTarget],
    config: DiffusionConfig,
    *,
    num_images: int,
    shape_CHW: tuple[int, int, int],
    seed: int,
    device: torch.device | str,
    state: State | None = None,
    on_step: Callable[[int, Callable[[], State]], None] | None = None,
) -> list[ClassSamples]:
    """Return `num_images` latents of every target.

    Args:
        predict: the model, in eval mode, on `device`.
        scheduler: a DDIMScheduler.
        targets: classes whose images share the model's passes.
        config: steps, noise, guidance.
        num_images: K.
        shape_CHW: of a latent.
        seed: each class draws from its own streams of (seed, label, image).
        device: where it is computed.
        state: resume from here: what `get_state` gave; the result is that of a run that never stopped.
        on_step: called after each step as on_step(steps done over all images, get_state).

    Raises:
        DataError: latents became NaN; names the classes.
    """
    scheduler.set_timesteps(config.steps, device=device)
    timesteps = scheduler.timesteps
    num_steps = len(timesteps)
    guided = _guided_steps(config, num_steps)
    flat = [target.real_MCHW.flatten(1).float() for target in targets]
    spacing = [mean_spacing(real_MD) for real_MD in flat]
    classes_G = torch.tensor([target.class_id for target in targets], device=device)
    done_KGCHW: list[Tensor] = []
    transport_KG: list[list[float]] = []
    step, x_GCHW = 0, torch.empty(0)
    if state is not None:
        done_KGCHW = [torch.tensor(x, device=device) for x in state["latents"]]
        transport_KG = state["transport"].tolist()
        step, x_GCHW = int(state["step"]), torch.tensor(state["current"], device=device)

    def get_state() -> State:
        stacked = torch.stack(done_KGCHW) if done_KGCHW else x_GCHW.new_zeros((0, *x_GCHW.shape))
        return {
            "latents": to_array(stacked),
            "transport": np.array(transport_KG, dtype=np.float64).reshape(-1, len(targets)),
            "step": np.array(step),
            "current": to_array(x_GCHW),
        }

    def move_of(g: int, end_GD: Tensor, step: int) -> Tensor:
        before = [x[g].flatten() for x in done_KGCHW]
        before_KD = torch.stack(before) if before else end_GD[:0]
        batch = _batch(flat[g], targets[g].label, config, seed, len(done_KGCHW), step)
        return _move(end_GD[g], before_KD, batch, config, spacing[g], targets[g].influence)

    with torch.no_grad():
        while len(done_KGCHW) < num_images:
            image = len(done_KGCHW)
            noise_GSCHW = _noise(targets, seed, image, (num_steps + 1, *shape_CHW))
            if step == 0:
                x_GCHW = torch.from_numpy(noise_GSCHW[:, 0]).to(device)
            while step < num_steps:
                output = predict(x_GCHW, timesteps[step], classes_G)
                fresh = torch.from_numpy(noise_GSCHW[:, step + 1]).to(device)
                found = scheduler.step(
                    output,
                    timesteps[step],
                    x_GCHW,
                    eta=config.eta,
                    variance_noise=fresh if config.eta > 0 else None,
                )
                x_GCHW = found.prev_sample
                if step in guided:
                    end_GD = found.pred_original_sample.flatten(1)
                    moves = [move_of(g, end_GD, step) for g in range(len(targets))]
                    x_GCHW = x_GCHW - torch.stack(moves).view_as(x_GCHW)
                step += 1
                # The last step of an image is told below, when the image is among those done.
                if on_step is not None and step < num_steps:
                    on_step(image * num_steps + step, get_state)
            _refuse_lost(targets, x_GCHW)
            done_KGCHW.append(x_GCHW)
            samples_GKD = torch.stack(done_KGCHW, dim=1).flatten(2)
            transport_KG.append(
                [_share(samples_GKD[g], flat[g], config, spacing[g]) for g in range(len(targets))]
            )
            step = 0
            if on_step is not None:
                on_step((image + 1) * num_steps, get_state)
    latents_KGCHW = torch.stack(done_KGCHW)
    return [
        ClassSamples(
            label=target.label,
            latents_KCHW=latents_KGCHW[:, g],
            transport_K=np.array([row[g] for row in transport_KG], dtype=np.float32),
        )
        for g, target in enumerate(targets)
    ]


def _guided_steps(config: DiffusionConfig, num_steps: int) -> frozenset[int]:
    """Return the steps inside the window, counted from 0 at the noise; none when nothing guides."""
    if config.ot_weight == config.diversity_weight == config.influence_weight == 0:
        return frozenset()
    begin, end = (round(part * num_steps) for part in config.window)
    return frozenset(range(begin, max(end, begin + 1)))


def _move(
    end_D: Tensor,
    earlier_nD: Tensor,
    real_MD: Tensor,
    config: DiffusionConfig,
    spacing: float,
    influence: ClassInfluence | None,
) -> Tensor:
    """Return what a guided step takes from the sample, float32 (D,)."""
    move_D = torch.zeros_like(end_D, dtype=torch.float32)
    if config.ot_weight > 0:
        direction_D = transport_direction(
            end_D,
            earlier_nD,
            real_MD,
            regularization=config.regularization * spacing,
            iterations=config.sinkhorn_iterations,
        )
        move_D += config.ot_weight * direction_D
    if config.diversity_weight > 0:
        move_D += config.diversity_weight * deviation_direction(end_D, earlier_nD)
    if config.influence_weight > 0:
        assert influence is not None, "an influence weight needs a surrogate"
        move_D -= config.influence_weight * influence_direction(end_D, influence)
    return move_D


def _share(samples_nD: Tensor, real_MD: Tensor, config: DiffusionConfig, spacing: float) -> float:
    """Return the transport distance of samples to real latents, a share of the spacing of the latter."""
    distance = transport_distance(
        samples_nD,
        real_MD,
        regularization=config.regularization * spacing,
        iterations=config.sinkhorn_iterations,
    )
    return float(distance) / spacing


def _noise(
    targets: Sequence[SampleTarget], seed: int, image: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the start and the noise of every step of one image of each class, float32 (G, S + 1, C, H, W)."""
    return np.stack(
        [
            class_generator(seed, t.label, _NOISE, image).standard_normal(shape, dtype=np.float32)
            for t in targets
        ]
    )


def _batch(
    real_MD: Tensor, label: int, config: DiffusionConfig, seed: int, image: int, step: int
) -> Tensor:
    """Return the real latents of one guided step, drawn without repetition."""
    if config.real_per_step >= len(real_MD):
        return real_MD
    rng = class_generator(seed, label, _REAL, image * config.steps + step)
    rows = rng.choice(len(real_MD), config.real_per_step, replace=False)
    return real_MD[torch.from_numpy(rows).to(real_MD.device)]


def _refuse_lost(targets: Sequence[SampleTarget], x_GCHW: Tensor) -> None:
    """Raise a DataError when latents are no numbers any more."""
    finite_G = torch.isfinite(x_GCHW).flatten(1).all(dim=1).tolist()
    lost = [t.label for t, ok in zip(targets, finite_G, strict=True) if not ok]
    if lost:
        raise DataError(
            f"recover: samples of classes {lost} became NaN; lower --recover.diffusion.ot-weight or "
            "--recover.diffusion.guidance-scale, turn --recover.mixed-precision off, and check the model's weights"
        )
