"""Units of the bench `otg`: the diffusion model, the surrogate of its influence term, and the images of a guidance.

Legend: K images of a class, M real ones, H W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.benches.accuracy.splits import Workplace
from jobs.benches.accuracy.units import ImagesUnit, Speed, Unit, network_at
from jobs.train_diffusion import Training, train_unet
from wmdd_ray.config import DiffusionConfig, NetworkConfig
from wmdd_ray.core.optimizer import State
from wmdd_ray.core.synthesis import deterministic_convolutions
from wmdd_ray.core.tiles import tile
from wmdd_ray.diffusion.influence import (
    ClassInfluence,
    class_influence,
    surrogate_of,
    train_surrogate,
)
from wmdd_ray.diffusion.model import DiffusionModel, load_model, save_model
from wmdd_ray.diffusion.recovery import sampled
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.run import unit_seed
from wmdd_ray.store import codecs

# Real images of a class that samples are led by, as the pipeline's.
_POOL = 300
_STATE_EVERY_S = 30.0
# For the plan, as they were on digits: an image's step costs this many times that of this network, a guided set that much more.
_COMPARED = NetworkConfig(arch="convnet3", width=32)
_UNET_COST, _SURROGATE_COST = 17.0, 6.0
_SAMPLE_COST, _TRANSPORT_COST, _INFLUENCE_COST = 14.0, 6.0, 100.0


@dataclass(frozen=True, kw_only=True)
class UnetUnit(Unit):
    """A diffusion model, trained on `train`: the files of a pipeline."""

    room = "diffusion"
    training: Training

    @property
    def label(self) -> str:
        return "unet"

    def seconds(self, place: Workplace, speed: Speed) -> float:
        passes = self.training.epochs * len(place.train.labels_N)
        return _UNET_COST * passes * speed(_COMPARED, False)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        keep = Checkpoints(place.room(self.room), self.id, _STATE_EVERY_S)
        told: dict[str, float] = {}

        def on_epoch(epoch: int, loss: float, get_state: Callable[[], State]) -> None:
            told["loss"] = round(loss, 5)
            keep.maybe(get_state)

        network, scheduler = train_unet(
            self.training,
            place.train.images_NHWC,
            place.train.labels_N,
            num_classes=len(place.class_names),
            device=place.device,
            state=keep.load(),
            on_epoch=on_epoch,
        )
        keep.clear()
        files = save_model(network, scheduler, place.class_names, {"data": self.data})
        return {f"{self.id}/{key}": content for key, content in files.items()}, told


@lru_cache(maxsize=1)
def model_at(place: Workplace, unit: UnetUnit) -> DiffusionModel:
    """Return a finished diffusion model; kept for the next unit of this process."""
    return load_model(f"{place.out}/{unit.room}/{unit.id}", place.device)


@dataclass(frozen=True, kw_only=True)
class SurrogateUnit(Unit):
    """The classifier of latents that tells influence, at its checkpoints; one for all sets, as there is one teacher."""

    room = "surrogate"
    unet: UnetUnit
    epochs: tuple[int, ...]
    latents: int

    @property
    def label(self) -> str:
        return "surrogate"

    def seconds(self, place: Workplace, speed: Speed) -> float:
        num_latents = min(len(place.train.labels_N), self.latents * len(place.class_names))
        return _SURROGATE_COST * self.epochs[-1] * num_latents * speed(_COMPARED, False)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        keep = Checkpoints(place.room(self.room), self.id, _STATE_EVERY_S)
        told: dict[str, float] = {}
        labels = range(len(place.class_names))
        parts = [self.real_latents(place, label).cpu().numpy() for label in labels]

        def on_epoch(_: int, loss: float, get_state: Callable[[], State]) -> None:
            told["loss"] = round(loss, 5)
            keep.maybe(get_state)

        with deterministic_convolutions():
            weights = train_surrogate(
                np.concatenate(parts),
                np.repeat(np.array(labels), [len(part) for part in parts]),
                num_classes=len(labels),
                checkpoints=self.epochs,
                seed=unit_seed(0, "recover", self.label),
                device=place.device,
                state=keep.load(),
                on_epoch=on_epoch,
            )
        keep.clear()
        return {f"{self.id}.safetensors": codecs.encode_state(weights)}, told

    def real_latents(self, place: Workplace, label: int) -> Tensor:
        """Return the latents of a class that it is trained on, float32 (M, C, H, W)."""
        images_MHWC = real_images(place, label, 0)[: self.latents]
        return model_at(place, self.unet).encode(images_MHWC)


@lru_cache(maxsize=1)
def surrogate_at(place: Workplace, unit: SurrogateUnit) -> tuple[torch.nn.Module, ...]:
    """Return a finished surrogate as it was at each checkpoint; kept for the next unit of this process."""
    return surrogate_of(
        codecs.decode_state(unit.file(place)),
        unit.epochs,
        num_classes=len(place.class_names),
        shape_CHW=model_at(place, unit.unet).shape_CHW,
        device=place.device,
    )


@lru_cache(maxsize=1)
def influences_at(place: Workplace, unit: SurrogateUnit) -> list[ClassInfluence]:
    """Return what the influence on each class is measured by; kept for the next set."""
    networks, labels = surrogate_at(place, unit), range(len(place.class_names))
    return [class_influence(networks, unit.real_latents(place, label), label) for label in labels]


@dataclass(frozen=True, kw_only=True)
class SampledUnit(ImagesUnit):
    """The images of all classes, sampled as the stage `recover` samples them; `recover.diffusion.model` is that of the unit."""

    unet: UnetUnit
    surrogate: SurrogateUnit | None
    recipe: str

    @property
    def diffusion(self) -> DiffusionConfig:
        """How they are sampled."""
        return self.recover.diffusion

    def seconds(self, place: Workplace, speed: Speed) -> float:
        passes = self.diffusion.steps * self.ipc * len(place.class_names)
        cost = _SAMPLE_COST
        cost += _TRANSPORT_COST * (self.diffusion.ot_weight > 0)
        cost += _INFLUENCE_COST * (self.diffusion.influence_weight > 0)
        return cost * passes * speed(_COMPARED, False)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        keep = Checkpoints(place.room(self.room), self.id, _STATE_EVERY_S)
        teacher_of = self.features[0].teacher
        num_classes = len(place.class_names)
        made = sampled(
            range(num_classes),
            model_at(place, self.unet),
            network_at(place, teacher_of),
            codecs.decode_teacher(teacher_of.file(place)),
            lambda label, side: real_images(place, label, self.seed, side),
            replace(recipe_of(self.recipe, self.ipc), recover=self.recover),
            seed=unit_seed(self.seed, "recover", ""),
            surrogate=self.networks(place),
            device=torch.device(place.device),
            state=keep.load(),
            on_step=lambda _, get_state: keep.maybe(get_state),
        )
        keep.clear()
        tiles, side = self.recover.tiles, place.source.image_size
        weights_N = np.concatenate([c.weights_K for c in made])
        content = codecs.encode_images(
            np.concatenate([tile(c.images_KHWC, tiles, side) for c in made]),
            np.repeat(np.arange(num_classes), self.ipc),
            weights_N.reshape(-1, tiles**2),
            place.class_names,
        )
        transport = float(np.mean([c.losses["ot"] for c in made]))
        seconds = round(keep.seconds, 3)
        return {f"{self.id}.parquet": content}, {"ot": transport, "seconds": seconds}

    def networks(self, place: Workplace) -> Sequence[torch.nn.Module]:
        """Return what tells influence, where it leads."""
        return surrogate_at(place, self.surrogate) if self.surrogate else ()


def real_images(place: Workplace, label: int, seed: int, side: int | None = None) -> np.ndarray:
    """Return real images of a class, uint8 (M, H, W, C), M at most 300, that a model's samples are led by."""
    assert side in (None, place.source.image_size), "the model was trained on these images"
    rows_N = place.train.of_class(label)
    rng = np.random.default_rng(unit_seed(seed, "random_real", str(label)))
    chosen = rng.choice(rows_N, min(len(rows_N), _POOL), replace=False)
    return np.asarray(place.train.images_NHWC[chosen])
