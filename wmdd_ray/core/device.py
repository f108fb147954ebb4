"""Which device computes: what Ray gave decides, and elsewhere whether there is a GPU."""

from __future__ import annotations

import platform

import torch

from wmdd_ray.errors import ConfigError


def device_for(gpus: float) -> torch.device:
    """Return the GPU of a worker that was given `gpus` of them (negative: one where there is one), or the CPU.

    Ray leaves a worker without a GPU the sight of all: what it was given decides.

    Raises:
        ConfigError: torch cannot use the GPU that was given.
    """
    usable = torch.cuda.is_available()
    if gpus == 0 or (gpus < 0 and not usable):
        return torch.device("cpu")
    if not usable:
        built = torch.version.cuda
        remedy = (
            f"update its driver to one for CUDA {built}" if built else "install a torch with CUDA"
        )
        raise ConfigError(
            f"--gpus-per-worker {gpus:g}: expected a GPU that torch {torch.__version__} can use on {platform.node()}, "
            f"found none (torch.version.cuda is {built}); {remedy}, or pass --gpus-per-worker 0"
        )
    return torch.device("cuda", torch.cuda.current_device())
