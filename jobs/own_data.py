"""Recipe `auto` at the command line: look at the images unless the run's record has it, choose, and say what was chosen and why."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wmdd_ray.config import DistillConfig, NetworkConfig, Resources, SourceConfig
from wmdd_ray.core.published import is_published
from wmdd_ray.errors import DataError
from wmdd_ray.recipes import fashion_mnist
from wmdd_ray.store.documents import load_json, read_sealed
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import open_source
from wmdd_ray.store.sources.listing import SPLIT_NAMES, NoSuchSplitError
from wmdd_ray.store.sources.opening import PREPARED_KEY
from wmdd_ray.store.uris import local_path
from wmdd_ray.units.auto import choose
from wmdd_ray.units.own_data import Measured, input_of, measure, of_prepared

from . import endings

RECORD_KEY = "auto"
"""Where run.json has what was measured."""

_PATTERN = re.compile(r"[{*?\[]")
_NO = re.compile(r"(^--|\.)no-")
_TYPED = {"squeeze.flip": "--squeeze.no-flip"}
_CHANGED_BY = {
    "size": ("source.image-size", "source.resize"),
    "color": ("source.channels", "source.mean", "source.std"),
    "teacher": ("squeeze.network.arch", "squeeze.epochs", "squeeze.flip"),
    "images": ("recover.iterations", "recover.tiles", "evaluate.epochs", "recipe NAME"),
    "held out": ("val-data", "val-fraction"),
}


@dataclass(frozen=True, kw_only=True)
class Typed:
    """What was typed that the measuring depends on; what is None was left open."""

    data: str
    val_data: str | None
    val_fraction: float | None
    image_size: int | None
    channels: int | None
    reading: SourceConfig


@dataclass(frozen=True, kw_only=True)
class Auto:
    """What `auto` saw: the record of a run has it, and the same is chosen from it again."""

    typed: Typed
    measured: Measured
    has_gpu: bool

    def record(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        measured = asdict(self.measured)
        return {"asked": _plain(self.typed), "measured": measured, "has_gpu": self.has_gpu}

    def choose(self, ipc: int, variant: str) -> tuple[DistillConfig, dict[str, str]]:
        """Return the options, and why."""
        typed = self.typed
        config, reasons = choose(
            self.measured, self.has_gpu, ipc, image_size=typed.image_size, variant=variant
        )
        if typed.val_data is not None or typed.val_fraction is not None:
            # What was typed comes over it.
            config = replace(config, val_fraction=None)
            reasons |= {"held out": "as you say"}
        return replace(config, data=typed.data), reasons


def placeholder(data: str, ipc: int, channels: int | None) -> DistillConfig:
    """Return options by which a command line can be parsed before anything is measured."""
    source = input_of(32, 1 if channels == 1 else 3, (0.5,) * 3, (0.5,) * 3)
    return replace(
        fashion_mnist(ipc), recipe="auto", data=data, source=replace(source, resize=1 << 20)
    )


def look(
    config: DistillConfig,
    resources: Resources,
    record: Store | None,
    *,
    image_size: int | None,
    channels: int | None,
    ask_cluster: bool,
    verbose: bool,
) -> Auto:
    """Return what there is to choose by: out of the record of the run, or of prepared.json, or measured.

    Args:
        config: What was typed, over the `placeholder`.
        resources: Say, or let the cluster say, whether there is a GPU.
        record: Where the run is, if its record counts.
        image_size: Side that was typed, or that a published teacher needs.
        channels: Likewise.
        ask_cluster: Join the cluster that RAY_ADDRESS names, where workers would run on it.
        verbose: Show Ray's log lines then.

    Raises:
        DataError: The images cannot be used.
        ArtifactError: They cannot be reached.
    """
    typed = Typed(
        data=config.data,
        val_data=config.val_data,
        val_fraction=config.val_fraction,
        image_size=image_size,
        channels=channels,
        reading=config.source,
    )
    known = None if record is None else _recorded(record)
    if known is not None and known.get("asked") == _plain(typed):
        measured = Measured.read(known["measured"])
        return Auto(typed=typed, measured=measured, has_gpu=known["has_gpu"])
    in_driver = resources.executor == "here" or resources.num_workers == 0
    ask_cluster = ask_cluster and not in_driver and bool(os.environ.get("RAY_ADDRESS"))
    has_gpu = _has_gpu(resources, ask_cluster=ask_cluster, verbose=verbose)
    return Auto(typed=typed, measured=_prepared(typed) or _measured(typed), has_gpu=has_gpu)


def _has_gpu(resources: Resources, *, ask_cluster: bool, verbose: bool) -> bool:
    """Return whether workers have a GPU: those of the cluster, or of this machine, where they will run."""
    if resources.gpus_per_worker >= 0:
        return resources.gpus_per_worker > 0
    # Imported here: a wrong option should not have to wait for them.
    if ask_cluster:
        from wmdd_ray.executors.cluster import has_gpus

        endings.join_cluster(None, resources, verbose=verbose)
        return has_gpus()
    import torch

    return torch.cuda.is_available()


def _plain(typed: Typed) -> dict[str, Any]:
    """Return what was typed as JSON has it."""
    return {name: repr(value) for name, value in vars(typed).items()}


def _recorded(store: Store) -> dict[str, Any] | None:
    try:
        record = load_json(store.get("run.json"), store.url("run.json"))
    except FileNotFoundError:
        return None
    return record.get(RECORD_KEY) if isinstance(record, dict) else None


def _prepared(typed: Typed) -> Measured | None:
    """Return what jobs/prepare.py measured, where the data are its output and nothing else is wanted."""
    elsewhere = typed.reading.bucket != SourceConfig().bucket or _PATTERN.search(typed.data)
    if typed.val_fraction is not None or elsewhere:
        return None
    try:
        manifest = of_prepared(read_sealed(Store(typed.data), PREPARED_KEY))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if typed.channels not in (None, manifest.channels):
        return None
    if manifest.held_out is None and typed.val_data is None:
        raise DataError(
            f"{typed.data}: {PREPARED_KEY} says that no images are held out to test on; pass some as --val-data, or prepare again "
            "with --val-fraction 0.05 and --overwrite"
        )
    return manifest


def _measured(typed: Typed) -> Measured:
    source = open_source(typed.data, typed.reading, split="train")
    held_out: int | None = -1
    if typed.val_data is None and typed.val_fraction is None:
        held_out = _held_out_of(typed, source.class_names)
    return measure(source, held_out=held_out, channels=typed.channels, image_size=typed.image_size)


def _held_out_of(typed: Typed, class_names: tuple[str, ...]) -> int | None:
    """Return how many held-out images the data bring: None when none, -1 when only reading tells."""
    try:
        source = open_source(typed.data, typed.reading, split="val", class_names=class_names)
    except NoSuchSplitError:
        return None
    return -1 if source.num_images is None else source.num_images


def name_of(data: str) -> str:
    """Return what a run on some data is called: the last name of their path that is none of a split or a pattern."""
    path = local_path(data)
    parts = (str(path.resolve()) if path is not None else data.partition("://")[2]).split("/")
    splits = frozenset().union(*SPLIT_NAMES["train"])
    kept = [part for part in parts if part and part not in splits and not _PATTERN.search(part)]
    plain = re.sub(r"\.(csv|tsv|parquet|tar(\.gz)?|tgz)$", "", kept[-1] if kept else "data")
    return re.sub(r"[^\w.-]+", "-", plain).strip("-.") or "data"


def told_network(network: NetworkConfig) -> str:
    """Return an architecture in words, with what it was made other."""
    wide = f" of width {network.width}" if network.arch.startswith("convnet") else ""
    return f"{network.arch}{wide}{' with a small stem' if network.small_stem else ''}"


def choice_lines(config: DistillConfig, reasons: dict[str, str], typed: Sequence[str]) -> list[str]:
    """Return five lines: what a run does, why `auto` chose it, and what changes it; what was `typed` wins."""
    source, squeeze, recover = config.source, config.squeeze, config.recover
    if is_published(config.teacher or ""):
        reasons = reasons | dict.fromkeys(("size", "color"), f"as {config.teacher} was trained")
    values = [" ".join(f"{value:.3f}" for value in some) for some in (source.mean, source.std)]
    many = f" of {recover.tiles} x {recover.tiles} tiles" if recover.tiles > 1 else ""
    held = (
        f"{config.val_fraction:.0%} of each class"
        if config.val_fraction
        else (config.val_data or "none of the training images")
    )
    said = {
        "size": f"{source.image_size} px",
        "color": f"{'gray' if source.channels == 1 else 'color'}, mean {values[0]}, deviation {values[1]}",
        "teacher": f"{told_network(squeeze.network)}, {squeeze.epochs} epochs in batches of {squeeze.batch_size}, "
        f"{'flips' if squeeze.flip else 'no flips'}",
        "images": f"{config.ipc} a class{many}, {recover.iterations} iterations, students of {config.evaluate.epochs} epochs",
        "held out": held,
    }
    return [_line(name, said[name], reasons[name], typed) for name in said]


def _line(name: str, said: str, reason: str, typed: Sequence[str]) -> str:
    changes = _CHANGED_BY[name]
    words = {word.partition("=")[0].replace("_", "-") for word in typed}
    given = [word for word in sorted(words) if _NO.sub(r"\1", word).removeprefix("--") in changes]
    why = f"with your {', '.join(given)}; else " if given else ""
    options = " ".join(_TYPED.get(option, f"--{option}") for option in changes)
    return f"{name:<9} {said}: {why}{reason} [{options}]"
