"""Attacks on a trained classifier, by libraries of others, and the checks that their results have to pass.

All work in [0, 1] pixel space: normalization is part of the attacked network, `eps` is the largest change of a pixel
(L-infinity). An image is robust when it is classified rightly as it is and after the attack; those that are wrong as
they are, are not attacked.

    pgd          100 steps of eps/4 from a random start (Madry et al. 2018)                  ART
    mim          20 steps of eps, momentum 1, per-image normalization (Dong et al. 2018)     ART
    cw           the least L2 change that is found (Carlini and Wagner 2017)                 ART
    square       5000 queries, no gradients (Andriushchenko et al. 2020)                     pyautoattack
    autoattack   standard: APGD-CE, APGD-T, FAB-T, Square (Croce and Hein 2020)              pyautoattack

`cw` has no eps: an image counts as fallen at eps when the change is at most eps sqrt(pixels x channels) long, the L2 ball
around the eps box, so its accuracy may be below AutoAttack's. GUARD's fixed c of 1e-4 is not reproduced: without Adam, whose first
steps have one length whatever the gradient is, an attack with it does not move.

Legend: N images, H W pixels, C channels, Y classes.

References:
    Xue et al. 2025, GUARD (steps and sizes). Nicolae et al. 2018, Adversarial Robustness Toolbox. Croce and Hein 2020,
    Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmdd_ray.config import AttackName
from wmdd_ray.core.kernels import deterministic_gradients
from wmdd_ray.errors import ConfigError, WmddError

SETTINGS: dict[AttackName, dict[str, Any]] = {
    "pgd": {"steps": 100, "step_in_eps": 0.25, "random_start": True},
    "square": {"queries": 5000},
    "autoattack": {"version": "standard"},
    "cw": {"steps": 10, "binary_search_steps": 6, "initial_const": 1.0, "learning_rate": 0.01},
    "mim": {"steps": 20, "step_in_eps": 1.0, "decay": 1.0},
}
NAMES: dict[AttackName, str] = {
    "pgd": "PGD-100",
    "square": "Square",
    "autoattack": "AutoAttack",
    "cw": "CW (L2)",
    "mim": "MIM",
}
# Attacks that AutoAttack has stronger versions of.
_WEAKER: tuple[AttackName, ...] = ("pgd", "square")
_BATCH_IMAGES = 250
# What float32 may add to a pixel.
_ROUNDING = 1e-6
# Share of the images from which a contradiction is no accident of random starts.
SUSPECT_SHARE = 0.01


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """Whether each image is right as it is, and after the attack; the L2 length of its change (0 where nothing was found).

    `notes` are the library's own warnings, each once.
    """

    clean_N: np.ndarray  # bool
    robust_N: np.ndarray  # bool
    change_N: np.ndarray  # float64
    notes: tuple[str, ...]


def libraries() -> dict[str, str]:
    """Return the versions of the attacks' libraries."""
    return {name: version(name) for name in ("adversarial-robustness-toolbox", "pyautoattack")}


def require_libraries(names: Sequence[AttackName], num_classes: int) -> None:
    """Raise a ConfigError when the attacks' libraries are missing, or there are too few classes for one."""
    missing = [m for m in ("art", "pyautoattack") if importlib.util.find_spec(m) is None]
    if names and missing:
        raise ConfigError(
            f"--attacks {','.join(names)}: expected the libraries of the attacks, found no {' and no '.join(missing)}; "
            "pip install adversarial-robustness-toolbox pyautoattack"
        )
    if "autoattack" in names and num_classes < 4:
        raise ConfigError(
            f"--attacks autoattack: expected at least 4 classes, which its targeted loss compares, got {num_classes}; leave it out"
        )


class _OnPixels(nn.Module):
    """A classifier of pixels in [0, 1]."""

    def __init__(self, network: nn.Module, mean_C: Sequence[float], std_C: Sequence[float]) -> None:
        super().__init__()
        self._network = network
        device = next(network.parameters()).device
        self._mean_C11 = torch.tensor(mean_C, device=device)[:, None, None]
        self._std_C11 = torch.tensor(std_C, device=device)[:, None, None]

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        logits: Tensor = self._network((pixels_NCHW - self._mean_C11) / self._std_C11)
        return logits


def attack(
    name: AttackName,
    network: nn.Module,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    eps: float,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    seed: int,
) -> Attacked:
    """Attack a classifier on uint8 images of known class.

    The network is in evaluation mode and takes images normalized by mean and deviation of a channel. `eps` is the largest change of
    a pixel, in (0, 1); `cw` does not use it.

    Raises:
        WmddError: the library changed a pixel by more than eps, or out of [0, 1].
    """
    device = next(network.parameters()).device
    model = _OnPixels(network, mean_C, std_C).eval()
    pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)))
    pixels = pixels.to(device).float() / 255
    labels = torch.from_numpy(labels_N.astype(np.int64)).to(device)
    clean_N = _right(model, pixels, labels)
    robust_N, change_N = clean_N.copy(), np.zeros(len(labels_N))
    row_R = np.flatnonzero(clean_N)
    notes: list[str] = []
    if len(row_R):
        index = torch.from_numpy(row_R).to(device)
        chosen, classes = pixels[index], labels[index]
        with _seeded(seed, device), deterministic_gradients(device), _heard(notes):
            if name in ("square", "autoattack"):
                attacked = _by_pyautoattack(name, model, chosen, classes, eps, seed)
            else:
                attacked = _by_art(name, model, chosen, classes, eps)
        attacked = attacked.detach().to(device)
        _check(name, chosen, attacked, None if name == "cw" else eps)
        robust_N[row_R] = _right(model, attacked, classes)
        change = torch.linalg.vector_norm((attacked - chosen).flatten(1).double(), dim=1)
        change_N[row_R] = change.cpu().numpy()
    return Attacked(
        clean_N=clean_N,
        robust_N=robust_N,
        change_N=change_N,
        notes=tuple(dict.fromkeys(notes)),
    )


def _right(model: nn.Module, pixels: Tensor, labels: Tensor) -> np.ndarray:
    with torch.inference_mode():
        parts = [model(part).argmax(dim=1) for part in pixels.split(_BATCH_IMAGES)]
    right: np.ndarray = (torch.cat(parts) == labels).cpu().numpy()
    return right


def _by_art(
    name: AttackName, model: nn.Module, pixels: Tensor, labels: Tensor, eps: float
) -> Tensor:
    from art.attacks.evasion import (  # type: ignore[import-untyped]
        CarliniL2Method,
        MomentumIterativeMethod,
        ProjectedGradientDescentPyTorch,
    )
    from art.estimators.classification import (  # type: ignore[import-untyped]
        PyTorchClassifier,
    )

    with torch.inference_mode():
        num_classes = model(pixels[:1]).shape[1]
    classifier = PyTorchClassifier(
        model,
        # The mean's gradients would be the smaller the larger the batch.
        nn.CrossEntropyLoss(reduction="sum"),
        input_shape=tuple(pixels.shape[1:]),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if pixels.device.type == "cuda" else "cpu",
    )
    settings = dict(SETTINGS[name])
    options = {"max_iter": settings.pop("steps"), "batch_size": _BATCH_IMAGES, "verbose": False}
    if name == "cw":
        method = CarliniL2Method(classifier, **settings, **options)
    else:
        options |= {"eps": eps, "eps_step": settings["step_in_eps"] * eps}
        if name == "pgd":
            starts = int(settings["random_start"])
            method = ProjectedGradientDescentPyTorch(classifier, num_random_init=starts, **options)
        else:
            method = MomentumIterativeMethod(classifier, decay=settings["decay"], **options)
    return torch.from_numpy(method.generate(pixels.cpu().numpy(), labels.cpu().numpy()))


def _by_pyautoattack(
    name: AttackName, model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, seed: int
) -> Tensor:
    from pyautoattack import AutoAttack  # type: ignore[import-untyped]

    settings: dict[str, Any] = (
        {"version": "standard"}
        if name == "autoattack"
        else {"version": "custom", "attacks": ["square"]}
    )
    method = AutoAttack(model, eps=eps, norm="Linf", device=pixels.device, seed=seed, **settings)
    with torch.inference_mode():
        others = model(pixels[:1]).shape[1] - 1
    for part in (method.apgd_targeted, method.fab):
        part.n_target_classes = min(part.n_target_classes, others)
    method.square.n_queries = SETTINGS["square"]["queries"]
    attacked: Tensor
    attacked, _ = method.run_standard_evaluation(pixels, labels, batch_size=_BATCH_IMAGES)
    return attacked


def _check(name: AttackName, pixels: Tensor, attacked: Tensor, eps: float | None) -> None:
    """Raise when an image has been changed by more than is allowed."""
    low, high = attacked.min().item(), attacked.max().item()
    largest = (attacked - pixels).abs().max().item()
    inside = low >= -_ROUNDING and high <= 1 + _ROUNDING
    if not inside or (eps is not None and not largest <= eps + _ROUNDING):
        raise WmddError(
            f"{NAMES[name]}: expected pixels in [0, 1] that change by at most {eps}, got pixels in [{low:.4f}, {high:.4f}] that "
            f"change by {largest:.6f}; its library does not do what it says, so nothing of it is kept"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's and numpy's global generators, which the libraries draw from, and put their states back after."""
    state = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)


@contextmanager
def _heard(notes: list[str]) -> Iterator[None]:
    """Keep what AutoAttack warns of (vanishing gradients, randomness) instead of printing it in a worker."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    logger, handler = logging.getLogger("auto-attack"), Keep(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


# Checks ----------------------------------------------------------------------------------------

Key = tuple[AttackName, float]
"""An attack and its eps."""


def robust_to_cw(attacked: Attacked, eps: float, floats: int) -> np.ndarray:
    """Return which images need a change longer than that of all `floats` numbers by eps."""
    within_N = attacked.change_N <= eps * math.sqrt(floats)
    return attacked.clean_N & (attacked.robust_N | ~within_N)


def worst_case(robust: Mapping[Key, np.ndarray], eps: float) -> np.ndarray:
    """Return which images no attack in a box of at most `eps` has made fall: what is known of their robustness.

    It is at most every attack's accuracy, and cannot rise with eps. `cw` has another ball and is left out.
    """
    return np.logical_and.reduce([r for (name, e), r in robust.items() if name != "cw" and e <= eps])  # fmt: skip


def contradictions(clean_N: np.ndarray, robust: Mapping[Key, np.ndarray]) -> list[dict[str, Any]]:
    """Return what cannot be true of the images: `what`, `eps`, `images` (how many) and their `share`.

    AutoAttack holds stronger versions of PGD and Square, so what survives it survives them; a smaller box lies in a
    larger one, so what survives the larger survives the smaller; nothing survives that is wrong from the start. The first two can
    happen to a few images, for the attacks search at random; many mean gradients that mislead the search. `clean_N` says which
    images are right without an attack, `robust` which after an attack of eps.
    """
    pairs: list[tuple[str, float, np.ndarray]] = []
    for (name, eps), robust_N in robust.items():
        pairs.append((f"{NAMES[name]} exceeds clean accuracy", eps, robust_N & ~clean_N))
        if name == "autoattack":
            for weaker in _WEAKER:
                if (weaker, eps) in robust:
                    beyond = robust_N & ~robust[weaker, eps]
                    pairs.append((f"AutoAttack exceeds {NAMES[weaker]}", eps, beyond))
        smaller = [e for n, e in robust if n == name and e < eps]
        if smaller:
            beyond = robust_N & ~robust[name, max(smaller)]
            pairs.append((f"{NAMES[name]} rises with eps", eps, beyond))
    return [
        {
            "what": what,
            "eps": eps,
            "images": int(beyond_N.sum()),
            "share": float(beyond_N.mean()),
        }
        for what, eps, beyond_N in pairs
        if beyond_N.any()
    ]
