"""The stages that test a set which is given: its teacher, if there is one, then a room of students an architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from wmdd_ray.config import Arch, DistillConfig
from wmdd_ray.options import fingerprint_options
from wmdd_ray.spine.numbers import StageNumbers
from wmdd_ray.spine.run import Stage, StageRun
from wmdd_ray.stages import evaluate
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.units.given_set import OwnSet, listed_set, open_given
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.students import rows
from wmdd_ray.units.tensor_set import TensorSet


def stages(
    config: DistillConfig, students: Sequence[Arch], real: str | None = None
) -> tuple[Stage, ...]:
    """Return the stages that test a set: the given teacher, if there is one, then a room a student architecture.

    `run.source` opens `train` (the set), `val`, and `real` for baselines, of which `real` is the fingerprint.
    """
    teacher: tuple[Stage, ...] = ()
    if config.teacher is not None:
        teacher = (replace(PIPELINE[0], name="teacher", numbers=StageNumbers()),)
    return (*teacher, *(_stage_of(student, config, real) for student in students))


def config_of(config: DistillConfig, student: Arch) -> DistillConfig:
    """Return the configuration with a student's architecture."""
    network = replace(config.evaluate.network, arch=student)
    return replace(config, evaluate=replace(config.evaluate, network=network))


def _stage_of(student: Arch, config: DistillConfig, real: str | None) -> Stage:
    own = config_of(config, student)

    def options(_: DistillConfig) -> dict[str, Any]:
        relabel = fingerprint_options(own.relabel)
        relabel = {name: relabel[name] for name in ("views", "epochs")}
        about = {"source": fingerprint_options(own.source), "relabel": relabel, "real_data": real}
        return {**evaluate.options(own), **about}

    def work(stage: StageRun) -> dict[str, Any]:
        given, baselines = stage.run.source("train"), own.evaluate.baselines
        sets = partial(
            open_given,
            given=given if isinstance(given, OwnSet | TensorSet) else listed_set(given, own),
            real=Listed.of(stage.run.source("real"), own.source) if baselines else None,
            teacher_room=stage.run.room("teacher") if own.teacher is not None else None,
            config=own,
        )
        # Kept, so that attacks can be asked for later without training again.
        return evaluate.train_students(stage, own, sets, of=rows(own), keep=True)

    return Stage(
        name=student,
        room=student,
        version=3,
        inputs=("teacher",) if config.teacher is not None else (),
        reads_data=True,
        options=options,
        plan=evaluate.plan,
        work=work,
        numbers=evaluate.NUMBERS,
    )
