"""Distill a labelled image data set: `python jobs/distill.py --ipc 10`.

Seven stages, each a folder under --out: squeeze (teacher/), features/, barycenters/, recover (images/), relabel (labels/),
assemble (dataset/), evaluate (evaluation/). Run the same command again after any interruption: finished units are kept.
Exit codes: 0 done, 1 workers lost, 2 configuration, 3 lost a race for --out, 4 input, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.distill", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import DistillConfig, Reporting, Resources, StageName, refuse_secrets
from wmdd_ray.product.card import results_table, size
from wmdd_ray.recipes import full_table, recipe_of
from wmdd_ray.spine.claims import fingerprint, flatten
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.spine.rooms import StageCommit
from wmdd_ray.spine.run import (
    Run,
    Stage,
    StageRun,
    expected_plan,
    run_pipeline,
)
from wmdd_ray.store.documents import dump_json
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source
from wmdd_ray.store.sources.listing import NoSuchSplitError
from wmdd_ray.telling.progress import StageLine, duration
from wmdd_ray.telling.trackers import TrackedRun, trackers_of
from wmdd_ray.units.cut import open_split
from wmdd_ray.units.own_data import doubts_of

from . import command_line, endings, forecast, own_data

_MEASURED_FOR = ("source.image-size", "source.channels")
_FIRST = (
    "recipe variant ipc data val-data teacher out from overwrite dry-run evaluate.full num-workers"
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the job. Those with a dot belong to one stage."""

    out: str | None = None
    """Root of the run: a path, or a URI that all nodes see. Absent: RECIPE-ipcIPC, of `auto` DATA-ipcIPC, in $WMDD_RAY_RUNS (set by
    cluster/), else in runs/ (a submitted job: in the home folder)."""
    first: Annotated[StageName | None, tyro.conf.arg(name="from")] = None
    """Begin with this stage; those before it must be committed."""
    last: Annotated[StageName | None, tyro.conf.arg(name="until")] = None
    """End with this stage."""
    overwrite: bool = False
    """Replace rooms that were made with other options; with --from, that room and those after in any case."""
    dry_run: bool = False
    """Print the plan (stages, units, bytes) and stop."""
    allow_unsafe_commits: bool = False
    """Work on a store that ignores conditional writes; two runs with one --out can then overwrite each other unnoticed."""
    full: Annotated[bool, tyro.conf.arg(name="evaluate.full")] = False
    """18 students where the recipe has 2: the full table."""
    verbose: bool = False
    """Show Ray's and the workers' log lines, and whole tracebacks."""
    config: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    reporting: Annotated[Reporting, tyro.conf.arg(name="")] = field(default_factory=Reporting)
    auto: Annotated[own_data.Auto | None, tyro.conf.Suppress, tyro.conf.Fixed] = None
    """What the recipe `auto` saw of the data; not an option."""
    told: Annotated[tuple[str, ...], tyro.conf.Suppress, tyro.conf.Fixed] = ()
    """What it chose, and why; not an option."""

    def __post_init__(self) -> None:
        refuse_secrets("out", self.out)
        endings.refuse_lost_folder(self.out)


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    return endings.exit_code_of(arguments, parse, distill)


def parse(arguments: list[str], *, ask_cluster: bool = True) -> Job:
    """Return the job of a command line: a recipe's values, changed by the options given; `auto` may ask a cluster for its GPUs."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("recipe", "variant", "ipc", "teacher", "data", *_MEASURED_FOR):
        first.add_argument(f"--{option}", f"--{option.replace('-', '_')}", dest=option, default="")
    first.add_argument("--evaluate.full", action="store_true", dest="full")
    known = vars(first.parse_known_args(arguments)[0])
    # tyro says what is wrong with others
    ipc = int(known["ipc"]) if known["ipc"].isdecimal() else 10
    with_data = known["data"] not in ("", "digits")
    recipe = known["recipe"] or ("auto" if with_data else "digits")
    if recipe == "auto" and with_data:
        return _parse_auto(arguments, known, ipc, ask_cluster=ask_cluster)
    config = _for_teacher(recipe_of(recipe, ipc, known["variant"] or "best"), known["teacher"])
    return _parse(arguments, full_table(config) if known["full"] else config)


def _parse(arguments: list[str], config: DistillConfig) -> Job:
    default = Job(config=config)
    return command_line.parse(Job, arguments, description=__doc__, default=default, first=_FIRST)


def _for_teacher(config: DistillConfig, teacher: str) -> DistillConfig:
    """Return the options with the input that published weights were trained with."""
    if not teacher.startswith(("torchvision:", "timm:")):
        return config
    # Imported here: torch, which a wrong option should not have to wait for.
    from wmdd_ray.core.published import published

    return replace(config, source=published(teacher).source(config.source))


def _parse_auto(arguments: list[str], known: dict[str, Any], ipc: int, *, ask_cluster: bool) -> Job:
    """Return the job of a command line without a recipe: its data choose, and the options given come over it."""
    size, channels = (
        int(known[name]) if known[name].isdecimal() else None for name in _MEASURED_FOR
    )
    teacher = known["teacher"]
    if teacher.startswith(("torchvision:", "timm:")):
        given = _for_teacher(DistillConfig(), teacher).source
        size, channels = size or given.image_size, channels or given.channels
    job = _parse(arguments, own_data.placeholder(known["data"], ipc, channels))
    out = None if job.overwrite else Store(job.out or default_out(job.config))
    auto = own_data.look(
        job.config,
        job.resources,
        out,
        image_size=size,
        channels=channels,
        ask_cluster=ask_cluster,
        verbose=job.verbose,
    )
    config, reasons = auto.choose(ipc, job.config.variant)
    # What was typed must not be at odds with what was not.
    warmup = min(config.squeeze.warmup_epochs, job.config.squeeze.epochs)
    config = replace(config, squeeze=replace(config.squeeze, warmup_epochs=warmup))
    config = full_table(config) if known["full"] else config
    job = _parse(arguments, _for_teacher(config, teacher))
    choices = own_data.told(job.config, reasons, arguments)
    return replace(job, auto=auto, told=tuple(choices))


def distill(job: Job) -> int:
    """Bring every room up to date and print what a person wants to know."""
    started = time.monotonic()
    run = open_run(job)
    for line in job.told:
        print(f"auto: {line}", flush=True)
    tracked = tracked_run(run)
    trackers = [] if job.dry_run else trackers_of(job.reporting, tracked)
    # Imported here: stages load torch and Ray, which a wrong option should not have to wait for.
    from wmdd_ray.executors.dispatch import sweep_notes, watch_of
    from wmdd_ray.stages import recover
    from wmdd_ray.stages.pipeline import PIPELINE

    if job.dry_run:
        print_plan(run, PIPELINE)
        return 0
    endings.refuse_foreign_folder(run.store)
    run.watch = watch_of(run, tracked, trackers)
    with endings.ended(run):
        if run.config.recover.method == "diffusion":
            # A wrong name is better told before the teacher is trained.
            recover.check_model(run.config, run.source("train").class_names)
        commits = run_pipeline(
            run, PIPELINE, first=job.first, last=job.last, overwrite=job.overwrite
        )
        sweep_notes(run)
    if "evaluation" in commits:
        from wmdd_ray.stages.assemble import write_card

        write_card(run.room("dataset"), run.config, commits["evaluation"])
    report = write_report(run)
    print_summary(run, commits, report, time.monotonic() - started)
    return 0


def open_run(job: Job) -> Run:
    """Return the run of a job; nothing is read or started yet."""
    config = job.config
    out = job.out or default_out(config)

    def opened(split: str) -> Source:
        if split == "train":
            return open_split(config, "train")
        names = run.source("train").class_names
        try:
            return open_split(config, "val", names)
        except NoSuchSplitError as error:
            if config.val_data is not None:
                raise
            raise NoSuchSplitError(
                f"{error}, or --val-fraction 0.1 to hold out a tenth of each class"
            ) from error

    def connect() -> None:
        endings.join_cluster(out, job.resources, verbose=job.verbose)
        # Only now: a run that was refused, or had nothing to do, is not what made the rooms.
        write_run_record(run, job.auto)
        print(f"writing to {run.store.uri}", file=sys.stderr)
        if (prices := forecast.told(run)) is not None and job.last in (None, "evaluate"):
            print(prices, file=sys.stderr)

    run = Run(
        store=Store(out),
        config=config,
        resources=job.resources,
        open_source=opened,
        progress=StageLine,
        connect=connect,
        unsafe_commits=job.allow_unsafe_commits,
    )
    return run


def tracked_run(run: Run) -> TrackedRun:
    """Return what trackers are told of a run; the same command has the same key."""
    uri, config = run.store.uri, asdict(run.config)
    return TrackedRun(
        name=uri.rstrip("/").rpartition("/")[2],
        key=fingerprint({"out": uri, "config": config}),
        options={"out": uri, **flatten(config)},
    )


def default_out(config: DistillConfig) -> str:
    """Return where a run goes when --out is absent."""
    variant = "" if config.variant == "best" else f"-{config.variant}"
    name = own_data.name_of(config.data) if config.recipe == "auto" else config.recipe
    return endings.default_out(f"{name}-ipc{config.ipc}{variant}")


def write_run_record(run: Run, auto: own_data.Auto | None) -> None:
    """Store the merged configuration, versions and revision of this run, and what `auto` saw."""
    record = {"config": asdict(run.config), "resources": asdict(run.resources), **versions()}
    record |= {"hardware": hardware(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= {own_data.RECORD_KEY: auto.record()} if auto else {}
    run.store.put("run.json", dump_json(record))


def print_plan(run: Run, pipeline: tuple[Stage, ...]) -> None:
    """Print what a run would do: a line a stage with its units, those finished, and the bytes to come."""
    print(f"plan for {run.store.uri}")
    print(f"{'stage':<12} {'room':<13} {'state':<34} {'units':>12} {'about':>9}")
    fingerprints: dict[str, str] = {}
    for stage in pipeline:
        room = run.room(stage.room)
        commit = room.read_commit()
        state, ready = "to do", all(name in fingerprints for name in stage.inputs)
        plan = expected_plan(run, stage, fingerprints) if ready else None
        if commit is not None and plan is not None:
            same = commit.fingerprint == plan["fingerprint"]
            state = "committed" if same else "other options: needs --overwrite"
            if same:
                fingerprints[stage.room] = commit.fingerprint
        work = stage.plan(StageRun(run=run, stage=stage, room=room, progress=StageLine(stage.name)))
        finished = room.finished()
        done = len(finished if work.units is None else finished & set(work.units))
        units = f"{done}/{'?' if work.units is None else len(work.units)}"
        if plan is None:
            state = "follows the rooms above"
        elif state == "to do" and finished:
            state = "in part: resumed"
        print(
            f"{stage.name:<12} {stage.room + '/':<13} {state:<34} {units:>12} {size(work.estimated_bytes):>9}"
        )
    if (prices := forecast.told(run)) is not None:
        print(prices)
    if run.config.data != "digits":
        for doubt, advice in doubts_of(run.source("train"), run.config.source):
            print(f"warning: {doubt}; {advice}")


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
    seen = commits["features"].metrics.get("files_seen") if "features" in commits else None
    if seen and run.config.data != "digits":
        print(f"real images     {seen}")
    if report is not None:
        print(f"report          {report}")
    if "evaluation" in commits:
        metrics = commits["evaluation"].metrics
        student = metrics["student"]["network"]["arch"]
        print(
            f"student         {student}, from scratch; teacher's top-1 {100 * metrics['teacher_top1']:.1f} %\n"
        )
        print(results_table(metrics["table"], for_page=False))
    print(f"\n{'stage':<12} {'committed in':>14} {'inside core':>14}")
    for commit in commits.values():
        core = commit.metrics.get("seconds_in_core")
        print(
            f"{commit.stage:<12} {duration(commit.seconds):>14} {duration(core) if core is not None else '-':>14}"
        )
    print(f"this run took {duration(seconds)}")


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
            f"`python jobs/report.py {run.store.uri}` writes it",
            file=sys.stderr,
        )
        return None
    return run.store.url(REPORT_KEY)


if __name__ == "__main__":
    command_line.run(main)
