"""Ways to store soft labels that are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from wmdd_ray.config import RelabelConfig

Trained = Literal["fkd", "fine", "coarse", "shared", "lpld"]


@dataclass(frozen=True)
class Option:
    """A way to store labels: what `relabel` is told, the kind of its students, how many epochs of a student share a label epoch."""

    name: str
    relabel: RelabelConfig
    students: Trained
    shared: int = 1

    @property
    def key(self) -> str:
        """Name of the option's students: those of equal labels are the same."""
        step = f"-{self.relabel.step:g}" if self.students in ("coarse", "shared") else ""
        return f"{self.students}{step}" + (f"-{self.shared}" if self.shared > 1 else "")


def options_of(
    full: RelabelConfig, steps: tuple[float, ...], shared: tuple[int, ...], alone: int
) -> list[Option]:
    """Return FKD's labels first, then ever smaller ones."""
    seed = replace(full, stored_views="seed")
    fine = replace(seed, precision="int8")
    stepped = [replace(fine, step=step) for step in steps]
    return [
        Option("fp16, views stored (FKD)", full, "fkd"),
        Option("fp16, views by seed", seed, "fkd"),
        Option("int8, steps of 1/8", fine, "fine"),
        *(Option(f"int8, steps of {one.step:g}", one, "coarse") for one in stepped),
        *(
            Option(f"int8, steps of {one.step:g}, 1/{n} of the epochs", one, "shared", n)
            for one, n in product(stepped, shared)
        ),
        Option(f"fp16, views stored, 1/{alone} of the epochs (LPLD alone)", full, "lpld", alone),
        Option("online: the teacher only", replace(seed, labels="online"), "fkd"),
    ]


def learned_from(options: list[Option], trained: tuple[Trained, ...]) -> list[Option]:
    """Return the options that get students of their own: of those of equal labels, the first."""
    found: dict[str, Option] = {}
    for option in options:
        if option.students in trained:
            found.setdefault(option.key, option)
    return list(found.values())
