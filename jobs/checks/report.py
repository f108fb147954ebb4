"""What the doctor's checks share: what they look at, and the lines that they leave."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal

from wmdd_ray.spine.run import Run

from ..distill import Job

Mark = Literal["ok", "warning", "FAIL", "skipped"]


@dataclass(frozen=True)
class Finding:
    """A line of the report. A failure without an `exit_code` has that of its check."""

    mark: Mark
    found: str
    advice: str = ""
    exit_code: int = 0


@dataclass
class Visit:
    """The run that is looked at, the names of the checks that failed, and whether a cluster was joined.

    Probe objects lie under `probe`.
    """

    job: Job
    run: Run
    failed: set[str] = field(default_factory=set)
    joined: bool = False

    def __post_init__(self) -> None:
        self.probe = self.run.store.child(f"doctor-{uuid.uuid4().hex[:12]}")


def many(number: float, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
