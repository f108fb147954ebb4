"""Moments at rest: merged exactly, whatever chunks they were taken in. No torch: barycenter actors stay small.

Legend: S channels summed over the BatchNorm layers, L layers, P parts.

References:
    Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wmdd_ray.records import Moments


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the union of disjoint `parts`.

    With n_p values in part p and n = sum_p n_p: mean = sum_p n_p mean_p / n and
    m2 = sum_p m2_p + sum_p n_p (mean_p - mean)^2. Summed in the given order: pass it sorted for equal bytes.
    """
    assert parts, "moments of nothing"
    channels_L = parts[0].channels_L
    assert all(p.channels_L == channels_L for p in parts), "parts of different networks"
    count_PS = np.stack([per_channel(p).astype(np.float64) for p in parts])
    mean_PS = np.stack([p.mean_S for p in parts])
    m2_PS = np.stack([p.m2_S for p in parts])
    # Relative to the first part's mean, so that a large common mean costs no digits.
    shift_PS = mean_PS - mean_PS[0]
    shift_S = (count_PS * shift_PS).sum(axis=0) / count_PS.sum(axis=0)
    return Moments(
        channels_L=channels_L,
        count_L=np.sum([p.count_L for p in parts], axis=0),
        mean_S=mean_PS[0] + shift_S,
        m2_S=m2_PS.sum(axis=0) + (count_PS * (shift_PS - shift_S) ** 2).sum(axis=0),
    )


def variance_S(moments: Moments) -> np.ndarray:
    """Return the biased variance of every channel, float64 (S,)."""
    return moments.m2_S / per_channel(moments)


def per_channel(moments: Moments) -> np.ndarray:
    """Return the number of values of every channel, int64 (S,)."""
    return np.repeat(moments.count_L, moments.channels_L)
