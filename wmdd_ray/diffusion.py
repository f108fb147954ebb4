"""Diffusion models at rest and at work: pipelines of diffusers, from a folder, a URI or the Hugging Face hub.

Two kinds are known by their model_index.json: a latent one of a DiTTransformer2DModel with an AutoencoderKL, and a
UNet2DModel on pixels, which may know classes or not. Only JSON and safetensors files are read: nothing is unpickled, and
no code of a repository runs. Whatever scheduler the pipeline names, images are sampled by DDIM with its noise levels.

A model of jobs/train_diffusion.py also has classes.json: its class names in order, and the checksum of its weights.

Legend: N images, B batch, C channels, H W pixels or latent positions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.store.documents import load_json, seal, unseal
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import arrow_filesystem, local_path

logger = logging.getLogger(__name__)

INDEX_KEY, CLASSES_KEY = "model_index.json", "classes.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Real images that a VAE encodes at once.
_ENCODE = 16
_OPTION = "--recover.diffusion.model"
_CONVERT = (
    'convert them once, where you trust them: python -c "from diffusers import DiTPipeline; '
    "DiTPipeline.from_pretrained('NAME').save_pretrained('FOLDER')\", and pass FOLDER"
)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a pipeline's JSON files say.

    `num_classes` is None of a model that knows no classes; `null_class` is what it was trained to take for no class, None
    where it was not. `class_names` has the names of every class, several of one separated by commas; empty where they are
    not told. `ordered` says that they are names of a data set, in its order. `identity` changes when the model's files do.
    """

    uri: str
    kind: str
    image_size: int
    channels: int
    num_classes: int | None
    null_class: int | None
    class_names: tuple[str, ...]
    ordered: bool
    train_steps: int
    identity: str


def read_card(uri: str) -> ModelCard:
    """Return what is known of a model without its weights.

    Raises:
        ConfigError: There is no such model, or none of a known kind.
        ArtifactError: Its weights are no safetensors, or its files are damaged.
    """
    with local_copy(uri, weights=False) as (folder, identity, keys):
        return _card_of(uri, folder, identity, keys)


@contextlib.contextmanager
def local_copy(uri: str, *, weights: bool) -> Iterator[tuple[Path, str, frozenset[str]]]:
    """Yield a model's folder on this machine, its identity, and the keys of all its files.

    Args:
        uri: a folder, a URI, or a repository's name on the hub.
        weights: with its weights, or the JSON files alone.
    """
    path = local_path(uri)
    is_uri = "://" in uri
    if not is_uri and not (path is not None and path.exists()):
        folder = _from_hub(uri, weights=weights)
        # The hub's cache names a snapshot's folder by its commit.
        yield folder, f"hub:{folder.name}", frozenset(_relative(folder))
        return
    store = Store(uri)
    listed = {
        key: size
        for key, size in store.list().items()
        if key.count("/") <= 1 and not key.startswith(("partial/", "."))
    }
    if INDEX_KEY not in listed:
        raise _not_found(uri, f"there is no {INDEX_KEY} in it")
    texts = {key: store.get(key) for key in listed if key.endswith(".json")}
    identity = _identity(listed, texts)
    if path is not None:
        yield path, identity, frozenset(listed)
        return
    with tempfile.TemporaryDirectory(prefix="wmdd-ray-model-") as made:
        folder = Path(made)
        for key, content in texts.items():
            (folder / key).parent.mkdir(exist_ok=True)
            (folder / key).write_bytes(content)
        if weights:
            for key in listed:
                if key.endswith(".safetensors"):
                    _download(uri, key, folder / key)
        yield folder, identity, frozenset(listed)


def _identity(listed: dict[str, int], texts: dict[str, bytes]) -> str:
    """Return a fingerprint of names, sizes and JSON files; of our own models, whose JSON has the checksum, of the weights too."""
    digest = hashlib.sha256()
    for key in sorted(listed):
        if key.endswith((".json", ".safetensors")):
            digest.update(f"{key} {listed[key]}\n".encode())
            digest.update(texts.get(key, b""))
    return digest.hexdigest()[:16]


def _relative(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _download(uri: str, key: str, target: Path) -> None:
    """Copy an object to a file, piece by piece: weights may be larger than what is read at once elsewhere."""
    try:
        filesystem, root = arrow_filesystem(uri)
        target.parent.mkdir(exist_ok=True)
        with filesystem.open_input_stream(f"{root}/{key}") as found, open(target, "wb") as file:
            shutil.copyfileobj(found, file, 1 << 22)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"cannot read {uri}/{key}: {error}; check the connection and the permissions, then run the same command again: "
            "finished units are kept"
        ) from error


def _from_hub(name: str, *, weights: bool) -> Path:
    """Return the folder of a snapshot in the hub's cache, downloaded unless it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors"] if weights else ["*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise _not_found(
            name, "there is no such folder, and it is no name of a repository"
        ) from error
    except Exception as error:
        # The hub's client raises what its HTTP library does; all of it means that the repository was not had.
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise _not_found(
            name,
            f"there is no such folder, and the Hugging Face hub did not give it ({type(error).__name__}: {said[0]}). Without a "
            f"network, download it elsewhere with `hf download {name} --local-dir FOLDER` and pass the folder, on a disk or an "
            "object store that all nodes see",
        ) from error


def _not_found(uri: str, why: str) -> ConfigError:
    return ConfigError(
        f"{_OPTION} {uri}: expected the folder, URI or hub name of a diffusers pipeline; {why}. jobs/train_diffusion.py makes one "
        "of the data's own images"
    )


def _card_of(uri: str, folder: Path, identity: str, keys: frozenset[str]) -> ModelCard:
    index = _json(folder, INDEX_KEY, uri)
    kinds = {
        name: part[1]
        for name, part in index.items()
        if isinstance(part, list) and len(part) == 2 and part[1]
    }
    latent = kinds.get("transformer") == "DiTTransformer2DModel" and "vae" in kinds
    if not (latent or kinds.get("unet") == "UNet2DModel") or "scheduler" not in kinds:
        raise ConfigError(
            f"{_OPTION} {uri}: expected a pipeline of a DiTTransformer2DModel with a VAE and a scheduler, or of a "
            f"UNet2DModel with a scheduler, found {kinds}; other pipelines (text to image, say) are not sampled by class"
        )
    for part in ("transformer", "vae") if latent else ("unet",):
        if f"{part}/{_WEIGHTS}" not in keys:
            # On the hub only what was downloaded is listed: JSON files alone for a card.
            others = sorted(k for k in keys if k.startswith(f"{part}/") and not k.endswith(".json"))
            if others or not identity.startswith("hub:"):
                raise ArtifactError(
                    f"{_OPTION} {uri}: expected {part}/{_WEIGHTS}, found {others or 'no weights'}; weights in other formats are "
                    f"pickles, which are never opened: {_CONVERT}"
                )
    scheduler = _json(folder, "scheduler/scheduler_config.json", uri)
    names: tuple[str, ...] = ()
    ordered = False
    num_classes: int | None = None
    null: int | None = None
    if latent:
        model, vae = (
            _json(folder, "transformer/config.json", uri),
            _json(folder, "vae/config.json", uri),
        )
        factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
        image_size, channels = int(model["sample_size"]) * factor, int(vae.get("out_channels", 3))
        num_classes = null = int(model["num_embeds_ada_norm"])
        labels = index.get("id2label") or {}
        if len(labels) == num_classes:
            names = tuple(str(labels[str(i)]) for i in range(num_classes))
    else:
        model = _json(folder, "unet/config.json", uri)
        image_size, channels = int(model["sample_size"]), int(model["in_channels"])
        num_classes = model.get("num_class_embeds")
    if CLASSES_KEY in keys:
        told = unseal((folder / CLASSES_KEY).read_bytes(), f"{uri}/{CLASSES_KEY}")
        names, ordered = tuple(told["class_names"]), True
        num_classes = null = len(names)
    return ModelCard(
        uri=uri,
        kind="dit" if latent else "unet",
        image_size=image_size,
        channels=channels,
        num_classes=num_classes,
        null_class=null,
        class_names=names,
        ordered=ordered,
        train_steps=int(scheduler.get("num_train_timesteps", 1000)),
        identity=identity,
    )


def _json(folder: Path, key: str, uri: str) -> dict[str, Any]:
    try:
        content = (folder / key).read_bytes()
    except FileNotFoundError as error:
        raise _not_found(uri, f"there is no {key} in it") from error
    found = load_json(content, f"{uri}/{key}")
    if not isinstance(found, dict):
        raise ArtifactError(f"{uri}/{key}: expected a JSON object, found {content[:40]!r}")
    return found


def class_ids_of(
    card: ModelCard, class_names: tuple[str, ...], given: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the model's class of every class of the data; 0 for a model that knows none.

    In this order: what was given, a model of our own for exactly these classes, the names that the model has for its
    classes, and for as many classes as the data's, their numbers.

    Raises:
        ConfigError: It cannot be told, or the model is one of other classes.
    """
    count = len(class_names)
    if given:
        known = card.num_classes or 0
        if len(given) != count or max(given) >= known:
            raise ConfigError(
                f"--recover.diffusion.class-ids: expected {count} classes below {known}, one a class of the data, got {given}"
            )
        return given
    if card.num_classes is None:
        return (0,) * count
    if card.ordered:
        if card.class_names != class_names:
            first = next(
                (i for i, pair in enumerate(zip(card.class_names, class_names, strict=False)) if pair[0] != pair[1]),
                min(count, len(card.class_names)),
            )  # fmt: skip
            raise ConfigError(
                f"{_OPTION} {card.uri}: it was trained on other classes: {len(card.class_names)} against the data's {count}, "
                f"first at class {first}: {card.class_names[first : first + 3]} against {class_names[first : first + 3]}; "
                "train one on this data (jobs/train_diffusion.py), or say by --recover.diffusion.class-ids which of its classes "
                "are meant"
            )
        return tuple(range(count))
    by_name = {
        word.strip().lower(): i
        for i, names in enumerate(card.class_names)
        for word in names.split(",")
    }
    found = [by_name.get(name.strip().lower(), -1) for name in class_names]
    if min(found) >= 0 and len(set(found)) == count:
        return tuple(found)
    if card.num_classes == count:
        logger.info("%s: class i of the data is taken for the model's class i", card.uri)
        return tuple(range(count))
    raise ConfigError(
        f"{_OPTION} {card.uri}: it has {card.num_classes} classes and the data {count}, whose names {class_names[:3]}... are not "
        "among the model's; say which are meant: --recover.diffusion.class-ids 0 217 482 ..., one a class of the data"
    )


def check_card(card: ModelCard, *, channels: int, steps: int, guidance_scale: float) -> None:
    """Raise a ConfigError when the options ask for what the model cannot do."""
    if card.channels != channels:
        raise ConfigError(
            f"{_OPTION} {card.uri}: it makes pictures of {card.channels} channels, --source.channels is {channels}; set that to "
            f"{card.channels} (with a teacher of as many), or take another model"
        )
    if steps > card.train_steps:
        raise ConfigError(
            f"--recover.diffusion.steps: expected at most the model's {card.train_steps}, got {steps}"
        )
    if guidance_scale != 1 and card.null_class is None:
        raise ConfigError(
            f"--recover.diffusion.guidance-scale: expected 1 for {card.uri}, which was not trained to do without a class, got "
            f"{guidance_scale:g}"
        )


class DiffusionModel:
    """A pipeline's network, VAE and noise levels, on a device.

    Args:
        card: What its JSON files say.
        network: UNet2DModel or DiTTransformer2DModel.
        vae: AutoencoderKL of a latent model.
        scheduler: A DDIMScheduler.
    """

    def __init__(self, card: ModelCard, network: nn.Module, vae: Any, scheduler: Any) -> None:
        self.card, self.network, self.vae, self.scheduler = card, network, vae, scheduler
        config: Any = network.config
        self.shape_CHW = (int(config.in_channels), int(config.sample_size), int(config.sample_size))
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
        card = _card_of(uri, folder, identity, keys)
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
            levels = _json(folder, "scheduler/scheduler_config.json", uri)
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
                f"{_OPTION} {uri}: its files could not be read ({type(error).__name__}: {said}); download or train the model again"
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
    train_steps: int = 1000,
) -> tuple[Any, Any]:
    """Return an untrained UNet on pixels, with a class more that stands for none, and its noise levels (cosine).

    Args:
        widths: channels at each resolution, from the image's to the one halved len(widths) - 1 times, which has attention.
        image_size: H = W, pixels.
        channels: C.
        num_classes: Y.
        layers: blocks at each resolution.
        train_steps: noise levels.

    Raises:
        ConfigError: The image cannot be halved so often, or diffusers is not installed.
    """
    halvings = len(widths) - 1
    if image_size % 2**halvings:
        raise ConfigError(
            f"--widths: expected at most {_halvings(image_size) + 1} for {image_size} pixels, each but the first halving them, "
            f"got {widths}"
        )
    groups = 8
    if any(width % groups or width < groups for width in widths):
        raise ConfigError(f"--widths: expected multiples of {groups}, got {widths}")
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
        norm_num_groups=groups,
        num_class_embeds=num_classes + 1,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=train_steps,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
    )
    return network, scheduler


def _halvings(number: int) -> int:
    return 0 if number % 2 else 1 + _halvings(number // 2)


def trained_card(unet: Any, scheduler: Any, class_names: tuple[str, ...], uri: str) -> ModelCard:
    """Return the card of a network of `new_unet` that has been trained on a data set, as its files would say it."""
    return ModelCard(
        uri=uri,
        kind="unet",
        image_size=int(unet.config.sample_size),
        channels=int(unet.config.in_channels),
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

    Args:
        network: a UNet2DModel whose class `len(class_names)` stands for none.
        scheduler: its noise levels.
        class_names: of the data, in order.
        about: what else classes.json says (data, options).
    """
    from diffusers.pipelines import DDIMPipeline

    with tempfile.TemporaryDirectory(prefix="wmdd-ray-model-") as made:
        folder = Path(made)
        DDIMPipeline(unet=network, scheduler=scheduler).save_pretrained(
            folder, safe_serialization=True
        )
        files = {key: (folder / key).read_bytes() for key in sorted(_relative(folder))}
    weights = hashlib.sha256(files[f"unet/{_WEIGHTS}"]).hexdigest()
    files[CLASSES_KEY] = seal(
        {"class_names": list(class_names), "weights_sha256": weights, **about}
    )
    # Last: a folder without it is no model.
    files[INDEX_KEY] = files.pop(INDEX_KEY)
    return files


def _check_weights(folder: Path, uri: str) -> None:
    told = json.loads((folder / CLASSES_KEY).read_bytes())["weights_sha256"]
    with open(folder / f"unet/{_WEIGHTS}", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != told:
        raise ArtifactError(
            f"{_OPTION} {uri}: expected weights with SHA-256 {told[:12]}..., found {found[:12]}...; train the model again"
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
