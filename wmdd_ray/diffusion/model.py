"""Diffusion models at work: loaded, sampled from, made and saved, as pipelines of diffusers.

Weights are safetensors: nothing is unpickled, and no code of a repository runs. Whatever scheduler the pipeline names, images
are sampled by DDIM with its noise levels. What is known of a model without its weights is in card.py.

Legend: N images, B batch, C channels, H W pixels or latent positions.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_ray.diffusion.card import (
    CLASSES_KEY,
    INDEX_KEY,
    LEVELS_KEY,
    NORM_GROUPS,
    OPTION,
    WEIGHTS,
    ModelCard,
    card_of,
    check_widths,
    files_below,
    local_copy,
    read_json,
)
from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.store.documents import seal

# Real images that a VAE encodes at once.
_ENCODE = 16


class DiffusionModel:
    """A pipeline's UNet2DModel or DiTTransformer2DModel, AutoencoderKL where it is latent, and DDIMScheduler, on a device."""

    def __init__(self, card: ModelCard, network: nn.Module, vae: Any, scheduler: Any) -> None:
        self.card, self.network, self.vae, self.scheduler = card, network, vae, scheduler
        self.shape_CHW = card.shape_CHW
        self._device = next(network.parameters()).device
        if vae is not None:
            # Of a latent v the network sees (v - shift) * factor.
            self._factor = float(vae.config.scaling_factor)
            self._shift = float(vae.config.shift_factor or 0.0)

    def predict(
        self,
        x_BCHW: Tensor,
        timestep: Tensor,
        classes_B: Tensor,
        *,
        guidance_scale: float,
        mixed_precision: bool,
    ) -> Tensor:
        """Return what the scheduler wants to know of noisy latents, float32, with classifier-free guidance."""
        card, batch = self.card, len(x_BCHW)
        with_null = guidance_scale != 1
        if with_null:
            assert card.null_class is not None, "checked by check_card"
            x_BCHW = torch.cat([x_BCHW, x_BCHW])
            classes_B = torch.cat([classes_B, torch.full_like(classes_B, card.null_class)])
        labels = None if card.num_classes is None else classes_B
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=mixed_precision):
            out = self.network(
                x_BCHW, timestep.expand(len(x_BCHW)), class_labels=labels, return_dict=False
            )[0]
        # A DiT that learned the variance has it in as many channels more; DDIM does not ask for it.
        out = out[:, : self.shape_CHW[0]].float()
        if not with_null:
            return out
        with_class, without = out[:batch], out[batch:]
        return without + guidance_scale * (with_class - without)

    @torch.no_grad()
    def encode(self, images_NHWC: np.ndarray) -> Tensor:
        """Return the latents of uint8 images of the model's size: a VAE's means, or pixels in [-1, 1]."""
        parts = []
        for start in range(0, len(images_NHWC), _ENCODE):
            pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC[start : start + _ENCODE]))
            x = pixels.to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
            if self.vae is not None:
                x = (self.vae.encode(x).latent_dist.mode() - self._shift) * self._factor
            parts.append(x.float().contiguous())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents_KCHW: Tensor) -> np.ndarray:
        """Return the uint8 images (K, H, W, C) of latents, at the model's size."""
        parts = []
        for latent in latents_KCHW.split(_ENCODE):
            x = latent
            if self.vae is not None:
                x = self.vae.decode(x / self._factor + self._shift, return_dict=False)[0]
            pixels = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            parts.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
        return np.ascontiguousarray(np.concatenate(parts))


def load_model(uri: str, device: torch.device | str) -> DiffusionModel:
    """Return a model in eval mode on a device.

    Raises:
        ConfigError: There is no such model, diffusers is not installed, or the pipeline is none of a known kind.
        ArtifactError: Its weights are no safetensors, are damaged, or do not fit its configuration.
    """
    with local_copy(uri, weights=True) as (folder, identity, keys):
        card = card_of(uri, folder, identity, keys)
        if CLASSES_KEY in keys:
            _check_weights(folder, uri)
        try:
            from diffusers.models import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
            from diffusers.schedulers import DDIMScheduler
        except ImportError as error:
            raise _not_installed(error) from error
        options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
        vae = None
        try:
            if card.kind == "dit":
                network = DiTTransformer2DModel.from_pretrained(
                    folder, subfolder="transformer", **options
                )
                vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **options)
            else:
                network = UNet2DModel.from_pretrained(folder, subfolder="unet", **options)
            levels = read_json(folder, LEVELS_KEY, uri)
            # By default DDIM clips to [-1, 1], which ruins latents; of the others only those that say so do.
            if levels.get("_class_name", "DDIMScheduler") not in ("DDIMScheduler", "DDPMScheduler"):
                levels = {"clip_sample": False, **levels}
            scheduler = DDIMScheduler.from_config(levels)
        except (
            ArithmeticError,
            LookupError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtifactError(
                f"{OPTION} {uri}: its files could not be read ({type(error).__name__}: {said}); download or train the model again"
            ) from error
    modules = [m.to(device).eval().requires_grad_(False) for m in (network, vae) if m is not None]
    return DiffusionModel(card, modules[0], vae, scheduler)


def _not_installed(error: ImportError) -> ConfigError:
    return ConfigError(
        f"--recover.method diffusion needs diffusers, which cannot be imported ({error}): pip install 'wmdd_ray[diffusion]'"
    )


def new_unet(
    widths: tuple[int, ...],
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    layers: int = 1,
) -> tuple[Any, Any]:
    """Return an untrained UNet on pixels, with a class more that stands for none, and its noise levels (cosine).

    `widths` are the channels of the `layers` blocks at each resolution, from the image's, H = W = `image_size`, to the one halved
    len(widths) - 1 times, which has attention.

    Raises:
        ConfigError: The widths cannot be (`check_widths`), or diffusers is not installed.
    """
    check_widths(widths, image_size)
    halvings = len(widths) - 1
    try:
        from diffusers.models import UNet2DModel
        from diffusers.schedulers import DDIMScheduler
    except ImportError as error:
        raise _not_installed(error) from error
    network = UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * halvings + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * halvings,
        layers_per_block=layers,
        norm_num_groups=NORM_GROUPS,
        num_class_embeds=num_classes + 1,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
    )
    return network, scheduler


def trained_card(unet: Any, scheduler: Any, class_names: tuple[str, ...], uri: str) -> ModelCard:
    """Return the card of a network of `new_unet` that has been trained on a data set, as its files would say it."""
    return ModelCard(
        uri=uri,
        kind="unet",
        image_size=int(unet.config.sample_size),
        channels=int(unet.config.in_channels),
        shape_CHW=(int(unet.config.in_channels), *2 * (int(unet.config.sample_size),)),
        num_classes=len(class_names),
        null_class=len(class_names),
        class_names=class_names,
        ordered=True,
        train_steps=int(scheduler.config.num_train_timesteps),
        identity="",
    )


def save_model(
    network: Any, scheduler: Any, class_names: tuple[str, ...], about: dict[str, Any]
) -> dict[str, bytes]:
    """Return the files of a UNet's pipeline by key, in diffusers' own format, with classes.json.

    The class `len(class_names)` of the network, a UNet2DModel, stands for none. `about` is what else classes.json says.
    """
    from diffusers.pipelines import DDIMPipeline

    with tempfile.TemporaryDirectory(prefix="wmdd-ray-model-") as made:
        folder = Path(made)
        DDIMPipeline(unet=network, scheduler=scheduler).save_pretrained(
            folder, safe_serialization=True
        )
        files = {key: (folder / key).read_bytes() for key in sorted(files_below(folder))}
    weights = hashlib.sha256(files[f"unet/{WEIGHTS}"]).hexdigest()
    files[CLASSES_KEY] = seal(
        {"class_names": list(class_names), "weights_sha256": weights, **about}
    )
    # Last: a folder without it is no model.
    files[INDEX_KEY] = files.pop(INDEX_KEY)
    return files


def _check_weights(folder: Path, uri: str) -> None:
    expected = json.loads((folder / CLASSES_KEY).read_bytes())["weights_sha256"]
    with open(folder / f"unet/{WEIGHTS}", "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ArtifactError(
            f"{OPTION} {uri}: expected weights with SHA-256 {expected[:12]}..., found {actual[:12]}...; train the model again"
        )


def fit_pictures(images_NHWC: np.ndarray, *, resize: int, image_size: int) -> np.ndarray:
    """Return pictures of a model as the network sees real ones: shorter side to `resize`, center crop to `image_size`.

    Those that are `image_size` wide are left as they are: the model was trained on pictures that were cropped before.
    """
    side = images_NHWC.shape[1]
    if side == image_size:
        return images_NHWC
    if side != resize:
        pixels = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=(resize, resize), mode="bilinear", antialias=True)
        images_NHWC = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    first = (resize - image_size) // 2
    return np.ascontiguousarray(
        images_NHWC[:, first : first + image_size, first : first + image_size]
    )
