"""The engine of the studies: stages of the product under many configurations, each done once, whoever needs it.

A job is a stage with its configuration and the jobs whose rooms it reads. Its room is named by the fingerprint that the pipeline
itself would write into the plan, so one folder serves tables, seeds and changed options, and what is there is found again. The
work is the product's own (`wmdd_ray/units`), done in this process or in a few, without Ray.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from multiprocessing import get_context
from typing import Any, cast

import torch

from wmdd_ray.config import AttackConfig, AttackName, DistillConfig, Resources
from wmdd_ray.executors.heap import keep_freed_memory
from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.spine.run import Progress, Run, Stage, bring, expected_plan
from wmdd_ray.stages import attack, evaluate
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.telling.progress import StageLine

from .splits import Place


def _students_options(config: DistillConfig) -> dict[str, Any]:
    return {**evaluate.options(config), "rows": list(student_rows(config)), "kept": True}


def student_rows(config: DistillConfig) -> tuple[str, ...]:
    """Return the rows of a job of students: the distilled set alone, or all real images alone."""
    return ("all_real",) if "all_real" in config.evaluate.baselines else ("distilled",)


STAGES: dict[str, Stage] = {stage.name: stage for stage in PIPELINE}
# Students that are kept, to be tested later on images that nobody had when they were trained.
STAGES["students"] = replace(
    STAGES["evaluate"],
    name="students",
    room="students",
    options=_students_options,
    work=lambda stage: evaluate.work(stage, of=student_rows(stage.config), keep=True),
)


@dataclass(frozen=True)
class Job:
    """A stage's name, its configuration, and the jobs whose rooms it reads.

    `attack:NAME:EPS` is an attack on students, `sample:N` the N images that are attacked.
    """

    stage: str
    config: DistillConfig
    inputs: tuple[Job, ...] = ()

    @property
    def made(self) -> Stage:
        kind, *about = self.stage.split(":")
        if kind == "sample":
            return attack.sample_stage(self.config, AttackConfig(images=int(about[0])))
        if kind == "attack":
            name, eps = cast(AttackName, about[0]), Fraction(about[1]) if about[1] else None
            return attack.attack_stage(self.config, "students", name, eps)
        return STAGES[kind]

    @property
    def judges(self) -> bool:
        """Whether it works after all training and hands nothing back to it."""
        return self.stage.partition(":")[0] in ("sample", "attack")


@dataclass(kw_only=True)
class _JobRun(Run):
    """A run of one stage whose rooms lie under the names of their fingerprints."""

    rooms: dict[str, str] = field(default_factory=dict)

    def room(self, name: str, space: str | None = None) -> Room:
        return Room(self.store, f"{name}/{self.rooms[name]}", self.token, space)


class Study:
    """The jobs of a study in a folder."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._plan = cache(self._plan_of)

    def id(self, job: Job) -> str:
        """Return the fingerprint of a job, which its room is named by."""
        return self._plan(job)["fingerprint"]

    def done(self, job: Job) -> StageCommit:
        """Return what a finished job committed; an ArtifactError when it is not done."""
        return self.room(job).committed()

    def room(self, job: Job) -> Room:
        return self._run(job).room(job.made.room)

    def closure(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs and all that they need, each once, what is needed first."""
        ordered: dict[str, Job] = {}

        def visit(job: Job) -> None:
            if self.id(job) not in ordered:
                for each in job.inputs:
                    visit(each)
                ordered[self.id(job)] = job

        for job in jobs:
            visit(job)
        return list(ordered.values())

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return those of the jobs, and of all that they need, that are not done."""
        return [job for job in self.closure(jobs) if self.room(job).read_commit() is None]

    def bring(self, jobs: Iterable[Job], processes: int = 1) -> None:
        """Do every job that is missing, as soon as its inputs are there, and say how far it is.

        `processes` are of one computing thread each; 1 works in this one.
        """
        waiting = self.missing(jobs)
        total, open_ids = len(waiting), {self.id(job) for job in waiting}
        line = StageLine("study")
        line.start(total, 0)
        running: dict[Future[None], Job] = {}
        with workers(processes) as pool:
            while waiting or running:
                for job in [j for j in waiting if not open_ids & set(map(self.id, j.inputs))]:
                    if len(running) < processes:
                        waiting.remove(job)
                        running[pool.submit(_do, self.place, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    job = running.pop(future)
                    open_ids.remove(self.id(job))
                    about = f"{job.stage} ipc {job.config.ipc} seed {job.config.seed}"
                    line.update(total - len(waiting) - len(running), about)
        line.finish()

    def do(self, job: Job) -> None:
        bring(self._run(job), job.made, self._plan(job))

    def _plan_of(self, job: Job) -> dict[str, Any]:
        done = {each.made.room: self.id(each) for each in job.inputs}
        return expected_plan(self._bare(job), job.made, done)

    def _run(self, job: Job) -> _JobRun:
        run = self._bare(job)
        # Barycenters look at the teacher that their features are of.
        before = [each for done in job.inputs for each in done.inputs]
        run.rooms = {each.made.room: self.id(each) for each in (*before, *job.inputs, job)}
        return run

    def _bare(self, job: Job) -> _JobRun:
        place = self.place
        return _JobRun(
            store=place.store,
            config=job.config,
            resources=Resources(executor="here"),
            open_source=place.judged_source_of if job.judges else place.source_of,
            progress=lambda name: Progress(),
            connect=lambda: None,
        )


def _do(place: Place, job: Job) -> None:
    Study(place).do(job)


def chain(
    config: DistillConfig,
    *,
    teacher: Job | None = None,
    makers: Job | None = None,
    labelers: Job | None = None,
) -> dict[str, Job]:
    """Return the jobs of a pipeline by stage, up to the assembled set.

    Args:
        config: Its configuration.
        teacher: The teacher that atoms are of; absent, the configuration's.
        makers: The teachers that make the images in turn, the first of which is `teacher`; absent, that one alone.
        labelers: The teachers that label, the first of which is `teacher`; absent, that one alone.
    """
    jobs: dict[str, Job] = {}
    squeeze = teacher or Job("squeeze", config)
    jobs["squeeze"] = squeeze
    jobs["features"] = Job("features", config, (squeeze,))
    jobs["barycenters"] = Job("barycenters", config, (jobs["features"],))
    made = (makers or squeeze, jobs["features"], jobs["barycenters"])
    jobs["recover"] = Job("recover", config, made)
    labeled = (labelers or squeeze, jobs["features"], jobs["recover"])
    jobs["relabel"] = Job("relabel", config, labeled)
    jobs["assemble"] = Job("assemble", config, (*labeled, jobs["relabel"]))
    return jobs


def students(config: DistillConfig, jobs: dict[str, Job]) -> Job:
    """Return the job of students on the assembled set of a chain."""
    inputs = (jobs["squeeze"], jobs["barycenters"], jobs["assemble"])
    return Job("students", config, inputs)


def print_plan(jobs: Iterable[Job], study: Study) -> None:
    """Print how many jobs of each stage there are, and how many are to do."""
    every = study.closure(jobs)
    missing = {study.id(job) for job in study.missing(every)}
    for stage in dict.fromkeys(job.stage for job in every):
        of_stage = [job for job in every if job.stage == stage]
        left = sum(study.id(job) in missing for job in of_stage)
        print(f"{stage:12} {len(of_stage):5} jobs, {left:5} to do")


def map_in(
    processes: int, function: Callable[..., Any], parts: Iterable[tuple[Any, ...]]
) -> Iterator[Any]:
    """Yield `function(*part)` for every part as they come, in this process or in some of one thread each."""
    with workers(processes) as pool:
        futures: list[Future[Any]] = [pool.submit(function, *part) for part in parts]
        for future in futures:
            yield future.result()


class _Here(Executor):
    """Does at once what is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def workers(processes: int) -> Iterator[Executor]:
    """Open a pool of processes with one computing thread each, which end with this one; of one, this process itself."""
    if processes == 1:
        with one_thread():
            yield _Here()
        return
    context, parent = get_context("spawn"), (os.getpid(),)
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the worker processes do: more add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(parent: int) -> None:
    """Prepare a worker process: one computing thread, and an end when the process that started it has ended."""
    keep_freed_memory()
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
