"""A recover step, against the network's forward and backward pass alone."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any, Literal

import numpy as np
import torch

from wmdd_ray.config import NetworkConfig, RecoverConfig
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.moments import variance_S
from wmdd_ray.core.networks import batch_norms, build_network
from wmdd_ray.core.synthesis import ClassTarget, recover_group
from wmdd_ray.core.views import to_input

from ..reporting import Row, report, spread


def recover(
    archs: tuple[Literal["convnet3", "resnet18"], ...] = ("convnet3", "resnet18"),
    width: int = 128,
    num_images: int = 100,
    iterations: int = 8,
    out: str | None = None,
) -> None:
    """Images a second of a recover step, against the network's forward and backward pass alone; 32 x 32 pixels.

    A bare pass runs after every step, in the same process on as many images; the first of each is not counted. Measured
    are one class of `num_images` images, and `num_images` classes of one image.

    Args:
        archs: Teachers, untrained (ResNet-18 with the small stem).
        width: Channels of a ConvNet-3 block.
        num_images: Images of a forward pass.
        iterations: Recover steps.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    for arch in archs:
        network = untrained(NetworkConfig(arch=arch, width=width, small_stem=True), num_images)
        for ipc in (1, num_images):
            step_s, bare_s = recover_seconds(network, num_images, ipc, iterations)
            row: Row = {"arch": arch, "ipc": ipc}
            for name, seconds in (("recover", step_s[1:]), ("bare", bare_s[1:])):
                row[f"{name}_images_per_s"] = spread([num_images / s for s in seconds])
            row["share_of_bare"] = statistics.median(bare_s[1:]) / statistics.median(step_s[1:])
            rows.append({**row, "first_step_s": step_s[0]})
    settings = {"image_size": 32, "convnet3_width": width, "num_images": num_images}
    report(rows, {**settings, "threads": 1}, out)


def untrained(config: NetworkConfig, num_classes: int) -> torch.nn.Module:
    """Return a random frozen network for 32 x 32 RGB whose BatchNorm layers have seen noise once."""
    torch.manual_seed(0)
    network = build_network(config, num_classes=num_classes, channels=3, image_size=32)
    for norm in batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(64, 3, 32, 32))
    return network.eval().requires_grad_(False)


def recover_seconds(
    network: torch.nn.Module, num_images: int, ipc: int, iterations: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of every recover step, and of the bare pass after it."""
    color: dict[str, Any] = {"mean_C": (0.5,) * 3, "std_C": (0.25,) * 3}
    shape = (num_images, 32, 32, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = to_input(pixels, **color, device="cpu")
    label_N = np.repeat(np.arange(num_images // ipc), ipc)
    features_ND, moments = features_and_moments(network, images, label_N, batch_size=64)
    targets = [
        ClassTarget(
            label=label,
            atoms_KD=features_ND[label_N == label],
            weights_K=np.full(ipc, 1 / ipc),
            mean_S=moments[label].mean_S,
            var_S=variance_S(moments[label]),
            start_KHWC=pixels[::-1][label_N == label],
        )
        for label in moments
    ]
    # The network is tapped while it recovers; the bare pass gets one that is not.
    plain = copy.deepcopy(network)
    step_s: list[float] = []
    bare_s: list[float] = []
    started = time.process_time()

    def bare(_: int, __: Any) -> None:
        nonlocal started
        step_s.append(time.process_time() - started)
        started = time.process_time()
        leaf = images.detach().clone().requires_grad_(True)
        torch.autograd.grad(plain(leaf).sum(), leaf)
        bare_s.append(time.process_time() - started)
        started = time.process_time()

    config = RecoverConfig(iterations=iterations)
    recover_group(
        network,
        targets,
        config,
        image_size=32,
        channels=3,
        **color,
        seed=0,
        device="cpu",
        on_step=bare,
    )
    return step_s, bare_s
