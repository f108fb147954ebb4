"""Checkpoint files that others have written: the weights in them, whatever they are wrapped in."""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from wmdd_ray.errors import DataError

# Names under which training scripts nest the weights, the last weights before their average, and prefixes that wrappers put
# before each name.
_NESTS = (
    *("state_dict", "model", "model_state_dict", "net"),
    *("state_dict_ema", "model_ema", "ema"),
)
_MOST_NESTS = 4
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
# Tensors that are no weights: what thop counts at each layer, and how many weights torch's AveragedModel has averaged.
_COUNTERS = ("total_ops", "total_params", "n_averaged")


class _Dropped:
    """In place of a number of numpy's, which accuracies beside tensors are: made of nothing, and holds nothing."""

    def __init__(self, *state: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# How pickles spell such a number.
_NUMBERS = [
    *((_Dropped, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_Dropped, "numpy.dtype"),
    (_Dropped, "_codecs.encode"),
]


def first_names(names: list[str]) -> str:
    """Return the first three of `names` in a row, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_torch_file(content: bytes, name: str) -> Any:
    """Return what a torch file holds: tensors in plain containers, on the CPU. No code of the file is ever run.

    Raises:
        DataError: the file is damaged, of another kind, or holds code.
    """
    try:
        return _loaded(content, [*_NUMBERS, argparse.Namespace])
    # Damaged bytes raise a dozen kinds of error in the parser; all of them mean the same to the user.
    except Exception as error:
        raise DataError(
            f"{name}: expected a torch file with tensors only (weights_only=True), got {len(content)} bytes that cannot be read as "
            f"such ({_reason(error)})"
        ) from error


def _loaded(content: bytes, safe: list[Any]) -> Any:
    _refuse_zip_bomb(content)
    with torch.serialization.safe_globals(safe):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def read_checkpoint(content: bytes, name: str) -> dict[str, Tensor]:
    """Return the weights in a safetensors file or a torch checkpoint, by state-dict name, on the CPU.

    Weights nested under `state_dict`, `model`, `model_state_dict` or `net`, or else under a name of their moving average,
    are unwrapped as often as they are wrapped. So are names: `module.` (data parallel, averaged), `_orig_mod.` (compiled),
    `model.` and `net.` (Lightning) are taken off while all names begin with one. The counters of thop and AveragedModel
    are left out. No code of the file is ever run: a pickle that wants more than tensors, plain containers and the options
    of a command line (argparse.Namespace, which timm and torchvision store beside the weights) is refused.

    Raises:
        DataError: the file is damaged, of another kind, holds code, or holds something else than tensors.
    """
    # safetensors: 8 bytes of header length, then a JSON object.
    is_safetensors = content[8:9] == b"{"
    try:
        stored: Any = (
            safetensors.torch.load(content)
            if is_safetensors
            else _loaded(content, [argparse.Namespace])
        )
    # Damaged bytes raise a dozen kinds of error in these two parsers; all of them mean the same to the user.
    except Exception as error:
        reason = _reason(error)
        raise DataError(
            f"checkpoint {name}: expected safetensors, or a torch file with tensors only (weights_only=True), got "
            f"{len(content)} bytes that cannot be read as such ({reason}); save the model's state_dict() and "
            "pass that file"
        ) from error
    # A pickled dictionary may hold itself.
    for _ in range(_MOST_NESTS):
        if isinstance(stored, Mapping):
            stored = next(
                (stored[k] for k in _NESTS if isinstance(stored.get(k), Mapping)),
                stored,
            )
    if (
        not isinstance(stored, Mapping)
        or not stored
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in stored.items())
    ):
        raise DataError(
            f"checkpoint {name}: expected a mapping from names to tensors, at the top or under one of {_NESTS}, "
            f"got {_kind(stored)}; save the model's state_dict()"
        )
    state = {str(k): v for k, v in stored.items() if k.rpartition(".")[2] not in _COUNTERS}
    return dict(zip(unwrapped(list(state)), state.values(), strict=True))


def unwrapped(names: list[str]) -> list[str]:
    """Return the names without the prefixes that wrappers have put before all of them."""
    while prefix := next(
        (p for p in _PREFIXES if names and all(n.startswith(p) for n in names)), ""
    ):
        names = [name.removeprefix(prefix) for name in names]
    return names


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


def _kind(value: object) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    others = [f"{k!r}: {type(v).__name__}" for k, v in value.items() if not isinstance(v, Tensor)]
    return f"a mapping with {first_names(others)}" if others else "an empty mapping"
