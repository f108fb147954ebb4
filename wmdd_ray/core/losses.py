"""What recover minimizes: one number a class, so that no class's gradient depends on its company.

Legend: G classes that share a forward pass, K images (= atoms) of each, B = G K, D feature width, Y classes of the
teacher, C channels of one BatchNorm layer, S channels summed over the layers, L layers, T targets.

References:
    Liu et al. 2025, Dataset Distillation via the Wasserstein Metric (feature term and per-class BatchNorm moments).
    Yin et al. 2023, SRe2L (cross-entropy and running statistics). Gretton et al. 2012, A kernel two-sample test.
    Shao et al. 2024, EDC (class and global statistics in equal parts) and G-VBSM (both average the statistics over
    the iterations). CIM 2026 (middle features of the real images that an image stands for).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wmdd_ray.core.taps import Tap

FeatureTerm = Literal["wasserstein", "cross_entropy", "mean", "rbf_mmd", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTarget:
    """The targets of G classes as tensors on the device.

    `weights_GK` are the masses of the atoms, `share_GK` those of the images, equal unless students weigh them too; both sum to
    1 in each class, but for weights of some of its positions, which are shares of the whole class.
    """

    labels_G: Tensor
    atoms_GKD: Tensor
    weights_GK: Tensor
    share_GK: Tensor


def feature_loss_G(
    term: FeatureTerm, features_BD: Tensor, logits_BY: Tensor, target: GroupTarget
) -> Tensor:
    """Return the feature term of every class, with f_j an image's feature, s_j its share, z_j its atom, w_j the atom's weight.

    - wasserstein: mean_j |f_j - z_j|^2 (image j stays with atom j);
    - cross_entropy: mean_j CE(teacher's logits, label);
    - mean: |sum_j s_j f_j - sum_j w_j z_j|^2, the MMD of the linear kernel;
    - rbf_mmd: squared MMD between sum_j s_j delta(f_j) and sum_j w_j delta(z_j), kernel exp(-d^2 / h), with h the
      median squared distance between two atoms (for a single atom: its squared norm).
    """
    if term == "cross_entropy":
        return cross_entropy_G(logits_BY, target)
    features_GKD = features_BD.view(target.atoms_GKD.shape)
    if term == "wasserstein":
        return (features_GKD - target.atoms_GKD).square().sum(dim=2).mean(dim=1)
    if term == "mean":
        images_GD = (target.share_GK[:, :, None] * features_GKD).sum(dim=1)
        class_GD = (target.weights_GK[:, :, None] * target.atoms_GKD).sum(dim=1)
        return (images_GD - class_GD).square().sum(dim=1)
    assert term == "rbf_mmd", term
    return _rbf_mmd_G(features_GKD, target)


def cross_entropy_G(logits_BY: Tensor, target: GroupTarget) -> Tensor:
    """Return the teacher's mean cross-entropy of every class."""
    k = target.weights_GK.shape[1]
    labels_B = target.labels_G.repeat_interleave(k)
    return F.cross_entropy(logits_BY, labels_B, reduction="none").view(-1, k).mean(dim=1)


def anchor_loss_G(images_BCHW: Tensor, anchors_BCHW: Tensor, num_classes: int) -> Tensor:
    """Return the mean squared difference of the rectified middle features of images and of their anchors, of every class.

    Rectified, because networks rectify them in place or not.
    """
    difference_BCHW = F.relu(images_BCHW.float()) - F.relu(anchors_BCHW.float())
    return difference_BCHW.square().flatten(1).mean(dim=1).view(num_classes, -1).mean(dim=1)


def _rbf_mmd_G(features_GKD: Tensor, target: GroupTarget) -> Tensor:
    atoms_GKD, weights_GK, share_GK = target.atoms_GKD, target.weights_GK, target.share_GK
    between_atoms_GKK = _squared_distances(atoms_GKD, atoms_GKD)
    k = weights_GK.shape[1]
    if k > 1:
        pairs = torch.triu_indices(k, k, offset=1, device=atoms_GKD.device)
        width_G = between_atoms_GKK[:, pairs[0], pairs[1]].median(dim=1).values
    else:
        width_G = atoms_GKD.square().sum(dim=(1, 2))
    # Atoms that coincide (or a zero atom) leave no scale: 1 then.
    width_G11 = torch.where(width_G > 0, width_G, torch.ones_like(width_G))[:, None, None]

    def mean_kernel_G(first_GK: Tensor, distances_GKK: Tensor, second_GK: Tensor) -> Tensor:
        kernel_GKK = torch.exp(-distances_GKK / width_G11)
        return torch.einsum("gi,gij,gj->g", first_GK, kernel_GKK, second_GK)

    return (
        mean_kernel_G(share_GK, _squared_distances(features_GKD, features_GKD), share_GK)
        - 2 * mean_kernel_G(share_GK, _squared_distances(features_GKD, atoms_GKD), weights_GK)
        + mean_kernel_G(weights_GK, between_atoms_GKK, weights_GK)
    )


def _squared_distances(x_GKD: Tensor, y_GKD: Tensor) -> Tensor:
    """Return (G, K, K) squared distances: the product form, which has a gradient at 0 and no K x K x D array."""
    squares = x_GKD.square().sum(dim=2)[:, :, None] + y_GKD.square().sum(dim=2)[:, None, :]
    return (squares - 2 * x_GKD @ y_GKD.transpose(1, 2)).clamp_min(0)


class MomentLoss:
    """BatchNorm moment term (PCBN) of sets of images: sum_l |mu_l(X_g) - mu_gl|_2 + |var_l(X_g) - var_gl|_2 of every set g.

    The moments of a set come from those of its images by the law of total variance, image j with share w_j:
    mean = sum_j w_j mean_j and var = sum_j w_j (var_j + (mean_j - mean)^2). All sets and layers are handled as one
    array, since a forward pass of many small layers would otherwise spend its time on launching small operations.

    The sets are the G classes of K images each; or single images (of K = 1); or, `across_classes`, as in SRe2L, G image
    positions of the K classes: set j is image j of every class.

    Several targets of a set share the loss in equal parts. With `decay` > 0 what is compared is an average over the
    calls, m <- decay m + (1 - decay) current, through whose current part alone the gradient flows; the first call
    has no past and compares its own moments. `running` is that average (mean_GS, var_GS), None before the first call.
    """

    def __init__(
        self,
        channels_L: tuple[int, ...],
        share_GK: Tensor,
        mean_TGS: Tensor,
        var_TGS: Tensor,
        decay: float = 0.0,
        *,
        across_classes: bool = False,
    ) -> None:
        """Keep the targets (T, G, S) and the images' shares, of which each set's sum to 1."""
        shape = (len(mean_TGS), len(share_GK), sum(channels_L))
        assert mean_TGS.shape == var_TGS.shape == shape, (mean_TGS.shape, shape)
        self.share_GK1 = share_GK[:, :, None]
        self.mean_TGS, self.var_TGS = mean_TGS, var_TGS
        self.decay, self.across_classes = decay, across_classes
        self.running: tuple[Tensor, Tensor] | None = None
        layer_S = torch.repeat_interleave(torch.arange(len(channels_L)), torch.tensor(channels_L))
        self.member_SL = F.one_hot(layer_S, len(channels_L)).to(mean_TGS)

    def __call__(self, taps: list[Tap]) -> Tensor:
        """Return the loss of every set (G,) from each layer's (mean_BC, var_BC)."""
        mean_GKS = self._by_set(torch.cat([mean for mean, _ in taps], dim=1))
        var_GKS = self._by_set(torch.cat([var for _, var in taps], dim=1))
        mean_GS = (self.share_GK1 * mean_GKS).sum(dim=1)
        spread_GKS = var_GKS + (mean_GKS - mean_GS[:, None]).square()
        var_GS = (self.share_GK1 * spread_GKS).sum(dim=1)
        if self.decay > 0:
            if self.running is not None:
                mean_GS = self.decay * self.running[0] + (1 - self.decay) * mean_GS
                var_GS = self.decay * self.running[1] + (1 - self.decay) * var_GS
            self.running = (mean_GS.detach(), var_GS.detach())
        loss_TG = self._norms_TG(mean_GS - self.mean_TGS) + self._norms_TG(var_GS - self.var_TGS)
        return loss_TG.mean(dim=0)

    def _by_set(self, values_BS: Tensor) -> Tensor:
        num_sets, size, _ = self.share_GK1.shape
        if self.across_classes:
            return values_BS.view(size, num_sets, -1).transpose(0, 1)
        return values_BS.view(num_sets, size, -1)

    def _norms_TG(self, difference_TGS: Tensor) -> Tensor:
        squares_TGL = difference_TGS.square() @ self.member_SL
        # The clamp gives the norm the subgradient 0 at 0, where sqrt's is infinite.
        return squares_TGL.clamp_min(1e-24).sqrt().sum(dim=2)
