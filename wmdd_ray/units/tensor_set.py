"""A distilled set as others store it in torch files: DC's and DM's `res_*.pt`, IDC's `data_best.pt`, MTT's `images_*.pt`.

What is read: `{"data": [[images, labels], ...]}` (one pair an experiment; `FILE.pt#2` is the third), a pair `[images, labels]`, or
images alone with their labels in the file beside that is called `labels_*.pt`. Images are (N, C, S, S): uint8, or floats of
which those with a negative value are normalized, by --source.mean and --source.std, and those in [0, 1] are pixels. They are
shown to students as they are, without rounding: distilled values lie between the 256 of a picture, and beyond them.

Legend: N images, C channels, S side, Y classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from wmdd_ray.config import SourceConfig
from wmdd_ray.core.checkpoints import read_torch_file
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import file_at

_FILE = re.compile(r"(.+\.pth?)(?:#([0-9]{1,4}))?")


@dataclass(frozen=True, kw_only=True)
class TensorSet:
    """Such a set: where it lies, and what is known of it. Stands in for a `Source`; a copy reads the file again."""

    uri: str
    class_names: tuple[str, ...]
    config: SourceConfig
    identity: str
    num_images: int
    total_bytes: int
    told: str

    def fingerprint(self) -> str:
        """Return the SHA-256 of its files, and which of several sets in them it is."""
        return self.identity

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs float32 NCHW, normalized as the students' are; classes int64)."""
        images, classes_N, _, _ = _read(self.uri, self.config, len(self.class_names))
        return images, classes_N


def is_tensor_set(uri: str) -> bool:
    """Return whether a URI is that of a torch file, by its ending."""
    return _FILE.fullmatch(uri) is not None


def open_tensor_set(uri: str, config: SourceConfig, class_names: tuple[str, ...]) -> TensorSet:
    """Read a set, `FILE.pt` or `FILE.pt#K`, once, and return what it is.

    `class_names` are in the order of the labels, which say no names; `config` is the students' input.

    Raises:
        DataError: The file holds something else, code, or images of another size, or labels of other classes.
    """
    images, classes_N, told, contents = _read(uri, config, len(class_names))
    most = int(classes_N.max())
    if most >= len(class_names):
        raise DataError(
            f"{uri}: expected labels from 0 to {len(class_names) - 1}, of as many classes as the held-out images have, found {most}"
        )
    digest = hashlib.sha256(uri.rpartition("#")[2].encode() if "#" in uri else b"0")
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return TensorSet(
        uri=uri,
        class_names=class_names,
        config=config,
        identity=digest.hexdigest(),
        num_images=len(images),
        total_bytes=sum(map(len, contents)),
        told=told,
    )


def _read(
    uri: str, config: SourceConfig, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, str, list[bytes]]:
    """Return (inputs, classes, how the values were taken, the files' contents)."""
    match = _FILE.fullmatch(uri)
    assert match is not None, uri
    file, number = match[1], int(match[2] or 0)
    content = _content(file)
    stored, contents = read_torch_file(content, file), [content]
    if isinstance(stored, torch.Tensor):
        beside = _labels_file(file)
        contents.append(_content(beside))
        stored = [stored, read_torch_file(contents[1], beside)]
    pairs = stored.get("data") if isinstance(stored, Mapping) else [stored]
    if not isinstance(pairs, list | tuple) or not all(map(_is_pair, pairs)) or not pairs:
        raise DataError(
            f"{file}: expected tensors, as {{'data': [[images, labels], ...]}} (DC, DM), [images, labels] (IDC), or images with "
            f"labels_*.pt beside them (MTT), found a {type(stored).__name__} of other things"
        )
    if number >= len(pairs):
        raise DataError(f"{uri}: expected #0 to #{len(pairs) - 1}, of the sets that the file holds")
    images, labels = pairs[number]
    if labels.ndim == 2 and labels.shape[1] == 1 and not labels.dtype.is_floating_point:
        labels = labels[:, 0]
    inputs, told = _inputs(images, labels, config, uri)
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise DataError(
                f"{uri}: expected learned labels of {num_classes} classes, as many as the held-out images have, found rows of "
                f"{labels.shape[1]}"
            )
        told += ", the likeliest class of each learned label"
        labels = _likeliest(labels, uri)
    which = f"set {number} of {len(pairs)}, " if len(pairs) > 1 else ""
    return inputs, labels.long(), f"{which}{told}", contents


def _likeliest(labels_NY: torch.Tensor, uri: str) -> torch.Tensor:
    """Return the class of each learned label; a row with several likeliest classes, or none, has no class to take."""
    has_one_N = (labels_NY == labels_NY.amax(dim=1, keepdim=True)).sum(dim=1) == 1
    has_one_N &= torch.isfinite(labels_NY).all(dim=1)
    if not has_one_N.all():
        row = int((~has_one_N).nonzero()[0])
        raise DataError(
            f"{uri}: expected learned labels of finite values, with one that is the largest, found {int((~has_one_N).sum())} of "
            f"{len(labels_NY)} without, first row {row}: {labels_NY[row, :10].tolist()}; mend or leave out these images"
        )
    return labels_NY.argmax(dim=1)


def _content(file: str) -> bytes:
    store, name = file_at(file)
    try:
        return store.get(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{file}: expected a torch file there, found none") from error


def _labels_file(file: str) -> str:
    """Return where the labels of images lie, and refuse images that only students of whitened images could see."""
    store, name = file_at(file)
    match = re.fullmatch(r"images_(zca_)?(.+)", name)
    if match is None:
        raise DataError(
            f"{file}: expected images_*.pt with labels_*.pt beside it, found images without labels"
        )
    # MTT writes them at each iteration that it keeps, and `best` beside it whitened alone; others write `best` as well.
    undone = [key for key in store.list() if re.fullmatch(r"images_zca_[^/]+", key)]
    if match[1] is None and undone:
        same = f"images_zca_{match[2]}"
        raise DataError(
            f"{file} is ZCA-whitened, which held-out images are not: pass {same if same in undone else ' or '.join(undone)} beside "
            "it, where it is undone"
        )
    return store.url(f"labels_{match[2]}")


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(part, torch.Tensor) for part in pair)
    )


def _inputs(
    images: torch.Tensor, labels: torch.Tensor, config: SourceConfig, uri: str
) -> tuple[torch.Tensor, str]:
    """Return the images as the network's input, and how their values were taken."""
    shape = (config.channels, config.image_size, config.image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or len(images) == 0:
        raise DataError(
            f"{uri}: expected images of shape (N, {', '.join(map(str, shape))}), as --source.channels and --source.image-size say, "
            f"found {tuple(images.shape)}"
        )
    whole = not labels.dtype.is_floating_point and labels.ndim == 1 and int(labels.min()) >= 0
    if len(labels) != len(images) or not (whole or labels.ndim == 2):
        raise DataError(
            f"{uri}: expected a class >= 0 or a row of soft labels for each of {len(images)} images, found {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    if images.dtype == torch.uint8:
        return images.float().div_(255).sub_(mean).div_(std), "pixels of 8 bits"
    values = images.detach().float().contiguous()
    low, high = float(values.min()), float(values.max())
    if not torch.isfinite(values).all() or (low >= 0 and high > 1):
        raise DataError(
            f"{uri}: expected finite values, either in [0, 1] or normalized (some below 0), or uint8, found values from {low:g} to "
            f"{high:g}"
        )
    if low < 0:
        return values, "values normalized by --source.mean and --source.std"
    return values.sub(mean).div_(std), "values in [0, 1]"
