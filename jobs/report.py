"""Write a page about a run: `python jobs/report.py RUN_URI`.

One HTML file without any network: pictures, accuracy, features, losses, bytes, time, options. `jobs/distill.py` writes it too,
as report.html in the run's folder; here it can be made at any time, also of a run that is unfinished or on another machine.
Exit codes: 0 done, 2 no run there, 4 the data given is none, 5 storage.
"""

from __future__ import annotations

import logging
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.report", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import DistillConfig, refuse_secrets
from wmdd_ray.errors import ConfigError, WmddError
from wmdd_ray.product.card import size
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, open_source

from . import command_line

REPORT_KEY = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Which run, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Root of the run (the --out of jobs/distill.py): a path or URI."""
    out: str | None = None
    """File or URI to write, ending in .html; absent: report.html in the run's folder."""
    data: str | None = None
    """Where the training images are now; absent: where the run read them."""
    classes: tuple[int, ...] = ()
    """Labels of the classes to show in full; absent: all, or of many 40 that are evenly spread."""

    def __post_init__(self) -> None:
        for option in ("run", "out", "data"):
            refuse_secrets(option, getattr(self, option))
        if self.out is not None and not self.out.endswith((".html", ".htm")):
            raise ConfigError(f"--out: expected a file that ends in .html, got {self.out!r}")


def main(arguments: list[str]) -> int:
    """Write the page and return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        report = command_line.parse(Report, arguments, description=__doc__)
        store, key = _target(report)
        content = page_of(Store(report.run), classes=report.classes, data=report.data)
        store.put(key, content)
    except WmddError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"report          {store.url(key)} ({size(len(content))})")
    return 0


def _target(report: Report) -> tuple[Store, str]:
    if report.out is None:
        return Store(report.run), REPORT_KEY
    folder, _, name = report.out.rpartition("/")
    return Store(folder or ("/" if report.out.startswith("/") else ".")), name


def page_of(
    store: Store,
    *,
    config: DistillConfig | None = None,
    source: Source | None = None,
    classes: tuple[int, ...] = (),
    data: str | None = None,
) -> bytes:
    """Return the page of the run under `store`.

    Args:
        store: Root of the run.
        config: The run's configuration; None takes what the run has recorded.
        source: Its training images; None opens them.
        classes: Labels to show in full; none takes a selection.
        data: Where the training images are now; None where the run read them.

    Raises:
        ConfigError: There is no run, or no such class.
        DataError: `data` is no data set.
    """
    # Imported here: stages load torch and Ray, which a wrong option should not have to wait for.
    from wmdd_ray.product.pages.classes import chosen_labels, shown_classes
    from wmdd_ray.product.pages.facts import read_run
    from wmdd_ray.product.pages.page import render
    from wmdd_ray.stages.pipeline import PIPELINE

    facts = read_run(store, PIPELINE, config)
    num_classes = len(facts.class_names)
    if classes and not set(classes) <= set(range(num_classes)):
        raise ConfigError(
            f"--classes: expected labels from 0 to {num_classes - 1}, got {sorted(classes)}"
        )
    if data is not None:
        facts.config = replace(facts.config, data=data)
    missing: list[str] = []
    if source is None:
        try:
            source = _open(facts.config)
        except WmddError as error:
            if data is not None:
                raise
            missing.append(
                f"Real images, which are not read where the run read them ({facts.config.data}): {error}. Pass --data to "
                "jobs/report.py where they are."
            )
    expected = facts.input_fingerprint("data")
    if source is not None and expected is not None and source.fingerprint() != expected:
        missing.append(
            f"Real images: those at {facts.config.data} are not the ones that the features were made from."
        )
        source = None
    shown, absent = shown_classes(facts, source, chosen_labels(num_classes, classes))
    return render(facts, shown, [*missing, *absent])


def _open(config: DistillConfig) -> Source:
    return open_source(config.data, config.source, split="train")


if __name__ == "__main__":
    command_line.run(main)
