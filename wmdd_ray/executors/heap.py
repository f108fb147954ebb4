"""What glibc does with freed memory in a worker: keep it where that is faster, return it where it would add up."""

from __future__ import annotations

import contextlib
import ctypes

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Where glibc begins; by itself it raises the threshold with every larger block that is freed, up to 32 MiB.
_FIRST_THRESHOLD_BYTES = 128 << 10


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed tensors back to the system.

    It does so above 32 MB by default, at 10,000 to 38,000 page faults an iteration of recover: 20 to 35 % of the time
    of a small network on CPU. Other C libraries have no such call.
    """
    _set(2**31 - 1)


def return_freed_memory() -> None:
    """Tell glibc to hand every freed block of 128 KiB and more back to the system, as it does at first.

    A stream of pieces of many sizes otherwise leaves holes, which look like data that gather.
    """
    _set(_FIRST_THRESHOLD_BYTES)


def _set(threshold_bytes: int) -> None:
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, threshold_bytes)
        mallopt(_M_TRIM_THRESHOLD, threshold_bytes)
