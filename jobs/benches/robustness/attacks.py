"""The units of work that are attacks on students, and the images that are attacked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from jobs.benches.accuracy.splits import Labeled, Workplace, load_split
from jobs.benches.accuracy.units import Speed, StudentUnit, Unit
from wmdd_ray.config import AttackConfig, AttackName
from wmdd_ray.robustness.attacks import Attacked, attack
from wmdd_ray.spine.run import unit_seed

# Passes of a network forth and back that an image takes which no attack makes fall, for the plan: a query is a third of one.
_PASSES: dict[AttackName, int] = {
    "pgd": 100, "mim": 20, "cw": 700, "square": 600, "autoattack": 1500,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttackUnit(Unit):
    """An attack on a finished student: which of the chosen images it is right on, before and after."""

    room = "attacks"
    reads_test = True
    student: StudentUnit
    attack: AttackName
    eps: str
    images: int
    split: str
    uri: str

    @property
    def label(self) -> str:
        """The student's, with the attack."""
        return f"{self.student.label}-{self.attack}"

    def seconds(self, place: Workplace, speed: Speed) -> float:
        student = self.student.student
        return self.images * _PASSES[self.attack] * speed(student.network, False)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        labeled = images_of(place, self.split, self.uri)
        rows_N = sample_rows(labeled.labels_N, self.images)
        eps = 0.0 if self.attack == "cw" else float(Fraction(self.eps))
        found = attack(
            self.attack,
            self.student.network(place),
            labeled.images_NHWC[rows_N],
            labeled.labels_N[rows_N],
            eps=eps,
            mean_C=place.source.mean,
            std_C=place.source.std,
            seed=unit_seed(0, "attack", f"{self.attack}-{self.eps}"),
        )
        told = {
            "clean": found.clean_N.astype(int).tolist(),
            "robust": found.robust_N.astype(int).tolist(),
            "l2_change": found.change_N.round(6).tolist(),
            "notes": list(found.notes),
        }
        return {f"{self.id}.json": json.dumps(told).encode()}, {"eps": self.eps}

    def found(self, place: Workplace) -> Attacked:
        """Return what the finished attack has found."""
        told = json.loads(self.file(place))
        return Attacked(
            clean_N=np.array(told["clean"], dtype=bool),
            robust_N=np.array(told["robust"], dtype=bool),
            change_N=np.array(told["l2_change"]),
            notes=tuple(told["notes"]),
        )


def attacks_on(student: StudentUnit, asked: AttackConfig, split: str, uri: str) -> list[AttackUnit]:
    """Return the attacks on a student, each once; C&W minimizes the change, so one does for every eps."""
    return [
        AttackUnit(
            data=student.data,
            student=student,
            attack=name,
            eps=eps,
            images=asked.images,
            split=split,
            uri=uri,
        )
        for name in dict.fromkeys(asked.names)
        for eps in (asked.eps if name != "cw" else ("none",))
    ]


def sample_rows(labels_N: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return up to `count` rows, ascending: classes take turns in giving their images, which come in random order."""
    rng = np.random.default_rng(seed)
    turns = [
        (turn, int(row))
        for label in np.unique(labels_N)
        for turn, row in enumerate(rng.permutation(np.flatnonzero(labels_N == label)))
    ]
    # Of the last turn some classes give an image and some do not.
    order = rng.permutation(len(turns))
    chosen = sorted(order.tolist(), key=lambda i: turns[i][0])[:count]
    return np.sort([turns[i][1] for i in chosen])


def images_of(place: Workplace, split: str, uri: str) -> Labeled:
    """Return the images that students are tested and attacked on."""
    if split == "val":
        return place.val
    return load_split(uri, place.source, "val", place.class_names)


def stages_of(attacks: dict[StudentUnit, list[AttackUnit]]) -> list[list[Unit]]:
    """Return all units, each once, in stages that need only what is before them."""
    labeled = [student.labeled for student in attacks]
    images = [unit.images for unit in labeled]
    features = [f for unit in images for f in unit.features]
    teachers = [f.teacher for f in features]
    last = [unit for units in attacks.values() for unit in units]
    stages = (teachers, features, images, labeled, [*attacks], last)
    return [list(dict.fromkeys(stage)) for stage in stages]
