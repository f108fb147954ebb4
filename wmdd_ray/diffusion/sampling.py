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
from wmdd_ray.core.optimizer import State, to_array
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
    course = _Course(predict, scheduler, targets, config, shape_CHW, seed, device)
    if state is not None:
        course.load(state)
    with torch.no_grad():
        while len(course.done_KGCHW) < num_images:
            course.step()
            if on_step is not None:
                on_step(len(course.done_KGCHW) * course.num_steps + course.at, course.state)
    latents_KGCHW = torch.stack(course.done_KGCHW)
    return [
        ClassSamples(
            label=target.label,
            latents_KCHW=latents_KGCHW[:, g],
            transport_K=np.array([row[g] for row in course.transport_KG], dtype=np.float32),
        )
        for g, target in enumerate(targets)
    ]


class _Course:
    """Samples of a group under way: those that are done, and the one that has come `at` steps from noise to an image."""

    def __init__(
        self,
        predict: Predict,
        scheduler: Any,
        targets: Sequence[SampleTarget],
        config: DiffusionConfig,
        shape_CHW: tuple[int, int, int],
        seed: int,
        device: torch.device | str,
    ) -> None:
        scheduler.set_timesteps(config.steps, device=device)
        self.num_steps = len(scheduler.timesteps)
        self.done_KGCHW: list[Tensor] = []
        self.transport_KG: list[list[float]] = []
        self.at, self._x_GCHW = 0, torch.empty(0)
        self._noise_GSCHW: np.ndarray | None = None  # of the image under way
        self._predict, self._scheduler, self._config = predict, scheduler, config
        self._targets, self._seed, self._device, self._shape_CHW = targets, seed, device, shape_CHW
        self._guided = _guided_steps(config, self.num_steps)
        self._real = [target.real_MCHW.flatten(1).float() for target in targets]
        self._spacing = [mean_spacing(real_MD) for real_MD in self._real]
        self._classes_G = torch.tensor([target.class_id for target in targets], device=device)

    def state(self) -> State:
        """Return copies of everything that the next step depends on."""
        empty = self._x_GCHW.new_zeros((0, *self._x_GCHW.shape))
        return {
            "latents": to_array(torch.stack(self.done_KGCHW) if self.done_KGCHW else empty),
            "transport": np.array(self.transport_KG, dtype=np.float64).reshape(
                -1, len(self._targets)
            ),
            "step": np.array(self.at),
            "current": to_array(self._x_GCHW),
        }

    def load(self, state: State) -> None:
        self.done_KGCHW = [torch.tensor(x, device=self._device) for x in state["latents"]]
        self.transport_KG = state["transport"].tolist()
        self.at = int(state["step"])
        self._x_GCHW = torch.tensor(state["current"], device=self._device)

    def step(self) -> None:
        """Bring an image of every class one step nearer to its end; after the last, count it among those that are done."""
        timestep, eta = self._scheduler.timesteps[self.at], self._config.eta
        if self._noise_GSCHW is None:
            shape, image = (self.num_steps + 1, *self._shape_CHW), len(self.done_KGCHW)
            self._noise_GSCHW = _noise(self._targets, self._seed, image, shape)
        noise_SGCHW = torch.from_numpy(self._noise_GSCHW).transpose(0, 1)
        if self.at == 0:
            self._x_GCHW = noise_SGCHW[0].to(self._device)
        output = self._predict(self._x_GCHW, timestep, self._classes_G)
        fresh_GCHW = noise_SGCHW[self.at + 1].to(self._device) if eta > 0 else None
        stepped = self._scheduler.step(
            output, timestep, self._x_GCHW, eta=eta, variance_noise=fresh_GCHW
        )
        self._x_GCHW = stepped.prev_sample
        if self.at in self._guided:
            end_GD = stepped.pred_original_sample.flatten(1)
            moves = [self._move(g, end_D) for g, end_D in enumerate(end_GD)]
            self._x_GCHW = self._x_GCHW - torch.stack(moves).view_as(self._x_GCHW)
        self.at += 1
        if self.at == self.num_steps:
            self._finish()

    def _finish(self) -> None:
        """Count the image under way among those that are done, and measure them; the next one begins."""
        _refuse_lost(self._targets, self._x_GCHW)
        self.done_KGCHW.append(self._x_GCHW)
        samples_GKD = torch.stack(self.done_KGCHW, dim=1).flatten(2)
        self.transport_KG.append([self._share(g, x_KD) for g, x_KD in enumerate(samples_GKD)])
        self.at, self._noise_GSCHW = 0, None

    def _share(self, g: int, samples_KD: Tensor) -> float:
        """Return the transport distance of samples of a class to its real latents, a share of the spacing of the latter."""
        distance = transport_distance(
            samples_KD,
            self._real[g],
            regularization=self._config.regularization * self._spacing[g],
            iterations=self._config.sinkhorn_iterations,
        )
        return float(distance) / self._spacing[g]

    def _move(self, g: int, end_D: Tensor) -> Tensor:
        """Return what a guided step takes from the sample of a class, which is led by the images of it that are done, (D,)."""
        config = self._config
        earlier_nD = end_D.new_empty((0, len(end_D)))
        if self.done_KGCHW:
            earlier_nD = torch.stack([x_GCHW[g].flatten() for x_GCHW in self.done_KGCHW])
        move_D = torch.zeros_like(end_D, dtype=torch.float32)
        if config.ot_weight > 0:
            direction_D = transport_direction(
                end_D,
                earlier_nD,
                self._batch(g),
                regularization=config.regularization * self._spacing[g],
                iterations=config.sinkhorn_iterations,
            )
            move_D += config.ot_weight * direction_D
        if config.diversity_weight > 0:
            move_D += config.diversity_weight * deviation_direction(end_D, earlier_nD)
        if config.influence_weight > 0:
            influence = self._targets[g].influence
            assert influence is not None, "an influence weight needs a surrogate"
            move_D -= config.influence_weight * influence_direction(end_D, influence)
        return move_D

    def _batch(self, g: int) -> Tensor:
        """Return the real latents of a class for this step, drawn without repetition."""
        real_MD, count = self._real[g], self._config.real_per_step
        if count >= len(real_MD):
            return real_MD
        step = len(self.done_KGCHW) * self._config.steps + self.at
        rng = class_generator(self._seed, self._targets[g].label, _REAL, step)
        rows = rng.choice(len(real_MD), count, replace=False)
        return real_MD[torch.from_numpy(rows).to(real_MD.device)]


def _guided_steps(config: DiffusionConfig, num_steps: int) -> frozenset[int]:
    """Return the steps inside the window, counted from 0 at the noise; none when nothing guides."""
    if config.ot_weight == config.diversity_weight == config.influence_weight == 0:
        return frozenset()
    begin, end = (round(part * num_steps) for part in config.window)
    return frozenset(range(begin, max(end, begin + 1)))


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


def _refuse_lost(targets: Sequence[SampleTarget], x_GCHW: Tensor) -> None:
    """Raise a DataError when latents are no numbers any more."""
    finite_G = torch.isfinite(x_GCHW).flatten(1).all(dim=1).tolist()
    lost = [t.label for t, ok in zip(targets, finite_G, strict=True) if not ok]
    if lost:
        raise DataError(
            f"recover: samples of classes {lost} became NaN; lower --recover.diffusion.ot-weight or "
            "--recover.diffusion.guidance-scale, turn --recover.mixed-precision off, and check the model's weights"
        )
