"""A teacher that is given: a committed one, published weights, or a checkpoint file."""

from __future__ import annotations

import socket
import time
from dataclasses import fields

import torch

from wmdd_ray.config import DistillConfig, NetworkConfig, SourceConfig
from wmdd_ray.core.checkpoints import read_checkpoint
from wmdd_ray.core.device import device_for
from wmdd_ray.core.networks import build_network, load_weights
from wmdd_ray.core.published import download, is_published, published
from wmdd_ray.core.teacher_check import check_teacher
from wmdd_ray.errors import ArtifactError, ConfigError, DataError
from wmdd_ray.spine.run import Run, Stage, StageRun, expected_plan
from wmdd_ray.spine.taken import teacher_room
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import file_at
from wmdd_ray.store.sources import Source
from wmdd_ray.store.sources.classes import exact, first_difference, plain
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.teacher import UNIT, commit_teacher, measure, source_of, teacher_key, units_of


def import_teacher(stage: StageRun, spec: str, unit: str = UNIT) -> None:
    """Read a teacher that `spec` names, measure it on held-out images, and commit it."""
    attempt = stage.room.begin(unit)
    if attempt is None:
        return
    about = {"unit": unit, "node": socket.gethostname(), "attempt": attempt.number}
    stage.event("unit_started", **about)
    source: Source = stage.run.source("train")
    network_config, network = given_network(stage.config, spec, source.class_names, unit)
    check_teacher(network, needs_norms=stage.config.needs_norms, **stage.config.source.shape)
    device = device_for(-1)
    network = network.to(device).eval()
    val = Listed.of(stage.run.source("val"), stage.config.source)
    check_order = stage.config.squeeze.check_class_order
    top1 = measure(network, val, stage.config, spec, device, check_order=check_order)
    commit_teacher(attempt, stage.config, network_config, network, source.class_names, top1, {})
    stage.event("unit_done", **about, seconds=round(time.perf_counter() - attempt.began, 3))


def check_given(run: Run, stage: Stage) -> None:
    """Raise what squeeze, the `stage`, would raise of the given teachers that it still has to import; nothing is downloaded."""
    config, room = run.config, run.room(stage.room)
    if config.teacher is None or not run.owns(stage.room):
        return
    plan = room.read_plan()
    same = plan is not None and plan["fingerprint"] == expected_plan(run, stage, {})["fingerprint"]
    finished = room.finished() if same else set()
    for unit in (unit for unit in units_of(config) if unit not in finished):
        names = run.source("train").class_names
        _, network = given_network(config, config.teacher, names, unit, fetch=False)
        check_teacher(network, needs_norms=config.needs_norms, **config.source.shape)


def given_network(
    config: DistillConfig,
    spec: str,
    class_names: tuple[str, ...],
    unit: str = UNIT,
    *,
    fetch: bool = True,
) -> tuple[NetworkConfig, torch.nn.Module]:
    """Return the architecture that `spec` names, and the network with its weights, on the CPU.

    Published weights that are not to be fetched are compared by their metadata, and the network is without them.
    """
    network_config, weights = _given_weights(config, spec, class_names, unit, fetch=fetch)
    network = build_network(network_config, num_classes=len(class_names), **config.source.shape)
    if weights is not None:
        load_weights(network, weights, f"--teacher {spec}")
    return network_config, network


def _given_weights(
    config: DistillConfig, spec: str, class_names: tuple[str, ...], unit: str, *, fetch: bool
) -> tuple[NetworkConfig, dict[str, torch.Tensor] | None]:
    """Return architecture and weights of `torchvision:NAME`, `timm:NAME`, a committed teacher, or a checkpoint file.

    A teacher other than the first is that of a run with as many.
    """
    if is_published(spec):
        _require_first(config, spec, unit, "weights of one")
        about = published(spec)
        _check_input(about.source(config.source), config.source, spec)
        if about.num_classes != len(class_names):
            raise DataError(
                f"--teacher {spec}: its {about.num_classes} classes are not the data's {len(class_names)}; train it on this data "
                "and pass the checkpoint, or leave --teacher out"
            )
        return NetworkConfig(arch=about.arch), download(spec) if fetch else None
    room = teacher_room(spec)
    if room is not None:
        commit = room.committed()
        if unit not in commit.units:
            _require_first(config, spec, unit, f"a run with {len(commit.units)}")
        teacher = codecs.decode_teacher(room.read(commit.file(teacher_key(unit))))
        check_names(teacher.class_names, class_names, spec)
        _check_input(source_of(teacher, config.source), config.source, spec)
        network = NetworkConfig(
            arch=teacher.arch, width=teacher.width, small_stem=teacher.small_stem
        )
        return network, {name: torch.tensor(array) for name, array in teacher.weights.items()}
    _require_first(config, spec, unit, "no run")
    try:
        store, name = file_at(spec)
        content = store.get(name)
    except (FileNotFoundError, ArtifactError) as error:
        raise ConfigError(
            f"--teacher {spec}: expected a committed teacher (a run or its teacher/ folder), torchvision:WEIGHTS, timm:MODEL, "
            f"or a checkpoint file, found none of them ({error if isinstance(error, ArtifactError) else 'no such file'})"
        ) from error
    return config.squeeze.network, read_checkpoint(content, spec)


def _require_first(config: DistillConfig, spec: str, unit: str, what: str) -> None:
    if unit != UNIT:
        raise ConfigError(
            f"--teacher {spec}: expected a run with the {config.num_teachers} teachers that --relabel.teachers, its schedule or "
            f"--recover.teachers asks for at ipc {config.ipc}, found {what}; give such a run, lower the number, or leave --teacher "
            "out to train them"
        )


def _check_input(expected: SourceConfig, source: SourceConfig, spec: str) -> None:
    """Raise a ConfigError that names each option of the input that is not as the weights expect."""
    wrong = [
        f"--source.{f.name.replace('_', '-')} {_written(getattr(expected, f.name))} (is {_written(getattr(source, f.name))})"
        for f in fields(source)
        if getattr(expected, f.name) != getattr(source, f.name)
    ]
    if wrong:
        raise ConfigError(f"--teacher {spec}: these weights expect {', '.join(wrong)}")


def _written(value: object) -> str:
    return " ".join(map(_written, value)) if isinstance(value, tuple) else str(value)


def check_names(teacher: tuple[str, ...], data: tuple[str, ...], spec: str) -> None:
    """Raise a DataError when a teacher's class names are not those of the data, in its order."""
    first = first_difference([*map(plain, teacher)], [*map(plain, data)])
    if first < max(len(teacher), len(data)):
        raise DataError(
            f"--teacher {spec}: its {len(teacher)} classes differ from the data's {len(data)}, first at class {first}: "
            f"({exact(teacher[first : first + 3])}) against ({exact(data[first : first + 3])}); use the teacher of this data"
        )
