"""What the pipeline costs when everything grows: classes, actors, data; and when a worker is lost."""

from __future__ import annotations

from typing import Annotated

import tyro

from jobs.benches.reporting import report
from jobs.benches.scale.classes import Classes
from jobs.benches.scale.memory import Memory
from jobs.benches.scale.workers import Workers

Part = (
    Annotated[Classes, tyro.conf.subcommand("classes")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Workers, tyro.conf.subcommand("workers")]
)


def scale(part: Annotated[Part, tyro.conf.arg(name="")], out: str | None = None) -> None:
    """Thousand classes and actors, memory against data, 1 and 2 workers, and a killed one.

    Args:
        part: What to measure.
        out: JSON file to write.
    """
    report(part.rows(), part.settings(), out)
