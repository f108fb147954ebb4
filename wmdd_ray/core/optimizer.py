"""Optimizers, their learning rate, and the state that training resumes from."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import nn

State = dict[str, np.ndarray]


def make_optimizer(
    network: nn.Module,
    name: Literal["adamw", "sgd"],
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with Nesterov momentum.

    Weight decay applies only to parameters of two or more dimensions: biases and BatchNorm have
    none. `momentum` is SGD's. Parameters that do not require a gradient are left out.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One fused kernel a step instead of several a parameter: these networks are small.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)
    nesterov = momentum > 0
    return torch.optim.SGD(
        groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=fused
    )


def cosine_rate(peak: float, step: int, num_steps: int) -> float:
    """Return peak (1 + cos(pi step / num_steps)) / 2: `peak` at step 0, 0 at `num_steps`."""
    return 0.5 * peak * (1 + math.cos(math.pi * step / num_steps))


def take_step(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, peak: float, step: int, num_steps: int
) -> None:
    """Take one step along the gradient of `loss`, at the cosine's rate."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = cosine_rate(peak, step, num_steps)
    optimizer.step()


def training_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return copies of all weights, buffers and optimizer state as plain arrays."""
    state = {f"network.{k}": _array_of(v) for k, v in network.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if value is not None:
                state[f"optimizer.{index}.{name}"] = _array_of(value)
    return state


def load_training_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put `training_state` back into a network and an optimizer that were built the same way.

    `Optimizer.load_state_dict` alone would keep the arrays' row-major layout, and fused optimizers
    walk parameter and state by address: with weights in channels-last format they would pair wrong
    elements without an error. Here each array takes the layout of its parameter.
    """
    current = network.state_dict()
    weights = {
        name: torch.tensor(state[f"network.{name}"]).reshape(value.shape)
        for name, value in current.items()
    }
    network.load_state_dict(weights)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, array in state.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            parameter, value = parameters[int(index)], torch.tensor(array)
            if value.numel() == parameter.numel() and name != "step":
                value = torch.empty_like(parameter).copy_(value.reshape(parameter.shape))
            slots.setdefault(int(index), {})[name] = value if name != "step" else value.reshape(())
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _array_of(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().contiguous().numpy().copy()
