"""A thousand classes and as many actors as the machine carries: the real barycenter stage on features that are made up.

What 1000 actors cost on a cluster follows from what is measured here: processor seconds and memory of an actor's start,
of a unit on an actor and in the driver, and the seconds for listing, reading and committing so many units.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from wmdd_ray.config import Resources
from wmdd_ray.recipes import recipe_of
from wmdd_ray.records import ClassFeatures, Moments
from wmdd_ray.spine.run import Progress, Run, Stage, StageRun, run_pipeline
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units.atoms import ClassSolver
from wmdd_ray.units.class_features import class_key, class_unit

from ..reporting import Row, spread
from ..speed.barycenter import synthetic_class
from .processes import cpu_s, descendants, in_a_process, local_ray, shares_mib
from .rooms import s3_server, store_rows

# The BatchNorm inputs of a ResNet-18.
_CHANNELS_L = (64,) * 5 + (128,) * 5 + (256,) * 5 + (512,) * 5
# Classes with other features than these would only cost time to make.
_DISTINCT = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """The barycenter stage on synthetic classes of ImageNet's shape, with ever more actors."""

    num_classes: int = 1000
    """Classes: units of work."""
    num_images: int = 1300
    """Images of a class; 1300 x 512 float32 is 2.7 MB, and 1000 classes 2.7 GB on disk."""
    ipc: int = 10
    """Atoms of a class."""
    actors: tuple[int, ...] = (2, 24, 48)
    """Actors, in turn; a Ray with so many logical CPUs is started for each, and an actor takes about 170 MiB."""
    stores: tuple[str, ...] = ("disk", "s3")
    """Where listing, reading and committing the units is measured: a folder, and an S3 server (moto) on this machine."""
    cluster_actors: int = 1000
    """Actors of the cluster that the cost model speaks of, one a core."""
    cluster_cores: int = 64
    """Cores of its nodes."""
    head_actors_per_s: float = 390.0
    """Actors that a Ray head starts in a second at most (Ray's own many_actors benchmark: 389 to 551)."""

    def rows(self) -> list[Row]:
        """Measure everything, and draw the conclusion for a cluster."""
        rows: list[Row] = []
        with tempfile.TemporaryDirectory() as folder:
            run_pipeline(open_run(self, folder, 1), stages(self), last="features")
            for num_actors in self.actors:
                shutil.rmtree(Path(folder) / "barycenters", ignore_errors=True)
                rows += in_a_process(drive, self, folder, num_actors)
        for store in self.stores:
            with tempfile.TemporaryDirectory() if store == "disk" else s3_server() as uri:
                rows += store_rows(uri, store, self.num_classes)
        return rows + cost_model(self, rows)


def row(what: str, unit: str, value: Any, actors: int | str = "-") -> Row:
    """Return a row of the table: a number or a spread."""
    return {"what": what, "actors": actors, "value": value, "unit": unit}


def open_run(options: Classes, folder: str, num_actors: int) -> Run:
    """Return a run at ImageNet's options whose source is a list of class names."""
    names = tuple(f"class {label}" for label in range(options.num_classes))
    return Run(
        store=Store(folder),
        config=recipe_of("imagenet1k", options.ipc),
        resources=Resources(max_actors=num_actors),
        open_source=lambda split: SimpleNamespace(class_names=names),
        progress=lambda name: Progress(),
        connect=lambda: None,
    )


def stages(options: Classes) -> tuple[Stage, ...]:
    """Return the pipeline's barycenters behind a features stage that needs neither a teacher nor Ray."""
    from wmdd_ray.stages.pipeline import PIPELINE

    def make_up(stage: StageRun) -> dict[str, Any]:
        classes = [synthetic_class(seed)[: options.num_images] for seed in range(_DISTINCT)]
        for label in range(options.num_classes):
            features_ND = classes[label % _DISTINCT]
            stage.room.commit_unit(
                class_unit(label),
                {class_key(label): codecs.encode_class_features(class_record(label, features_ND))},
                metrics={"num_images": len(features_ND)},
                attempt=1,
            )
        counts = [len(classes[0])] * options.num_classes
        return {"num_images": sum(counts), "class_counts": counts, "bad_images": []}

    named = {stage.name: stage for stage in PIPELINE}
    made_up = replace(named["features"], inputs=(), reads_data=False, work=make_up)
    return (made_up, named["barycenters"])


def class_record(label: int, features_ND: np.ndarray) -> ClassFeatures:
    """Return a class's features with moments of a ResNet-18's shape."""
    total = sum(_CHANNELS_L)
    count_L = np.full(len(_CHANNELS_L), len(features_ND) * 49)
    moments = Moments(
        channels_L=_CHANNELS_L, count_L=count_L, mean_S=np.zeros(total), m2_S=np.ones(total)
    )
    keys = tuple(f"{label:05d}/{i:05d}.jpg" for i in range(len(features_ND)))
    return ClassFeatures(label=label, keys=keys, features_ND=features_ND, moments=moments)


def drive(options: Classes, folder: str, num_actors: int) -> list[Row]:
    """Start Ray with so many logical CPUs; start and stop as many actors; then run the stage. Runs in its own process."""
    with local_ray(num_actors):
        run = open_run(options, folder, num_actors)
        measured = started(run, num_actors)
        driver_s, wall_s = time.process_time(), time.perf_counter()
        commit = run_pipeline(run, stages(options))["barycenters"]
        driver_s, wall_s = time.process_time() - driver_s, time.perf_counter() - wall_s
    markers = commit.units.values()
    core_s = [marker.metrics["seconds_in_core"] for marker in markers]
    around_s = [marker.seconds - core for marker, core in zip(markers, core_s, strict=True)]
    measured |= {
        ("stage, with its actors' start", "s"): wall_s,
        ("a unit in core functions (cores shared)", "ms"): spread([1000 * s for s in core_s]),
        ("a unit, reading and encoding", "ms"): spread([1000 * s for s in around_s]),
        ("driver, processor time a unit", "ms"): 1000 * driver_s / len(markers),
    }
    return [row(what, unit, value, num_actors) for (what, unit), value in measured.items()]


def started(run: Run, num_actors: int) -> dict[tuple[str, str], Any]:
    """Start the stage's actors, all at once, and return what each took until it could work, by name and unit."""
    import ray

    actor_class = ray.remote(num_cpus=1)(ClassSolver)
    arguments = (run.room("barycenters"), run.room("features"), (), run.config)
    actors = [actor_class.remote(*arguments) for _ in range(num_actors)]
    ray.get([actor.ready.remote() for actor in actors])
    here = [p for p, title in descendants(os.getpid()).items() if "ClassSolver" in title]
    memory = [shares_mib(pid) for pid in here]
    measured: dict[tuple[str, str], Any] = {
        ("an actor's start, processor time", "s"): spread([cpu_s(pid) for pid in here]),
        ("an actor's memory, PSS", "MiB"): spread([m["pss"] for m in memory]),
        ("an actor's memory, USS", "MiB"): spread([m["uss"] for m in memory]),
    }
    for actor in actors:
        ray.kill(actor)
    return measured


def cost_model(options: Classes, rows: Sequence[Row]) -> list[Row]:
    """Say what the stage takes on a cluster: one actor a core, starts side by side, units shared out evenly."""

    def measured(what: str, actors: int | None = None) -> float:
        values = [r["value"] for r in rows if r["what"] == what and actors in (None, r["actors"])]
        return float(values[-1]["median"] if isinstance(values[-1], dict) else values[-1])

    few, most = min(options.actors), max(options.actors)
    actors, cores = options.cluster_actors, options.cluster_cores
    start_s = measured("an actor's start, processor time", few) + actors / options.head_actors_per_s
    # With few actors each has a core, as on the cluster.
    unit_ms = measured("a unit in core functions (cores shared)", few)
    unit_ms += measured("a unit, reading and encoding", few)
    units_s = -(-options.num_classes // actors) * unit_ms / 1000
    driver_s = measured("driver, processor time a unit", most) * options.num_classes / 1000
    bookkeeping_s = sum(
        measured(f"{options.stores[-1]}: {step}") for step in ("list", "read markers", "commit")
    )
    memory_gib = measured("an actor's memory, PSS", most) * min(actors, cores) / 1024
    model = {
        ("actors ready", "s"): start_s,
        ("memory of a node", "GiB"): memory_gib,
        ("all units", "s"): units_s,
        ("driver's processor time", "s"): driver_s,
        ("list, read, commit", "s"): bookkeeping_s,
        ("stage", "s"): start_s + max(units_s, driver_s) + bookkeeping_s,
    }
    name = f"model, {-(-actors // cores)} nodes of {cores} cores"
    return [row(f"{name}: {what}", unit, value, actors) for (what, unit), value in model.items()]
