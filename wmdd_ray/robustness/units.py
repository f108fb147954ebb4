"""Attacks on the students of `jobs/evaluate.py`: a student, an attack, an eps and a slice of the images are a unit.

So a run that is killed goes on with the next slice, and another attack or eps leaves what is there alone.

Legend: N images, H W pixels, C channels.
"""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from wmdd_ray.config import AttackConfig, AttackName, DistillConfig
from wmdd_ray.robustness.attacks import Attacked, attack
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import DoUnit, Report, unit_seed
from wmdd_ray.store import documents
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.real_images import draw_of_classes
from wmdd_ray.units.students import read_student

SAMPLE = "attacked"
SAMPLE_UNIT, SAMPLE_KEY = "images", "images.safetensors"
# Images of one unit: as many at 32 pixels, and fewer of larger ones, but not so few that a processor idles.
_SLICE_IMAGES, _SLICE_PIXELS, _SLICE_LEAST = 250, 250 * 32 * 32, 25


def budgets(name: AttackName, attack: AttackConfig) -> tuple[Fraction | None, ...]:
    """Return the budgets that an attack is run with, ascending; CW has none."""
    return (None,) if name == "cw" else tuple(sorted(map(Fraction, attack.eps)))


def room_of(student: str, name: AttackName, eps: Fraction | None) -> str:
    """Return the room of an attack."""
    budget = "" if eps is None else f"-{eps.numerator}of{eps.denominator}"
    return f"{student}-{name}{budget}"


def draw_sample(val: Listed, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` held-out images, uint8 (N, H, W, C), and their classes, int64: equally many of each class, or one more.

    Which classes have one more (or any, where there are more classes than images) is drawn. A class that has fewer gives all it
    has, so there can be fewer than `count`. Classes take turns, so that every slice has of each.
    """
    num_classes = len(val.source.class_names)
    order = np.random.default_rng(unit_seed(seed, "attack", "classes")).permutation(num_classes)
    wanted = Counter(dict.fromkeys(range(num_classes), count // num_classes))
    wanted.update(order[: count % num_classes].tolist())
    chosen = draw_of_classes(val, +wanted, seed=unit_seed(seed, "attack", "images"))
    turns = sorted((i, label) for label, images in chosen.items() for i in range(len(images)))
    images_NHWC = np.stack([chosen[label][i] for i, label in turns])
    return images_NHWC, np.array([label for _, label in turns], dtype=np.int64)


def slices_of(num_images: int, config: DistillConfig) -> list[slice]:
    """Return the images of each unit."""
    side = config.source.image_size
    step = max(_SLICE_LEAST, min(_SLICE_IMAGES, _SLICE_PIXELS // side**2))
    return [slice(first, first + step) for first in range(0, num_images, step)]


def open_attacker(
    device: torch.device,
    *,
    room: Room,
    students: Room,
    sample: Room,
    name: AttackName,
    eps: Fraction | None,
    config: DistillConfig,
    num_classes: int,
) -> DoUnit:
    """Read the images, and return the function that attacks one student on a slice of them."""
    drawn = safetensors.numpy.load(sample.read(sample.committed().file(SAMPLE_KEY)))
    images_NHWC, labels_N = drawn["images_NHWC"], drawn["labels_N"]
    slices = slices_of(len(labels_N), config)

    def do_unit(unit: str, report: Report) -> None:
        attempt = room.begin(unit)
        if attempt is None:
            return
        trained, _, number = unit.rpartition("-")
        report(0.0, f"{trained}, images {int(number) + 1}/{len(slices)}")
        network = read_student(students, trained, config, num_classes, device)
        part = slices[int(number)]
        in_core = time.perf_counter()
        attacked = attack(
            name,
            network,
            images_NHWC[part],
            labels_N[part],
            eps=0.0 if eps is None else float(eps),
            mean_C=config.source.mean,
            std_C=config.source.std,
            # The images of a slice share a search; students of one seed are attacked from the same start.
            seed=unit_seed(config.seed, "attack", f"{name}-{eps}-{number}"),
        )
        in_core = time.perf_counter() - in_core
        attempt.commit(
            {_flags_key(unit): documents.dump_json(_flags(attacked))},
            metrics={
                "clean": float(attacked.clean_N.mean()),
                "robust": float(attacked.robust_N.mean()),
                "seconds_in_core": round(in_core, 4),
            },
        )

    return do_unit


def _flags_key(unit: str) -> str:
    return f"images/{unit}.json"


def _flags(attacked: Attacked) -> dict[str, Any]:
    return {
        "clean": attacked.clean_N.astype(int).tolist(),
        "robust": attacked.robust_N.astype(int).tolist(),
        "l2_change": attacked.change_N.round(6).tolist(),
        "notes": list(attacked.notes),
    }


def read_attacked(room: Room, trained: str, count: int) -> Attacked:
    """Return what an attack did to a student, all slices together."""
    commit = room.committed()
    parts = []
    for number in range(count):
        key = _flags_key(f"{trained}-{number:03d}")
        parts.append(documents.load_json(room.read(commit.file(key)), key))
    return Attacked(
        clean_N=np.array([v for part in parts for v in part["clean"]], dtype=bool),
        robust_N=np.array([v for part in parts for v in part["robust"]], dtype=bool),
        change_N=np.array([v for part in parts for v in part["l2_change"]]),
        notes=tuple(dict.fromkeys(note for part in parts for note in part["notes"])),
    )
