"""What is known of a diffusion model without its weights: where it lies, its kind, its size and its classes.

Pipelines of diffusers, from a folder, a URI or the Hugging Face hub. Two kinds are known by their model_index.json: a latent
one of a DiTTransformer2DModel with an AutoencoderKL, and a UNet2DModel on pixels, which may know classes or not. Only JSON
files are read here. A model of jobs/train_diffusion.py also has classes.json: its class names in order, and the checksum of
its weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.store.documents import load_json, unseal
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources.classes import exact, first_difference, plain
from wmdd_ray.store.uris import arrow_filesystem, local_path

logger = logging.getLogger(__name__)

INDEX_KEY, CLASSES_KEY = "model_index.json", "classes.json"
LEVELS_KEY = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTION = "--recover.diffusion.model"
SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
)
"""Schedulers of diffusers whose configuration says the noise levels of a model in terms that DDIM has too.

Of those that diffusers calls compatible with it, EDMEulerScheduler is not: its networks see scaled images and logarithms of sigma.
"""
NORM_GROUPS = 8
"""Groups of channels that our own UNets normalize."""
# What those schedulers can be told, and DDIM cannot do.
_LEVELS = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_type": ("discrete",),
}
# Above any size, channels, classes and steps of a model that there is, and any depth of an autoencoder.
_LARGEST_COUNT, _MOST_BLOCKS = 2**20, 16
_CONVERT = (
    'convert them once, where you trust them: python -c "from diffusers import DiTPipeline; '
    "DiTPipeline.from_pretrained('NAME').save_pretrained('FOLDER')\", and pass FOLDER"
)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a pipeline's JSON files say.

    `shape_CHW` is that of what is sampled: latents, or pixels. `num_classes` is None of a model that knows no classes;
    `null_class` is what it was trained to take for no class, None where it was not. `class_names` has the names of every class,
    several of one separated by commas; empty where they are not told. `ordered` says that they are names of a data set, in its
    order. `identity` changes when the model's files do.
    """

    uri: str
    kind: str
    image_size: int
    channels: int
    shape_CHW: tuple[int, int, int]
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
        return card_of(uri, folder, identity, keys)


@contextlib.contextmanager
def local_copy(uri: str, *, weights: bool) -> Iterator[tuple[Path, str, frozenset[str]]]:
    """Yield a model's folder on this machine, its identity, and the keys of all its files.

    `uri` is a folder, a URI, or a repository's name on the hub. Without `weights` the JSON files alone are there.
    """
    path = local_path(uri)
    is_uri = "://" in uri
    if not is_uri and not (path is not None and path.exists()):
        folder = _from_hub(uri, weights=weights)
        # The hub's cache names a snapshot's folder by its commit.
        yield folder, f"hub:{folder.name}", frozenset(files_below(folder))
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


def files_below(folder: Path) -> list[str]:
    """Return the keys of all files of a folder."""
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _download(uri: str, key: str, target: Path) -> None:
    """Copy an object to a file, piece by piece: weights may be larger than what is read at once elsewhere."""
    try:
        filesystem, root = arrow_filesystem(uri)
        target.parent.mkdir(exist_ok=True)
        with filesystem.open_input_stream(f"{root}/{key}") as remote, open(target, "wb") as file:
            shutil.copyfileobj(remote, file, 1 << 22)
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
        f"{OPTION} {uri}: expected the folder, URI or hub name of a diffusers pipeline; {why}. jobs/train_diffusion.py makes one "
        "of the data's own images"
    )


def card_of(uri: str, folder: Path, identity: str, keys: frozenset[str]) -> ModelCard:
    """Return the card of a model whose JSON files are in `folder`; errors as `read_card`."""
    index = read_json(folder, INDEX_KEY, uri)
    kinds = {
        name: part[1]
        for name, part in index.items()
        if isinstance(part, list) and len(part) == 2 and part[1]
    }
    latent = kinds.get("transformer") == "DiTTransformer2DModel" and "vae" in kinds
    if not (latent or kinds.get("unet") == "UNet2DModel") or "scheduler" not in kinds:
        raise ConfigError(
            f"{OPTION} {uri}: expected a pipeline of a DiTTransformer2DModel with a VAE and a scheduler, or of a "
            f"UNet2DModel with a scheduler, found {kinds}; other pipelines (text to image, say) are not sampled by class"
        )
    beside = {name: kind for name, kind in kinds.items() if name not in ("unet", "scheduler")}
    if not latent and beside:
        raise ConfigError(
            f"{OPTION} {uri}: expected of a UNet2DModel nothing but a scheduler beside it, for it is sampled in pixels, found "
            f"{beside}; a UNet in the latent space of an autoencoder is not supported: take a DiT, or a UNet on pixels"
        )
    for part in ("transformer", "vae") if latent else ("unet",):
        if f"{part}/{WEIGHTS}" not in keys:
            # On the hub only what was downloaded is listed: JSON files alone for a card.
            others = sorted(k for k in keys if k.startswith(f"{part}/") and not k.endswith(".json"))
            if others or not identity.startswith("hub:"):
                raise ArtifactError(
                    f"{OPTION} {uri}: expected {part}/{WEIGHTS}, found {others or 'no weights'}; weights in other formats are "
                    f"pickles, which are never opened: {_CONVERT}"
                )
    scheduler = read_json(folder, LEVELS_KEY, uri)
    _check_levels(scheduler, kinds["scheduler"], uri)
    names: tuple[str, ...] = ()
    ordered = False
    num_classes: int | None = None
    null: int | None = None
    if latent:
        model, vae = (
            read_json(folder, "transformer/config.json", uri),
            read_json(folder, "vae/config.json", uri),
        )
        blocks = vae.get("block_out_channels", [0])
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MOST_BLOCKS:
            raise ArtifactError(
                f"{uri}: expected the VAE's block_out_channels as a list of at most {_MOST_BLOCKS}, found {blocks!r}"
            )
        factor, channels = 2 ** (len(blocks) - 1), _count(vae, "out_channels", uri, 3)
        num_classes = null = _count(model, "num_embeds_ada_norm", uri)
        labels = index.get("id2label") or {}
        if len(labels) == num_classes:
            names = tuple(str(labels[str(i)]) for i in range(num_classes))
    else:
        model = read_json(folder, "unet/config.json", uri)
        factor, channels = 1, _count(model, "in_channels", uri)
        if model.get("num_class_embeds") is not None:
            num_classes = _count(model, "num_class_embeds", uri)
    side = _count(model, "sample_size", uri)
    if CLASSES_KEY in keys:
        about = unseal((folder / CLASSES_KEY).read_bytes(), f"{uri}/{CLASSES_KEY}")
        names, ordered = tuple(about["class_names"]), True
        num_classes = null = len(names)
    return ModelCard(
        uri=uri,
        kind="dit" if latent else "unet",
        image_size=side * factor,
        channels=channels,
        shape_CHW=(_count(model, "in_channels", uri), side, side),
        num_classes=num_classes,
        null_class=null,
        class_names=names,
        ordered=ordered,
        train_steps=_count(scheduler, "num_train_timesteps", uri, 1000),
        identity=identity,
    )


def _count(document: dict[str, Any], key: str, uri: str, default: int | None = None) -> int:
    """Return a positive whole number of one of a model's JSON files; an ArtifactError when it is none."""
    value = document.get(key, default)
    if type(value) is not int or not 0 < value <= _LARGEST_COUNT:
        raise ArtifactError(
            f"{OPTION} {uri}: expected {key} as a whole number from 1 to {_LARGEST_COUNT}, found {value!r}; images that are not "
            "square, or a model whose file does not say their size, are not supported"
        )
    return value


def _check_levels(levels: dict[str, Any], named: object, uri: str) -> None:
    """Raise a ConfigError unless DDIM has the noise levels that the model was trained with, and takes what it predicts."""
    for key, kind in ((INDEX_KEY, named), (LEVELS_KEY, levels.get("_class_name", named))):
        if kind not in SCHEDULERS:
            raise ConfigError(
                f"{OPTION} {uri}: expected a scheduler whose noise levels DDIM can sample by ({', '.join(SCHEDULERS)}), found "
                f"{kind} in {key}; consistency, flow-matching, EDM and score-SDE models are not supported: take another model"
            )
    for option, known in _LEVELS.items():
        # Absent is the default of all of them, which is the first one known.
        value = levels.get(option, known[0])
        if value not in known and not (option == "beta_schedule" and levels.get("trained_betas")):
            raise ConfigError(
                f"{OPTION} {uri}: expected in {LEVELS_KEY} a {option} that DDIM has ({', '.join(known)}), found {value!r}; "
                "take another model"
            )


def read_json(folder: Path, key: str, uri: str) -> dict[str, Any]:
    """Return one of a model's JSON files, which must be an object; an ArtifactError says what is wrong with it."""
    try:
        content = (folder / key).read_bytes()
    except FileNotFoundError as error:
        raise _not_found(uri, f"there is no {key} in it") from error
    document = load_json(content, f"{uri}/{key}")
    if not isinstance(document, dict):
        raise ArtifactError(f"{uri}/{key}: expected a JSON object, found {content[:40]!r}")
    return document


def class_ids_of(
    card: ModelCard, class_names: tuple[str, ...], given: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the model's class of every class of the data; 0 for a model that knows none.

    In this order: what was given, a model of our own for exactly these classes, the names that the model has for its
    classes, each of one class (by its upper and lower case, where these tell two apart), and for as many classes as the data's,
    of which it knows none by name, their numbers.

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
        first = first_difference([*map(plain, card.class_names)], [*map(plain, class_names)])
        if first < max(count, len(card.class_names)):
            raise ConfigError(
                f"{OPTION} {card.uri}: it was trained on other classes: {len(card.class_names)} against the data's {count}, "
                f"first at class {first}: ({exact(card.class_names[first : first + 3])}) against "
                f"({exact(class_names[first : first + 3])}); train one on this data (jobs/train_diffusion.py), or say by "
                "--recover.diffusion.class-ids which of its classes are meant"
            )
        return tuple(range(count))
    in_case: dict[str, set[int]] = {}
    in_any_case: dict[str, set[int]] = {}
    for i, names in enumerate(card.class_names):
        for word in map(plain, names.split(",")):
            in_case.setdefault(word, set()).add(i)
            in_any_case.setdefault(word.lower(), set()).add(i)
    found = [
        in_case.get(word) or in_any_case.get(word.lower(), set())
        for word in map(plain, class_names)
    ]
    if card.num_classes == count and not any(found):
        logger.info("%s: class i of the data is taken for the model's class i", card.uri)
        return tuple(range(count))
    times = Counter(i for ids in found for i in ids)
    doubtful = [
        name
        for name, ids in zip(class_names, found, strict=True)
        if len(ids) != 1 or times[min(ids)] > 1
    ]
    if not doubtful:
        return tuple(i for ids in found for i in ids)
    raise ConfigError(
        f"{OPTION} {card.uri}: it has {card.num_classes} classes and the data {count}, of whose names {len(doubtful)} do not "
        f"each mean one class of the model: {exact(doubtful)}; say which are meant: --recover.diffusion.class-ids 0 217 482 ..., "
        "one a class of the data"
    )


def check_card(card: ModelCard, *, channels: int, steps: int, guidance_scale: float) -> None:
    """Raise a ConfigError when the options ask for what the model cannot do."""
    if card.channels != channels:
        raise ConfigError(
            f"{OPTION} {card.uri}: it makes pictures of {card.channels} channels, --source.channels is {channels}; set that to "
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


def check_widths(widths: tuple[int, ...], image_size: int) -> None:
    """Raise a ConfigError unless a UNet of our own can have these channels at each resolution of H = W pixels."""
    if not widths:
        raise ConfigError("--widths: expected at least one")
    if image_size % 2 ** (len(widths) - 1):
        most = (image_size & -image_size).bit_length()
        raise ConfigError(
            f"--widths: expected at most {most} for {image_size} pixels, each but the first halving them, "
            f"got {widths}"
        )
    if any(width % NORM_GROUPS or width < NORM_GROUPS for width in widths):
        raise ConfigError(f"--widths: expected multiples of {NORM_GROUPS}, got {widths}")
