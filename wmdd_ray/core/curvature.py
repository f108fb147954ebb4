"""Curvature of a classifier's loss around the real images: the term by which GUARD's teacher is trained.

Per image, with l its own loss, g = grad_x l(x) and the step z = h g / |g|_2 held fixed:

    gradient:  mean_b |grad_x l_b(x_b + z_b) - grad_x l_b(x_b)|_2       the published term; differentiated twice
    loss:      |mean_b l_b(x_b + z_b) - mean_b l_b(x_b)|                what the authors' ImageNet training computes

For a small h the first is h |H g| / |g| with H the Hessian of l in the input. The second is about h mean_b |g_b| +
h^2/2 (the curvature along z): mostly a penalty on the gradient's length, which costs no second derivative. Its absolute value is
of a worker's own batch, so several workers take the steps of one only where their differences have one sign.

Where this differs from the authors' code: their gradients are those of the batch's *mean* loss, so their strength falls with
the batch (lambda 100 at batch 128 is 0.78 here). They add 1e-7 to gradient and norm, by which an image without a gradient steps by
h in every pixel; here it stays where it is, and the smallest gradient has a direction.

Legend: B batch, C channels, H W pixels, Y classes.

References:
    Xue et al. 2025, GUARD (AAAI, arXiv 2403.10045). Moosavi-Dezfooli et al. 2019, CURE (its regularizer).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_ray.config import CurvatureForm
from wmdd_ray.core.architectures import evaluating
from wmdd_ray.core.kernels import full_float32


def curvature(
    losses_of: Callable[[Tensor], Tensor],
    inputs_B: Tensor,
    *,
    step: float,
    form: CurvatureForm = "gradient",
) -> Tensor:
    """Return the curvature term as a scalar that can be differentiated in everything `losses_of` depends on.

    Args:
        losses_of: inputs -> losses (B), where a loss depends on its own input alone (no batch statistics).
        inputs_B: inputs, the first axis is B; no gradient flows into them.
        step: h, length of z in the inputs' units.
        form: `gradient` or `loss`.
    """
    twice = form == "gradient"
    inputs_B = inputs_B.detach().requires_grad_(True)
    losses_B = losses_of(inputs_B)
    (gradients_B,) = torch.autograd.grad(
        losses_B.sum(), inputs_B, create_graph=twice, retain_graph=True
    )
    moved_B = (inputs_B + ascent_step(gradients_B, step)).detach().requires_grad_(twice)
    moved_losses_B = losses_of(moved_B)
    if not twice:
        return (moved_losses_B.mean() - losses_B.mean()).abs()
    (moved_gradients_B,) = torch.autograd.grad(moved_losses_B.sum(), moved_B, create_graph=True)
    change_B = (moved_gradients_B - gradients_B).flatten(start_dim=1)
    return torch.linalg.vector_norm(change_B, dim=1).mean()


def ascent_step(gradients_B: Tensor, step: float) -> Tensor:
    """Return h g / |g|_2 of each row, without a graph; a row of zeros stays one."""
    rows_BD = gradients_B.detach().flatten(start_dim=1)
    # The squares of a well-trained network's gradients are below the smallest float; those of their ratios are not.
    largest_B1 = rows_BD.abs().amax(dim=1, keepdim=True)
    rows_BD = rows_BD / torch.where(largest_B1 > 0, largest_B1, 1)
    length_B1 = torch.linalg.vector_norm(rows_BD, dim=1, keepdim=True)
    rows_BD = step * rows_BD / torch.where(length_B1 > 0, length_B1, 1)
    return rows_BD.reshape(gradients_B.shape)


def classifier_curvature(
    network: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    step: float,
    form: CurvatureForm = "gradient",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the curvature term of a classifier's cross-entropy, in evaluation mode and float32; its mode is put back.

    In training mode BatchNorm would make every loss depend on the whole batch, and the term would move the running
    moments; an attacker meets the network in evaluation mode. Under autocast the difference of two close gradients would have
    bfloat16's 8 bits, and TF32's 10 on a GPU. `step` is in units of the normalized input.

    Call it after the training pass of the same step: BatchNorm writes the running moments in place, which the graph of this
    term holds until `backward`.
    """

    def losses_of(inputs_BCHW: Tensor) -> Tensor:
        return F.cross_entropy(
            network(inputs_BCHW), labels_B, label_smoothing=label_smoothing, reduction="none"
        )

    with (
        evaluating(network),
        full_float32(),
        torch.autocast(images_BCHW.device.type, enabled=False),
    ):
        return curvature(losses_of, images_BCHW, step=step, form=form)
