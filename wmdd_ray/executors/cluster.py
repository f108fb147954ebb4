"""The cluster that a run finds or starts, and how wide a stage may work on it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

from wmdd_ray.config import Resources
from wmdd_ray.errors import ConfigError

# A laptop: up to this many CPUs, worker processes (each imports torch, 11 to 24 s) cost more than they bring.
_LAPTOP_CPUS = 4
_HEAD_TIMEOUT_S = 10.0
# Workers to ask an autoscaler for that has started nothing yet, when nobody says how many (--num-workers).
_UNSEEN_WORKERS = 2
_LOCAL_OBJECT_STORE_BYTES = 512 << 20


def connect(out: str, *, verbose: bool = False) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as inside `ray job submit`), or start one on this machine.

    A local Ray listens on 127.0.0.1 only and asks for a token that is made for this run alone.

    Args:
        out: Root URI of the run.
        verbose: Show Ray's own log lines and those of the workers.

    Raises:
        ConfigError: `out` is not a place that every worker sees.
    """
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if os.environ.get("RAY_ADDRESS"):
        require_head(os.environ["RAY_ADDRESS"])
    if not ray.is_initialized():
        level = logging.INFO if verbose else logging.ERROR
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=level, log_to_driver=verbose)
        else:
            _start_local(level, verbose)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    # A node without CPUs does nothing itself: those that do are still to come.
    elsewhere = num_nodes > 1 or not has_cpus()
    if out.startswith("memory://") or (elsewhere and "://" not in out):
        nodes = f"all {num_nodes} nodes" if num_nodes > 1 else "every node"
        raise ConfigError(
            f"--out {out}: expected a URI that {nodes} of the cluster see, such as s3://bucket/prefix (or "
            "file:///mount/folder for a disk that every node has mounted)"
        )


def require_head(address: str) -> None:
    """Make sure that something listens at `address`: Ray would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_HEAD_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(
                f"no cluster at RAY_ADDRESS={address}: {error}; start its head, or unset RAY_ADDRESS to work on this machine alone"
            ) from error


def has_cpus() -> bool:
    """Return whether the cluster has CPUs now; one that starts with a head alone has not, and grows when it is asked."""
    return bool(ray.cluster_resources().get("CPU", 0))


def _start_local(level: int, verbose: bool) -> None:
    # Workers import the package from this checkout, wherever the driver was started.
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with contextlib.nullcontext() if verbose else hushed():
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 2),
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            logging_level=level,
            log_to_driver=verbose,
            _node_ip_address="127.0.0.1",
        )
    # Before the handler of Ray's node, which ends the raylet under a connected driver: the last one registered is called first.
    atexit.register(ray.shutdown)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep the core worker's own announcements, which no log level reaches, off the terminal; exceptions pass."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@dataclass(frozen=True)
class Width:
    """How wide a stage works: `num_workers` 0 means in the driver. `cpus` of a worker are its computing threads too."""

    num_workers: int
    cpus: int
    gpus: float


def width(resources: Resources) -> Width:
    """Return the workers of a stage: as asked for, else one a GPU, else one a CPU, else (on a laptop) the driver."""
    num_workers, cpus, gpus = (
        resources.num_workers,
        resources.cpus_per_worker,
        resources.gpus_per_worker,
    )
    if num_workers == 0:
        return Width(0, cpus, max(0.0, gpus))
    here = ray.cluster_resources()
    if gpus < 0:
        gpus = 1.0 if here.get("GPU", 0) else 0.0
    if num_workers < 0:
        here_cpus = int(here.get("CPU", 0))
        here_gpus = here.get("GPU", 0.0)
        if not (here_gpus if gpus else here_cpus):
            num_workers = _UNSEEN_WORKERS
        elif gpus:
            num_workers = max(1, int(here_gpus / gpus))
        elif len(ray.nodes()) == 1 and here_cpus <= _LAPTOP_CPUS:
            return Width(0, cpus, 0.0)
        else:
            num_workers = max(1, here_cpus // cpus)
    if not os.environ.get("RAY_ADDRESS"):
        _refuse_more_than_here(num_workers, cpus, gpus, here)
    return Width(num_workers, cpus, gpus)


def _refuse_more_than_here(
    num_workers: int, cpus: int, gpus: float, here: Mapping[str, float]
) -> None:
    """Refuse workers that this machine has no room for: without a cluster that could grow, Ray would wait for ever."""
    for option, asked, kind in (
        ("cpus-per-worker", cpus, "CPU"),
        ("gpus-per-worker", gpus, "GPU"),
    ):
        if num_workers * asked > (has := here.get(kind, 0)):
            raise ConfigError(
                f"--num-workers {num_workers} of --{option} {asked:g}: this machine has {has:g} {kind}s; lower them, or join a "
                "cluster that has more (RAY_ADDRESS, or ray job submit)"
            )
