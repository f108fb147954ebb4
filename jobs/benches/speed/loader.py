"""Images a second out of a distilled set, against a loop over tensors that are in memory already."""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

from wmdd_ray.config import NetworkConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.student_losses import soft_label_loss
from wmdd_ray.core.views import render_views, take
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.store.images import loaded

from ..reporting import Row, report, spread
from .orchestration import distill

_Source = Callable[[], Iterator[Any]]
_BATCH_IMAGES = 25
_WARM_UP = 5  # batches before the clock starts: workers start, caches fill
_OPTIONS = (
    "--recipe cifar10 --ipc 1 --squeeze.network.width 8 --squeeze.batch-size 10 --squeeze.warmup-epochs 0 --squeeze.min-top1 1e-9 "
    "--recover.method real --recover.start random --recover.tiles 1 --relabel.epochs 4 --evaluate.epochs 4 --executor here "
    "--until assemble"
)


def loader(
    image_size: int = 224,
    num_classes: int = 1000,
    workers: tuple[int, ...] = (0, 1, 2),
    widths: tuple[int, ...] = (32,),
    seconds: float = 4.0,
    repeats: int = 3,
    out: str | None = None,
) -> None:
    """Images a second of decoding and rendering alone, of the README's loop, and of a ConvNet-3 that trains in it.

    The set has an image a class, of two photographs, and 4 label epochs. The in-memory loop trains on batches that were rendered
    and stacked before the clock starts: the most that any loader can reach. What is compared takes turns; workers live from
    pass to pass. `waiting` is the share of the training loop's wall-clock time that it waits for a batch. Wall-clock numbers
    suffer from other work on the machine; `of_in_memory` compares images a processor second of the training process (with
    workers, what is left of it in that process).

    Args:
        image_size: Side of the images, pixels.
        num_classes: Classes, and images.
        workers: Worker processes of the DataLoader; 0 loads in the training process.
        widths: Channels of a ConvNet-3 block.
        seconds: How long each rate is measured.
        repeats: Turns.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        uri = make_set(folder, image_size, num_classes)
        opened = DistilledDataset(uri)
        views, stored = opened.label_epoch(0)[0], opened.stored_images()
        in_memory = list(itertools.islice(_loaded(uri, 0), 8))

        def render() -> Iterator[Any]:
            for rows in _passes(opened.batches(_BATCH_IMAGES)):
                taken = take(views, np.array(rows) % len(views))
                yield [render_views(stored, taken, image_size)]

        def decode(**encoding: Any) -> Iterator[Any]:
            files = [io.BytesIO() for _ in range(_BATCH_IMAGES)]
            for file, image in zip(files, opened.images, strict=False):
                Image.fromarray(image).save(file, **encoding)
            while True:
                yield [[np.asarray(loaded(file.getvalue(), image_size**2)) for file in files]]

        loaders = {f"DataLoader, {n} workers": partial(_loaded, uri, n) for n in workers}
        sources: dict[str, tuple[int | None, _Source]] = {
            "decoding PNG": (None, partial(decode, format="PNG")),
            "decoding WebP, lossless": (None, partial(decode, format="WEBP", lossless=True)),
            "rendering": (None, render),
            **{name: (None, batches) for name, batches in loaders.items()},
        }
        for width in widths:
            steps = f" -> ConvNet-3, width {width}"
            sources[f"tensors in memory{steps}"] = width, partial(itertools.cycle, in_memory)
            sources |= {name + steps: (width, batches) for name, batches in loaders.items()}
        rates: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
        for _ in range(repeats):
            for name, (channels, source) in sources.items():
                rates[name].append(_measured(opened, channels, source, seconds))
    rows: list[Row] = []
    for name, turns in rates.items():
        row: Row = {"what": name}
        row |= {column: spread([turn[column] for turn in turns]) for column in turns[0]}
        if name.startswith("tensors"):
            base = row["images_per_cpu_s"]["median"]
        if "->" in name:
            row["of_in_memory"] = row["images_per_cpu_s"]["median"] / base
        else:
            del row["waiting"]
        rows.append(row)
    about = {name: getattr(opened, name) for name in ("num_images", "image_size", "label_epochs")}
    report(rows, {**about, "batch_size": _BATCH_IMAGES, "threads": 1}, out)


def _passes(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of one pass after another, for ever."""
    while True:
        yield from batches


def _loaded(uri: str, workers: int) -> Iterator[Any]:
    """Open a set and yield the batches of the README's loop."""
    dataset = DistilledDataset(uri)
    order = dataset.batches(_BATCH_IMAGES)
    return _passes(DataLoader(dataset, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0))  # fmt: skip


def _step(dataset: DistilledDataset, width: int | None) -> Callable[[Any], None]:
    """Return a training step of a ConvNet-3 on a batch; without a width, one that does nothing."""
    if width is None:
        return lambda batch: None
    shape = {"channels": len(dataset.mean_C), "image_size": dataset.image_size}
    network = build_network(NetworkConfig(width=width), num_classes=dataset.num_images, **shape)
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
    dataset: DistilledDataset, width: int | None, source: _Source, seconds: float
) -> dict[str, float]:
    """Train on batches that never end, and return images a second after the warm-up and the share of time spent waiting."""
    step, batches = _step(dataset, width), source()
    for _ in range(_WARM_UP):
        step(next(batches))
    started, cpu, count, waited = time.perf_counter(), time.process_time(), 0, 0.0
    while (
        now := time.perf_counter()
    ) - started < seconds or not count:  # once on a machine that paused
        batch = next(batches)
        waited += time.perf_counter() - now
        step(batch)
        count += len(batch[0])
    spent, computed = time.perf_counter() - started, time.process_time() - cpu
    rates = {"images_per_s": count / spent, "images_per_cpu_s": count / computed}
    return {**rates, "waiting": waited / spent}


def make_set(folder: str, side: int, num_classes: int) -> str:
    """Distill crops of two photographs, an image a class with a tint that a teacher can tell it by, and return the set's URI."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for label, split in itertools.product(range(num_classes), ("train", "val")):
        tint = np.random.default_rng(label).uniform(0.1, 1, 3)
        top, left = (rng.integers(0, most - side) for most in photos[label % 2].shape[:2])
        crop = photos[label % 2][top : top + side, left : left + side] * tint
        file = Path(folder, "photos", split, f"{label:05d}", "0.jpg")
        file.parent.mkdir(parents=True)
        Image.fromarray(crop.astype(np.uint8)).save(file)
    epochs = max(1, 1000 // num_classes)  # 100 steps
    size = f"--squeeze.epochs {epochs} --source.image-size {side} --source.resize {side} --data {folder}/photos"
    distill(f"{folder}/run", *_OPTIONS.split(), *size.split())
    return f"{folder}/run/dataset"
