"""The spine of the pipeline: order, fingerprint, skip, resume, commit. No Ray, no formulas.

A stage fills one room (`rooms.py`). Running again skips committed rooms, and inside an unfinished room the finished
units. A room whose plan differs is refused with the name of the option that changed.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from wmdd_ray.config import DistillConfig, Resources
from wmdd_ray.errors import ConfigError, LostRaceError
from wmdd_ray.spine.claims import check_ours, claim_room, leave_room, plan_of
from wmdd_ray.spine.events import EventLog
from wmdd_ray.spine.numbers import StageNumbers
from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.store.filesystem import Store

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TAKEN = ("teacher", "features")
"""Rooms that a run may take from another one (`taken.py`): they do not depend on ipc or on how images are made."""

Report = Callable[..., None]
"""report(fraction, note, **values): says which fraction of the unit under way is done, with a short note and, at the end of
an epoch, `epoch` (from 1) and `loss`."""

DoUnit = Callable[[str, Report], None]
"""Works on one unit and commits it."""

OpenWorker = Callable[["torch.device"], DoUnit]
"""Loads what a worker keeps, on its device. Picklable."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage has to do: its unit ids in order, and the bytes that they will take.

    `units` is None when the number of units shows only while the data streams (tar shards).
    """

    units: tuple[str, ...] | None
    estimated_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the pipeline's table of contents.

    `options` picks the part of the configuration that the stage's bytes depend on. `inputs` are the rooms that it
    reads. `plan` names its units. `work` does them and returns the room's metrics. `numbers` says what its units tell.
    """

    name: str
    room: str
    version: int = 1
    inputs: tuple[str, ...] = ()
    reads_data: bool = False
    options: Callable[[DistillConfig], dict[str, Any]]
    plan: Callable[[StageRun], Work]
    work: Callable[[StageRun], dict[str, Any]]
    numbers: StageNumbers = StageNumbers()


@dataclass(kw_only=True)
class Run:
    """One run: where its rooms are, what it is asked for, and the real images it may read.

    `open_source` opens ("train" | "val") on first use: listing millions of objects is not free. `token` is unique to the
    driver process; everything that it publishes carries it. Rooms of `TAKEN` are those of `origin`, if there is one; `relatives`
    have the same teacher, and results that may be the same. Runs of the same images share `sources`, so that these are listed once.
    """

    store: Store
    config: DistillConfig
    resources: Resources
    open_source: Callable[[str], Any]
    progress: Callable[[str], Progress]
    connect: Callable[[], None]
    watch: Watch = field(default_factory=lambda: Watch())
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.time)
    unsafe_commits: bool = False
    origin: Store | None = None
    relatives: tuple[Store, ...] = ()
    sources: dict[str, Any] = field(default_factory=dict)
    _writes: bool = False
    _works: bool = False

    def source(self, split: str) -> Any:
        """Return the opened source of a split, opened once."""
        if split not in self.sources:
            self.sources[split] = self.open_source(split)
        return self.sources[split]

    def room(self, name: str, space: str | None = None) -> Room:
        """Return a room of this run; `space` is that of the plan which the run has claimed it for."""
        origin = self.store if self.owns(name) else self.origin
        return Room(origin or self.store, name, self.token, space)

    def owns(self, room: str) -> bool:
        """Return whether a room is the run's own, not taken from another run."""
        return self.origin is None or room not in TAKEN

    @cached_property
    def events(self) -> EventLog:
        return EventLog(self.store, self.token)

    def begin_writing(self) -> None:
        """Make sure, once and before the first write, that only one of two runs can publish a room."""
        if not (self._writes or self.unsafe_commits):
            self.store.probe()
        self._writes = True

    def begin_work(self) -> None:
        """Join the cluster, once and when there is work to do."""
        if not self._works:
            self.connect()
            self.events.write("run_started", node=socket.gethostname())
            self.watch.begin(self)
        self._works = True

    def end(self, exit_code: int) -> None:
        """Write the last event; nothing when there was no work."""
        if self._works:
            self.events.write("run_ended", exit_code=exit_code)
            self.events.flush()
            self.watch.end(exit_code)


class Watch:
    """Somebody who follows a run at work. The base class does not; `telling/watch.py` has the one of the jobs."""

    def begin(self, run: Run) -> None:
        """Say that there is work to do, and a cluster to do it on."""

    def units(self, stage: str, done: float, total: int | None, *, final: bool = False) -> None:
        """Say how many units of a stage are finished now, and for the last time."""

    def event(self, stage: StageRun, event: str, about: dict[str, Any]) -> None:
        """Say what happened, as the event log has it, or what a unit under way tells (`unit_told`: its `values`)."""

    def end(self, exit_code: int) -> None:
        """Say that the job ends; only after `begin`."""


class Progress:
    """Where a stage reports how far it is. The base class shows nothing; the jobs show a line a stage."""

    def start(self, total: int | None, done: float) -> None:
        """Say how many units there are, and how many were found finished."""

    def work_begins(self) -> None:
        """Say that a worker has begun with a unit."""

    def update(self, done: float, note: str = "") -> None:
        """Say how many units are finished now; a unit under way counts in part."""

    def finish(self, note: str = "") -> None:
        """Close the line."""


class _Watched(Progress):
    """A progress line that the run's watch follows."""

    def __init__(self, line: Progress, watch: Watch, stage: str) -> None:
        self._line, self._watch, self._stage = line, watch, stage
        self._total: int | None = None
        self._done = 0.0

    def start(self, total: int | None, done: float) -> None:
        self._total, self._done = total, done
        self._line.start(total, done)
        self._watch.units(self._stage, done, total)

    def work_begins(self) -> None:
        self._line.work_begins()

    def update(self, done: float, note: str = "") -> None:
        self._done = max(self._done, done)
        self._line.update(done, note)
        self._watch.units(self._stage, self._done, self._total)

    def finish(self, note: str = "") -> None:
        self._line.finish(note)
        self._watch.units(self._stage, self._total or self._done, self._total, final=True)


@dataclass(kw_only=True)
class StageRun:
    """What a stage function is given: its own room, the rooms to its left, the options, a progress line."""

    run: Run
    stage: Stage
    room: Room
    progress: Progress

    @property
    def config(self) -> DistillConfig:
        return self.run.config

    @property
    def resources(self) -> Resources:
        """Where and how wide to execute."""
        return self.run.resources

    def event(self, event: str, **about: Any) -> None:
        """Write an event of this stage; what a unit tells on its way is for the watch alone."""
        self.run.watch.event(self, event, about)
        if event == "unit_started":
            self.progress.work_begins()
        if event != "unit_told":
            self.run.events.write(event, stage=self.stage.name, **about)

    @cached_property
    def inputs(self) -> dict[str, StageCommit]:
        """The commits of the rooms that this stage reads."""
        return {name: self.run.room(name).committed() for name in self.stage.inputs}


def unit_seed(seed: int, stage: str, unit: str) -> int:
    """Return the 63-bit seed of one unit of work: its own, whoever does it and whenever."""
    digest = hashlib.sha256(f"{seed}/{stage}/{unit}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def expected_plan(run: Run, stage: Stage, done: Mapping[str, str]) -> dict[str, Any]:
    """Return the plan of a stage's room: options, inputs and the fingerprint over both.

    `done` has the fingerprints of the rooms to the left.
    """
    inputs = {name: done[name] for name in stage.inputs}
    if stage.reads_data:
        inputs["data"] = run.source("train").fingerprint()
        inputs["val_data"] = run.source("val").fingerprint()
    head = {"stage": stage.name, "version": stage.version, "inputs": inputs}
    return plan_of({**head, "options": stage.options(run.config)})


def run_pipeline(
    run: Run,
    stages: Sequence[Stage],
    *,
    first: str | None = None,
    last: str | None = None,
    overwrite: bool = False,
) -> dict[str, StageCommit]:
    """Bring every room up to date and return their commits, in order.

    Rooms before the stage `first` must be committed for the same options. `overwrite` replaces rooms that were made with other
    options, and, with `first`, its room and those after.

    Raises:
        ConfigError: A room was made with other options and `overwrite` is off; the message names the options.
    """
    names = [stage.name for stage in stages]
    begin = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    if begin >= end:
        raise ConfigError(
            f"--from {first} comes after --until {last}; the order is {', '.join(names)}"
        )
    commits: dict[str, StageCommit] = {}
    fingerprints: dict[str, str] = {}
    for position, stage in enumerate(stages[:end]):
        plan = expected_plan(run, stage, fingerprints)
        if overwrite and first and position >= begin and run.owns(stage.room):
            run.begin_writing()
            run.begin_work()
            # Without a plan a folder of that name is somebody else's.
            if (room := run.room(stage.room)).read_plan() is not None:
                room.clear()
        if position < begin and _committed_as(run, stage, plan) is None:
            raise ConfigError(
                f"--from {first} needs a committed {stage.room}/ for these options, and there is none in "
                f"{run.store.uri}; run from an earlier stage"
            )
        commit = bring(run, stage, plan, overwrite=overwrite)
        commits[stage.room] = commit
        fingerprints[stage.room] = commit.fingerprint
    return commits


def bring(run: Run, stage: Stage, plan: dict[str, Any], *, overwrite: bool = False) -> StageCommit:
    """Return the commit of a stage's room, after the work that is missing; the rooms that it reads are committed.

    `plan` is its `expected_plan`. `overwrite` replaces a room that was made with other options.

    Raises:
        ConfigError: The room was made with other options and `overwrite` is off; the message names the options.
    """
    commit = _committed_as(run, stage, plan)
    if commit is None:
        assert run.owns(stage.room), "what is taken from another run is committed"
        return _build(run, stage, plan, overwrite=overwrite)
    line = run.progress(stage.name)
    line.start(len(commit.units), len(commit.units))
    line.finish("found committed" if run.owns(stage.room) else "taken")
    return commit


def _committed_as(run: Run, stage: Stage, plan: dict[str, Any]) -> StageCommit | None:
    """Return the commit of a stage's room, if there is one for this plan."""
    commit = run.room(stage.room).read_commit()
    return commit if commit and commit.fingerprint == plan["fingerprint"] else None


def _build(run: Run, stage: Stage, plan: dict[str, Any], *, overwrite: bool) -> StageCommit:
    """Do a stage's unfinished units and commit its room."""
    started = time.monotonic()
    room = run.room(stage.room)
    room.store.sweep(run.began)
    if overwrite:  # a refusal comes before the room is emptied
        run.begin_writing()
        run.begin_work()
    plan = claim_room(room, plan, run.begin_writing, overwrite=overwrite)
    room = run.room(stage.room, plan["space"])
    run.begin_work()
    progress = _Watched(run.progress(stage.name), run.watch, stage.name)
    stage_run = StageRun(run=run, stage=stage, room=room, progress=progress)
    stage_run.event("stage_started")
    try:
        metrics = stage.work(stage_run)
    except BaseException as error:
        leave_room(room, plan, error, run.room)
        raise
    check_ours(room, plan)
    commit = StageCommit(
        stage=stage.name,
        version=stage.version,
        fingerprint=plan["fingerprint"],
        options=plan["options"],
        inputs=plan["inputs"],
        units=room.read_units(sorted(room.finished())),
        metrics=metrics,
        seconds=round(time.monotonic() - started, 3),
        host=room.host,
        run=run.token,
        finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
        space=room.space,
    )
    _publish(room, plan, commit)
    stage_run.event("stage_committed", seconds=commit.seconds, units=len(commit.units))
    stage_run.progress.finish()
    return commit


def _publish(room: Room, plan: dict[str, Any], commit: StageCommit) -> None:
    """Commit a room, unless it was committed or taken over by another run."""
    committed = room.commit(commit)
    if not committed and room.committed().space != room.space:
        # Of a run that the room was taken over from, and that was frozen when it should have seen that.
        check_ours(room, plan)
        room.store.delete("stage.json")
        committed = room.commit(commit)
    if not committed:
        winner = room.committed()
        same = "the same" if winner.fingerprint == commit.fingerprint else "other"
        raise LostRaceError(
            f"{room.store.uri} was committed by another run with {same} options (at {winner.finished}) "
            "while this one worked on it; what it holds is whole. Give each run its own --out, or run the same command again "
            "when the other one has ended"
        )
    try:
        check_ours(room, plan)
    except LostRaceError:
        # Whoever took the room over has emptied it of what this commit names.
        if room.committed().run == commit.run:
            room.store.delete("stage.json")
        raise
    room.sweep(commit)
