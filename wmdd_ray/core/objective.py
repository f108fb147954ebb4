"""What the images of a group of classes shall meet in a teacher, and the loss of what they meet.

Legend: G classes of the group, K images of each, B = G K, C color channels, H W pixels, D feature width, Y classes of the
teacher, S BatchNorm channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.embedding import running_moments
from wmdd_ray.core.losses import (
    GroupTarget,
    MomentLoss,
    anchor_loss_G,
    cross_entropy_G,
    feature_loss_G,
)
from wmdd_ray.core.networks import features_and_logits, required_batch_norms
from wmdd_ray.core.optimizer import State, to_array
from wmdd_ray.core.taps import Tap
from wmdd_ray.errors import ConfigError

Terms = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherTarget:
    """What the images of one class shall meet in a teacher beside the first; atom j is that of image j there too."""

    atoms_KD: np.ndarray
    mean_S: np.ndarray
    var_S: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassTarget:
    """What the images of one class shall meet.

    `mean_S` and `var_S` are the class's moments of all BatchNorm inputs; or, (K, S), those of the cell of each atom, which
    its image then matches by itself. `start_KHWC` (uint8, at the side that is optimized) is the first iterate, None for
    noise; `anchors_KHWC` (uint8, of any side) is the real image that each image stands for; `others` are the targets in the
    teachers after the first, whose widths may differ.
    """

    label: int
    atoms_KD: np.ndarray
    weights_K: np.ndarray
    mean_S: np.ndarray
    var_S: np.ndarray
    start_KHWC: np.ndarray | None = None
    anchors_KHWC: np.ndarray | None = None
    others: tuple[TeacherTarget, ...] = ()


class Objective:
    """Images as teacher number `index` sees them -> its active loss terms and their total, of every class (G,)."""

    def __init__(
        self,
        network: nn.Module,
        index: int,
        taps: list[Tap],
        middle: list[Tensor],
        targets: list[ClassTarget],
        positions: range,
        config: RecoverConfig,
        device: torch.device | str,
    ) -> None:
        def stacked(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(arrays).astype(np.float32)).to(device)

        self.network, self.taps, self.middle, self.config = network, taps, middle, config
        self.device = torch.device(device)
        self._averages = (f"average{index}_mean", f"average{index}_var")
        own = [t if index == 0 else t.others[index - 1] for t in targets]
        # Of the whole class: one position alone would have lost its weight.
        weights_GK = stacked([(t.weights_K / t.weights_K.sum())[positions] for t in targets])
        even_GK = torch.full_like(weights_GK, 1 / len(positions))
        self.target = GroupTarget(
            labels_G=torch.tensor([t.label for t in targets], device=device),
            atoms_GKD=stacked([t.atoms_KD[positions] for t in own]),
            weights_GK=weights_GK,
            share_GK=weights_GK if config.weighted_moments else even_GK,
        )
        self.with_feature = config.feature_term != "none" and config.feature_weight > 0
        self.moment_loss: MomentLoss | None = None
        if config.moments != "none" and config.bn_weight > 0:
            self.moment_loss = _moment_loss(network, own, self.target.share_GK, config)
        is_active = self.with_feature or self.moment_loss is not None
        is_active |= config.ce_weight > 0 or config.anchor_weight > 0
        if not is_active and config.iterations > 0:
            raise ConfigError(
                "--recover: no loss term is active; give --recover.feature-weight, --recover.bn-weight (with --recover.moments), "
                "--recover.ce-weight or --recover.anchor-weight a value above 0, or set --recover.iterations 0"
            )

    def __call__(self, views_BCHW: Tensor, anchors_BCHW: Tensor | None = None) -> Terms:
        config = self.config
        middle_of_anchors = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.mixed_precision):
            if anchors_BCHW is not None:
                # First, since the taps hold the last pass.
                with torch.no_grad():
                    features_and_logits(self.network, anchors_BCHW)
                (middle_of_anchors,) = self.middle
            features_BD, logits_BY = features_and_logits(self.network, views_BCHW)
        features_BD, logits_BY = features_BD.float(), logits_BY.float()
        terms: Terms = {}
        total_G = torch.zeros(len(self.target.labels_G), device=views_BCHW.device)
        if self.with_feature:
            assert config.feature_term != "none"
            terms["feature"] = feature_loss_G(
                config.feature_term, features_BD, logits_BY, self.target
            )
            total_G = total_G + config.feature_weight * terms["feature"]
        if self.moment_loss is not None:
            terms["bn"] = self._of_classes(self.moment_loss(self.taps))
            total_G = total_G + config.bn_weight * terms["bn"]
        if config.ce_weight > 0:
            terms["ce"] = cross_entropy_G(logits_BY, self.target)
            total_G = total_G + config.ce_weight * terms["ce"]
        if middle_of_anchors is not None:
            terms["anchor"] = anchor_loss_G(self.middle[0], middle_of_anchors, len(total_G))
            total_G = total_G + config.anchor_weight * terms["anchor"]
        return terms | {"total": total_G}

    def _of_classes(self, loss_of_sets: Tensor) -> Tensor:
        """Return the moment loss of every class: its own, the mean of its images', or that of all positions."""
        num_classes = len(self.target.labels_G)
        if self.config.moments == "global":
            return loss_of_sets.mean().expand(num_classes)
        return loss_of_sets.view(num_classes, -1).mean(dim=1)

    def state(self) -> State:
        """Return the moments averaged so far: what the next call depends on beside its argument."""
        if self.moment_loss is None or self.moment_loss.running is None:
            return {}
        return dict(zip(self._averages, map(to_array, self.moment_loss.running), strict=True))

    def load(self, state: State) -> None:
        if self._averages[0] in state:
            assert self.moment_loss is not None
            mean, var = (torch.tensor(state[name], device=self.device) for name in self._averages)
            self.moment_loss.running = (mean, var)


def _moment_loss(
    network: nn.Module,
    own: Sequence[ClassTarget | TeacherTarget],
    share_GK: Tensor,
    config: RecoverConfig,
) -> MomentLoss:
    """Return the moment term of a teacher's targets `own`: of classes, of each image, or of running moments across classes."""
    across, of_cells = config.moments == "global", own[0].mean_S.ndim == 2
    share = share_GK
    if across:
        total_K = share_GK.sum(dim=0)
        share = share_GK.T / total_K[:, None]
        share[total_K == 0] = 1 / len(share_GK)  # a position that no class gives a weight
    elif of_cells:
        share = torch.ones_like(share_GK).view(-1, 1)
    assert not of_cells or config.moments != "blend", "a cell has no share of the running moments"

    def stacked(own_rows: list[np.ndarray], running_S: np.ndarray) -> Tensor:
        targets_T = []
        if config.moments in ("per_class", "blend"):
            targets_T.append(np.concatenate([np.atleast_2d(rows) for rows in own_rows]))
        if config.moments in ("global", "blend"):
            targets_T.append(np.broadcast_to(running_S, (len(share), len(running_S))))
        return torch.from_numpy(np.stack(targets_T).astype(np.float32)).to(share.device)

    running_mean_S, running_var_S = running_moments(network)
    return MomentLoss(
        tuple(norm.num_features for norm in required_batch_norms(network)),
        share,
        stacked([t.mean_S for t in own], running_mean_S),
        stacked([t.var_S for t in own], running_var_S),
        decay=config.ema_statistics,
        across_classes=across,
    )
