"""Optimizers, their learning rate, the average of the weights, and the state that training resumes from.

References:
    Loshchilov and Hutter 2019, AdamW. Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks. Liu
    et al. 2025, Muon is scalable for LLM training (steps of AdamW's size). Polyak and Juditsky 1992, averaged weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.config import OptimizerName

State = dict[str, np.ndarray]


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a copy of a tensor as an array."""
    return tensor.detach().cpu().numpy().copy()


def make_optimizer(
    network: nn.Module,
    name: OptimizerName,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Return AdamW, SGD with Nesterov momentum, or Muon with AdamW, which is AdamW alone where no matrix is hidden.

    Weight decay applies only to parameters of two or more dimensions: biases and BatchNorm have
    none. `momentum` is SGD's. Parameters that do not require a gradient are left out. Set the
    network's device and memory format before: Muon holds views of the weights.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if name == "muon" and _hidden_of(parameters):
        return MuonAdamW(parameters, learning_rate=learning_rate, weight_decay=weight_decay)
    groups = _decay_groups(parameters, weight_decay)
    fused = _can_fuse(parameters)
    if name != "sgd":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)
    nesterov = momentum > 0
    return torch.optim.SGD(
        groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=fused
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden weight matrices, AdamW for everything else, at one rate.

    Hidden are, as Jordan et al. advise for ConvNets, all kernels and matrices but the first (it reads pixels) and the
    last (it writes logits). A convolution's kernel is the matrix of its outputs by all its inputs. Not hidden either is
    a depthwise kernel, whose rows see different channels: to make them orthogonal to each other means nothing. Nor are a
    Vision Transformer's class token and positions. Steps are scaled to the size of AdamW's (Liu et al. 2025), so that
    one learning rate serves both parts.
    """

    def __init__(
        self, parameters: list[nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> None:
        """Take the parameters in the order of their layers."""
        self._hidden = _hidden_of(parameters)
        taken = {id(p) for p in self._hidden}
        others = [p for p in parameters if id(p) not in taken]
        # torch's Muon takes matrices only: these share their memory with the kernels.
        self._muon = torch.optim.Muon(
            [nn.Parameter(_as_matrix(p.detach())) for p in self._hidden],
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW(
            _decay_groups(others, weight_decay), lr=learning_rate, fused=_can_fuse(others)
        )
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimizer's groups and state, so that it is saved and loaded as any other."""
        self._muon.state = self._adamw.state = self.state
        self._muon.param_groups = self.param_groups[:1]
        self._adamw.param_groups = self.param_groups[1:]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for kernel in self._hidden:
            kernel.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step along the gradients of the parameters."""
        assert closure is None, "one evaluation a step"
        matrices = self.param_groups[0]["params"]
        for kernel, matrix in zip(self._hidden, matrices, strict=True):
            assert matrix.data_ptr() == kernel.data_ptr(), "the weights were moved or laid out anew"
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad)
        self._muon.step()
        self._adamw.step()


def _hidden_of(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return the weights that Muon takes: none of a network of one convolution."""
    matrices = [p for p in parameters if p.ndim in (2, 4)]
    return [p for p in matrices[1:-1] if p.shape[1] > 1]


def _as_matrix(kernel: Tensor) -> Tensor:
    """Return a kernel as (outputs, inputs x height x width) in the order of its memory: a view, or an error.

    Muon's step commutes with an exchange of columns, so either order of the inputs gives the same step but for
    rounding.
    """
    in_rows = kernel.ndim == 4 and not kernel.is_contiguous()
    return (kernel.permute(0, 2, 3, 1) if in_rows else kernel).view(len(kernel), -1)


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    """Return whether one fused kernel can replace several a parameter: these networks are small."""
    return all(p.device.type in ("cpu", "cuda") for p in parameters)


class WeightAverage:
    """Bias-corrected exponential moving average of a network's weights and buffers.

    After step t it is sum_i d^(t-i) w_i / sum_i d^(t-i) over the weights w_1 .. w_t: those before the first step have no
    part in it, and a training shorter than 1 / (1 - d) steps is averaged evenly. BatchNorm's running moments are
    averaged as the weights are (as AveragedModel of torch.optim.swa_utils does with use_buffers=True); counters are not.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Follow `network`, whose device and memory format are set; `decay` is d in [0, 1)."""
        state = network.state_dict()  # shares its memory with the network
        self._values = {k: v for k, v in state.items() if v.is_floating_point()}
        self._averages = {k: v.clone() for k, v in self._values.items()}
        self._decay, self._steps = decay, 0

    def update(self) -> None:
        """Take in the weights after one more step."""
        self._steps += 1
        share = (1 - self._decay) / (1 - self._decay**self._steps)
        # On a GPU a few launches for all of them, with the bits of one each.
        torch._foreach_lerp_([*self._averages.values()], [*self._values.values()], share)

    def put_into_network(self) -> None:
        """Overwrite the network's weights and running moments by their averages."""
        for name, average in self._averages.items():
            self._values[name].copy_(average)

    def state(self) -> State:
        """Return copies of everything that `load` needs, as plain arrays."""
        arrays = {f"average.{name}": to_array(value) for name, value in self._averages.items()}
        return arrays | {"average_steps": np.array(self._steps)}

    def load(self, state: State) -> None:
        self._steps = state["average_steps"].item()
        for name, average in self._averages.items():
            average.copy_(torch.tensor(state[f"average.{name}"]).reshape(average.shape))


def cosine_rate(peak: float, step: int, num_steps: int, warmup_steps: int = 0) -> float:
    """Return peak (1 + cos(pi t / T)) / 2 with t = step - warmup_steps and T = num_steps - warmup_steps.

    That is `peak` at t = 0 and 0 at `num_steps`. Before, the rate rises by peak / (warmup_steps + 1) a step from just that.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


def take_step(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    peak: float,
    step: int,
    num_steps: int,
) -> None:
    """Take one step along the gradient of `loss`, at the rate of `cosine_rate`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    descend(optimizer, peak, step, num_steps)


def descend(
    optimizer: torch.optim.Optimizer, peak: float, step: int, num_steps: int, warmup_steps: int = 0
) -> None:
    """Take one step along the gradients that are there, at the rate of `cosine_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = cosine_rate(peak, step, num_steps, warmup_steps)
    optimizer.step()


def training_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> State:
    """Return copies of all weights, buffers and optimizer state as plain arrays, and of the average's."""
    state = {f"network.{k}": to_array(v) for k, v in network.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if value is not None:
                state[f"optimizer.{index}.{name}"] = to_array(value)
    return state if average is None else state | average.state()


def load_training_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    average: WeightAverage | None = None,
) -> None:
    """Put `training_state` back into a network, an optimizer and an average that were built the same way.

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
    if average is not None:
        average.load(state)
