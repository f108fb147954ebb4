"""Weights that torchvision and timm publish: what they expect of their input, and their download.

Legend: C color channels.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

# These two scale their input once more when they are built for their published weights.
_OWN_SCALING = ("googlenet", "inception_v3")


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published weights by their metadata: nothing is downloaded for it.

    `resize` is the shorter side after resizing and `crop` the side of the center crop, pixels. `weights` is torchvision's
    entry, None for timm, whose architecture names the weights.
    """

    arch: str
    num_classes: int
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    resize: int
    crop: int
    interpolation: Literal["bilinear", "bicubic"]
    weights: Any = None

    def source(self, source: SourceConfig) -> SourceConfig:
        """Return `source` with the input that the weights were trained with."""
        return replace(
            source,
            image_size=self.crop,
            resize=self.resize,
            channels=3,
            mean=self.mean_C,
            std=self.std_C,
            interpolation=self.interpolation,
        )


def is_published(spec: str) -> bool:
    """Return whether a teacher is given as `torchvision:NAME` or `timm:NAME`."""
    return spec.startswith(("torchvision:", "timm:"))


def published(spec: str) -> Published:
    """Return what the metadata of published weights say.

    Args:
        spec: `torchvision:` and a classifier, which means its default weights (`resnet18`), or an entry
            (`ResNet18_Weights.IMAGENET1K_V1`); `timm:` and a model, with or without a tag (`resnet50.a1_in1k`).

    Raises:
        ConfigError: there are no such weights, or their input is brought about otherwise than by resize and crop.
    """
    library, _, name = spec.partition(":")
    return _of_timm(name) if library == "timm" else _of_torchvision(name)


def download(spec: str) -> dict[str, Tensor]:
    """Return published weights by state-dict name, on the CPU.

    Raises:
        ConfigError: as `published`.
        DataError: the weights cannot be downloaded, or arrive damaged.
    """
    about = published(spec)
    try:
        if about.weights is None:
            import timm

            network = timm.create_model(about.arch.removeprefix("timm:"), pretrained=True)
            return dict(network.state_dict())
        state = about.weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    # urllib and huggingface_hub raise OSErrors; torch.hub RuntimeError for a wrong hash or a damaged file.
    except (OSError, RuntimeError) as error:
        where = "it" if about.weights is None else about.weights.url
        raise DataError(
            f"--teacher {spec}: {where} cannot be downloaded ({error}); download it where there is network, and pass the file as "
            f"--teacher, with --squeeze.network.arch {about.arch}"
        ) from error
    return dict(state)


def _of_torchvision(name: str) -> Published:
    from torchvision import models

    entries: dict[str, tuple[str, Any]] = {}
    for arch in models.list_models(module=models):
        if arch in _OWN_SCALING:
            continue
        family: Any = models.get_model_weights(arch)
        entries[arch] = (arch, family.DEFAULT)
        entries.update({str(entry): (arch, entry) for entry in family})
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
        raise ConfigError(
            f"--teacher torchvision:{name}: no such weights; expected a classifier of torchvision, as resnet18, or its weights, as "
            f"ResNet18_Weights.IMAGENET1K_V1; near to it: {', '.join(near) or 'none'}"
        )
    arch, entry = entries[name]
    preset = entry.transforms()
    return Published(
        arch=arch,
        num_classes=len(entry.meta["categories"] or ()),  # one of VGG-16 has features alone
        mean_C=tuple(preset.mean),
        std_C=tuple(preset.std),
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        weights=entry,
    )


def _of_timm(name: str) -> Published:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"--teacher timm:{name}: expected the package timm, found none ({error}); pip install timm"
        ) from error
    known = timm.list_pretrained()
    plain = {tagged.partition(".")[0] for tagged in known}
    if name not in known and name not in plain:
        near = difflib.get_close_matches(name, [*known, *plain], n=3, cutoff=0.4)
        raise ConfigError(
            f"--teacher timm:{name}: no such weights; expected a model of timm.list_pretrained(); near to it: "
            f"{', '.join(near) or 'none'}"
        )
    card = timm.get_pretrained_cfg(name)
    assert card is not None, f"timm lists {name} without its metadata"
    if not card.num_classes:
        raise ConfigError(
            f"--teacher timm:{name}: expected a classifier, got weights without a last layer for classes; choose others"
        )
    side = card.input_size[-1]
    if card.crop_mode != "center" or card.interpolation not in ("bilinear", "bicubic"):
        raise ConfigError(
            f"--teacher timm:{name}: expected weights whose input is resized by its shorter side (bilinear or bicubic) and cut at "
            f"the center, got crop mode {card.crop_mode}, {card.interpolation}; choose others, or pass the file as --teacher"
        )
    return Published(
        arch=f"timm:{name}",
        num_classes=card.num_classes,
        mean_C=tuple(card.mean),
        std_C=tuple(card.std),
        resize=int(side / card.crop_pct),
        crop=side,
        interpolation=cast(Any, card.interpolation),
    )
