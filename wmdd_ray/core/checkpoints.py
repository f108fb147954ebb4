"""Weights that others have trained: checkpoint files and torchvision's published ones.

Legend: C color channels.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from wmdd_ray.config import Arch
from wmdd_ray.errors import ConfigError, DataError

_TORCHVISION_ARCHS: tuple[Arch, ...] = ("resnet18", "resnet50", "mobilenet_v2")
# Names under which training scripts nest the weights, and prefixes that wrappers put before each key.
_NESTS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")


def first_names(names: list[str]) -> str:
    """Return the first three of `names` in a row, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_checkpoint(content: bytes, name: str) -> dict[str, Tensor]:
    """Return the weights in a safetensors file or a torch checkpoint, by state-dict name, on the CPU.

    Weights nested under `state_dict`, `model` or `model_state_dict` are unwrapped, and the prefixes `module.`
    (data parallel) and `_orig_mod.` (compiled) are taken off. No code of the file is ever run: a pickle that
    wants more than tensors and plain containers is refused.

    Args:
        content: bytes of the file.
        name: how messages call the file.

    Raises:
        DataError: the file is damaged, of another kind, holds code, or holds something else than tensors.
    """
    # safetensors: 8 bytes of header length, then a JSON object.
    is_safetensors = content[8:9] == b"{"
    try:
        _refuse_zip_bomb(content)
        found: Any = (
            safetensors.torch.load(content)
            if is_safetensors
            else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        )
    # Damaged bytes raise a dozen kinds of error in these two parsers; all of them mean the same to the user.
    except Exception as error:
        reason = _reason(error)
        raise DataError(
            f"checkpoint {name}: expected safetensors, or a torch file with tensors only (weights_only=True), got "
            f"{len(content)} bytes that cannot be read as such ({reason}); save the model's state_dict() and "
            "pass that file"
        ) from error
    if isinstance(found, Mapping):
        found = next((found[k] for k in _NESTS if isinstance(found.get(k), Mapping)), found)
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    ):
        raise DataError(
            f"checkpoint {name}: expected a mapping from names to tensors, at the top or under one of {_NESTS}, "
            f"got {_kind(found)}; save the model's state_dict()"
        )
    state = {str(k): v for k, v in found.items()}
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _reason(error: Exception) -> str:
    """Return the line that says why; torch's begins with advice in color, which is not to be followed for files of others."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    said = re.search(r"WeightsUnpickler error: (.+?)(?:\. Please|\n|$)", text)
    return said[1] if said else text.split("\n")[0] or type(error).__name__


def _refuse_zip_bomb(content: bytes) -> None:
    """Refuse a zip file that unpacks to more than it holds: torch stores its records as they are, and inflates any."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        unpacked_bytes = sum(record.file_size for record in archive.infolist())
    if unpacked_bytes > len(content):
        raise ValueError(f"its records unpack to {unpacked_bytes} bytes")


def _kind(found: object) -> str:
    if not isinstance(found, Mapping):
        return type(found).__name__
    others = [f"{k!r}: {type(v).__name__}" for k, v in found.items() if not isinstance(v, Tensor)]
    return f"a mapping with {first_names(others)}" if others else "an empty mapping"


def torchvision_weights(
    name: str,
) -> tuple[
    Arch, dict[str, Tensor], tuple[str, ...], tuple[float, ...], tuple[float, ...], int, int
]:
    """Download published weights and return (arch, state dict, class names, mean_C, std_C, resize, crop).

    Args:
        name: an architecture, which means its default weights (`resnet18`), or one entry
            (`ResNet18_Weights.IMAGENET1K_V1`).

    Returns:
        The last two are the shorter side after resizing and the side of the center crop, pixels.

    Raises:
        ConfigError: torchvision has no such weights, or the architecture is none of ours.
        DataError: the weights cannot be downloaded, or arrive damaged.
    """
    from torchvision import models

    entries: dict[str, tuple[Arch, Any]] = {}
    for arch in _TORCHVISION_ARCHS:
        family: Any = models.get_model_weights(arch)
        entries[arch] = (arch, family.DEFAULT)
        entries.update({str(entry): (arch, entry) for entry in family})
    if name not in entries:
        raise ConfigError(
            f"--teacher torchvision:{name}: no such weights; expected one of {', '.join(entries)}"
        )
    arch, entry = entries[name]
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    # urllib raises OSErrors; torch.hub raises RuntimeError for a wrong hash or a damaged file.
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"--teacher torchvision:{name}: {entry.url} cannot be downloaded ({error}); download it where there is "
            f"network, and pass the file as --teacher"
        ) from error
    preset = entry.transforms()
    return (
        arch,
        dict(state),
        tuple(entry.meta["categories"]),
        tuple(preset.mean),
        tuple(preset.std),
        preset.resize_size[0],
        preset.crop_size[0],
    )
