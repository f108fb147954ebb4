"""Test a distilled set: `python jobs/evaluate.py URI --students resnet18,mobilenet_v2 --seeds 3 --labels soft,hard`.

Trains students from scratch on the set alone and tests them once, after the last epoch, on held-out real images. The set is one
of ours (`dataset/` of a run, or the run) or labelled images that somebody else distilled: class folders, WebDataset shards,
Parquet, `.pt` files of DC, DM, IDC and MTT, a set of the Hugging Face hub. Images of others have soft labels when --teacher is
given, which is measured first. The URI comes first.

Ours say where their real images are, which are read from there with --follow-data, as their run read them, or given as --data or
--val-data, with the --source options for labels that the run had typed again, or changed. They bring their input size and
normalization; the student's recipe is that of the recipe they were made by. Every option of it is an --evaluate option.
--attacks pgd,square,autoattack,cw,mim --eps 1/255,2/255,8/255 attacks every student on --attack-images of the held-out images.
Results are committed under --out, a folder a student, and one an attack and eps; the same command again goes on or prints them,
attacks can be added, and results.json holds all of them, sealed. Exit codes are those of jobs/distill.py.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.evaluate", run_name="__main__", alter_sys=True)

from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.spine.run import Run, run_pipeline
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, open_source
from wmdd_ray.store.sources.classes import by_any_number, by_number, first_difference, plain, shown
from wmdd_ray.telling.progress import StageLine
from wmdd_ray.units.cut import open_split
from wmdd_ray.units.tensor_set import TensorSet, is_tensor_set, open_tensor_set

from . import command_line, distill, endings
from .evaluation.options import Evaluation, parse
from .evaluation.results import print_summary, write_results


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    return endings.exit_code_of(arguments, lambda words: parse(words, __doc__), evaluate)


def evaluate(evaluation: Evaluation) -> int:
    """Train and test the students that are missing, and print the table."""
    started = time.monotonic()
    from wmdd_ray.executors.dispatch import sweep_notes, watch_of
    from wmdd_ray.robustness import results
    from wmdd_ray.robustness.attacks import require_libraries
    from wmdd_ray.stages import attack
    from wmdd_ray.stages.given_set import config_of, stages

    run = open_run(evaluation)
    configs = {student: config_of(evaluation.config, student) for student in evaluation.students}
    if evaluation.attack.names:
        require_libraries(evaluation.attack.names, len(run.source("train").class_names))
    real = run.source("real").fingerprint() if evaluation.config.evaluate.baselines else None
    run.watch = watch_of(run, distill.tracked_run(run))
    with endings.ended(run):
        work = stages(evaluation.config, evaluation.students, real)
        if evaluation.attack.names:
            work += (attack.sample_stage(evaluation.config, evaluation.attack),)
            for student, own in configs.items():
                work += attack.stages(own, student, evaluation.attack)
        commits = run_pipeline(run, work, overwrite=evaluation.job.overwrite)
        sweep_notes(run)
    table = [
        {"student": student, **row}
        for student in evaluation.students
        for row in commits[student].metrics["table"]
    ]
    attacked = results.results(run, configs, evaluation.attack) if evaluation.attack.names else None
    write_results(run, evaluation, commits, table, attacked)
    print_summary(run, evaluation, commits, table, attacked, time.monotonic() - started)
    return 0


def open_run(evaluation: Evaluation) -> Run:
    """Return the run of a job; nothing is read or started yet."""
    job, config = evaluation.job, evaluation.config

    def names() -> tuple[str, ...]:
        """Return the classes in the order of the labels: the set's, the teacher's, or the real images'."""
        if evaluation.class_names is not None:
            return evaluation.class_names
        if job.data is not None:
            return open_source(job.data, config.source, split="train").class_names
        if job.val_data is None and is_tensor_set(evaluation.place):
            raise ConfigError(
                f"{job.uri} has no held-out images: pass some by --data or --val-data"
            )
        return open_source(
            job.val_data or evaluation.place,
            config.source,
            split="val",
            dedicated=job.val_data is not None,
        ).class_names

    def opened(split: str) -> Any:
        if split == "train":
            return evaluation.own or foreign_set(evaluation, names())
        return open_split(
            config, "train" if split == "real" else "val", run.source("train").class_names
        )

    width = 13 + (16 if evaluation.attack.names else 0)
    run = Run(
        store=Store(evaluation.out),
        config=config,
        resources=job.resources,
        open_source=opened,
        # The longest name of an architecture would touch the numbers.
        progress=lambda name: StageLine(f"{name:<{width}}"),
        connect=lambda: endings.join_cluster(evaluation.out, job.resources, verbose=job.verbose),
        unsafe_commits=job.allow_unsafe_commits,
    )
    return run


def foreign_set(evaluation: Evaluation, names: tuple[str, ...]) -> Source | TensorSet:
    """Return the images that somebody else distilled, with their classes matched to `names`."""
    job, source = evaluation.job, evaluation.config.source
    if is_tensor_set(evaluation.place):
        _require_order(names)
        return open_tensor_set(evaluation.place, source, names)
    if job.classes == "names":
        return open_source(evaluation.place, source, split="train", class_names=names)
    opened = open_source(evaluation.place, source, split="train")
    if len(opened.class_names) != len(names):
        raise DataError(
            f"--classes order: expected {len(names)} classes as the held-out images have, found {len(opened.class_names)} in "
            f"{job.uri}"
        )
    alike = {*map(plain, opened.class_names)} == {*map(plain, names)}
    ordered = names if alike else by_number(opened.class_names)
    if ordered is not names:
        _require_order(names)
        _require_order(ordered, f"{job.uri}'s")
    if ordered != opened.class_names:
        opened = open_source(evaluation.place, source, split="train", class_names=ordered)
    opened.class_names = names
    return opened


def _require_order(names: tuple[str, ...], whose: str = "the held-out images'") -> None:
    """Refuse classes of which nobody knows which one is the third."""
    numbered = by_any_number(names)
    if numbered != names:
        k = first_difference(numbered, names)
        raise DataError(
            f"--classes order: {whose} classes {shown(names)} are numbered and come in another order, so class {k} could be "
            f"{numbered[k]!r} or {names[k]!r}; pad their names with zeros, or name the set's classes alike and pass --classes names"
        )


if __name__ == "__main__":
    command_line.run(main)
