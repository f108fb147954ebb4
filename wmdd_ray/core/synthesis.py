"""Recover: optimize the images of a group of classes against the teacher's features and BatchNorm moments.

Minimized is the sum over the group's classes k of
    L_k = feature_weight * feature term + bn_weight * moment term + ce_weight * mean_j CE(teacher(x_j), k)
          + anchor_weight * anchor term
(`core/losses.py` has the terms, `core/objective.py` the sum). Unlike the reference, whose loss is one norm over the whole batch, no
class's gradient depends on its company, and each image has its own crop, flip and roll. The exception are SRe2L's running
statistics (`moments="global"`): as its authors do, image j of every class of the group matches them together. `core/groups.py`
plans groups so that their company is always the same.

Several teachers take turns: iteration i is the i-th modulo their number's. With `tiles` t the images are the t x t
small ones of which `core/tiles.py` makes a stored image; the network sees each by itself, enlarged. With
`residual_blends` the images are drawn back to their start between equal parts of the iterations; unlike FADRM, which
begins Adam anew there, its averages go on.

Legend: G classes of the group, K = ipc t^2 images of each, B = G K, C color channels, H W pixels, S BatchNorm channels,
M teachers, P points of a loss curve.

References:
    Liu et al. 2025, Dataset Distillation via the Wasserstein Metric. Kingma and Ba 2015, Adam, algorithm 1. Kim et al.
    2022, IDC, section 4.1 (multi-formation). Cui et al. 2025, FADRM (residual blends, mixed precision). Shao et al.
    2024, G-VBSM (several teachers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.config import RecoverConfig
from wmdd_ray.core.groups import needs_whole_classes
from wmdd_ray.core.jitter import Jitter, noise_start
from wmdd_ray.core.kernels import deterministic_convolutions, deterministic_gradients
from wmdd_ray.core.networks import features_and_logits, required_batch_norms
from wmdd_ray.core.objective import ClassTarget as ClassTarget
from wmdd_ray.core.objective import Objective, Terms
from wmdd_ray.core.objective import TeacherTarget as TeacherTarget
from wmdd_ray.core.optimizer import State, to_array
from wmdd_ray.core.pixel_adam import PixelAdam
from wmdd_ray.core.resample import whole
from wmdd_ray.core.taps import output_of, tapped
from wmdd_ray.core.tiles import tile_side
from wmdd_ray.core.views import to_input
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.records import ClassImages

MAX_CURVE_POINTS = 200
"""Iterations whose losses are kept, evenly spread, the first and the last among them."""


def recover_group(
    networks: nn.Module | Sequence[nn.Module],
    targets: list[ClassTarget],
    config: RecoverConfig,
    *,
    image_size: int,
    channels: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    seed: int,
    device: torch.device | str,
    positions: range | None = None,
    state: State | None = None,
    on_step: Callable[[int, Callable[[], State]], None] | None = None,
) -> list[ClassImages]:
    """Return the distilled images of every target, in order: K of side image_size // config.tiles, or those at `positions`.

    Adam on the pixels, cosine rate to 0; after each step the pixels are clamped to the range of valid images. At the
    end they are rounded (the reference truncates). The losses are those of the last iteration, and so of the teacher
    whose turn it was; the curves have them after some more. The features are those of the rounded images, whole and
    upright, in the first teacher.

    Args:
        networks: the teacher, or M of them, in eval mode on `device`; frozen and tapped meanwhile, then as before.
        targets: classes that share the forward passes; all with the same number of atoms, and M - 1 `others`.
        config: terms, coefficients and optimizer.
        image_size: H = W of what the network sees, pixels.
        channels: C.
        mean_C: what the network's input is centered by, in [0, 1].
        std_C: what the network's input is divided by.
        seed: each class draws from its own stream of (seed, label).
        device: where it is computed.
        positions: which of the K images of every class are made; all of them by default, and where moments are of a class.
        state: resume from here: what `get_state` gave; the result is that of a run that never stopped.
        on_step: called after each step as on_step(iterations done, get_state).

    Raises:
        ConfigError: no loss term is active, anchors are weighed but not given, or more tiles than pixels.
        DataError: the optimization diverged; names the classes.
    """
    networks = (networks,) if isinstance(networks, nn.Module) else tuple(networks)
    assert all(len(t.others) == len(networks) - 1 for t in targets), "one target a teacher"
    of_class = len(targets[0].weights_K)
    assert all(len(t.weights_K) == of_class for t in targets), "one number of images a group"
    positions = range(of_class) if positions is None else positions
    is_whole = len(positions) == of_class
    assert is_whole or not needs_whole_classes(config), "a class is matched by all its images"
    as_input = partial(to_input, mean_C=mean_C, std_C=std_C, device=device)
    side = tile_side(image_size, config.tiles)
    start_BCHW = _start(targets, positions, (channels, side, side), as_input, seed, device)
    anchors_BCHW = _anchors(targets, positions, config, as_input)
    adam = PixelAdam(start_BCHW.clone(), config, mean_C, std_C)
    jitter = Jitter(
        [t.label for t in targets],
        of_class,
        config,
        image_size=image_size,
        seed=seed,
        device=device,
        positions=positions,
    )
    with ExitStack() as stack:
        stack.enter_context(deterministic_gradients(device))
        objectives = [
            stack.enter_context(_objective(network, m, targets, positions, config, device))
            for m, network in enumerate(networks)
        ]
        descent = _Descent(adam, objectives, jitter, config, start_BCHW, anchors_BCHW)
        if state is not None:
            descent.load(state)
        while adam.iteration < config.iterations:
            descent.step()
            if on_step is not None:
                on_step(adam.iteration, descent.state)
    _refuse_lost(targets, adam.images_BCHW)
    pixels_BHWC = adam.pixels()
    features_BD = features_of(networks[0], as_input(pixels_BHWC), image_size)
    return _by_class(targets, positions, pixels_BHWC, features_BD, descent.curves)


class _Descent:
    """The images of a group under way: step after step down the objective of the teacher whose turn it is."""

    def __init__(
        self,
        adam: PixelAdam,
        objectives: list[Objective],
        jitter: Jitter,
        config: RecoverConfig,
        start_BCHW: Tensor,
        anchors_BCHW: Tensor | None,
    ) -> None:
        self.adam, self.objectives, self.jitter = adam, objectives, jitter
        self.start_BCHW, self.anchors_BCHW = start_BCHW, anchors_BCHW
        self.curves = _Curves(config.iterations)
        # The ends of all parts but the last.
        parts = config.residual_blends + 1
        self._blend_at = {config.iterations * part // parts for part in range(1, parts)}

    def state(self) -> State:
        """Return copies of everything that the next step depends on, and the losses so far."""
        state = self.adam.state() | self.curves.state()
        for objective in self.objectives:
            state |= objective.state()
        return state

    def load(self, state: State) -> None:
        self.adam.load(state)
        self.curves.load(state)
        for objective in self.objectives:
            objective.load(state)

    def step(self) -> None:
        """Do the next iteration."""
        adam, anchors = self.adam, self.anchors_BCHW
        images = adam.images_BCHW.requires_grad_(True)
        objective = self.objectives[adam.iteration % len(self.objectives)]
        if anchors is not None:
            anchors = self.jitter(anchors, adam.iteration)
        terms = objective(self.jitter(images, adam.iteration), anchors)
        (gradient,) = torch.autograd.grad(terms["total"].sum(), images)
        adam.step(gradient)
        self.curves.add(adam.iteration, {name: value.detach() for name, value in terms.items()})
        if adam.iteration in self._blend_at:
            adam.blend(self.start_BCHW)


@contextmanager
def _objective(
    network: nn.Module,
    index: int,
    targets: list[ClassTarget],
    positions: range,
    config: RecoverConfig,
    device: torch.device | str,
) -> Iterator[Objective]:
    """Yield what teacher number `index` asks of the images, and tap it meanwhile."""
    with ExitStack() as stack:
        taps = stack.enter_context(tapped(network))
        middle: list[Tensor] = []
        if config.anchor_weight > 0:
            norms = required_batch_norms(network)
            layer = norms[round(config.anchor_depth * (len(norms) - 1))]
            middle = stack.enter_context(output_of(layer))
        yield Objective(network, index, taps, middle, targets, positions, config, device)


def _by_class(
    targets: list[ClassTarget],
    positions: range,
    pixels_BHWC: np.ndarray,
    features_BD: np.ndarray,
    curves: _Curves,
) -> list[ClassImages]:
    """Return what was made of a group, class by class. The last losses are the last points of the curves."""
    curve_PG = {name.removeprefix("curve_"): value for name, value in curves.state().items()}
    classes = []
    for g, target in enumerate(targets):
        own = slice(g * len(positions), (g + 1) * len(positions))
        classes.append(
            ClassImages(
                label=target.label,
                images_KHWC=pixels_BHWC[own],
                weights_K=target.weights_K[positions],
                losses={name: float(value_PG[-1, g]) for name, value_PG in curve_PG.items()},
                curves={name: value_PG[:, g] for name, value_PG in curve_PG.items()},
                curve_at_P=curves.at_P,
                features_KD=features_BD[own],
            )
        )
    return classes


class _Curves:
    """The losses of some iterations. They stay on the device until they are asked for: no step waits for them."""

    def __init__(self, iterations: int) -> None:
        points = np.linspace(1, iterations, min(iterations, MAX_CURVE_POINTS))
        self.at_P = np.unique(points.round().astype(np.int32))
        """Which iterations those are, counted from 1; the last one is among them."""
        self._wanted = frozenset(self.at_P.tolist())
        self._before: State = {}
        self._since: list[Terms] = []

    def load(self, state: State) -> None:
        self._before = {k: v for k, v in state.items() if k.startswith("curve_")}

    def add(self, iteration: int, terms: Terms) -> None:
        """Keep the losses of an iteration if it is one of those."""
        if iteration in self._wanted:
            self._since.append(terms)

    def state(self) -> State:
        """Return `curve_<term>` -> its values so far, float32 (P, G)."""
        names = self._since[0] if self._since else ()
        since = {f"curve_{k}": to_array(torch.stack([t[k] for t in self._since])) for k in names}
        both = (self._before, since)
        keys = dict.fromkeys(key for part in both for key in part)
        return {key: np.concatenate([part[key] for part in both if key in part]) for key in keys}


@torch.no_grad()
def features_of(network: nn.Module, images_BCHW: Tensor, image_size: int) -> np.ndarray:
    """Return features_BD, float32, of whole images; small ones are enlarged as they are for every step."""
    with deterministic_convolutions():
        features_BD, _ = features_and_logits(network, whole(images_BCHW, image_size))
    return to_array(features_BD.float())


def _anchors(
    targets: list[ClassTarget],
    positions: range,
    config: RecoverConfig,
    as_input: Callable[[np.ndarray], Tensor],
) -> Tensor | None:
    """Return the real images that the images stand for, in their order, or None where they do not count."""
    if config.anchor_weight == 0:
        return None
    given = [t.anchors_KHWC[positions] for t in targets if t.anchors_KHWC is not None]
    if len(given) < len(targets):
        raise ConfigError(
            "--recover.anchor-weight: expected the real images that the images of every class stand for, got those of "
            f"{len(given)} of {len(targets)} classes; leave it 0 without them"
        )
    return as_input(np.concatenate(given))


def _start(
    targets: list[ClassTarget],
    positions: range,
    shape_CHW: tuple[int, ...],
    as_input: Callable[[np.ndarray], Tensor],
    seed: int,
    device: torch.device | str,
) -> Tensor:
    """Return the first iterate: the start that a class brings, or noise."""
    parts = []
    for target in targets:
        if target.start_KHWC is None:
            shape_KCHW = (len(target.weights_K), *shape_CHW)
            noise_KCHW = noise_start(seed, target.label, shape_KCHW)
            part = torch.from_numpy(noise_KCHW[positions]).to(device)
        else:
            part = as_input(target.start_KHWC[positions])
        expected = (len(positions), *shape_CHW)
        assert part.shape == expected, f"start of class {target.label}: {part.shape}"
        parts.append(part)
    return torch.cat(parts)


def _refuse_lost(targets: list[ClassTarget], images_BCHW: Tensor) -> None:
    """Raise a DataError when pixels are no numbers any more."""
    finite_B = to_array(torch.isfinite(images_BCHW).all(dim=(1, 2, 3)))
    finite_G = np.all(finite_B.reshape(len(targets), -1), axis=1)
    if not finite_G.all():
        lost = [t.label for t, ok in zip(targets, finite_G.tolist(), strict=True) if not ok]
        raise DataError(
            f"recover: pixels of classes {lost} became NaN; lower --recover.learning-rate or --recover.bn-weight, "
            "and check that the teacher and the class's moments are finite"
        )
