"""What a step of teacher training costs without the curvature term and with either form of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from wmdd_ray.config import SqueezeConfig
from wmdd_ray.core.batches import in_memory_batches
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.optimizer import make_optimizer
from wmdd_ray.core.training import train_classifier

from ..reporting import spread
from .engine import one_thread
from .splits import Place

_STEPS = 12


def step_cost(curved: SqueezeConfig, place: Place) -> list[dict[str, Any]]:
    """Return the seconds of a step of teacher training: plain and with either form, taking turns, processor time."""
    forms: dict[str, SqueezeConfig] = {"plain": replace(curved, curvature_weight=0.0)}
    for form in ("loss", "gradient"):
        forms[form] = replace(curved, curvature_weight=0.1, curvature_form=form)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    train = place.load("train")
    with one_thread():
        for turn in range(_STEPS + 1):
            for name, config in forms.items():
                torch.manual_seed(0)
                network = build_network(
                    config.network,
                    num_classes=len(place.class_names),
                    channels=place.source.channels,
                    image_size=place.source.image_size,
                ).to(memory_format=torch.channels_last)
                optimizer = make_optimizer(network, "sgd", learning_rate=1e-3, weight_decay=0.0)
                batch = next(
                    iter(
                        in_memory_batches(
                            train.images_NHWC, train.labels_N, batch_size=config.batch_size, seed=0,
                            epoch=turn,
                        )
                    )
                )  # fmt: skip
                started = time.process_time()
                train_classifier(
                    network,
                    optimizer,
                    partial(_same, [batch] * 3),
                    replace(config, epochs=1),
                    steps_per_epoch=3,
                    mean_C=place.source.mean,
                    std_C=place.source.std,
                    seed=0,
                )
                if turn > 0:  # the first warms up
                    seconds[name].append((time.process_time() - started) / 3)
    plain = statistics.median(seconds["plain"])
    return [
        {
            "form": name,
            "batch_size": curved.batch_size,
            "cpu_seconds_a_step": spread(values),
            "times_plain": round(statistics.median(values) / plain, 2),
        }
        for name, values in seconds.items()
    ]


def _same(batches: list[Any], _: int) -> list[Any]:
    return batches
