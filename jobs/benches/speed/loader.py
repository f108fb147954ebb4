"""Images a second out of a distilled set, against a loop over tensors that are in memory already."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from wmdd_ray.config import NetworkConfig, RelabelConfig
from wmdd_ray.records import SoftLabelBlock, Teacher, ViewDraw
from wmdd_ray.store.filesystem import Store

from ..reporting import Row, report, spread
from ..scale.rooms import s3_server

if TYPE_CHECKING:
    from wmdd_ray.dataset import DistilledDataset

_CLASSES = 10
# Batches that are loaded before the clock starts: workers start, caches fill.
_WARM_UP = 5


def loader(
    dataset: str | None = None,
    workers: tuple[int, ...] = (0, 1, 2),
    widths: tuple[int, ...] = (32, 128),
    s3: bool = True,
    batch_size: int = 25,
    seconds: float = 4.0,
    repeats: int = 3,
    threads: int = 1,
    out: str | None = None,
) -> None:
    """Images a second of rendering alone, of a plain DataLoader, and of a ConvNet-3 that trains from it; how long it waits.

    The in-memory loop trains on the same batches, rendered and stacked before the clock starts: the most that any loader
    can reach. What is compared takes turns. `waiting` is the share of the training loop's wall-clock time that it waits for a
    batch; `first_batch_s` is the time from opening the data set to the first batch, with the start of the workers and the
    first reading of label files. Wall-clock numbers suffer from other work on the machine; `of_in_memory` compares images a
    processor second of the training process, so it says what a loader takes from training (with workers, what is left of it
    in that process).

    Args:
        dataset: A distilled set; without it, a random one of 100 gray images of 28 pixels and 300 label epochs is made.
        workers: Worker processes of the DataLoader; 0 loads in the training process.
        widths: Channels of a ConvNet-3 block.
        s3: Train from a copy of the set on an S3 server (moto) on this machine too.
        batch_size: Images of a batch.
        seconds: How long each rate is measured.
        repeats: Turns.
        threads: Computing threads of the training process.
        out: JSON file to write.
    """
    import torch

    from wmdd_ray.core.views import render_views
    from wmdd_ray.dataset import DistilledDataset

    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        uri = dataset or write_random_set(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = DistilledDataset(uri)
        places = {"": uri}
        if s3:
            places[" from s3://"] = _copy(uri, stack.enter_context(s3_server()))
        views, _ = opened.label_epoch(0)
        stored = opened.stored_images()
        in_memory = [_batch(opened, batch_size, i) for i in range(40)]

        def render() -> Iterator[Any]:
            while True:
                yield [render_views(stored, views, opened.image_size)]

        sources: dict[str, tuple[int | None, Callable[[], Iterator[Any]]]] = {
            "rendering alone": (None, render)
        }
        for width in (None, *widths):
            steps = "" if width is None else f" -> ConvNet-3, width {width}"
            if width is not None:
                sources[f"tensors in memory{steps}"] = width, partial(itertools.cycle, in_memory)
            for (place, at), n in itertools.product(places.items(), workers):
                if place and width is None:
                    continue
                sources[f"DataLoader{place}, {n} workers{steps}"] = (
                    width, partial(_loaded, at, batch_size, n),
                )  # fmt: skip
        found: dict[str, list[_Measured]] = {name: [] for name in sources}
        for _ in range(repeats):
            for name, (width, batches) in sources.items():
                found[name].append(_measured(opened, width, batches, seconds))
    rows: list[Row] = []
    base = 0.0
    for name, turns in found.items():
        row: Row = {
            "what": name,
            "images_per_s": spread([turn.images_per_s for turn in turns]),
            "images_per_cpu_s": spread([turn.images_per_cpu_s for turn in turns]),
        }
        if name.startswith("DataLoader"):
            row["first_batch_s"] = spread([turn.first_batch_s for turn in turns])
        if name.startswith("tensors"):
            base = row["images_per_cpu_s"]["median"]
        if "->" in name:
            row["waiting"] = spread([turn.waiting for turn in turns])
            row["of_in_memory"] = row["images_per_cpu_s"]["median"] / base
        rows.append(row)
    settings = {
        "num_images": opened.num_images,
        "image_size": opened.image_size,
        "label_epochs": opened.label_epochs,
        "batch_size": batch_size,
        "threads": threads,
    }
    report(rows, settings, out)


@dataclass(frozen=True)
class _Measured:
    """A turn: images by the wall clock and by this process's time, seconds to the first batch, share of time spent waiting."""

    images_per_s: float
    images_per_cpu_s: float
    first_batch_s: float
    waiting: float


def _copy(uri: str, to: str) -> str:
    """Copy a distilled set and return where it is."""
    source, sink = Store(uri), Store(to)
    for key in source.list():
        sink.put(key, source.get(key))
    return to


def _batch(dataset: DistilledDataset, batch_size: int, number: int) -> Any:
    import torch

    rng = np.random.default_rng(number)
    items = dataset.__getitems__(rng.integers(0, len(dataset), batch_size).tolist())
    return [torch.stack(column) for column in zip(*items, strict=True)]


def _loaded(uri: str, batch_size: int, workers: int) -> Iterator[Any]:
    """Open a set and yield the batches of a plain DataLoader, in random order over all label epochs, for ever."""
    from torch.utils.data import DataLoader

    from wmdd_ray.dataset import DistilledDataset

    # 30,000 items and more: the workers start once, in the warm-up.
    loader = DataLoader(
        DistilledDataset(uri), batch_size=batch_size, shuffle=True, num_workers=workers
    )
    while True:
        yield from loader


def _step(dataset: DistilledDataset, width: int | None) -> Callable[[Any], None]:
    """Return a training step of a ConvNet-3 on a batch; without a width, one that does nothing."""
    if width is None:
        return lambda batch: None
    import torch

    from wmdd_ray.core.networks import build_network
    from wmdd_ray.core.student_losses import soft_label_loss

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
) -> _Measured:
    """Train on batches that never end, and return how fast it went after the warm-up."""
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
    return _Measured(count / spent, count / computed, first_batch_s, waited / spent)


def write_random_set(folder: str, ipc: int = 10, size: int = 28, epochs: int = 300) -> str:
    """Write a distilled set of random gray images with random labels and return its URI: a loader takes as long for them."""
    from wmdd_ray.core.networks import build_network
    from wmdd_ray.core.soft_labels import compress
    from wmdd_ray.core.views import draw_block
    from wmdd_ray.store import codecs, documents

    rng, num_images = np.random.default_rng(0), _CLASSES * ipc
    names = tuple(f"class {label}" for label in range(_CLASSES))
    network = build_network(
        NetworkConfig(width=8), num_classes=_CLASSES, channels=1, image_size=size
    )
    teacher = Teacher(
        arch="convnet3",
        width=8,
        small_stem=False,
        class_names=names,
        image_size=size,
        resize=size,
        channels=1,
        mean_C=(0.5,),
        std_C=(0.25,),
        top1=0.1,
        weights={name: value.numpy() for name, value in network.state_dict().items()},
    )
    pixels = rng.integers(0, 256, (num_images, size, size, 1), dtype=np.uint8)
    files = {
        "teacher.safetensors": codecs.encode_teacher(teacher),
        "data/train-00000-of-00001.parquet": codecs.encode_images(
            pixels,
            np.repeat(np.arange(_CLASSES), ipc),
            np.full((num_images, 1), 1 / ipc),
            names,
        ),
    }
    relabel = RelabelConfig()
    draw = ViewDraw(
        seed=0,
        image_size=size,
        index_N=np.arange(num_images, dtype=np.int32),
        crop_scale_min=relabel.views.crop_scale_min,
        flip=relabel.views.flip,
        mix=relabel.views.mix,
    )
    for first in range(0, epochs, relabel.epochs_per_unit):
        block = range(first, min(first + relabel.epochs_per_unit, epochs))
        views = draw_block(draw, block)
        logits_VY = rng.standard_normal((len(views), _CLASSES))
        files[f"labels/e{block.start:05d}-{block.stop - 1:05d}-s0000.parquet"] = (
            codecs.encode_soft_labels(
                SoftLabelBlock(
                    first_epoch=first,
                    num_epochs=len(block),
                    views=views,
                    labels=compress(logits_VY, relabel),
                    draw=draw,
                )
            )
        )
    store = Store(folder)
    for key, content in files.items():
        store.put(key, content)
    meta = {
        "class_names": list(names),
        "image_size": size,
        "channels": 1,
        "mean": [0.5],
        "std": [0.25],
        "ipc": ipc,
        "num_images": num_images,
        "tiles": 1,
        "label_epochs": epochs,
        "labels": {"labels": "stored", "batch_size": relabel.batch_size},
    }
    entries = [documents.entry_of(key, content) for key, content in files.items()]
    store.put(documents.MANIFEST_KEY, documents.encode_manifest(meta, entries))
    return folder
