"""What the pipeline costs when everything grows: classes, actors, data, workers, losses."""

from __future__ import annotations

from typing import Annotated

import tyro

from ..reporting import report
from .classes import Classes
from .forecast import Forecast
from .memory import Memory
from .workers import Workers

Part = (
    Annotated[Forecast, tyro.conf.subcommand("simulation")]
    | Annotated[Classes, tyro.conf.subcommand("classes")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Workers, tyro.conf.subcommand("workers")]
)


def scale(part: Annotated[Part, tyro.conf.arg(name="")], out: str | None = None) -> None:
    """Thousand classes and actors, memory against data, 1 and 2 workers here, 8 to 256 by simulation.

    Args:
        part: What to measure.
        out: JSON file to write.
    """
    report(part.rows(), part.settings(), out)
