"""Attacks on the students of `jobs/evaluate.py`: a room for the images that are attacked, and one for each attack and eps."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import safetensors.numpy

from wmdd_ray.config import Arch, AttackConfig, AttackName, DistillConfig
from wmdd_ray.executors.dispatch import do_units
from wmdd_ray.options import fingerprint_options
from wmdd_ray.robustness.attacks import SETTINGS, libraries
from wmdd_ray.robustness.units import (
    SAMPLE,
    SAMPLE_KEY,
    SAMPLE_UNIT,
    budgets,
    draw_sample,
    open_attacker,
    room_of,
    slices_of,
)
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.spine.rooms import seconds_in_core
from wmdd_ray.spine.run import Stage, StageRun, Work
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.students import unit_ids


def stages(config: DistillConfig, student: Arch, attack: AttackConfig) -> tuple[Stage, ...]:
    """Return a stage an attack and eps on the students of an architecture, whose room is `student`; `sample_stage` comes before."""
    return tuple(
        attack_stage(config, student, name, eps)
        for name in attack.names
        for eps in budgets(name, attack)
    )


def sample_stage(config: DistillConfig, attack: AttackConfig) -> Stage:
    """Return the stage that draws the held-out images which all students are attacked on."""

    def options(_: DistillConfig) -> dict[str, Any]:
        source = fingerprint_options(config.source)
        return {"images": attack.images, "seed": config.seed, "source": source}

    def work(stage: StageRun) -> dict[str, Any]:
        if SAMPLE_UNIT not in stage.room.finished():
            stage.progress.start(1, 0)
            attempt = stage.room.begin(SAMPLE_UNIT)
            assert attempt is not None, "the driver alone draws"
            val = Listed.of(stage.run.source("val"), config.source)
            images_NHWC, labels_N = draw_sample(val, attack.images, seed=config.seed)
            content = safetensors.numpy.save({"images_NHWC": images_NHWC, "labels_N": labels_N})
            attempt.commit(
                {SAMPLE_KEY: content},
                metrics={"images": len(labels_N), "classes": len(set(labels_N.tolist()))},
            )
        stage.progress.update(1)
        return dict(stage.room.read_unit(SAMPLE_UNIT).metrics)

    return Stage(
        name=SAMPLE,
        room=SAMPLE,
        reads_data=True,
        options=options,
        plan=lambda _: Work(
            units=(SAMPLE_UNIT,),
            estimated_bytes=attack.images * config.source.image_size**2 * config.source.channels,
        ),
        work=work,
    )


def attack_stage(
    config: DistillConfig, student: str, name: AttackName, eps: Fraction | None
) -> Stage:
    """Return the stage of one attack and eps on the students in the room `student`."""

    def options(_: DistillConfig) -> dict[str, Any]:
        budget = None if eps is None else str(eps)
        return {"attack": name, "eps": budget, "settings": SETTINGS[name], "seed": config.seed}

    def work(stage: StageRun) -> dict[str, Any]:
        students = unit_ids(config)
        num_images = stage.inputs[SAMPLE].metrics["images"]
        count = len(slices_of(num_images, config))
        units = [f"{trained}-{number:03d}" for trained in students for number in range(count)]
        do_units(
            stage,
            units,
            partial(
                open_attacker,
                room=stage.room,
                students=stage.run.room(student),
                sample=stage.run.room(SAMPLE),
                name=name,
                eps=eps,
                config=config,
                num_classes=len(stage.run.source("train").class_names),
            ),
        )
        markers = stage.room.read_units(units)
        return {
            "images": num_images,
            "seconds_in_core": seconds_in_core(markers),
            "hardware": hardware(),
            **versions(),
            "libraries": libraries(),
        }

    room = room_of(student, name, eps)
    return Stage(
        name=room,
        room=room,
        inputs=(student, SAMPLE),
        options=options,
        plan=lambda _: Work(units=None, estimated_bytes=0),
        work=work,
    )
