"""recover: the distilled images, on Ray Train workers that take groups of classes from a load-balanced stream.

They are optimized against the teacher (`core/synthesis.py`), or sampled from a diffusion model (`stages/diffusion.py`); whoever
reads the room need not know. Where samples are led by their influence, a classifier of latents is a unit before all groups
(`stages/surrogate.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from wmdd_ray.config import DistillConfig
from wmdd_ray.core.crops import easiest_crops
from wmdd_ray.core.jitter import noise_start
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import network_of
from wmdd_ray.core.optimizer import State
from wmdd_ray.core.synthesis import ClassTarget, recover_group
from wmdd_ray.core.tiles import shrink, tile, tile_side
from wmdd_ray.diffusion import DiffusionModel, load_model
from wmdd_ray.diffusion_card import read_card
from wmdd_ray.options import fingerprint_options
from wmdd_ray.records import ClassBarycenter, ClassImages, Teacher
from wmdd_ray.rooms import Room
from wmdd_ray.run import StageRun, Work, unit_seed
from wmdd_ray.stages import barycenters, diffusion, surrogate
from wmdd_ray.stages.checkpoints import Checkpoints
from wmdd_ray.stages.teacher import read_teacher
from wmdd_ray.stages.workers import DoUnit, Report, do_units
from wmdd_ray.store import codecs
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources import Source


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the images depend on."""
    if config.recover.method == "diffusion":
        return {"seed": config.seed, "recover": diffusion.options(config)}
    return {"seed": config.seed, "recover": fingerprint_options(config.recover)}


def groups(config: DistillConfig, num_classes: int) -> dict[str, range]:
    """Return unit id -> the labels of its classes. Fixed by ipc and the options, never by the cluster."""
    size = max(1, config.recover.images_per_group // config.num_atoms)
    starts = range(0, num_classes, size)
    return {f"g{i:05d}": range(s, min(s + size, num_classes)) for i, s in enumerate(starts)}


def key_of(label: int) -> str:
    """Return the key of a class's images."""
    return f"classes/{label:05d}.safetensors"


def check_model(config: DistillConfig, class_names: tuple[str, ...]) -> str:
    """Return the identity of the diffusion model that images are sampled from, "" when they are not.

    Raises:
        ConfigError, ArtifactError: There is no such model, or it does not go with the options or the classes.
    """
    if config.recover.method != "diffusion":
        return ""
    card = read_card(config.recover.diffusion.model)
    diffusion.checked(card, config, class_names)
    return card.identity


def plan(stage: StageRun) -> Work:
    """Return one unit a group of classes, after the surrogate where there is one."""
    config = stage.config
    class_names = stage.run.source("train").class_names
    check_model(config, class_names)
    num_classes = len(class_names)
    size = num_classes * config.ipc * config.source.image_size**2 * config.source.channels
    units = tuple(groups(config, num_classes))
    if surrogate.is_needed(config):
        card = read_card(config.recover.diffusion.model)
        size += surrogate.size_bytes(config, card, num_classes)
        units = (surrogate.UNIT, *units)
    return Work(units=units, estimated_bytes=size)


def work(stage: StageRun) -> dict[str, Any]:
    """Recover every group that is not finished."""
    config = stage.config
    units = groups(config, len(stage.inputs["features"].metrics["class_counts"]))
    identity = check_model(config, stage.run.source("train").class_names)
    worker = partial(
        open_worker,
        room=stage.room,
        teacher_room=stage.run.room("teacher"),
        barycenter_room=stage.run.room("barycenters"),
        source=stage.run.source("train"),
        config=config,
        units=units,
        model_identity=identity,
    )
    every = list(units)
    if surrogate.is_needed(config):
        every = [surrogate.UNIT, *units]
        stage.progress.start(len(every), len(stage.room.finished()))
        do_units(stage, [surrogate.UNIT], worker, among=every)
        do_units(stage, list(units), worker, among=every)
    else:
        do_units(stage, every, worker)
    markers = stage.room.read_units(every)
    losses = [loss for marker in markers.values() for loss in marker.metrics["losses"]]
    return {
        "losses": {name: float(np.mean([loss[name] for loss in losses])) for name in losses[0]},
        "seconds_in_core": round(sum(m.metrics["seconds_in_core"] for m in markers.values()), 3),
    }


def open_worker(
    device: torch.device,
    *,
    room: Room,
    teacher_room: Room,
    barycenter_room: Room,
    source: Source,
    config: DistillConfig,
    units: dict[str, range],
    model_identity: str = "",
) -> DoUnit:
    """Load the teacher, and the diffusion model if there is one, and return the function that makes one group of classes.

    Where there is a surrogate, the function makes that too, and groups only after it.
    """
    teacher = read_teacher(teacher_room)
    network = network_of(teacher, device)
    files = {f.key: f for m in barycenter_room.committed().units.values() for f in m.files}
    model: DiffusionModel | None = None
    if config.recover.method == "diffusion":
        model = load_model(config.recover.diffusion.model, device)
        diffusion.check_unchanged(model, model_identity)

    def real_of(label: int, side: int, most: int | None = None) -> np.ndarray:
        keys = barycenters.read_barycenter(barycenter_room, files, label).random_keys[:most]
        return read_real(source, keys, diffusion.source_at(config, side))

    @cache
    def surrogates() -> tuple[torch.nn.Module, ...]:
        if model is None or not surrogate.is_needed(config):
            return ()
        return surrogate.read(room, model, config, num_classes=teacher.num_classes, device=device)

    def target_of(label: int) -> ClassTarget:
        found = barycenters.read_barycenter(barycenter_room, files, label)
        counts_S = np.repeat(found.moments.count_L, found.moments.channels_L)
        assert counts_S.min() > 0, f"class {label} has no moments"
        return ClassTarget(
            label=label,
            atoms_KD=found.barycenter.atoms_KD,
            weights_K=found.barycenter.weights_K,
            mean_S=found.moments.mean_S,
            var_S=variance_S(found.moments),
            start_KHWC=_start(found, source, network, config),
        )

    def do_unit(unit: str, report: Report) -> None:
        if unit == surrogate.UNIT:
            assert model is not None, "planned for a diffusion model only"
            surrogate.make(
                room,
                model,
                partial(real_of, most=config.recover.diffusion.influence_latents),
                config,
                num_classes=teacher.num_classes,
                device=device,
                report=report,
            )
            return
        started = time.perf_counter()
        attempt = room.begin_unit(unit)
        if attempt is None:
            return
        keep = Checkpoints(room, unit, config.recover.checkpoint_s)
        steps = config.recover.iterations if model is None else diffusion.num_steps(config)

        def on_step(step: int, get_state: Callable[[], State]) -> None:
            keep.maybe(get_state)
            report(step / max(1, steps), f"step {step}/{steps} of {unit}")

        if model is None:
            targets = [target_of(label) for label in units[unit]]
            in_core = time.perf_counter()
            images = recover_group(
                network,
                targets,
                config.recover,
                image_size=teacher.image_size,
                channels=teacher.channels,
                mean_C=teacher.mean_C,
                std_C=teacher.std_C,
                seed=_seed(config),
                device=device,
                state=keep.load(),
                on_step=on_step,
            )
        else:
            in_core = time.perf_counter()
            images = diffusion.sampled(
                units[unit],
                model,
                network,
                teacher,
                real_of,
                config,
                seed=_seed(config),
                surrogate=surrogates(),
                device=device,
                state=keep.load(),
                on_step=on_step,
            )
        in_core = time.perf_counter() - in_core
        room.commit_unit(
            unit,
            {key_of(record.label): codecs.encode_class_images(record) for record in images},
            metrics={
                "labels": [record.label for record in images],
                "losses": [record.losses for record in images],
                "seconds_in_core": round(in_core, 4),
            },
            attempt=attempt,
            seconds=time.perf_counter() - started,
        )
        keep.clear()

    return do_unit


def _start(
    found: ClassBarycenter, source: Source, network: torch.nn.Module, config: DistillConfig
) -> np.ndarray | None:
    """Return the start images of a class, or None for a noise start."""
    kind, k = config.recover.start, config.num_atoms
    side = tile_side(config.source.image_size, config.recover.tiles)
    if kind == "noise":
        return None
    if kind == "mosaic":
        return _mosaic(found, source, network, config)
    keys = found.nearest_keys if kind == "nearest" else found.random_keys[:k]
    return shrink(read_real(source, keys, config), side)


def _mosaic(
    found: ClassBarycenter, source: Source, network: torch.nn.Module, config: DistillConfig
) -> np.ndarray:
    """Return the teacher's easiest crops: one a tile, and without tiles 2 x 2 in each image, as RDED stores them."""
    tiles, image_size = config.recover.tiles, config.source.image_size
    factor = 2 if tiles == 1 else 1
    crops = easiest_crops(
        network,
        read_real(source, found.random_keys, config),
        found.label,
        config.num_atoms * factor**2,
        side=tile_side(image_size, tiles * factor),
        image_size=image_size,
        mean_C=config.source.mean,
        std_C=config.source.std,
        seed=unit_seed(config.seed, "mosaic", ""),
        crop_scale_min=config.recover.crop_scale_min,
    )
    return tile(crops, factor, tile_side(image_size, tiles))


def start_images(
    found: ClassBarycenter, source: Source | None, teacher: Teacher, config: DistillConfig
) -> np.ndarray:
    """Return what the images of a class begin from (K, H, W, C), uint8, for people to look at; noise needs no source."""
    if config.recover.start != "noise":
        assert source is not None, "a real start needs the real images"
        # Only easy crops are chosen by the teacher.
        needed = config.recover.start == "mosaic"
        network = network_of(teacher) if needed else torch.nn.Identity()
        start_KHWC = _start(found, source, network, config)
        assert start_KHWC is not None
        return start_KHWC
    side = tile_side(teacher.image_size, config.recover.tiles)
    shape_KCHW = (config.num_atoms, teacher.channels, side, side)
    noise_KHWC = noise_start(_seed(config), found.label, shape_KCHW).transpose(0, 2, 3, 1)
    fraction_KHWC = noise_KHWC * np.array(teacher.std_C) + np.array(teacher.mean_C)
    return (fraction_KHWC.clip(0, 1) * 255).round().astype(np.uint8)


def _seed(config: DistillConfig) -> int:
    """Return the seed that all groups share, so that a class's draws do not depend on its group."""
    return unit_seed(config.seed, "recover", "")


def read_real(source: Source, keys: tuple[str, ...], config: DistillConfig) -> np.ndarray:
    """Return real images (K, H, W, C) uint8 by key, as the network sees them."""
    raws = source.read_keys(keys)
    return np.stack([decode_image(raw.content, config.source, raw.key) for raw in raws])


def read_images(room: Room, labels: range | list[int]) -> list[ClassImages]:
    """Return the distilled images of some classes, verified."""
    files = {f.key: f for m in room.committed().units.values() for f in m.files}
    return [codecs.decode_class_images(room.read(files[key_of(label)])) for label in labels]
