"""Measure this machine: `python jobs/bench.py NAME [--out FILE.json]`.

NAME is barycenter, recover, features, labels, loader, orchestration, prepare, scale, accuracy, robustness, otg or otm. Each
benchmark prints a table and writes the same numbers with hardware, versions, settings, n, min, median and max. What is compared is
measured in the same run, taking turns. With one computing thread processor seconds are counted, which other work on the
machine changes least; otherwise wall-clock seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from jobs import command_line
from jobs.benches.scale.command import scale
from jobs.benches.speed.barycenter import barycenter
from jobs.benches.speed.features import features
from jobs.benches.speed.loader import loader
from jobs.benches.speed.orchestration import orchestration
from jobs.benches.speed.otm import otm
from jobs.benches.speed.prepare import prepare
from jobs.benches.speed.recover import recover
from jobs.benches.study.command import accuracy
from jobs.benches.study.labels import labels
from jobs.benches.study.otg import otg
from jobs.benches.study.robustness import robustness
from wmdd_ray.errors import WmddError


def main(arguments: list[str]) -> None:
    """Run the benchmark that the command line names."""
    benchmarks: dict[str, Callable[..., Any]] = {
        f.__name__: f
        for f in (
            barycenter,
            recover,
            features,
            labels,
            loader,
            orchestration,
            prepare,
            scale,
            accuracy,
            robustness,
            otg,
            otm,
        )
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            benchmarks,
            args=arguments,
            description=__doc__,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except WmddError as error:
        raise SystemExit(f"{arguments[0]}: {error}") from error


if __name__ == "__main__":
    command_line.run(main)
