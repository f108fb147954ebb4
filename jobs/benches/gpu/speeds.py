"""Features, recover, relabel and students at 224 pixels and 1000 classes, each against the bare network on the same batch."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from wmdd_ray.config import NetworkConfig, RecoverConfig
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import batch_norms, build_network
from wmdd_ray.core.soft_labels import compress, label_views
from wmdd_ray.core.synthesis import ClassTarget, recover_group
from wmdd_ray.core.training import train_student
from wmdd_ray.core.views import StoredImages, draw_views, to_input
from wmdd_ray.recipes import recipe_of
from wmdd_ray.store.images import decode_image

from ..reporting import Row, spread

_RECIPE = recipe_of("imagenet1k", 10)
COLOR: dict[str, Any] = {"mean_C": _RECIPE.source.mean, "std_C": _RECIPE.source.std}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured, and where: by default ImageNet-1K's recipe at ten images a class.

    A run is a pass over `num_images`, and `repeats` steps of recover on a group of images of `ipc` a class.
    """

    device: torch.device
    image_size: int = _RECIPE.source.image_size
    num_classes: int = 1000
    num_images: int = 500
    repeats: int = 40
    ipc: int = 10
    network: NetworkConfig = _RECIPE.squeeze.network
    recover: RecoverConfig = _RECIPE.recover

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Shape:
        """Return the recipe's shape, or a small one for rehearsals."""
        shape, network = cls(device=device), NetworkConfig(arch="convnet3", width=4)
        few: dict[str, Any] = {"image_size": 16, "num_classes": 10, "num_images": 20, "repeats": 2}
        return replace(shape, network=network, **few) if quick else shape

    def teacher(self) -> torch.nn.Module:
        """Return a random frozen network whose BatchNorm layers have seen noise, in the format of `network_of`."""
        network = untrained(self.network, self.num_classes, self.image_size, self.device)
        return network.to(memory_format=torch.channels_last)

    def pixels(self) -> np.ndarray:
        shape = (self.num_images, self.image_size, self.image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def untrained(
    config: NetworkConfig, num_classes: int, image_size: int, device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """Return a random frozen network for RGB whose BatchNorm layers have seen noise once."""
    torch.manual_seed(0)
    network = build_network(config, num_classes=num_classes, channels=3, image_size=image_size)
    for norm in batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network.to(device).train()(torch.randn(64, 3, image_size, image_size).to(device))
    return network.eval().requires_grad_(False)


def targets_of(
    network: torch.nn.Module, pixels_NHWC: np.ndarray, ipc: int, device: torch.device
) -> list[ClassTarget]:
    """Return classes of `ipc` images whose own features are the atoms; they start from others."""
    label_N = np.repeat(np.arange(len(pixels_NHWC) // ipc), ipc)
    images_NCHW = to_input(pixels_NHWC, **COLOR, device=device)
    features_ND, moments = features_and_moments(network, images_NCHW, label_N, batch_size=100)
    return [
        ClassTarget(
            label=label,
            atoms_KD=features_ND[label_N == label],
            weights_K=np.full(ipc, 1 / ipc),
            mean_S=of_class.mean_S,
            var_S=variance_S(of_class),
            start_KHWC=pixels_NHWC[::-1][label_N == label],
        )
        for label, of_class in moments.items()
    ]


@dataclass(frozen=True)
class Work:
    """A kind of work as the product does it, and what the bare network does for it in a batch.

    `images` go through the network in a run. `passes` are forward alone, with gradients of the pixels, or of the weights.
    """

    run: Callable[[], object]
    images: int
    network: torch.nn.Module
    batch_BCHW: torch.Tensor
    passes: Literal["forward", "pixels", "weights"]
    mixed: bool = False

    def bare(self, network: Any) -> None:
        """Pass the batch through the network, as this kind of work does."""
        mixed = torch.autocast(self.batch_BCHW.device.type, torch.bfloat16, enabled=self.mixed)
        images_BCHW = self.batch_BCHW
        if self.passes == "pixels":
            images_BCHW = images_BCHW.detach().requires_grad_(True)
        with torch.no_grad() if self.passes == "forward" else nullcontext(), mixed:
            logits_BY = network(images_BCHW)
        if self.passes != "forward":
            network.zero_grad()
            # Not torch.autograd.grad, which the counting of operations does not follow.
            logits_BY.float().sum().backward()


Make = Callable[[Shape], Work]


def features(shape: Shape) -> Work:
    """Embed a chunk of one class."""
    network = shape.teacher()
    images_NCHW = to_input(shape.pixels(), **COLOR, device=shape.device)
    batch_size, labels_N = _RECIPE.features.batch_size, np.zeros(shape.num_images, np.int64)

    def run() -> None:
        features_and_moments(network, images_NCHW, labels_N, batch_size=batch_size)

    return Work(run, shape.num_images, network, images_NCHW[:batch_size], "forward")


def recover(shape: Shape) -> Work:
    """Optimize a group of images."""
    network = shape.teacher()
    pixels = shape.pixels()[: shape.recover.images_per_group]
    targets = targets_of(network, pixels, shape.ipc, shape.device)
    config = replace(shape.recover, iterations=shape.repeats)

    def run() -> None:
        about: dict[str, Any] = {"image_size": shape.image_size, "channels": 3, "seed": 0}
        recover_group(network, targets, config, **about, **COLOR, device=shape.device)

    # The network is tapped while it recovers; the bare pass gets one that is not.
    plain, batch_BCHW = copy.deepcopy(network), to_input(pixels, **COLOR, device=shape.device)
    images = len(pixels) * shape.repeats
    return Work(run, images, plain, batch_BCHW, "pixels", config.mixed_precision)


def relabel(shape: Shape) -> Work:
    """Render views of all images, label them, and round the labels."""
    network, config = shape.teacher(), _RECIPE.relabel
    images_NCHW = to_input(shape.pixels(), **COLOR, device=shape.device)
    views = draw_views(shape.num_images, shape.image_size, config.views, seed=0, epoch=0)

    def run() -> None:
        size = shape.image_size
        compress(label_views(network, images_NCHW, views, size, config.batch_size), config)

    return Work(run, shape.num_images, network, images_NCHW[: config.batch_size], "forward")


def students(shape: Shape) -> Work:
    """Train a student on views of all images, four passes."""
    config, epochs = replace(_RECIPE.evaluate, network=shape.network), 4
    images = StoredImages(shape.pixels(), **COLOR, device=shape.device)
    views = [
        draw_views(shape.num_images, shape.image_size, _RECIPE.relabel.views, seed=0, epoch=epoch)
        for epoch in range(epochs)
    ]
    logits_VY = np.random.default_rng(0).normal(0, 3, (shape.num_images, shape.num_classes))
    student = shape.teacher().requires_grad_(True)

    def run() -> None:
        labels = logits_VY.astype(np.float32)
        about: dict[str, Any] = {"epochs": epochs, "image_size": shape.image_size, "seed": 0}
        train_student(student, images, lambda e: (views[e], labels), None, config, **about)

    # In the format in which students are trained.
    plain = copy.deepcopy(student).to(memory_format=torch.channels_last).train()
    batch_BCHW = images[torch.arange(min(config.batch_size, shape.num_images))]
    images_seen = epochs * shape.num_images
    return Work(run, images_seen, plain, batch_BCHW, "weights", config.mixed_precision)


MADE: dict[str, Make] = {f.__name__: f for f in (features, recover, relabel, students)}


def _now(device: torch.device) -> float:
    """Return processor seconds of one thread, or, when a GPU has done all that was asked of it, those of the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(
    runs: Sequence[Callable[[], object]], device: torch.device, most_s: float
) -> list[list[float]]:
    """Return the seconds of every run of each, taking turns, after one that warms up: three at least, more while there is time."""
    taken: list[list[float]] = []
    began = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - began < most_s:
        marks = [_now(device)]
        for run in runs:
            run()
            marks.append(_now(device))
        taken.append(np.diff(marks).tolist())
    return [list(column) for column in zip(*taken[1:], strict=True)]


def _rates(images: int, seconds: list[float]) -> dict[str, float]:
    return spread([images / max(s, 1e-9) for s in seconds])


def measured(work: Work, most_s: float, peak_tflops: float | None = None) -> Row:
    """Return images a second of the work and of the bare network, their shares, and the peak of memory."""
    device, batch = work.batch_BCHW.device, len(work.batch_BCHW)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ours, its = seconds_of((work.run, lambda: work.bare(work.network)), device, most_s)
    rates, bare = _rates(work.images, ours), _rates(batch, its)
    row: Row = {"images_per_s": rates, "bare_images_per_s": bare}
    row["share_of_bare"] = rates["median"] / bare["median"]
    if device.type == "cuda":
        row["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    with FlopCounterMode(display=False) as counter:
        work.bare(work.network)
    flops = counter.get_total_flops() / batch
    row |= {"passes": work.passes, "mixed_precision": work.mixed, "gflops_per_image": flops / 1e9}
    if peak_tflops:
        row["share_of_bf16_peak"] = rates["median"] * flops / (peak_tflops * 1e12)
    if work.passes == "pixels":
        row["s_per_image_of_1000_iterations"] = 1000 / rates["median"]
    return row


def compiled(make: Make, shape: Shape, most_s: float, quick: bool) -> Row:
    """Return images a second of the bare network, compiled; a rehearsal traces it alone."""
    work, backend = make(shape), "eager" if quick else "inductor"
    started = time.perf_counter()
    network = torch.compile(work.network, backend=backend)
    work.bare(network)
    first_s = time.perf_counter() - started
    (seconds,) = seconds_of((lambda: work.bare(network),), work.batch_BCHW.device, most_s / 2)
    rates = _rates(len(work.batch_BCHW), seconds)
    return {"bare_images_per_s": rates, "backend": backend, "first_pass_s": first_s}


def decoding(most_s: float) -> Row:
    """Return JPEGs of 500 x 375 noise that one process brings to the network's input in a second."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(encoded, "JPEG")
    content = encoded.getvalue()

    def run() -> None:
        decode_image(content, _RECIPE.source, "synthetic")

    (seconds,) = seconds_of((run,), torch.device("cpu"), most_s / 4)
    rates = _rates(1, seconds)
    return {"images_per_s": rates, "jpeg_bytes": len(content)}
