"""What a step of teacher training costs without the curvature term and with either form of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from jobs.benches.reporting import spread
from jobs.benches.study.engine import one_thread
from jobs.benches.study.splits import Place
from wmdd_ray.config import SqueezeConfig
from wmdd_ray.core.batches import in_memory_batches
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.optimizer import make_optimizer
from wmdd_ray.core.training import train_classifier

_TURNS, _STEPS = 12, 3


def step_cost(curved: SqueezeConfig, place: Place) -> list[dict[str, Any]]:
    """Return the processor seconds of a step of teacher training: plain and with either form, taking turns."""
    once = replace(curved, epochs=1, curvature_weight=0.1)
    forms = {
        "plain": replace(once, curvature_weight=0.0),
        "loss": replace(once, curvature_form="loss"),
        "gradient": replace(once, curvature_form="gradient"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    train, size = place.load("train"), {"batch_size": curved.batch_size}
    images, labels = train.images_NHWC, train.labels_N
    with one_thread():
        for turn in range(_TURNS + 1):
            batches = in_memory_batches(images, labels, **size, seed=0, epoch=turn)
            batch = next(iter(batches))
            for name, config in forms.items():
                seconds[name].append(_seconds(config, batch, place) / _STEPS)
    # The first warms up.
    plain = statistics.median(seconds["plain"][1:])
    return [
        {
            "form": name,
            "batch_size": curved.batch_size,
            "cpu_seconds_a_step": spread(values[1:]),
            "times_plain": round(statistics.median(values[1:]) / plain, 2),
        }
        for name, values in seconds.items()
    ]


def _seconds(config: SqueezeConfig, batch: Any, place: Place) -> float:
    torch.manual_seed(0)
    network = build_network(
        config.network,
        num_classes=len(place.class_names),
        channels=place.source.channels,
        image_size=place.source.image_size,
    ).to(memory_format=torch.channels_last)
    started = time.process_time()
    train_classifier(
        network,
        make_optimizer(network, "sgd", learning_rate=1e-3, weight_decay=0.0),
        lambda _: [batch] * _STEPS,
        config,
        steps_per_epoch=_STEPS,
        mean_C=place.source.mean,
        std_C=place.source.std,
        seed=0,
    )
    return time.process_time() - started
