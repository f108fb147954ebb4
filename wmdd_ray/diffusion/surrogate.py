"""The surrogate of recover's influence term: one unit before all groups, which read what it has committed."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.kernels import deterministic_convolutions
from wmdd_ray.core.optimizer import State
from wmdd_ray.diffusion.card import ModelCard
from wmdd_ray.diffusion.influence import surrogate_of, surrogate_parameters, train_surrogate
from wmdd_ray.diffusion.model import DiffusionModel
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import Report, unit_seed
from wmdd_ray.store import codecs

UNIT = "surrogate"
_KEY = f"{UNIT}.safetensors"
# Share of the unit, for the progress line alone, after which all real latents are there.
_ENCODED = 0.5


def is_needed(config: DistillConfig) -> bool:
    """Return whether the images of a run depend on a surrogate."""
    return config.recover.method == "diffusion" and config.recover.diffusion.influence_weight > 0


def size_bytes(config: DistillConfig, card: ModelCard, num_classes: int) -> int:
    """Return the bytes that the surrogate takes: the weights at each checkpoint, float32."""
    checkpoints = config.recover.diffusion.influence_epochs
    return 4 * len(checkpoints) * surrogate_parameters(num_classes, card.shape_CHW)


def make(
    room: Room,
    model: DiffusionModel,
    read_real: Callable[[int, int], np.ndarray],
    config: DistillConfig,
    *,
    num_classes: int,
    device: torch.device,
    report: Report,
) -> None:
    """Train the surrogate on real latents of all classes and commit it.

    What it holds are at most `influence_latents` latents a class, in half precision: 1.6 GB for ImageNet-1K in a DiT of 256
    pixels, twice that while they are put together. A resumed unit encodes them again. `read_real` is (label, side) -> real
    images of the class, uint8 (M, side, side, C), M at most `influence_latents`.
    """
    attempt = room.begin(UNIT)
    if attempt is None:
        return
    keep = Checkpoints(room, UNIT, config.recover.checkpoint_s)
    epochs = config.recover.diffusion.influence_epochs
    parts = []
    for label in range(num_classes):
        latents_MCHW = model.encode(read_real(label, model.card.image_size))
        parts.append(latents_MCHW.half().cpu().numpy())
        done = (label + 1) / num_classes
        report(_ENCODED * done, f"real latents of {label + 1}/{num_classes} classes")
    state, losses = keep.load(), []
    if state is not None:
        losses = state.pop("losses").tolist()

    def on_epoch(epoch: int, loss: float, get_state: Callable[[], State]) -> None:
        losses.append(round(loss, 4))
        keep.maybe(lambda: get_state() | {"losses": np.array(losses)})
        report(
            _ENCODED + (1 - _ENCODED) * epoch / epochs[-1],
            f"{UNIT}, epoch {epoch}/{epochs[-1]}, loss {loss:.3f}",
            epoch=epoch,
            loss=loss,
        )

    in_core = time.perf_counter()
    with deterministic_convolutions():
        weights = train_surrogate(
            np.concatenate(parts),
            np.repeat(np.arange(num_classes), [len(part) for part in parts]),
            num_classes=num_classes,
            checkpoints=epochs,
            seed=unit_seed(config.seed, "recover", UNIT),
            device=device,
            state=state,
            on_epoch=on_epoch,
        )
    in_core = time.perf_counter() - in_core
    attempt.commit(
        {_KEY: codecs.encode_state(weights)},
        metrics={"epoch_losses": losses, "seconds_in_core": round(in_core, 4)},
    )
    keep.clear()


def read(
    room: Room,
    model: DiffusionModel,
    config: DistillConfig,
    *,
    num_classes: int,
    device: torch.device,
) -> tuple[torch.nn.Module, ...]:
    """Return the committed surrogate as it was at each checkpoint, verified, though the room is not committed yet."""
    content = room.read(room.read_unit(UNIT).files[0])
    return surrogate_of(
        codecs.decode_state(content),
        config.recover.diffusion.influence_epochs,
        num_classes=num_classes,
        shape_CHW=model.shape_CHW,
        device=device,
    )
