"""The commands of an installed package: `wmdd-ray distill --ipc 10`, or `python -m wmdd_ray distill --ipc 10`."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from wmdd_ray import __version__
from wmdd_ray.api import JOBS, job, lacking

_COMMANDS = (
    "distill",
    "prepare",
    "evaluate",
    "compare",
    "export",
    "report",
    "doctor",
    "train_diffusion",
    "bench",
)


def main() -> None:
    """Do the command that the command line names, and end with its exit code."""
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name == "--version":
        print(__version__)
        sys.exit(0)
    if name not in _COMMANDS:
        wants_help = name in ("-h", "--help")
        known = "\n".join(f"  {each:<15} {_about(each)}" for each in _COMMANDS)
        print(
            f"{'' if wants_help else f'error: expected a command, got {name!r}'}\nusage: wmdd-ray COMMAND [OPTIONS]\n\n{known}\n\n"
            "`wmdd-ray COMMAND --help` explains the options.".lstrip(),
            file=sys.stdout if wants_help else sys.stderr,
        )
        sys.exit(0 if wants_help else 2)
    sys.argv[:] = [f"wmdd-ray {name}", *arguments]
    try:
        job("command_line").run(job(name).main)
    except ModuleNotFoundError as error:
        print(f"error: {lacking(error)}", file=sys.stderr)
        sys.exit(2)


def _about(name: str) -> str:
    """Return the first words of a command's docstring; the command itself may need what is not installed."""
    spec = importlib.util.find_spec(f"{JOBS}.{name}")
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition(":")[0]


if __name__ == "__main__":
    main()
