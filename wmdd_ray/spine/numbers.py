"""What a run tells while it works: numbers by stage, and how each stage reads them off the markers of its units."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wmdd_ray.spine.rooms import UnitMarker

STEPS = {
    "squeeze": "epoch",
    "barycenters": "class",
    "recover": "iteration",
    "evaluate": "epoch",
    "top1": "seed",
    "progress": "seconds",
}
"""Group of a number -> what its steps count. `progress` counts whole seconds since the run began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """One number of a run.

    `metric` is what it measures; with `stage` and `part` (a loss term, a row of the table) it is a series. `detail` (a unit's
    id) makes a further series of it for trackers; `seconds` is the time of day, since 1970.
    """

    stage: str
    metric: str
    value: float
    step: int
    part: str = ""
    detail: str = ""
    seconds: float = field(default_factory=time.time)

    @property
    def group(self) -> str:
        """What its series stands with, and what its step counts."""
        if self.metric in ("loss", "cost"):
            return self.stage
        return self.metric if self.metric in STEPS else "progress"

    @property
    def name(self) -> str:
        """Name of its series: `recover/loss/bn/g00003`, `top1/distilled-soft`, `progress/features/units_done`."""
        parts: tuple[str, ...] = (self.metric, self.part, self.detail)
        if self.group == "progress":
            parts = (self.stage, *parts)
        elif self.group == self.metric:
            parts = (self.part or self.stage, self.detail)
        return "/".join((self.group, *filter(None, parts)))


def _counted(stage: Any, marker: UnitMarker) -> int | None:
    return marker.metrics.get("num_images")


@dataclass(frozen=True, kw_only=True)
class StageNumbers:
    """How a stage's numbers are read; its functions take the `StageRun`.

    The defaults tell of no number, and of the images that a marker counts.
    """

    series: Callable[[str], tuple[str, str]] = lambda unit: ("", "")
    """Unit -> (part, detail) of the numbers that it tells."""
    numbers: Callable[[Any, UnitMarker], list[Number]] = lambda stage, marker: []
    """The losses, costs and accuracies that the marker of a finished unit holds."""
    curves: Callable[[Any, UnitMarker], list[Number]] = lambda stage, marker: []
    """The losses of a finished unit by step, where the marker's files hold them."""
    images: Callable[[Any, UnitMarker], int | None] = _counted
    """The images of a finished unit; None where nobody counts them."""
    images_by_epoch: bool = False
    """Whether a unit goes through all real images every epoch, and `images` is what it has seen in all of them."""
