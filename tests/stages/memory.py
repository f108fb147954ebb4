"""Peak memory of driver and workers when the data grows and the classes do not: flat, or something gathers.

The stages are the pipeline's own, on data that is made up: tar shards for features, a features room for barycenters, an
images room for relabel.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from jobs.prepare import Job as PrepareJob
from jobs.prepare import prepare
from tests.stages.processes import Peaks, descendants, local_ray, watched
from wmdd_ray.config import (
    DistillConfig,
    FeaturesConfig,
    NetworkConfig,
    RelabelConfig,
    Resources,
    SourceConfig,
    SqueezeConfig,
)
from wmdd_ray.records import ClassFeatures, ClassImages, Moments
from wmdd_ray.spine.run import Progress, Run, Stage, StageRun, run_pipeline
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import open_source
from wmdd_ray.units.splitting import PrepareConfig

_NUM_CLASSES = 10
_IPC = 10
_NETWORK = NetworkConfig(arch="convnet3", width=8)
_ACTORS = ("ray::MapWorker", "ray::BarycenterActor")
"""Titles of what holds a stage's data."""
_PICTURES = 20
# The BatchNorm inputs of a ResNet-18.
_CHANNELS_L = (64,) * 5 + (128,) * 5 + (256,) * 5 + (512,) * 5
_CONFIG = DistillConfig(
    ipc=_IPC,
    source=SourceConfig(format="webdataset", image_size=64, resize=64),
    squeeze=SqueezeConfig(network=_NETWORK),
    features=FeaturesConfig(chunk_images=64, regroup="never"),
)


def features_peaks(shard_images: int, num_shards: int) -> Peaks:
    """Watch the features stage on so many tar shards."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "data", num_shards, shard_images, side=64)
        return stage_peaks(folder, {"squeeze": commit_untrained}, "features")


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
        from wmdd_ray.units.images import images_key

        pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
        for label in range(num_classes):
            record = ClassImages(label=label, images_KHWC=pixels, weights_K=np.ones(1), losses={})
            content = {images_key(label): codecs.encode_class_images(record)}
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
        resources=Resources(
            num_workers=1 if measured == "features" else 0, max_actors=2, executor="train"
        ),
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
    attempt = stage.room.begin("teacher")
    assert attempt is not None
    commit_teacher(attempt, stage.config, _NETWORK, network, names, 1.0, {})
    return {"top1": 1.0}


def prepare_peaks(num_shards: int, shard_mb: int, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Watch jobs/prepare.py at every size; once before unwatched, so that imports do not count. Runs in its own process."""
    with local_ray(num_cpus=2):
        return [watch_job(num_shards, shard_mb, size) for size in (sizes[0], *sizes)][1:]


def watch_job(num_shards: int, shard_mb: int, shard_images: int) -> dict[str, float]:
    """Return the peaks of the job on so many images, with the MiB that were written and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data, made = Path(folder) / "data", Path(folder) / "out"
        write_shards(data, num_shards, shard_images)
        job = PrepareJob(source=str(data), out=str(made), config=PrepareConfig(shard_mb=shard_mb))
        started = time.perf_counter()
        with watched() as peaks:
            prepare(job)
        seconds = time.perf_counter() - started
        stored = sum(file.stat().st_size for file in made.glob("data/*.parquet"))
    images = num_shards * shard_images
    return {"images": images, **asdict(peaks), "mib": stored / 2**20, "seconds": seconds}


def class_record(label: int, features_ND: np.ndarray) -> ClassFeatures:
    """Return a class's features with moments of a ResNet-18's shape."""
    total = sum(_CHANNELS_L)
    count_L = np.full(len(_CHANNELS_L), len(features_ND) * 49)
    moments = Moments(
        channels_L=_CHANNELS_L, count_L=count_L, mean_S=np.zeros(total), m2_S=np.ones(total)
    )
    keys = tuple(f"{label:05d}/{i:05d}.jpg" for i in range(len(features_ND)))
    return ClassFeatures(label=label, keys=keys, features_ND=features_ND, moments=moments)


def write_shards(folder: Path, num_shards: int, shard_images: int, side: int = 128) -> None:
    """Write WebDataset shards of JPEGs that mix all classes; a few different pictures, over and over."""
    folder.mkdir()
    (folder / "classes.txt").write_text(
        "".join(f"class {label}\n" for label in range(_NUM_CLASSES))
    )
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(_PICTURES):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(encoded, "JPEG")
        pictures.append(encoded.getvalue())
    for shard in range(num_shards):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for i in range(shard_images):
                members = {"jpg": pictures[i % _PICTURES], "cls": str(i % _NUM_CLASSES).encode()}
                for kind, content in members.items():
                    member = tarfile.TarInfo(f"{shard:05d}-{i:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
