"""The memory of a process and of Ray's workers below it while they work, out of /proc (Linux)."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from jobs.benches.scale.pipeline import memory_mib as own_mib

T = TypeVar("T")


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Start a Ray with so many logical CPUs, on 127.0.0.1 only, and stop it."""
    # Reads Ray's environment variables before Ray does.
    import wmdd_ray.stages  # noqa: F401

    # isort: split
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()


def in_a_process(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns in a process of its own: peak memory and Ray are not this one's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def descendants(pid: int) -> dict[int, str]:
    """Return the processes below one, with their titles (Ray names a worker's process after its actor)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name stands in parentheses and may hold anything.
                after_name = (entry / "stat").read_text().rpartition(")")[2]
                parents[int(entry.name)] = int(after_name.split()[1])
    titles: dict[int, str] = {}
    below = {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below}
        for child in below:
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{child}/cmdline").read_bytes()
                titles[child] = title.replace(b"\0", b" ").decode(errors="replace").strip()
    return titles


# How often new workers are looked for: it takes some milliseconds.
_LOOK_S = 0.1


@dataclass
class Peaks:
    """Highest memory of their own that was seen, MiB: this process, what it grew by, and the largest of Ray's workers below it."""

    driver: float = 0.0
    driver_grew: float = 0.0
    worker: float = 0.0
    num_workers: int = 0


@contextlib.contextmanager
def watched(every_s: float = 0.05) -> Iterator[Peaks]:
    """Watch the memory of this process and of Ray's workers below it; the peaks are complete when the block ends.

    Pages of the object store do not count: they are shared, and Ray bounds them. A worker counts from when it has a title,
    which Ray gives it with its first task.
    """
    peaks, stop = Peaks(), threading.Event()
    peaks.driver = before = own_mib(os.getpid())

    def watch() -> None:
        workers: set[int] = set()
        looked = 0.0
        while not stop.wait(every_s):
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                titles = descendants(os.getpid()).items()
                workers |= {p for p, t in titles if t.startswith("ray::") and "::IDLE" not in t}
            peaks.driver = max(peaks.driver, own_mib(os.getpid()))
            peaks.worker = max([peaks.worker, *(own_mib(pid) for pid in workers)])
            peaks.num_workers = len(workers)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()
        peaks.driver_grew = peaks.driver - before
