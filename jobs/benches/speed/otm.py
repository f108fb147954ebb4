"""What the optimal-transport term of the student's loss costs, against the step of a ResNet-18 without it."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch

from wmdd_ray.config import EvaluateConfig, NetworkConfig, ViewConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.student_losses import transport_loss
from wmdd_ray.core.training import train_student
from wmdd_ray.core.views import StoredImages, draw_views

from ..reporting import Row, report, spread


def otm(
    batch_sizes: tuple[int, ...] = (25, 100),
    num_classes: int = 10,
    image_size: int = 32,
    small_stem: bool = True,
    steps: int = 5,
    out: str | None = None,
) -> None:
    """Milliseconds of a ResNet-18 student's step with the Sinkhorn term and without, taking turns, and of the term alone.

    Steps are whole ones of `train_student`, rendering and optimizer included, in processor time of one thread. They vary by more
    than the term takes, so the share is that of the term alone, forward and backward.

    Args:
        batch_sizes: Images of a step.
        num_classes: Classes.
        image_size: Side of the images, pixels.
        small_stem: 3 x 3 first convolution without pooling, as the recipes have it up to 64 pixels.
        steps: Measured steps; one more of each warms up.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    network = NetworkConfig(arch="resnet18", small_stem=small_stem)
    off = EvaluateConfig(network=network, loss="mse", ce_weight=0.025, num_seeds=1)
    on = replace(off, sinkhorn_weight=0.1)
    for batch_size in batch_sizes:
        seconds: dict[str, list[float]] = {"without": [], "with": [], "term": []}
        for _ in range(steps + 1):
            seconds["without"].append(_step_s(off, batch_size, num_classes, image_size))
            seconds["with"].append(_step_s(on, batch_size, num_classes, image_size))
            seconds["term"].append(_term_s(on, batch_size, num_classes))
        row: Row = {"batch": batch_size}
        # The first of each warms up.
        row |= {f"{name}_ms": spread([1000 * s for s in of[1:]]) for name, of in seconds.items()}
        alone, without = (statistics.median(seconds[name][1:]) for name in ("term", "without"))
        rows.append({**row, "share_of_step": alone / without})
    settings = {"image_size": image_size, "num_classes": num_classes, "small_stem": small_stem}
    report(rows, {"arch": "resnet18", **settings, "threads": 1}, out)


def _step_s(config: EvaluateConfig, batch_size: int, num_classes: int, image_size: int) -> float:
    """Return the seconds of one step of training, the second of two: the first allocates."""
    import numpy as np

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch_size, image_size, image_size, 3), dtype=np.uint8)
    torch.manual_seed(0)
    shape = {"num_classes": num_classes, "channels": 3, "image_size": image_size}
    views = draw_views(batch_size, image_size, ViewConfig(), seed=0, epoch=0)
    logits_VY = rng.normal(0, 3, (batch_size, num_classes)).astype(np.float32)
    ended: list[float] = []
    train_student(
        build_network(config.network, **shape),
        StoredImages(pixels, (0.5,) * 3, (0.25,) * 3),
        lambda _: (views, logits_VY),
        None,
        replace(config, batch_size=batch_size),
        epochs=2,
        image_size=image_size,
        seed=0,
        classes_N=np.arange(batch_size) % num_classes,
        on_epoch=lambda *_: ended.append(time.process_time()),
    )
    return ended[1] - ended[0]


def _term_s(config: EvaluateConfig, batch_size: int, num_classes: int) -> float:
    """Return the seconds of the term alone, forward and backward: the mean of ten."""
    student, teacher = torch.randn(
        (2, batch_size, num_classes), generator=torch.Generator().manual_seed(0)
    )
    student = student.clone().requires_grad_(True)
    for number in range(11):
        if number == 1:
            started = time.process_time()
        loss = transport_loss(
            student,
            teacher,
            regularization=config.sinkhorn_regularization,
            iterations=config.sinkhorn_iterations,
        )
        torch.autograd.grad(loss, student)
    return (time.process_time() - started) / 10
