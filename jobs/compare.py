"""Compare methods: `python jobs/compare.py ours=runs/digits-ipc10 DM=runs/evaluate-dm --out table.md table.csv table.tex`.

One table of what runs, folders of several runs and evaluations found, from their sealed results alone. A line that has another
student, training, number of views or other held-out images than the first of its data, ipc and labels is marked as not comparable.
Exit codes: 0 done, 2 no results there or a wrong option, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.compare", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import refuse_secrets
from wmdd_ray.errors import ConfigError
from wmdd_ray.product.comparison import compared, ddranking_csv, results_of, written
from wmdd_ray.store.filesystem import file_at

from . import command_line, endings

_NAMED = re.compile(r"([^/:=]+)=(.+)")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the job."""

    results: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Runs (--out of jobs/distill.py, of one ipc or several), their dataset/, or --out of jobs/evaluate.py, each as URI or NAME=URI
    with what the method is to be called."""
    out: tuple[str, ...] = ()
    """Files or URIs to write, by their endings: .md, .csv, .tex (for booktabs). Absent: Markdown on the terminal."""
    ddranking: str | None = None
    """File or URI that gets the label-robust score of the one set that is named as DD-Ranking's package writes it."""

    def __post_init__(self) -> None:
        for uri in (*self.results, *self.out, self.ddranking):
            refuse_secrets("results", uri)
        if not self.results:
            raise ConfigError(
                "expected runs or evaluations, as in: jobs/compare.py runs/digits-ipc10"
            )
        for out in self.out:
            if out.rpartition(".")[2] not in ("md", "csv", "tex"):
                raise ConfigError(
                    f"--out: expected files that end in .md, .csv or .tex, got {out!r}"
                )


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    parse = partial(command_line.parse, Job, description=__doc__)
    return endings.exit_code_of(arguments, parse, compare)


def compare(job: Job) -> int:
    """Write the table."""
    listed = []
    for word in job.results:
        named = _NAMED.fullmatch(word)
        listed += results_of(named[2], named[1]) if named else results_of(word)
    results = compared(listed)
    for out in job.out:
        _write(out, written(results, out.rpartition(".")[2]))
    if job.ddranking is not None:
        _write(job.ddranking, ddranking_csv(results))
    if not (job.out or job.ddranking):
        print(written(results, "md"), end="")
    return 0


def _write(out: str, text: str) -> None:
    store, name = file_at(out)
    store.put(name, text.encode())
    print(f"{'written':<16}{store.url(name)}")


if __name__ == "__main__":
    command_line.run(main)
