"""recover by a diffusion model: the images of a group of classes, sampled one after another and led by transport (OTG)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.groups import Group
from wmdd_ray.core.kernels import deterministic_convolutions
from wmdd_ray.core.optimizer import State
from wmdd_ray.core.synthesis import features_of
from wmdd_ray.core.tiles import shrink, tile_side
from wmdd_ray.core.views import to_input
from wmdd_ray.diffusion import surrogate
from wmdd_ray.diffusion.card import ModelCard, check_card, class_ids_of, read_card
from wmdd_ray.diffusion.influence import LEAST_SIDE, class_influence
from wmdd_ray.diffusion.model import fit_pictures, load_model
from wmdd_ray.diffusion.sampling import ClassSamples, SampleTarget, sample_group
from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.options import fingerprint_options
from wmdd_ray.records import ClassImages, Teacher
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import Report

OnStep = Callable[[int, Callable[[], State]], None]
RealAt = Callable[[int, DistillConfig, int | None], np.ndarray]
"""(label, options by which images are read, most) -> random real images of a class, uint8 (M, H, W, C)."""


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that sampled images depend on, and which model `model` is now."""
    recover = fingerprint_options(config.recover)
    used = ("method", "tiles", "images_per_group", "mixed_precision", "diffusion")
    model = read_card(config.recover.diffusion.model).identity
    return {**{name: recover[name] for name in used}, "model": model}


def checked(
    card: ModelCard, config: DistillConfig, class_names: tuple[str, ...]
) -> tuple[int, ...]:
    """Return the model's class of every class of the data; a ConfigError when model and options do not go together."""
    diffusion = config.recover.diffusion
    check_card(
        card,
        channels=config.source.channels,
        steps=diffusion.steps,
        guidance_scale=diffusion.guidance_scale,
    )
    side = card.shape_CHW[1]
    if diffusion.influence_weight > 0 and side < LEAST_SIDE:
        raise ConfigError(
            f"--recover.diffusion.influence-weight: expected 0 for {card.uri}, whose latents are {side} values wide, which is too "
            f"small for the classifier that tells the influence ({LEAST_SIDE}); got {diffusion.influence_weight:g}"
        )
    return class_ids_of(card, class_names, diffusion.class_ids)


class Sampler:
    """Makes the images of recover by a diffusion model, and its surrogate where there is one (`units.images.Maker`).

    Raises:
        ArtifactError: The model is not `model_identity` any more, with which the run began.
    """

    def __init__(
        self,
        config: DistillConfig,
        room: Room,
        network: torch.nn.Module,
        teacher: Teacher,
        real_at: RealAt,
        *,
        model_identity: str,
        seed: int,
        device: torch.device,
    ) -> None:
        self._config, self._room, self._real_at = config, room, real_at
        self._network, self._teacher, self._seed, self._device = network, teacher, seed, device
        self._model = load_model(config.recover.diffusion.model, device)
        card = self._model.card
        if card.identity != model_identity:
            raise ArtifactError(
                f"--recover.diffusion.model {card.uri}: expected the model that this run began with ({model_identity}), found "
                f"another ({card.identity}); leave it alone while the run works, or put the first one back"
            )
        self._surrogates: tuple[torch.nn.Module, ...] | None = None
        # Of all images of a group.
        self.num_steps = config.num_atoms * config.recover.diffusion.steps

    def prepare(self, unit: str, report: Report) -> bool:
        if unit != surrogate.UNIT:
            return False
        most = self._config.recover.diffusion.influence_latents
        surrogate.make(
            self._room,
            self._model,
            partial(self._real, most=most),
            self._config,
            num_classes=self._teacher.num_classes,
            device=self._device,
            report=report,
        )
        return True

    def make(
        self, group: Group, *, state: State | None, on_step: OnStep
    ) -> tuple[list[ClassImages], float]:
        """Return the images of some classes, of equal weights, with what they reach in the teacher, and the seconds.

        The curve `ot` is the transport distance to the class's real images after each image, a share of their own mean
        distance: it has no iterations, so its points are the images.
        """
        started = time.perf_counter()
        model, diffusion = self._model, self._config.recover.diffusion
        predict = partial(
            model.predict,
            guidance_scale=diffusion.guidance_scale,
            mixed_precision=self._config.recover.mixed_precision,
        )
        targets = self._targets(group)
        with deterministic_convolutions():
            samples = sample_group(
                predict,
                model.scheduler,
                targets,
                diffusion,
                num_images=self._config.num_atoms,
                shape_CHW=model.shape_CHW,
                seed=self._seed,
                device=self._device,
                state=state,
                on_step=on_step,
            )
        return [self._images_of(one) for one in samples], time.perf_counter() - started

    def _targets(self, group: Group) -> list[SampleTarget]:
        model, surrogates = self._model, self._read_surrogates()
        class_ids = checked(model.card, self._config, self._teacher.class_names)
        most = self._config.recover.diffusion.influence_latents
        targets = []
        for label in group.labels:
            real_MCHW = model.encode(self._real(label, model.card.image_size))
            targets.append(
                SampleTarget(
                    label=label,
                    class_id=class_ids[label],
                    real_MCHW=real_MCHW,
                    influence=class_influence(surrogates, real_MCHW[:most], label)
                    if surrogates
                    else None,
                )
            )
        return targets

    def _images_of(self, samples: ClassSamples) -> ClassImages:
        teacher = self._teacher
        whole_KHWC = fit_pictures(
            self._model.decode(samples.latents_KCHW),
            resize=teacher.resize,
            image_size=teacher.image_size,
        )
        images_KHWC = shrink(whole_KHWC, tile_side(teacher.image_size, self._config.recover.tiles))
        pixels = to_input(images_KHWC, teacher.mean_C, teacher.std_C, self._device)
        k = len(images_KHWC)
        return ClassImages(
            label=samples.label,
            images_KHWC=images_KHWC,
            weights_K=np.full(k, 1 / k),
            losses={"ot": float(samples.transport_K[-1])},
            curves={"ot": samples.transport_K},
            curve_at_P=np.arange(1, k + 1, dtype=np.int32),
            features_KD=features_of(self._network, pixels, teacher.image_size),
        )

    def _real(self, label: int, side: int, most: int | None = None) -> np.ndarray:
        """Return real images at the model's side: whole ones, cropped to a square."""
        config, source = self._config, self._config.source
        if side != source.image_size:
            config = replace(config, source=replace(source, image_size=side, resize=side))
        return self._real_at(label, config, most)

    def _read_surrogates(self) -> tuple[torch.nn.Module, ...]:
        if self._surrogates is None:
            self._surrogates = ()
            if surrogate.is_needed(self._config):
                self._surrogates = surrogate.read(
                    self._room,
                    self._model,
                    self._config,
                    num_classes=self._teacher.num_classes,
                    device=self._device,
                )
        return self._surrogates
