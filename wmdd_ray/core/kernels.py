"""Which of a GPU's algorithms compute: those that give the same bytes again. On a CPU nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Keep cuDNN from algorithms that add in a random order; they would break the promise of equal bytes."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
