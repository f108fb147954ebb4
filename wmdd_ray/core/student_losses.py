"""What students minimize: divergence and squared error to the teacher's logits, transport to them, cross-entropy to classes.

Legend: B batch, Y classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wmdd_ray.core.sinkhorn import l1_costs, sinkhorn_distance


def soft_label_loss(
    student_BY: torch.Tensor,
    teacher_BY: torch.Tensor,
    temperature: float,
    weights_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return mean_b w_b KL(softmax(teacher_b / T) || softmax(student_b / T)), summed over classes.

    There is no factor T^2, as in FKD and WMDD's reference: with AdamW the scale of the loss hardly
    matters, with SGD the learning rate has to make up for it.

    Args:
        student_BY: student's logits.
        teacher_BY: teacher's logits, each row up to a constant.
        temperature: T.
        weights_B: weight of each image, of mean 1 over the data set; None is 1.

    References:
        Hinton et al. 2015, distillation at a temperature.
    """
    log_student = F.log_softmax(student_BY.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_BY.float() / temperature, dim=1)
    divergence_B = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return _mean(divergence_B, weights_B)


def logit_loss(
    student_BY: torch.Tensor, teacher_BY: torch.Tensor, weights_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Return mean_b w_b mean_y (s_by - t_by)^2 of logits that are shifted to mean 0 in each row.

    Unlike in the cited works both are shifted: stored logits are known up to a constant a row, which no softmax sees.

    Args:
        student_BY: student's logits.
        teacher_BY: teacher's logits, each row up to a constant. Those that `top_k` did not keep are spread evenly.
        weights_B: weight of each image, of mean 1 over the data set; None is 1.

    References:
        Shao et al. 2024, G-VBSM and EDC (mean squared error to logits).
    """
    error_BY = student_BY.float() - teacher_BY.float()
    error_BY = error_BY - error_BY.mean(dim=1, keepdim=True)
    return _mean(error_BY.square().mean(dim=1), weights_B)


def transport_loss(
    student_BY: torch.Tensor, teacher_BY: torch.Tensor, *, regularization: float, iterations: int
) -> torch.Tensor:
    """Return the entropic cost of moving the student's outputs of a batch to the teacher's, whichever view they are of.

    The cost is the mean absolute difference of logits that are shifted to mean 0 in each row, as in `logit_loss`; the images'
    weights have no part in it.

    Args:
        student_BY: student's logits.
        teacher_BY: teacher's logits of the same views, each row up to a constant.
        regularization: a share of the batch's mean cost.
        iterations: of Sinkhorn's algorithm.

    References:
        Cui et al. 2025, arXiv 2512.00308 (OTM), whose coefficients are not published. Cui et al. 2024, SinKD, transports between
        probabilities with an absolute regularization; logits and a share of the mean cost are ours.
    """
    student, teacher = (
        x.float() - x.float().mean(dim=1, keepdim=True) for x in (student_BY, teacher_BY)
    )
    costs_BB = l1_costs(student, teacher)
    # Not 0 where the student is the teacher; a tensor, so that a GPU is not waited for.
    reg = regularization * costs_BB.detach().mean().clamp_min(1e-12)
    return sinkhorn_distance(costs_BB, regularization=reg, iterations=iterations)


def hard_label_loss(
    student_BY: torch.Tensor,
    classes_B: torch.Tensor,
    partners_B: torch.Tensor,
    share_B: torch.Tensor,
    weights_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean cross-entropy to labels that are mixed as CutMix mixes their images.

    mean_b w_b (-share_b log p_b[class_b] - (1 - share_b) log p_b[partner's class_b]).

    Args:
        student_BY: student's logits.
        classes_B: int64 class of each view's own image.
        partners_B: int64 class of the image that it is mixed with.
        share_B: the own image's share, in [0, 1].
        weights_B: weight of each image, of mean 1 over the data set; None is 1.

    References:
        Yun et al. 2019, CutMix.
    """
    log_BY = F.log_softmax(student_BY.float(), dim=1)
    own_B, other_B = (log_BY.gather(1, c[:, None])[:, 0] for c in (classes_B, partners_B))
    return _mean(-share_B * own_B - (1 - share_B) * other_B, weights_B)


def _mean(loss_B: torch.Tensor, weights_B: torch.Tensor | None) -> torch.Tensor:
    return (loss_B if weights_B is None else weights_B * loss_B).mean()
