"""Batches that are cut into parts, whose gradients are summed in one order on however many workers.

Legend: K parts of a batch, k of them on this worker, W workers, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatch:
    """The parts of each batch that one of W workers computes, and what all of them make of the gradients.

    As under DistributedDataParallel a part has BatchNorm statistics of its own, and the running moments are the first
    part's. Unlike there, who computes a part changes no bit: the sum is ((g_0 + g_1) + g_2) + ... in each number.
    """

    def __init__(self, network: nn.Module, num_parts: int, rank: int = 0, world: int = 1) -> None:
        """Take the parts of worker `rank` of `world`, which divides `num_parts`; all begin with the same weights."""
        assert num_parts % world == 0, "each worker has as many parts as the others"
        each = num_parts // world
        self.own = range(rank * each, (rank + 1) * each)
        self._network, self._num_parts, self._world = network, num_parts, world

    def backward(self, losses_k: Sequence[Callable[[], Tensor]]) -> None:
        """Leave the gradient of the mean of all parts' losses in the parameters of every worker.

        Args:
            losses_k: Computes the loss of each part of this worker, in training mode.
        """
        self._network.zero_grad(set_to_none=True)
        if self._num_parts == 1:
            losses_k[0]().backward()
            return
        before, after = self._moments(), list[Tensor]()
        gradients: list[Tensor] = []
        for loss in losses_k:
            if gradients:
                self._network.zero_grad(set_to_none=True)
                self._set_moments(before)
            loss().backward()
            after = after or self._moments()
            gradients.append(torch.cat([grad.reshape(-1) for grad in self._gradients()]))
        if self._world > 1:
            for moment in after:
                dist.broadcast(moment, src=0)
        self._set_moments(after)
        mean_P = self._sum(torch.stack(gradients)) / self._num_parts
        own = self._gradients()
        for grad, mean in zip(own, mean_P.split([grad.numel() for grad in own]), strict=True):
            grad.copy_(mean.view(grad.shape))  # it keeps the layout that the optimizer walks

    def gathered(self, numbers_k: Tensor) -> list[float]:
        """Return the numbers of all K parts, in order, from those of this worker's."""
        if self._world == 1:
            return numbers_k.tolist()
        numbers_K = numbers_k.new_empty(self._num_parts)
        dist.all_gather_into_tensor(numbers_K, numbers_k)
        return numbers_K.tolist()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._network.parameters() if p.grad is not None]

    def _moments(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._network.buffers()]

    def _set_moments(self, moments: list[Tensor]) -> None:
        for buffer, moment in zip(self._network.buffers(), moments, strict=True):
            buffer.copy_(moment)

    def _sum(self, gradients_kP: Tensor) -> Tensor:
        """Return the sum over all K parts. A worker sums its share of the numbers, so each number travels twice."""
        if self._world == 1:
            return _in_order(gradients_kP)
        num_own, num_numbers = gradients_kP.shape
        width = -(-num_numbers // self._world)
        padded = F.pad(gradients_kP, (0, self._world * width - num_numbers))
        sent = padded.view(num_own, self._world, width).transpose(0, 1).contiguous()
        taken = torch.empty_like(sent)
        dist.all_to_all_single(taken, sent)
        whole = sent.new_empty(self._world * width)
        dist.all_gather_into_tensor(whole, _in_order(taken.flatten(0, 1)))
        return whole[:num_numbers]


def _in_order(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
