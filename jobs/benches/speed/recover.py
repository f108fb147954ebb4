"""Recover, against the network's forward and backward pass alone."""

from __future__ import annotations

from typing import Literal

import torch

from wmdd_ray.config import NetworkConfig, RecoverConfig

from ..gpu import speeds
from ..reporting import Row, report


def recover(
    archs: tuple[Literal["convnet3", "resnet18"], ...] = ("convnet3", "resnet18"),
    width: int = 128,
    num_images: int = 100,
    iterations: int = 20,
    seconds: float = 60.0,
    out: str | None = None,
) -> None:
    """Images a second of recover on one CPU thread, against the network's forward and backward pass alone; 32 x 32 pixels.

    A bare pass runs after every run, in the same process on as many images; the first of each is not counted. Measured are
    one class of `num_images` images, and `num_images` classes of one image.

    Args:
        archs: Teachers, untrained (ResNet-18 with the small stem).
        width: Channels of a ConvNet-3 block.
        num_images: Images of a forward pass.
        iterations: Steps of a run, between two bare passes; its start and end, a pass without gradients, are in it.
        seconds: How long each teacher and number of classes is measured, with three of both at least.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    for arch in archs:
        network = NetworkConfig(arch=arch, width=width, small_stem=True)
        shape = {"image_size": 32, "num_classes": num_images, "num_images": num_images}
        for ipc in (1, num_images):
            group = speeds.Shape(
                device=torch.device("cpu"),
                **shape,
                repeats=iterations,
                ipc=ipc,
                network=network,
                recover=RecoverConfig(),
            )
            rates = speeds.measured(speeds.recover(group), seconds)
            rows.append({"arch": arch, "ipc": ipc, **rates})
    settings = {"image_size": 32, "convnet3_width": width, "num_images": num_images}
    report(rows, {**settings, "threads": 1}, out)
