"""Which of a GPU's algorithms compute: those that give the same bytes again. On a CPU nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Keep cuDNN from algorithms that add in a random order; they would break the promise of equal bytes."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep cuDNN from TF32, which it uses unless it is told not to: of the 23 bits of a number it reads 10."""
    # Not by `allow_tf32`, which cannot be read where somebody has set this one.
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


@contextmanager
def deterministic_gradients(device: torch.device | str) -> Iterator[None]:
    """Keep a GPU from convolutions and from fused attention whose gradients are added in a random order."""
    on_gpu = torch.device(device).type == "cuda"
    with (
        deterministic_convolutions(),
        # Not on a CPU, whose fused attention has one order and other bits.
        sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext(),
    ):
        yield
