"""What the pipeline costs when everything grows, and when a worker is lost."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import tyro

from ..reporting import report
from .classes import Classes
from .workers import Workers

Part = (
    Annotated[Classes, tyro.conf.subcommand("classes")]
    | Annotated[Workers, tyro.conf.subcommand("workers")]
)


def scale(part: Annotated[Part, tyro.conf.arg(name="")], out: str | None = None) -> None:
    """Thousand classes and actors, and a worker of two that is killed.

    Args:
        part: What to measure.
        out: JSON file to write.
    """
    rows = part.rows()
    load = [round(load, 1) for load in os.getloadavg()]
    report(rows, {**asdict(part), "load_average": load}, out)
