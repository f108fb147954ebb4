"""Images a second out of a distilled set, against a loop over tensors that are in memory already."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.student_losses import soft_label_loss
from wmdd_ray.core.views import render_views
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.store.filesystem import Store

from ..reporting import Row, report, spread
from ..scale.rooms import s3_server
from .orchestration import distill

# Batches that are loaded before the clock starts: workers start, caches fill.
_WARM_UP = 5
_BATCH_IMAGES = 25


def loader(
    workers: tuple[int, ...] = (0, 1, 2),
    widths: tuple[int, ...] = (32, 128),
    seconds: float = 4.0,
    repeats: int = 3,
    out: str | None = None,
) -> None:
    """Images a second of rendering alone, of a plain DataLoader, and of a ConvNet-3 that trains from it, also over S3 (moto, here).

    The in-memory loop trains on the same batches, rendered and stacked before the clock starts: the most that any loader
    can reach. What is compared takes turns. `waiting` is the share of the training loop's wall-clock time that it waits for a
    batch; `first_batch_s` is the time from opening the data set to the first batch, with the start of the workers and the
    first reading of label files. Wall-clock numbers suffer from other work on the machine; `of_in_memory` compares images a
    processor second of the training process, so it says what a loader takes from training (with workers, what is left of it
    in that process).

    Args:
        workers: Worker processes of the DataLoader; 0 loads in the training process.
        widths: Channels of a ConvNet-3 block.
        seconds: How long each rate is measured.
        repeats: Turns.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        uri = make_set(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = DistilledDataset(uri)
        places = {"": uri, " from s3://": _copy(uri, stack.enter_context(s3_server()))}
        views, _ = opened.label_epoch(0)
        stored = opened.stored_images()
        in_memory = [_batch(opened, i) for i in range(40)]

        def render() -> Iterator[Any]:
            while True:
                yield [render_views(stored, views, opened.image_size)]

        sources: dict[str, tuple[int | None, Callable[[], Iterator[Any]]]] = {
            "rendering alone": (None, render),
            **{f"DataLoader, {n} workers": (None, partial(_loaded, uri, n)) for n in workers},
        }
        for width in widths:
            steps = f" -> ConvNet-3, width {width}"
            sources[f"tensors in memory{steps}"] = width, partial(itertools.cycle, in_memory)
            for (place, at), n in itertools.product(places.items(), workers):
                sources[f"DataLoader{place}, {n} workers{steps}"] = width, partial(_loaded, at, n)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
        for _ in range(repeats):
            for name, (channels, batches) in sources.items():
                found[name].append(_measured(opened, channels, batches, seconds))
    rows: list[Row] = []
    for name, turns in found.items():
        columns = {column: spread([turn[column] for turn in turns]) for column in turns[0]}
        if not name.startswith("DataLoader"):
            del columns["first_batch_s"]
        if "->" not in name:
            del columns["waiting"]
        row: Row = {"what": name, **columns}
        if name.startswith("tensors"):
            base = row["images_per_cpu_s"]["median"]
        if "->" in name:
            row["of_in_memory"] = row["images_per_cpu_s"]["median"] / base
        rows.append(row)
    about = {name: getattr(opened, name) for name in ("num_images", "image_size", "label_epochs")}
    report(rows, {**about, "batch_size": _BATCH_IMAGES, "threads": 1}, out)


def _copy(uri: str, to: str) -> str:
    """Copy a distilled set and return where it is."""
    source, sink = Store(uri), Store(to)
    for key in source.list():
        sink.put(key, source.get(key))
    return to


def _batch(dataset: DistilledDataset, number: int) -> Any:
    rng = np.random.default_rng(number)
    items = dataset.__getitems__(rng.integers(0, len(dataset), _BATCH_IMAGES).tolist())
    return [torch.stack(column) for column in zip(*items, strict=True)]


def _loaded(uri: str, workers: int) -> Iterator[Any]:
    """Open a set and yield the batches of a plain DataLoader, in random order over all label epochs, for ever."""
    # 30,000 items and more: the workers start once, in the warm-up.
    loader = DataLoader(
        DistilledDataset(uri), batch_size=_BATCH_IMAGES, shuffle=True, num_workers=workers
    )
    while True:
        yield from loader


def _step(dataset: DistilledDataset, width: int | None) -> Callable[[Any], None]:
    """Return a training step of a ConvNet-3 on a batch; without a width, one that does nothing."""
    if width is None:
        return lambda batch: None

    network = build_network(
        NetworkConfig(width=width),
        num_classes=len(dataset.class_names),
        channels=len(dataset.mean_C),
        image_size=dataset.image_size,
    )
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())

    def step(batch: Any) -> None:
        views, logits, _ = batch
        loss = soft_label_loss(network(views), logits, 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _measured(
    dataset: DistilledDataset,
    width: int | None,
    source: Callable[[], Iterator[Any]],
    seconds: float,
) -> dict[str, float]:
    """Train on batches that never end, and return how fast it went after the warm-up.

    Returns:
        Images by the wall clock and by this process's time, seconds to the first batch, share of time spent waiting.
    """
    step, began = _step(dataset, width), time.perf_counter()
    batches = source()
    step(next(batches))
    first_batch_s = time.perf_counter() - began
    for _ in range(_WARM_UP):
        step(next(batches))
    started, cpu, count, waited = time.perf_counter(), time.process_time(), 0, 0.0
    while (now := time.perf_counter()) - started < seconds:
        batch = next(batches)
        waited += time.perf_counter() - now
        step(batch)
        count += len(batch[0])
    spent, computed = time.perf_counter() - started, time.process_time() - cpu
    return {
        "images_per_s": count / spent,
        "images_per_cpu_s": count / computed,
        "first_batch_s": first_batch_s,
        "waiting": waited / spent,
    }


def make_set(folder: str) -> str:
    """Distill 100 gray images of 28 pixels with 300 label epochs, real ones of digits, and return their URI."""
    options = "--recipe digits --ipc 10 --source.image-size 28 --source.resize 28 --executor here"
    options += " --squeeze.network.width 8 --squeeze.epochs 1 --squeeze.min-top1 0"
    options += " --recover.method real --recover.start random --relabel.epochs 300"
    distill(folder, *options.split(), "--until", "assemble")
    return f"{folder}/dataset"
