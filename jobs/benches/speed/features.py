"""The features stage, against a bare loop over the same decoding and teacher."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.networks import network_of
from wmdd_ray.core.views import to_input
from wmdd_ray.recipes import recipe_of
from wmdd_ray.store.codecs import decode_teacher
from wmdd_ray.store.sources import decoded_chunks, open_source

from ..reporting import report, spread
from .orchestration import distill, read_stage


def features(data: str, bare_chunks: int = 20, out: str | None = None) -> None:
    """Images a second of the features stage, against a bare loop over the same decoding and teacher in one process.

    The teacher is a ConvNet-3 after one epoch. The stage has a fixed start (processes, imports); its marginal rate counts
    from the first committed chunk to the last. Bare loops use one thread, as each embedding actor does.

    Args:
        data: Folder of IDX files (Fashion-MNIST).
        bare_chunks: Chunks that each bare loop runs over.
        out: JSON file to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("--recipe", "fashion_mnist", "--data", data, "--until", "features")
        distill(folder, *options, "--squeeze.epochs", "1")
        stage = read_stage(folder, "features")
        bare_rates = bare_loops(folder, data, bare_chunks)
        units = Path(folder) / "features" / "units"
        finished = sorted(
            ((units / f"{unit}.json").stat().st_mtime, marker["metrics"])
            for unit, marker in stage["units"].items()
        )
    images = [metrics["num_images"] for _, metrics in finished]
    rates = {
        "whole stage": [sum(images) / stage["seconds"]],
        "stage, first to last chunk": [sum(images[1:]) / (finished[-1][0] - finished[0][0])],
        **bare_rates,
    }
    base = statistics.median(bare_rates["bare loop: decode + network"])
    rows = [
        {"what": name, "images_per_s": spread(values), "of_bare": statistics.median(values) / base}
        for name, values in rates.items()
    ]
    report(rows, {"num_images": sum(images), "threads": 1}, out)


def bare_loops(run: str, data: str, num_chunks: int) -> dict[str, list[float]]:
    """Return images per wall-clock second of every chunk, for loops in one process that take turns."""
    torch.set_num_threads(1)
    config = recipe_of("fashion_mnist", 10)
    teacher = decode_teacher((Path(run) / "teacher" / "teacher.safetensors").read_bytes())
    network = network_of(teacher)
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    source = open_source(data, config.source, split="train")
    chunk_images, batch_size = config.features.chunk_images, config.features.batch_size
    rates: dict[str, list[float]] = {}
    for shard in source.shards(chunk_images)[:num_chunks]:
        started = time.perf_counter()
        for chunk in decoded_chunks(source, shard, config.source, chunk_images):
            images = to_input(chunk.images_NHWC, teacher.mean_C, teacher.std_C, "cpu")
            marks = [started, time.perf_counter()]
            for module in (network, channels_last):
                with torch.no_grad():
                    for batch in images.split(batch_size):
                        module(batch)
                marks.append(time.perf_counter())
            features_and_moments(channels_last, images, chunk.labels_N, batch_size=batch_size)
            marks.append(time.perf_counter())
            decode_s, *work_s = np.diff(marks).tolist()
            names = ("network", "network in channels-last", "the stage's core function")
            for name, seconds in zip(names, work_s, strict=True):
                rate = len(images) / (decode_s + seconds)
                rates.setdefault(f"bare loop: decode + {name}", []).append(rate)
            started = time.perf_counter()
    return rates
