"""Recover: optimize the images of a group of classes against the teacher's features and BatchNorm moments.

Minimized is the sum over the group's classes k of
    L_k = feature_weight * feature term + bn_weight * moment term + ce_weight * mean_j CE(teacher(x_j), k)
(`core/losses.py` has the terms). Unlike the reference, whose loss is one norm over the whole batch, no class's
gradient depends on its company, and each image has its own crop, flip and roll. SRe2L's running statistics
(`moments="global"`) are for the same reason matched by every class by itself.

Legend: G classes of the group, K = ipc images of each, B = G K, C color channels, H W pixels, S BatchNorm channels.

References:
    Liu et al. 2025, Dataset Distillation via the Wasserstein Metric. Kingma and Ba 2015, Adam, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.embedding import running_moments
from wmdd_ray.core.jitter import Jitter, noise_start
from wmdd_ray.core.losses import GroupTarget, MomentLoss, cross_entropy_G, feature_loss_G
from wmdd_ray.core.networks import batch_norms, features_and_logits
from wmdd_ray.core.pixel_adam import PixelAdam, State, to_array
from wmdd_ray.core.taps import Tap, tapped
from wmdd_ray.core.views import to_input
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import ClassImages

Terms = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassTarget:
    """What the images of one class shall meet.

    `mean_S` and `var_S` are the class's moments of all BatchNorm inputs; `start_KHWC` (uint8) is the first iterate,
    None for noise.
    """

    label: int
    atoms_KD: np.ndarray
    weights_K: np.ndarray
    mean_S: np.ndarray
    var_S: np.ndarray
    start_KHWC: np.ndarray | None = None


def recover_group(
    network: nn.Module,
    targets: list[ClassTarget],
    config: RecoverConfig,
    *,
    image_size: int,
    channels: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    seed: int,
    device: torch.device | str,
    state: State | None = None,
    on_step: Callable[[int, Callable[[], State]], None] | None = None,
) -> list[ClassImages]:
    """Return the distilled images of every target, in order.

    Adam on the pixels, cosine rate to 0; after each step the pixels are clamped to the range of valid images. At the
    end they are rounded (the reference truncates).

    Args:
        network: the teacher in eval mode on `device`; frozen and tapped meanwhile, then as it was.
        targets: classes that share the forward passes; all with the same number of atoms.
        config: terms, coefficients and optimizer.
        image_size: H = W, pixels.
        channels: C.
        mean_C: what the network's input is centered by, in [0, 1].
        std_C: what the network's input is divided by.
        seed: each class draws from its own stream of (seed, label).
        device: where it is computed.
        state: resume from here: what `get_state` gave; the result is that of a run that never stopped.
        on_step: called after each step as on_step(iterations done, get_state).

    Raises:
        ConfigError: no loss term is active.
        DataError: the optimization diverged; names the classes.
    """
    ipc = len(targets[0].weights_K)
    assert all(len(t.weights_K) == ipc for t in targets), "one ipc a group"
    shape_BCHW = (len(targets) * ipc, channels, image_size, image_size)
    labels = [t.label for t in targets]
    color = [
        torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (mean_C, std_C)
    ]
    losses: dict[str, np.ndarray] = {}
    if state is None:
        start = _start(targets, shape_BCHW, mean_C, std_C, seed, device)
        adam = PixelAdam(start, config, color)
    else:
        adam = PixelAdam.from_state(state, shape_BCHW, config, color, device)
        losses = {k.removeprefix("loss_"): v for k, v in state.items() if k.startswith("loss_")}
    jitter = Jitter(labels, ipc, config, seed=seed, device=device)
    terms: Terms = {}

    def get_state() -> State:
        return adam.state() | {f"loss_{name}": to_array(v) for name, v in terms.items()}

    with tapped(network) as taps, _deterministic_convolutions():
        objective = _Objective(network, taps, targets, config, device)
        while adam.iteration < config.iterations:
            images = adam.images_BCHW.requires_grad_(True)
            terms = objective(jitter(images, adam.iteration))
            (gradient,) = torch.autograd.grad(terms["total"].sum(), images)
            terms = {name: value.detach() for name, value in terms.items()}
            adam.step(gradient)
            if on_step is not None:
                on_step(adam.iteration, get_state)
    losses |= {name: to_array(value) for name, value in terms.items()}
    return _class_images(targets, adam.pixels(), adam.images_BCHW, losses)


class _Objective:
    """Images as the network sees them -> the loss terms that are active, and their total, of every class (G,)."""

    def __init__(
        self,
        network: nn.Module,
        taps: list[Tap],
        targets: list[ClassTarget],
        config: RecoverConfig,
        device: torch.device | str,
    ) -> None:
        def stacked(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(arrays).astype(np.float32)).to(device)

        self.network, self.taps, self.config = network, taps, config
        weights = [t.weights_K / t.weights_K.sum() for t in targets]
        self.target = GroupTarget(
            labels_G=torch.tensor([t.label for t in targets], device=device),
            atoms_GKD=stacked([t.atoms_KD for t in targets]),
            weights_GK=stacked(weights),
        )
        self.with_feature = config.feature_term != "none" and config.feature_weight > 0
        self.moment_loss: MomentLoss | None = None
        if config.moments != "none" and config.bn_weight > 0:
            moments = [(t.mean_S, t.var_S) for t in targets]
            if config.moments == "global":
                moments = [running_moments(network)] * len(targets)
            uniform = [np.full_like(w, 1 / len(w)) for w in weights]
            self.moment_loss = MomentLoss(
                tuple(norm.num_features for norm in batch_norms(network)),
                stacked(weights if config.weighted_moments else uniform),
                stacked([mean_S for mean_S, _ in moments]),
                stacked([var_S for _, var_S in moments]),
            )
        is_active = self.with_feature or self.moment_loss is not None or config.ce_weight > 0
        if not is_active and config.iterations > 0:
            raise ConfigError(
                "--recover: no loss term is active; give --recover.feature-weight, --recover.bn-weight (with "
                "--recover.moments) or --recover.ce-weight a value above 0, or set --recover.iterations 0"
            )

    def __call__(self, views_BCHW: Tensor) -> Terms:
        config = self.config
        features_BD, logits_BY = features_and_logits(self.network, views_BCHW)
        terms: Terms = {}
        total_G = torch.zeros(len(self.target.labels_G), device=views_BCHW.device)
        if self.with_feature:
            assert config.feature_term != "none"
            terms["feature"] = feature_loss_G(
                config.feature_term, features_BD, logits_BY, self.target
            )
            total_G = total_G + config.feature_weight * terms["feature"]
        if self.moment_loss is not None:
            terms["bn"] = self.moment_loss(self.taps)
            total_G = total_G + config.bn_weight * terms["bn"]
        if config.ce_weight > 0:
            terms["ce"] = cross_entropy_G(logits_BY, self.target)
            total_G = total_G + config.ce_weight * terms["ce"]
        return terms | {"total": total_G}


def _start(
    targets: list[ClassTarget],
    shape_BCHW: tuple[int, ...],
    mean_C: Sequence[float],
    std_C: Sequence[float],
    seed: int,
    device: torch.device | str,
) -> Tensor:
    parts = []
    for target in targets:
        shape_KCHW = (len(target.weights_K), *shape_BCHW[1:])
        if target.start_KHWC is None:
            part = torch.from_numpy(noise_start(seed, target.label, shape_KCHW)).to(device)
        else:
            part = to_input(target.start_KHWC, mean_C, std_C, device)
        assert part.shape == shape_KCHW, f"start of class {target.label}: {part.shape}"
        parts.append(part)
    return torch.cat(parts)


def _class_images(
    targets: list[ClassTarget],
    pixels_BHWC: np.ndarray,
    images_BCHW: Tensor,
    losses: dict[str, np.ndarray],
) -> list[ClassImages]:
    ipc = len(pixels_BHWC) // len(targets)
    finite_B = to_array(torch.isfinite(images_BCHW).all(dim=(1, 2, 3)))
    finite_G = np.all(finite_B.reshape(len(targets), ipc), axis=1)
    if not finite_G.all():
        lost = [t.label for t, ok in zip(targets, finite_G.tolist(), strict=True) if not ok]
        raise DataError(
            f"recover: pixels of classes {lost} became NaN; lower --recover.learning-rate or --recover.bn-weight, "
            "and check that the teacher and the class's moments are finite"
        )
    return [
        ClassImages(
            label=target.label,
            images_KHWC=pixels_BHWC[g * ipc : (g + 1) * ipc],
            weights_K=target.weights_K,
            losses={name: float(value_G[g]) for name, value_G in losses.items()},
        )
        for g, target in enumerate(targets)
    ]


@contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    """Keep cuDNN from algorithms that add in a random order; they would break the promise of equal bytes."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
