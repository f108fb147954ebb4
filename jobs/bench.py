"""Measure this machine: `python jobs/bench.py NAME [--out FILE.json]`.

NAME is barycenter, views, recover, features, gpu, labels, loader, orchestration, scale, accuracy, robustness or otg. Each
benchmark prints a table and writes the same numbers with hardware, versions, settings, n, min, median and max. What is compared is
measured in the same run, taking turns. With one computing thread processor seconds are counted, which other work on the
machine changes least; otherwise wall-clock seconds.
"""

from __future__ import annotations

import argparse
import inspect
import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.bench", run_name="__main__", alter_sys=True)

from wmdd_ray.errors import WmddError

from . import command_line

BENCHES = {
    "barycenter": "speed.barycenter",
    "views": "speed.views",
    "recover": "speed.recover",
    "features": "speed.features",
    "gpu": "gpu.command",
    "labels": "study.labels",
    "loader": "speed.loader",
    "orchestration": "speed.orchestration",
    "scale": "scale.pipeline",
    "accuracy": "study.command",
    "robustness": "study.robustness",
    "otg": "study.otg",
}
"""Benchmark -> the module with the function of its name; only what is asked for is imported."""


def main(arguments: list[str]) -> None:
    """Run the benchmark that the command line names."""
    named = arguments[0] if arguments and arguments[0] in BENCHES else None
    benches = {
        name: getattr(import_module(f".benches.{module}", __package__), name)
        for name, module in BENCHES.items()
        if named in (None, name)
    }
    if named == "gpu":
        return _plainly(benches[named], arguments[1:])
    import tyro

    config = (tyro.conf.CascadeSubcommandArgs,)
    if named is None:
        tyro.extras.subcommand_cli_from_dict(
            benches, args=arguments, description=__doc__, config=config
        )
        return None
    try:
        tyro.cli(benches[named], args=arguments[1:], prog=f"jobs/bench.py {named}", config=config)
    except WmddError as error:
        raise SystemExit(f"{named}: {error}") from error


def _plainly(function: Callable[..., None], arguments: list[str]) -> None:
    """Call a function with its options by the standard library alone: a machine with a GPU that is lent has no tyro."""
    parser = argparse.ArgumentParser(
        description=function.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, parameter in inspect.signature(function).parameters.items():
        kind = str if parameter.default is None else type(parameter.default)
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name.replace('_', '-')}", default=parameter.default, **how)
    function(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    command_line.run(main)
