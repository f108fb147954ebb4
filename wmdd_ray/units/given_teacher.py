"""A teacher that is given: a committed one, published weights, or a checkpoint file."""

from __future__ import annotations

import socket
import time
from typing import cast

import torch

from wmdd_ray.config import Arch, DistillConfig, NetworkConfig, SourceConfig
from wmdd_ray.core.checkpoints import read_checkpoint, torchvision_weights
from wmdd_ray.core.networks import build_network, load_weights
from wmdd_ray.errors import ArtifactError, ConfigError, DataError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import StageRun
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.teacher import UNIT, commit_teacher, key_of, measure


def import_teacher(stage: StageRun, spec: str, unit: str = UNIT) -> None:
    """Read a teacher that `spec` names, measure it on held-out images, and commit it."""
    started = time.perf_counter()
    attempt = stage.room.begin_unit(unit)
    if attempt is None:
        return
    stage.event("unit_started", unit=unit, node=socket.gethostname(), attempt=attempt)
    source: Source = stage.run.source("train")
    network_config, weights = given_weights(stage.config, spec, source.class_names, unit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network(
        network_config,
        num_classes=len(source.class_names),
        channels=stage.config.source.channels,
        image_size=stage.config.source.image_size,
    )
    load_weights(network, weights, f"--teacher {spec}")
    network = network.to(device).eval()
    val = Listed.of(stage.run.source("val"), stage.config.source)
    top1 = measure(network, val, stage.config, spec, device)
    commit_teacher(
        stage.room,
        stage.config,
        network_config,
        network,
        source.class_names,
        top1,
        started,
        {},
        attempt=attempt,
        unit=unit,
    )
    seconds = round(time.perf_counter() - started, 3)
    stage.event("unit_done", unit=unit, node=socket.gethostname(), attempt=attempt, seconds=seconds)


def given_weights(
    config: DistillConfig, spec: str, class_names: tuple[str, ...], unit: str = UNIT
) -> tuple[NetworkConfig, dict[str, torch.Tensor]]:
    """Return architecture and weights of `torchvision:NAME`, a committed teacher, or a checkpoint file.

    A teacher other than the first is that of a run with as many.
    """
    if spec.startswith("torchvision:"):
        _require_first(config, spec, unit, "weights of one")
        arch, state, _, mean_C, std_C, resize, crop = torchvision_weights(
            spec.removeprefix("torchvision:")
        )
        _check_preset(config.source, (mean_C, std_C, resize, crop), spec)
        return NetworkConfig(arch=arch), state
    for room in (Room(Store(spec), ""), Room(Store(spec), "teacher")):
        commit = room.read_commit()
        if commit is None:
            continue
        if unit not in commit.units:
            _require_first(config, spec, unit, f"a run with {len(commit.units)}")
        teacher = codecs.decode_teacher(room.read(commit.file(key_of(unit))))
        check_names(teacher.class_names, class_names, spec)
        network = NetworkConfig(
            arch=cast(Arch, teacher.arch), width=teacher.width, small_stem=teacher.small_stem
        )
        return network, {name: torch.tensor(array) for name, array in teacher.weights.items()}
    _require_first(config, spec, unit, "no run")
    folder, _, name = spec.rpartition("/")
    try:
        content = Store(folder or ".").get(name)
    except (FileNotFoundError, IsADirectoryError, ArtifactError) as error:
        raise ConfigError(
            f"--teacher {spec}: expected a committed teacher (a run or its teacher/ folder), torchvision:WEIGHTS, or a "
            f"checkpoint file, found none of them ({type(error).__name__})"
        ) from error
    return config.squeeze.network, read_checkpoint(content, spec)


def _require_first(config: DistillConfig, spec: str, unit: str, found: str) -> None:
    if unit != UNIT:
        raise ConfigError(
            f"--teacher {spec}: expected a run with the {config.num_teachers} teachers that --relabel.teachers or its schedule "
            f"asks for at ipc {config.ipc}, found {found}; give such a run, lower the number, or leave --teacher out to train them"
        )


def _check_preset(source: SourceConfig, preset: tuple[object, ...], spec: str) -> None:
    asked = (source.mean, source.std, source.resize, source.image_size)
    if asked != preset:
        mean_C, std_C, resize, crop = preset
        raise ConfigError(
            f"--teacher {spec}: these weights expect mean {mean_C}, std {std_C}, shorter side {resize}, center crop {crop}; the "
            f"run has {asked}; set --source.mean, --source.std, --source.resize and --source.image-size to them"
        )


def check_names(teacher: tuple[str, ...], data: tuple[str, ...], spec: str) -> None:
    """Raise a DataError when a teacher's class names are not those of the data, in its order."""
    if teacher != data:
        first = next(
            (i for i, (a, b) in enumerate(zip(teacher, data, strict=False)) if a != b),
            min(len(teacher), len(data)),
        )
        raise DataError(
            f"--teacher {spec}: its {len(teacher)} classes differ from the data's {len(data)}, first at class {first}: "
            f"{teacher[first : first + 3]} against {data[first : first + 3]}; use the teacher of this data"
        )
