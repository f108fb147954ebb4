"""Write a page about a run: `python jobs/report.py RUN_URI`.

One HTML file without any network: pictures, accuracy, features, losses, bytes, time, options. `jobs/distill.py` writes it too,
as report.html in the run's folder; here it can be made at any time, also of a run that is unfinished or on another machine.
Exit codes: 0 done, 2 no run there, 4 the data given is none, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.report", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import DistillConfig, refuse_secrets
from wmdd_ray.errors import ArtifactError, ConfigError, DataError, WmddError
from wmdd_ray.product.tables import size
from wmdd_ray.store.filesystem import Store, file_at
from wmdd_ray.store.sources import Source
from wmdd_ray.store.uris import check_named
from wmdd_ray.units.cut import open_split

from . import command_line, endings

REPORT_KEY = "report.html"
CARD_KEY = "dataset/README.md"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Which run, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Root of the run (the --out of jobs/distill.py): a path or URI."""
    out: str | None = None
    """File or URI to write, ending in .html; absent: report.html in the run's folder."""
    data: str | None = None
    """Where the training images are; absent: no real images are shown, but for the embedded digits."""
    follow_data: bool = False
    """Without --data, read the training images where the run says that it read them (a path, s3:// or gs://): say so only of runs
    that are yours."""
    classes: tuple[int, ...] = ()
    """Labels of the classes to show in full; absent: all, or of many 40 that are evenly spread."""

    def __post_init__(self) -> None:
        for option in ("run", "out", "data"):
            refuse_secrets(option, getattr(self, option))
        if self.out is not None and not self.out.endswith((".html", ".htm")):
            raise ConfigError(f"--out: expected a file that ends in .html, got {self.out!r}")


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    parse = partial(command_line.parse, Report, description=__doc__)
    return endings.exit_code_of(arguments, parse, write)


def write(report: Report) -> int:
    """Write the page."""
    run = Store(report.run)
    store, key = (run, REPORT_KEY) if report.out is None else file_at(report.out)
    try:
        content = page_of(
            run,
            classes=report.classes,
            data=report.data,
            card=CARD_KEY if report.out is None else None,
            follow_data=report.follow_data,
        )
    except WmddError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        # A run is a folder of anybody's JSON.
        raise ArtifactError(
            f"{report.run}: expected a run as this version of wmdd_ray writes it, found another ({type(error).__name__}: "
            f"{error}); make the page with the version that made the run"
        ) from error
    store.put(key, content)
    print(f"report          {store.url(key)} ({size(len(content))})")
    return 0


def page_of(
    store: Store,
    *,
    config: DistillConfig | None = None,
    source: Source | None = None,
    classes: tuple[int, ...] = (),
    data: str | None = None,
    card: str | None = CARD_KEY,
    follow_data: bool = False,
) -> bytes:
    """Return the page of the run under `store`, by its recorded configuration where no other is given.

    Without a `source` the training images are opened at `data`, or with `follow_data` where the run says that it read them.

    Raises:
        ConfigError: There is no run, or no such class.
        DataError: `data` is no data set.
    """
    # Imported here: stages load torch and Ray, which a wrong option should not have to wait for.
    from wmdd_ray.product.pages.classes import chosen_labels, shown_classes
    from wmdd_ray.product.pages.facts import read_run
    from wmdd_ray.product.pages.page import render
    from wmdd_ray.stages.pipeline import PIPELINE

    facts = read_run(store, PIPELINE, config, follow=follow_data or config is not None)
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
            if data is None and not follow_data and facts.config.data != "digits":
                raise DataError("a place is not read because a run names it")
            if data is None:
                check_named(facts.config.data, store.uri)
            source = open_split(facts.config, "train")
        except WmddError as error:
            if data is not None:
                raise
            missing.append(
                f"Real images, which are not read where the run read them ({facts.config.data}): {error}. Pass --data to "
                "jobs/report.py where they are, or --follow-data if this run is yours."
            )
    features = facts.stages["features"].commit
    expected = features and features.inputs.get("data")
    if source is not None and expected is not None and source.fingerprint() != expected:
        missing.append(
            f"Real images: those at {facts.config.data} are not the ones that the features were made from."
        )
        source = None
    shown, absent = shown_classes(facts, source, chosen_labels(num_classes, classes))
    return render(facts, shown, [*missing, *absent], card)


if __name__ == "__main__":
    command_line.run(main)
