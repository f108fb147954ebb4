"""What core promises, on the device that is there: the same bytes twice and after a stop, and the CPU's numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from wmdd_ray.config import EvaluateConfig, NetworkConfig, RecoverConfig, SqueezeConfig, ViewConfig
from wmdd_ray.core.batches import in_memory_batches
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import build_network, weights_of
from wmdd_ray.core.optimizer import State, load_training_state, training_state
from wmdd_ray.core.soft_labels import label_views
from wmdd_ray.core.synthesis import recover_group
from wmdd_ray.core.training import optimizer_and_average, train_classifier, train_student
from wmdd_ray.core.views import StoredImages, draw_views, render_views, to_input

from ..reporting import Row
from .speeds import COLOR, targets_of, untrained

_SIZE, _CLASSES, _IPC = 32, 4, 5
_PIXELS = np.random.default_rng(0).integers(0, 256, (_CLASSES * _IPC, _SIZE, _SIZE, 3), np.uint8)
_LABELS = np.repeat(np.arange(_CLASSES), _IPC)
# TensorFloat-32, in which cuDNN convolves by default, keeps ten bits.
_CLOSE = 5e-3


def all_checks(device: torch.device, quick: bool) -> dict[str, Callable[[], Row]]:
    """Return every check by name, of a ResNet-18 or of a small network; each tells `ok` and the numbers behind it."""
    network = NetworkConfig(arch="resnet18", small_stem=True)
    if quick:
        network = NetworkConfig(arch="convnet3", width=4)
    return {
        "recover, float32": partial(recovered, network, device, mixed=False),
        "recover, autocast": partial(recovered, network, device, mixed=True),
        "student by Muon, float32": partial(student, network, device, mixed=False),
        "student by Muon, autocast": partial(student, network, device, mixed=True),
        "teacher by SGD, autocast, channels-last": partial(teacher, network, device),
        "features against the CPU": partial(features, network, device),
        "views and labels against the CPU": partial(views, network, device),
    }


def _twice_and_resumed(
    run: Callable[
        [State | None, Callable[[int, Callable[[], State]], None]], dict[str, np.ndarray]
    ],
    stop_at: int,
) -> Row:
    """Run twice, and once from the state after step `stop_at`; say whether the results are equal to the bit, and how far apart."""
    states: dict[int, State] = {}

    def keep(step: int, get_state: Callable[[], State]) -> None:
        if step == stop_at:
            states[step] = get_state()

    first, again = run(None, keep), run(None, lambda *_: None)
    resumed = run(states[stop_at], lambda *_: None)
    row: Row = {"finite": all(np.isfinite(v).all() for v in first.values())}
    for name, other in (("again", again), ("resumed", resumed)):
        row[f"{name}_same"] = all(np.array_equal(v, other[k]) for k, v in first.items())
        row[f"{name}_off_by"] = max(
            float(np.abs(v.astype(float) - other[k]).max()) for k, v in first.items()
        )
    return {"ok": row["finite"] and row["again_same"] and row["resumed_same"], **row}


def recovered(arch: NetworkConfig, device: torch.device, *, mixed: bool) -> Row:
    """Recover the same images twice, and on from a state."""
    network = untrained(arch, _CLASSES, _SIZE).to(device)
    targets = targets_of(network, _PIXELS, _IPC, device)
    config = RecoverConfig(iterations=6, mixed_precision=mixed, moments="blend", ema_statistics=0.8)

    def run(state: State | None, on_step: Any) -> dict[str, np.ndarray]:
        about: dict[str, Any] = {"image_size": _SIZE, "channels": 3, "seed": 0, "device": device}
        made = recover_group(
            network, targets, config, **about, **COLOR, state=state, on_step=on_step
        )
        return {str(one.label): one.images_KHWC for one in made}

    return _twice_and_resumed(run, 3)


def _new_network(arch: NetworkConfig, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    about = {"num_classes": _CLASSES, "channels": 3, "image_size": _SIZE}
    return build_network(arch, **about).to(device).to(memory_format=torch.channels_last)


def student(arch: NetworkConfig, device: torch.device, *, mixed: bool) -> Row:
    """Train the same student twice by Muon with averaged weights, and on from a state."""
    config = EvaluateConfig(
        batch_size=10, optimizer="muon", mixed_precision=mixed, ema_decay=0.9, num_seeds=1
    )
    images = StoredImages(_PIXELS, **COLOR, device=device)
    logits_VY = np.random.default_rng(1).normal(0, 3, (len(_PIXELS), _CLASSES)).astype(np.float32)

    def run(state: State | None, on_step: Any) -> dict[str, np.ndarray]:
        network = _new_network(arch, device)
        train_student(
            network,
            images,
            lambda epoch: (
                draw_views(len(_PIXELS), _SIZE, ViewConfig(), seed=0, epoch=epoch),
                logits_VY,
            ),
            None,
            config,
            epochs=4,
            image_size=_SIZE,
            seed=0,
            state=state,
            on_epoch=lambda epoch, _, get_state: on_step(epoch + 1, get_state),
        )
        return weights_of(network)

    return _twice_and_resumed(run, 2)


def teacher(arch: NetworkConfig, device: torch.device) -> Row:
    """Train the same teacher twice, and on from a state."""
    config = SqueezeConfig(network=arch, epochs=4, mixed_precision=True, learning_rate=0.01)

    def run(state: State | None, on_step: Any) -> dict[str, np.ndarray]:
        network = _new_network(arch, device)
        optimizer, _ = optimizer_and_average(network, config)
        if state is not None:
            load_training_state(network, optimizer, state)
        train_classifier(
            network,
            optimizer,
            lambda epoch, part: in_memory_batches(
                _PIXELS, _LABELS, batch_size=10, seed=0, epoch=epoch, part=part
            ),
            config,
            steps_per_epoch=2,
            **COLOR,
            seed=0,
            start_epoch=0 if state is None else 2,
            on_epoch=lambda epoch, _: on_step(
                epoch + 1, lambda: training_state(network, optimizer)
            ),
        )
        return weights_of(network)

    return _twice_and_resumed(run, 2)


def _off_by(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def features(arch: NetworkConfig, device: torch.device) -> Row:
    """Compare features and moments on the device, in both memory formats, with the CPU's."""

    def off_cpu(layout: torch.memory_format) -> float:
        by_device = []
        for where in (torch.device("cpu"), device):
            network = untrained(arch, _CLASSES, _SIZE).to(where).to(memory_format=layout)
            images = to_input(_PIXELS, **COLOR, device=where)
            features_ND, moments = features_and_moments(network, images, _LABELS, batch_size=10)
            by_device.append(
                np.concatenate([features_ND.ravel(), *map(variance_S, moments.values())])
            )
        return _off_by(by_device[1], by_device[0])

    layouts = (torch.contiguous_format, torch.channels_last)
    contiguous, channels_last = map(off_cpu, layouts)
    ok = max(contiguous, channels_last) < _CLOSE
    return {"ok": ok, "contiguous_off_by": contiguous, "channels_last_off_by": channels_last}


def views(arch: NetworkConfig, device: torch.device) -> Row:
    """Compare the pixels of views, to the bit, and their labels with the CPU's."""
    network, drawn = untrained(arch, _CLASSES, _SIZE), ViewConfig()
    pixels, logits = [], []
    for where in (torch.device("cpu"), device):
        images = StoredImages(_PIXELS, **COLOR, device=where)
        rows = draw_views(len(_PIXELS), _SIZE, drawn, seed=0, epoch=0)
        pixels.append(render_views(images, rows, _SIZE).cpu())
        logits.append(label_views(network.to(where), images, rows, _SIZE, 8))
    same, off_by = bool(torch.equal(*pixels)), _off_by(logits[1], logits[0])
    return {"ok": same and off_by < _CLOSE, "pixels_same": same, "logits_off_by": off_by}
