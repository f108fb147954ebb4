"""What the optimal-transport term of the student's loss costs, against the step of a ResNet-18 without it."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from wmdd_ray.config import EvaluateConfig, NetworkConfig

from ..reporting import Row, report, spread

if TYPE_CHECKING:
    import torch


def otm(
    batch_sizes: tuple[int, ...] = (25, 100),
    num_classes: int = 10,
    image_size: int = 32,
    small_stem: bool = True,
    steps: int = 5,
    iterations: int = EvaluateConfig().sinkhorn_iterations,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    out: str | None = None,
) -> None:
    """Milliseconds of a ResNet-18 student's step with the Sinkhorn term and without, taking turns, and of the term alone.

    Steps are whole ones of `train_student`, rendering and optimizer included; on one CPU thread processor time is counted.
    They vary by more than the term takes, so the share is that of the term alone, forward and backward.

    Args:
        batch_sizes: Images of a step.
        num_classes: Classes.
        image_size: Side of the images, pixels.
        small_stem: 3 x 3 first convolution without pooling, as the recipes have it up to 64 pixels.
        steps: Measured steps; one more of each warms up.
        iterations: Sinkhorn iterations.
        threads: Computing threads.
        device: Where.
        out: JSON file to write.
    """
    import torch

    torch.set_num_threads(threads)
    rows: list[Row] = []
    network = NetworkConfig(arch="resnet18", small_stem=small_stem)
    off = EvaluateConfig(network=network, loss="mse", ce_weight=0.025, num_seeds=1)
    on = replace(off, sinkhorn_weight=0.1, sinkhorn_iterations=iterations)
    for batch_size in batch_sizes:
        seconds: dict[str, list[float]] = {"without": [], "with": [], "term": []}
        for turn in range(steps + 1):
            found = {
                "without": _step_s(off, batch_size, num_classes, image_size, device, threads),
                "with": _step_s(on, batch_size, num_classes, image_size, device, threads),
                "term": _term_s(on, batch_size, num_classes, device, threads),
            }
            for name, value in found.items():
                if turn > 0:  # the first warms up
                    seconds[name].append(value)
        row: Row = {"batch": batch_size}
        row |= {f"{name}_ms": spread([1000 * s for s in found]) for name, found in seconds.items()}
        alone, without = (statistics.median(seconds[name]) for name in ("term", "without"))
        rows.append({**row, "share_of_step": alone / without})
    settings = {
        "arch": "resnet18", "small_stem": small_stem, "image_size": image_size, "num_classes": num_classes,
        "iterations": iterations, "threads": threads, "device": device,
    }  # fmt: skip
    report(rows, settings, out)


def _now(device: str, threads: int) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if threads == 1 and device == "cpu" else time.perf_counter()


def _step_s(
    config: EvaluateConfig,
    batch_size: int,
    num_classes: int,
    image_size: int,
    device: str,
    threads: int,
) -> float:
    """Return the seconds of one step of training, the second of two: the first allocates."""
    import numpy as np
    import torch

    from wmdd_ray.config import ViewConfig
    from wmdd_ray.core.networks import build_network
    from wmdd_ray.core.training import train_student
    from wmdd_ray.core.views import StoredImages, draw_views

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch_size, image_size, image_size, 3), dtype=np.uint8)
    torch.manual_seed(0)
    network = build_network(
        config.network, num_classes=num_classes, channels=3, image_size=image_size
    ).to(device)
    views = draw_views(batch_size, image_size, ViewConfig(), seed=0, epoch=0)
    logits_VY = rng.normal(0, 3, (batch_size, num_classes)).astype(np.float32)
    ended: list[float] = []

    def ends(*_: Any) -> None:
        ended.append(_now(device, threads))

    train_student(
        network,
        StoredImages(pixels, (0.5,) * 3, (0.25,) * 3, torch.device(device)),
        lambda _: (views, logits_VY),
        None,
        replace(config, batch_size=batch_size),
        epochs=2,
        image_size=image_size,
        seed=0,
        classes_N=np.arange(batch_size) % num_classes,
        on_epoch=ends,
    )
    return ended[1] - ended[0]


def _term_s(
    config: EvaluateConfig, batch_size: int, num_classes: int, device: str, threads: int
) -> float:
    """Return the seconds of the term alone, forward and backward: the mean of ten."""
    import torch

    from wmdd_ray.core.student_losses import transport_loss

    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_classes)
    student, teacher = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    student.requires_grad_(True)
    started: float = 0.0
    for number in range(11):
        if number == 1:
            started = _now(device, threads)
        loss: torch.Tensor = transport_loss(
            student,
            teacher,
            regularization=config.sinkhorn_regularization,
            iterations=config.sinkhorn_iterations,
        )
        torch.autograd.grad(loss, student)
    return (_now(device, threads) - started) / 10
