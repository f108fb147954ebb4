"""Measure this machine: `python jobs/bench.py NAME [--out FILE.json]`.

NAME is barycenter, recover, features, labels, loader, orchestration, prepare, scale, accuracy, robustness, otg or otm. Each
benchmark prints a table and writes the same numbers with hardware, versions, settings, n, min, median and max. What is compared is
measured in the same run, taking turns. With one computing thread processor seconds are counted, which other work on the
machine changes least; otherwise wall-clock seconds.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.bench", run_name="__main__", alter_sys=True)

import tyro

from . import command_line
from .benches.scale.command import scale
from .benches.speed.barycenter import barycenter
from .benches.speed.features import features
from .benches.speed.loader import loader
from .benches.speed.orchestration import orchestration
from .benches.speed.otm import otm
from .benches.speed.prepare import prepare
from .benches.speed.recover import recover
from .benches.study.command import accuracy
from .benches.study.labels import labels
from .benches.study.otg import otg
from .benches.study.robustness import robustness


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
    tyro.extras.subcommand_cli_from_dict(
        benchmarks,
        args=arguments,
        description=__doc__,
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


if __name__ == "__main__":
    command_line.run(main)
