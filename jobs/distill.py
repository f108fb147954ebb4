"""Distill a labelled image data set: `python jobs/distill.py --ipc 10`.

Seven stages, each a folder under --out: squeeze (teacher/), features/, barycenters/, recover (images/), relabel (labels/),
assemble (dataset/), evaluate (evaluation/). Run the same command again after any interruption: finished units are kept.
Exit codes: 0 done, 1 workers lost, 2 configuration, 3 lost a race for --out, 4 input, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.distill", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import DistillConfig, Reporting, Resources, StageName, refuse_secrets
from wmdd_ray.core.published import is_published, published
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import full_table, recipe_of
from wmdd_ray.spine.claims import fingerprint, flatten
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.spine.rooms import StageCommit
from wmdd_ray.spine.run import TAKEN, Run, run_pipeline
from wmdd_ray.spine.taken import note_runs, origin_of, take
from wmdd_ray.store.documents import dump_json
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source
from wmdd_ray.store.sources.listing import NoSuchSplitError
from wmdd_ray.telling.progress import StageLine
from wmdd_ray.telling.trackers import TrackedRun, trackers_of
from wmdd_ray.units.cut import open_split

from . import command_line, endings, forecast, own_data
from .summary import print_plan, print_several, print_summary, write_report

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
    features: str | None = None
    """Take teacher and features from this run (its --out), which must have been made of the same data with the same options."""
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
    ipcs: Annotated[tuple[int, ...], tyro.conf.Suppress, tyro.conf.Fixed] = ()
    """All of `--ipc`, where it names several; not an option."""

    def __post_init__(self) -> None:
        refuse_secrets("out", self.out)
        refuse_secrets("features", self.features)
        endings.refuse_lost_folder(self.out)


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    return endings.exit_code_of(arguments, parse_all, distill)


def parse_all(arguments: list[str], *, ask_cluster: bool = True) -> list[Job]:
    """Return the job of a command line; for `--ipc 1 10` one each, in a folder of its own that takes what they share from above."""
    words, ipcs = list(arguments), []
    if "--ipc" in words:
        at = len(words) - words[::-1].index("--ipc")
        while at < len(words) and words[at].isdecimal():
            ipcs.append(words.pop(at))
        words[at:at] = ipcs[:1]
    if len(ipcs) < 2:
        return [parse(arguments, ask_cluster=ask_cluster)]
    several = tuple(dict.fromkeys(map(int, ipcs)))
    jobs: list[Job] = []
    for ipc in several:
        words[at] = str(ipc)
        seen = jobs[0].auto if jobs else None
        jobs.append(parse(words, several, seen, ask_cluster=ask_cluster))
    root = root_of(jobs[0])
    _require_one_teacher(jobs)
    return [
        replace(job, out=f"{root}/ipc{job.config.ipc}", features=job.features or root, ipcs=several)
        for job in jobs
    ]


def _require_one_teacher(jobs: Sequence[Job]) -> None:
    """Raise a ConfigError that names what makes the teacher or the features of one ipc other ones."""
    from wmdd_ray.stages import features, squeeze

    def options_of(job: Job) -> dict[str, Any]:
        return flatten({**squeeze.options(job.config), **features.options(job.config)})

    first = options_of(jobs[0])
    for job in jobs[1:]:
        other = options_of(job)
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"--ipc {' '.join(str(job.config.ipc) for job in jobs)}: expected one teacher for all, got {name} "
                    f"{first.get(name)} at {jobs[0].config.ipc} and {other.get(name)} at {job.config.ipc}; give the option that "
                    "decides it one value, or each ipc a run of its own"
                )


def parse(
    arguments: list[str],
    ipcs: tuple[int, ...] = (),
    auto: own_data.Auto | None = None,
    *,
    ask_cluster: bool = True,
) -> Job:
    """Return the job of a command line: a recipe's values, changed by the options given; `ipcs` are all of several."""
    names = ("recipe", "variant", "ipc", "teacher", "data", *_MEASURED_FOR)
    known = command_line.typed(arguments, *names)
    # tyro says what is wrong with others
    ipc = int(known["ipc"]) if known["ipc"].isdecimal() else 10
    with_data = known["data"] not in ("", "digits")
    recipe = known["recipe"] or ("auto" if with_data else "digits")
    if recipe == "auto" and with_data:
        job = _parse_auto(arguments, known, ipc, ipcs, auto, ask_cluster=ask_cluster)
    else:
        config = _for_teacher(recipe_of(recipe, ipc, known["variant"] or "best"), known["teacher"])
        job = _parse(arguments, config)
    return replace(job, ipcs=ipcs)


def _parse(arguments: list[str], config: DistillConfig) -> Job:
    default = Job(config=full_table(config) if "--evaluate.full" in arguments else config)
    return command_line.parse(Job, arguments, description=__doc__, default=default, first=_FIRST)


def _for_teacher(config: DistillConfig, teacher: str) -> DistillConfig:
    """Return the options with the input that published weights were trained with."""
    if not is_published(teacher):
        return config
    return replace(config, source=published(teacher).source(config.source))


def _parse_auto(
    arguments: list[str],
    known: dict[str, str],
    ipc: int,
    ipcs: tuple[int, ...],
    auto: own_data.Auto | None,
    *,
    ask_cluster: bool,
) -> Job:
    """Return the job of a command line without a recipe: its data choose, and the options given come over it."""
    size, channels = (
        int(known[name]) if known[name].isdecimal() else None for name in _MEASURED_FOR
    )
    teacher = known["teacher"]
    if is_published(teacher):
        given = _for_teacher(DistillConfig(), teacher).source
        size, channels = size or given.image_size, channels or given.channels
    job = _parse(arguments, own_data.placeholder(known["data"], ipc, channels))
    if auto is None:
        out = None if job.overwrite else Store(root_of(replace(job, ipcs=ipcs)))
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
    job = _parse(arguments, _for_teacher(config, teacher))
    choices = own_data.choice_lines(job.config, reasons, arguments)
    return replace(job, auto=auto, told=tuple(choices))


def distill(jobs: Sequence[Job]) -> int:
    """Do the jobs of a command line, which share what does not depend on ipc, and print what a person wants to know."""
    started = time.monotonic()
    first = jobs[0]
    for line in first.told:
        print(f"auto: {line}", flush=True)
    # Imported here: stages load torch and Ray, which a wrong option should not have to wait for.
    from wmdd_ray.stages.pipeline import PIPELINE
    from wmdd_ray.units.features import check_listed
    from wmdd_ray.units.given_teacher import check_given

    shared = tuple(stage for stage in PIPELINE if stage.room in TAKEN)
    runs = [(job, open_run(job)) for job in jobs]
    parents = []
    if len(jobs) > 1 and first.features == root_of(first):
        parents = [replace(first, out=first.features, features=None)]
    above = [(job, open_run(job)) for job in parents]
    for _, run in above + runs[1:]:
        run.sources = runs[0][1].sources
    if first.dry_run:
        check_given((above or runs)[0][1], PIPELINE[0])
        for _, run in runs:
            source = run.source("train")
            check_listed(source.shards(run.config.features.chunk_images), source, run.config)
        own = tuple(stage for stage in PIPELINE if stage not in shared) if above else PIPELINE
        root = (above or runs)[0][1].store.uri
        print_plan(root, [(run, shared) for _, run in above] + [(run, own) for _, run in runs])
        return 0
    endings.refuse_foreign_folder(Store(root_of(first)))
    names = [stage.name for stage in shared]
    for job, run in above:
        if job.first is None or job.first in names or job.last in names:
            last = job.last if job.last in names else "features"
            bring_up(replace(job, last=last), run)
    if above and first.last in names:
        return 0
    if len(jobs) > 1:
        note_runs(Store(root_of(first)), first.ipcs)
    made = []
    for job, run in runs:
        commits = bring_up(job, run)
        made.append((run, commits))
        report = write_report(run)
        if len(jobs) == 1:
            print_summary(run, commits, report, time.monotonic() - started)
    if len(jobs) > 1:
        print_several(root_of(first), made, time.monotonic() - started)
    return 0


def bring_up(job: Job, run: Run) -> dict[str, StageCommit]:
    """Bring every room of a run up to date, and return their commits."""
    from wmdd_ray.executors.dispatch import sweep_notes, watch_of
    from wmdd_ray.stages import assemble, recover
    from wmdd_ray.stages.pipeline import PIPELINE

    tracked = tracked_run(run)
    run.watch = watch_of(run, tracked, trackers_of(job.reporting, tracked))
    with endings.ended(run):
        if run.config.recover.method == "diffusion":
            # A wrong name is better told before the teacher is trained.
            recover.check_model(run.config, run.source("train").class_names)
        anew = job.overwrite and job.first in ("squeeze", "features", "barycenters")
        take(run, PIPELINE, overwrite=job.overwrite, anew=anew)
        commits = run_pipeline(
            run, PIPELINE, first=job.first, last=job.last, overwrite=job.overwrite
        )
        sweep_notes(run)
    if "evaluation" in commits:
        assemble.write_card(run.room("dataset"), run.config, commits["evaluation"])
    return commits


def open_run(job: Job) -> Run:
    """Return the run of a job; nothing is read or started yet."""
    config = job.config
    out = job.out or default_out(config)
    endings.refuse_data_among_rooms(
        Store(out), {"--data": config.data, "--val-data": config.val_data}
    )
    origin = Store(job.features) if job.features else None
    beside = [f"{root_of(job)}/ipc{ipc}" for ipc in job.ipcs if job.features]

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
        if (prices := forecast.price_line(run)) is not None and job.last in (None, "evaluate"):
            print(prices, file=sys.stderr)

    run = Run(
        store=Store(out),
        config=config,
        resources=job.resources,
        open_source=opened,
        progress=lambda name: StageLine(f"ipc{config.ipc} {name:<12}" if beside else name),
        connect=connect,
        unsafe_commits=job.allow_unsafe_commits,
        origin=origin and (origin_of(origin) or origin),
        relatives=tuple(Store(uri) for uri in beside if uri != out),
    )
    return run


def root_of(job: Job) -> str:
    """Return the root of all that a command line makes: of several ipc the folder above."""
    if job.ipcs and job.features and job.out:
        return job.out.rpartition("/")[0]
    return (job.out or default_out(job.config, job.ipcs)).rstrip("/")


def tracked_run(run: Run) -> TrackedRun:
    """Return what trackers are told of a run; the same command has the same key."""
    uri, config = run.store.uri, asdict(run.config)
    return TrackedRun(
        # Of several ipc the last name is that of the ipc alone.
        name="-".join(uri.rstrip("/").split("/")[-2 if run.relatives else -1 :]),
        key=fingerprint({"out": uri, "config": config}),
        options={"out": uri, **flatten(config)},
    )


def default_out(config: DistillConfig, ipcs: Sequence[int] = ()) -> str:
    """Return where a run goes when --out is absent, or the runs of several ipc."""
    variant = "" if config.variant == "best" else f"-{config.variant}"
    name = own_data.name_of(config.data) if config.recipe == "auto" else config.recipe
    numbers = "-".join(map(str, ipcs or [config.ipc]))
    return endings.default_out(f"{name}-ipc{numbers}{variant}")


def write_run_record(run: Run, auto: own_data.Auto | None) -> None:
    """Store the merged configuration, versions and revision of this run, and what `auto` saw."""
    record = {"config": asdict(run.config), "resources": asdict(run.resources), **versions()}
    record |= {"hardware": hardware(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= {own_data.RECORD_KEY: auto.record()} if auto else {}
    run.store.put("run.json", dump_json(record))


if __name__ == "__main__":
    command_line.run(main)
