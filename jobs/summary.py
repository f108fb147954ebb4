"""What jobs/distill.py prints: the plan of a run, or of several that share a teacher, and the summary; the page that it writes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from wmdd_ray.product.tables import ROW_NAMES, results_table, size
from wmdd_ray.spine.outlook import Outlook, outlooks
from wmdd_ray.spine.provenance import as_typed
from wmdd_ray.spine.rooms import StageCommit
from wmdd_ray.spine.run import Run, Stage
from wmdd_ray.store.sources.passed import left_out
from wmdd_ray.telling.progress import duration
from wmdd_ray.units.own_data import doubts_of

from . import forecast


def print_plan(root: str, runs: Sequence[tuple[Run, tuple[Stage, ...]]]) -> None:
    """Print what runs would do: a line a stage with its units, those finished, and the bytes to come.

    `root` is where they are. A run that takes rooms comes after the one that makes them.
    """
    names = [
        f"{run.store.uri}/{stage.room}/".removeprefix(f"{root}/")
        for run, stages in runs
        for stage in stages
    ]
    wide = max(13, *(len(name) + 1 for name in names))
    print(f"plan for {root}")
    print(f"{'stage':<12} {'room':<{wide}} {'state':<34} {'units':>12} {'about':>9}")
    for one, name in zip(outlooks(runs), names, strict=True):
        units = f"{one.num_finished}/{'?' if one.num_units is None else one.num_units}"
        about = size(one.work.estimated_bytes)
        print(f"{one.stage.name:<12} {name:<{wide}} {_state(one):<34} {units:>12} {about:>9}")
    for run, stages in runs:
        if stages[-1].name == "evaluate" and (prices := forecast.price_line(run)) is not None:
            print(prices)
    run = runs[0][0]
    if passed := left_out(run.source("train").passed_over):
        print(f"training images: {passed}")
    if run.config.data != "digits":
        for doubt, advice in doubts_of(run.source("train"), run.config.source):
            print(f"warning: {doubt}; {advice}")


def _state(one: Outlook) -> str:
    if one.plan is None:
        return "follows the rooms above"
    if not one.run.owns(one.stage.room):
        return "taken" if one.commit else "not as here: cannot be taken"
    if one.other:
        return "other options: needs --overwrite"
    if one.commit:
        return "committed"
    return "in part: resumed" if one.finished else "to do"


def print_summary(
    run: Run, commits: dict[str, StageCommit], report: str | None, seconds: float
) -> None:
    """Print where the set and the report are, its size, the accuracy table, and where the time went."""
    print()
    if "dataset" in commits:
        made = commits["dataset"].metrics
        real = made["source"]
        uri = run.room("dataset").store.uri
        print(f"distilled set   {uri}")
        print(f"preview         {uri}/preview.png")
        print(
            f"size            {made['num_images']} images, {size(made['image_bytes'])} (+ {size(made['label_bytes'])} of soft "
            f"labels, {size(made['teacher_bytes'])} of teacher) for {real['num_images']} real images, "
            f"{size(real['stored_bytes'])}"
        )
        for reason in commits["features"].metrics["bad_images"][:5]:
            print(f"skipped         {reason}")
    account = commits["features"].metrics.get("files_seen") if "features" in commits else None
    if account and run.config.data != "digits":
        print(f"real images     {account}")
    if report is not None:
        print(f"report          {report}")
    if "evaluation" in commits:
        metrics = commits["evaluation"].metrics
        print(f"{_students_line(metrics)}\n")
        print(results_table(metrics["table"], for_page=False))
    print(f"\n{'stage':<12} {'committed in':>14} {'inside core':>14}")
    for commit in commits.values():
        core = commit.metrics.get("seconds_in_core")
        print(
            f"{commit.stage:<12} {duration(commit.seconds):>14} {duration(core) if core is not None else '-':>14}"
        )
    print(f"this run took {duration(seconds)}")


def print_several(
    root: str, made: Sequence[tuple[Run, dict[str, StageCommit]]], seconds: float
) -> None:
    """Print where several runs that share a teacher are, a line an ipc, and what all of it took."""
    ipcs = [run.config.ipc for run, _ in made]
    print(
        f"\ndistilled sets  {root}/ipc{{{','.join(map(str, ipcs))}}}/dataset, a report.html beside each"
    )
    whole = [(run, commits) for run, commits in made if "evaluation" in commits]
    if whole:
        metrics = whole[0][1]["evaluation"].metrics
        rows = list(
            dict.fromkeys(r["row"] for _, c in whole for r in c["evaluation"].metrics["table"])
        )
        print(
            f"{_students_line(metrics)}\n"
            f"all results     {as_typed('python jobs/compare.py')} {root}\n\n"
            f"Top-1 % by {' / '.join(metrics['student']['labels'])} labels:\n\n"
            f"| ipc | images | size | {' | '.join(ROW_NAMES.get(row, row) for row in rows)} |\n"
            f"|---:|---:|---:|{'---:|' * len(rows)}"
        )
    for run, commits in whole:
        table = commits["evaluation"].metrics["table"]
        cells = [
            " / ".join(f"{100 * r['top1_mean']:.1f}" for r in table if r["row"] == row)
            for row in rows
        ]
        set_made = commits["dataset"].metrics
        stored = f"{size(set_made['image_bytes'])} + {size(set_made['label_bytes'])} of labels"
        print(f"| {run.config.ipc} | {set_made['num_images']} | {stored} | {' | '.join(cells)} |")
    print(f"\nthis run took {duration(seconds)}")


def _students_line(metrics: dict[str, Any]) -> str:
    arch, top1 = metrics["student"]["network"]["arch"], metrics["teacher_top1"]
    return f"student         {arch}, from scratch; teacher's top-1 {100 * top1:.1f} %"


def write_report(run: Run) -> str | None:
    """Write the page about a run that is done and return its URI; None, and a warning, when that fails: the run is done."""
    from .report import REPORT_KEY, page_of

    try:
        source = run.source("train")
        run.store.put(REPORT_KEY, page_of(run.store, config=run.config, source=source))
    except Exception as error:
        logging.getLogger(__name__).info("the report", exc_info=error)
        print(
            f"warning: {run.store.url(REPORT_KEY)} was not written ({type(error).__name__}: {error}); the run is done, and "
            f"`{as_typed('python jobs/report.py')} {run.store.uri}` writes it",
            file=sys.stderr,
        )
        return None
    return run.store.url(REPORT_KEY)
