"""Peak memory of driver and workers when the data grows and the classes do not: flat, or something gathers.

The stages are the pipeline's own, on data that is made up: tar shards for features, a features room for barycenters, an
images room for relabel.
"""

from __future__ import annotations

import gc
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from wmdd_ray.config import (
    DistillConfig,
    FeaturesConfig,
    NetworkConfig,
    RelabelConfig,
    Resources,
    SourceConfig,
    SqueezeConfig,
)
from wmdd_ray.records import ClassImages
from wmdd_ray.spine.run import Progress, Run, Stage, StageRun, run_pipeline
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import open_source

from ..reporting import Row
from .classes import class_record
from .processes import Peaks, descendants, local_ray, watched

_NUM_CLASSES = 10
_IPC = 10
_NETWORK = NetworkConfig(arch="convnet3", width=8)
_ACTORS = ("ray::MapWorker", "ray::BarycenterActor")
"""Titles of what holds a stage's data."""
_CONFIG = DistillConfig(
    ipc=_IPC,
    source=SourceConfig(format="webdataset", image_size=64, resize=64),
    squeeze=SqueezeConfig(network=_NETWORK),
    features=FeaturesConfig(chunk_images=64, regroup="never"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peak memory of driver and workers at 1 and at `times` times the data: images, images a shard, label epochs."""

    times: int = 8
    """How much more data."""
    shards: int = 4
    """Tar shards at 1."""
    shard_images: int = 500
    """Images of a shard at 1, 64 x 64 pixels: 12 KB each decoded, 64 a chunk."""
    class_images: int = 1300
    """Images of a class for the barycenters, at all sizes; what grows is the number of classes."""
    label_epochs: int = 50
    """Label epochs at 1, of 600 images with 600 logits each: 1.4 MB an epoch."""

    def rows(self) -> list[Row]:
        """Measure every case in a driver of its own."""
        n = self.times
        cases: dict[str, tuple[Callable[[int], Peaks], int]] = {
            f"features, {n} x the shards": (
                partial(features_peaks, self.shard_images),
                self.shards,
            ),
            f"features, {n} x the images a shard": (
                partial(features_of_large_shards, self.shards),
                self.shard_images,
            ),
            f"barycenters, {n} x the classes": (partial(barycenter_peaks, self.class_images), 20),
            f"relabel, {n} x the label epochs": (relabel_peaks, self.label_epochs),
        }
        rows: list[Row] = []
        for name, (case, size) in cases.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as driver:
                one, many = driver.submit(compare, case, (size, n * size)).result()
            for times, peaks in ((1, one), (n, many)):
                rows.append({"case": name, "data": times, **asdict(peaks)})
            rows[-1] |= {"driver_ratio": many.driver / one.driver}
            rows[-1] |= {"worker_ratio": many.worker / one.worker if one.worker else "-"}
        return rows

    def settings(self) -> Row:
        """Return what the rows depend on."""
        return {**asdict(self), "load_average": [round(load, 1) for load in os.getloadavg()]}


def compare(case: Callable[[int], Peaks], sizes: Sequence[int]) -> list[Peaks]:
    """Watch a case at every size; once before unwatched, so that imports do not count. Runs in its own process."""
    with local_ray(num_cpus=2):
        case(sizes[0])
        return [case(size) for size in sizes]


def features_peaks(shard_images: int, num_shards: int) -> Peaks:
    """Watch the features stage on so many tar shards."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "data", num_shards, shard_images)
        return stage_peaks(folder, {"squeeze": commit_untrained}, "features")


def features_of_large_shards(num_shards: int, shard_images: int) -> Peaks:
    """Watch the features stage on shards of so many images."""
    return features_peaks(shard_images, num_shards)


def barycenter_peaks(class_images: int, num_classes: int) -> Peaks:
    """Watch the barycenters of so many classes, each of so many images."""

    def make_up(stage: StageRun) -> dict[str, Any]:
        from wmdd_ray.units.class_features import class_key, class_unit

        rng = np.random.default_rng(0)
        for label in range(num_classes):
            features_ND = rng.random((class_images, 512), dtype=np.float32)
            content = codecs.encode_class_features(class_record(label, features_ND))
            stage.room.commit_unit(class_unit(label), {class_key(label): content}, attempt=1)
        return {"class_counts": [class_images] * num_classes}

    with tempfile.TemporaryDirectory() as folder:
        return stage_peaks(folder, {"features": make_up}, "barycenters", num_classes=num_classes)


def relabel_peaks(epochs: int, num_classes: int = 600, epochs_per_unit: int = 10) -> Peaks:
    """Watch the labels of an image a class in so many epochs, some of them a unit, by a loop in the driver."""

    def make_images(stage: StageRun) -> dict[str, Any]:
        from wmdd_ray.units.images import key_of

        pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
        for label in range(num_classes):
            record = ClassImages(label=label, images_KHWC=pixels, weights_K=np.ones(1), losses={})
            content = {key_of(label): codecs.encode_class_images(record)}
            stage.room.commit_unit(f"{label:05d}", content, attempt=1)
        return {}

    relabel = RelabelConfig(epochs=epochs, epochs_per_unit=epochs_per_unit)
    config = replace(
        _CONFIG,
        ipc=1,
        source=replace(_CONFIG.source, image_size=32, resize=32),
        relabel=relabel,
        evaluate=replace(_CONFIG.evaluate, epochs=epochs),
    )
    with tempfile.TemporaryDirectory() as folder:
        made_up = {
            "squeeze": commit_untrained,
            "features": lambda stage: {"class_counts": [1] * num_classes},
            "recover": make_images,
        }
        return stage_peaks(folder, made_up, "relabel", config=config, num_classes=num_classes)


def stage_peaks(
    folder: str,
    made_up: Mapping[str, Callable[[StageRun], dict[str, Any]]],
    measured: str,
    *,
    config: DistillConfig = _CONFIG,
    num_classes: int = _NUM_CLASSES,
) -> Peaks:
    """Fill the rooms of some stages by functions instead of their work, then watch the stage `measured`."""
    from wmdd_ray.stages.pipeline import PIPELINE

    named = {stage.name: stage for stage in PIPELINE}
    stages: list[Stage] = [
        replace(named[name], inputs=(), reads_data=False, work=work)
        for name, work in made_up.items()
    ]
    stages.append(replace(named[measured], reads_data=False))
    names = tuple(f"class{label}" for label in range(num_classes))

    def open_split(split: str) -> Any:
        if measured != "features":
            return SimpleNamespace(class_names=names)
        return open_source(str(Path(folder) / "data"), config.source, split="train")

    run = Run(
        store=Store(folder),
        config=config,
        resources=Resources(num_workers=1 if measured == "features" else 0, max_actors=2),
        open_source=open_split,
        progress=lambda name: Progress(),
        connect=lambda: None,
    )
    run_pipeline(run, stages, last=stages[-2].name)
    _wait_for_end_of_actors()
    with watched() as peaks:
        run_pipeline(run, stages)
    return peaks


def _wait_for_end_of_actors(timeout_s: float = 60.0) -> None:
    """Wait until the actors of a stage before, which end a moment after it, are gone: their peak is not this stage's."""
    deadline = time.monotonic() + timeout_s
    gc.collect()
    while any(title.startswith(_ACTORS) for title in descendants(os.getpid()).values()):
        assert time.monotonic() < deadline, f"actors of another stage: {descendants(os.getpid())}"
        time.sleep(0.1)


def commit_untrained(stage: StageRun) -> dict[str, Any]:
    """Commit a teacher that has learned nothing: its memory is that of one which has."""
    import torch

    from wmdd_ray.core.networks import build_network
    from wmdd_ray.units.teacher import commit_teacher

    names, source = stage.run.source("train").class_names, stage.config.source
    torch.manual_seed(0)
    network = build_network(
        _NETWORK, num_classes=len(names), channels=3, image_size=source.image_size
    )
    commit_teacher(
        stage.room, stage.config, _NETWORK, network, names, 1.0, time.perf_counter(), {}, attempt=1
    )
    return {"top1": 1.0}


def write_shards(folder: Path, num_shards: int, shard_images: int) -> None:
    """Write WebDataset shards of 64 x 64 JPEGs; a few different pictures, over and over."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(20):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BILINEAR).save(encoded, "JPEG")
        pictures.append(encoded.getvalue())
    for shard in range(num_shards):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for i in range(shard_images):
                members = {"jpg": pictures[i % 20], "cls": str(i % _NUM_CLASSES).encode()}
                for kind, content in members.items():
                    member = tarfile.TarInfo(f"{shard:05d}-{i:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
