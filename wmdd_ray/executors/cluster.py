"""The cluster that a run finds or starts, and how wide a stage may work on it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

from wmdd_ray.config import Resources
from wmdd_ray.errors import ConfigError, WmddError
from wmdd_ray.spine.run import StageRun

logger = logging.getLogger(__name__)

# A laptop: up to this many CPUs the driver works, and worker processes join it where that pays (`beside.py`).
_LAPTOP_CPUS = 4
_HEAD_TIMEOUT_S = 10.0
# Workers to ask an autoscaler for that has started nothing yet, when nobody says how many (--num-workers).
_UNSEEN_WORKERS = 2
_LAPTOP_OBJECT_STORE_BYTES = 512 << 20
# Ray's processes on one machine open hundreds of sockets and files.
_NEEDED_FILES = 1024
# A cluster that nobody makes larger: a node that was lost may be on its way back.
_FIXED_WAIT_S = 300.0
_TELL_EVERY_S = 60.0


def connect(out: str | None, *, verbose: bool = False) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as inside `ray job submit`), or start one on this machine.

    A local Ray listens on 127.0.0.1 only and asks for a token that is made for this run alone. `out` is the root URI of the run,
    None where nothing is written. `verbose` shows Ray's own log lines and those of the workers.

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
    if out is None:
        return
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    # A head without CPUs does nothing itself: nodes that do are still to come, once they are asked for.
    elsewhere = num_nodes > 1 or not ray.cluster_resources().get("CPU")
    if os.environ.get("RAY_ADDRESS") and "://" not in out:
        elsewhere = elsewhere or has_autoscaler(ray.get_runtime_context().gcs_address)
    if out.startswith("memory://") or (elsewhere and "://" not in out):
        nodes = f"all {num_nodes} nodes" if num_nodes > 1 else "every node"
        raise ConfigError(
            f"--out {out}: expected a URI that {nodes} of the cluster see, such as s3://bucket/prefix (or "
            "file:///mount/folder for a disk that every node has mounted)"
        )


def require_head(address: str) -> None:
    """Make sure that something listens at `address`: Ray would go on trying for minutes."""
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: expected the head's HOST:6379, got the address of its dashboard; type `ray job submit "
            f"--address {address} -- python jobs/...`, or give the head's"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_HEAD_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(
                f"no cluster at RAY_ADDRESS={address}: {error}; start its head, or unset RAY_ADDRESS to work on this machine alone"
            ) from error


def has_gpus() -> bool:
    """Return whether the cluster has GPUs now, which workers then take (`width`)."""
    return bool(ray.cluster_resources().get("GPU", 0))


def is_one_machine() -> bool:
    """Return whether all nodes are on this machine, and speak to each other on its loopback interface."""
    return all(n["NodeManagerAddress"].startswith("127.") for n in ray.nodes() if n["Alive"])


def _own_folder() -> str:
    """Return the folder for a local Ray's sessions. Ray lets everybody write into these, so it lies in one that is closed.

    Raises:
        ConfigError: Somebody else has made the folder, or opened it.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    folder = base / f"wmdd_ray-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o777 != 0o700:
        raise ConfigError(
            f"{folder}: expected a folder of this user that nobody else may enter, found mode {status.st_mode & 0o777:o} of user "
            f"{status.st_uid}; remove it, or set RAY_TMPDIR to a folder of your own"
        )
    return str(folder / "ray")


def _allow_files() -> None:
    """Let this process and those that it starts open as many files as Ray needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _NEEDED_FILES:
        if hard != resource.RLIM_INFINITY and hard < _NEEDED_FILES:
            raise ConfigError(
                f"at most {hard} open files are allowed here (ulimit -n), Ray needs {_NEEDED_FILES}: start the job in a shell or "
                "container with more (docker run --ulimit nofile=65536), or pass --executor here, which starts no Ray"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (_NEEDED_FILES, hard))


def _start_local(level: int, verbose: bool) -> None:
    _allow_files()
    # Workers import the package from this checkout, wherever the driver was started.
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    for is_last in (False, True):
        try:
            with contextlib.nullcontext() if verbose else hushed():
                _init_local(level, verbose)
            break
        except ConfigError:
            raise
        except Exception as error:
            # On a busy machine a part of Ray comes too late for the others, which Ray may tell by a bare Exception.
            ray.shutdown()
            if is_last:
                reason = str(error).strip().splitlines()[0]
                raise WmddError(
                    f"Ray did not start on this machine, twice: {reason}; it may be busy or short of memory: run the same command "
                    "again, or pass --executor here, which starts no Ray"
                ) from error
    # Before the handler of Ray's node, which ends the raylet under a connected driver: the last one registered is called first.
    atexit.register(ray.shutdown)


def _init_local(level: int, verbose: bool) -> None:
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=False,
        object_store_memory=_object_store_bytes(),
        logging_level=level,
        log_to_driver=verbose,
        _node_ip_address="127.0.0.1",
        _temp_dir=_own_folder(),
    )


def _object_store_bytes() -> int | None:
    """Return how much memory a local Ray has for objects: None is its own choice, 30 % of all, within what /dev/shm has free."""
    shared = Path("/dev/shm")
    is_small = (os.cpu_count() or 1) <= _LAPTOP_CPUS or not shared.is_dir()
    if is_small or shutil.disk_usage(shared).free < 4 * _LAPTOP_OBJECT_STORE_BYTES:
        return _LAPTOP_OBJECT_STORE_BYTES
    return None


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
    here = ray.cluster_resources()
    if gpus < 0:
        gpus = 1.0 if has_gpus() else 0.0
    if num_workers == 0:
        return Width(0, cpus, gpus)
    if num_workers < 0:
        here_cpus = int(here.get("CPU", 0))
        here_gpus = here.get("GPU", 0.0)
        if not (here_gpus if gpus else here_cpus):
            num_workers = _UNSEEN_WORKERS
        elif gpus:
            num_workers = max(1, workers_on(here_gpus, gpus))
        elif len(ray.nodes()) == 1 and here_cpus <= _LAPTOP_CPUS:
            return Width(0, cpus, 0.0)
        else:
            num_workers = max(1, here_cpus // cpus)
    if not os.environ.get("RAY_ADDRESS"):
        _refuse_more_than_here(num_workers, cpus, gpus, here)
    return Width(num_workers, cpus, gpus)


def workers_on(has: float, each: float) -> int:
    """Return how many workers of `each` GPUs (or CPUs) a machine has room for: a part of a GPU is a part of one of them."""
    return int(has) * int(1 / each) if each < 1 else int(has // each)


def _refuse_more_than_here(
    num_workers: int, cpus: int, gpus: float, here: Mapping[str, float]
) -> None:
    """Refuse workers that this machine has no room for: without a cluster that could grow, Ray would wait for ever."""
    for option, each, kind in (
        ("cpus-per-worker", cpus, "CPU"),
        ("gpus-per-worker", gpus, "GPU"),
    ):
        if each and num_workers > workers_on(has := here.get(kind, 0), each):
            raise ConfigError(
                f"--num-workers {num_workers} of --{option} {each:g}: this machine has {has:g} {kind}s; lower them, or join a "
                "cluster that has more (RAY_ADDRESS, or ray job submit)"
            )


def await_room(stage: StageRun, wide: Width, num_needed: int = 1) -> None:
    """Return when the nodes have room for `num_needed` workers, and say each minute what is waited for.

    Raises:
        ConfigError: They have not, and nothing is seen that adds nodes.
        WmddError: An autoscaler has added none of that kind in `--worker-timeout-s`.
    """
    began = time.monotonic()
    warned = began - _TELL_EVERY_S
    asked_for: list[ray.ObjectRef[None]] = []
    grows = False
    try:
        while (room := _room(wide)) < num_needed:
            if not asked_for:
                grows = has_autoscaler(ray.get_runtime_context().gcs_address)
                # An autoscaler sees tasks that wait, and takes them for the stage's workers.
                probe = ray.remote(num_cpus=wide.cpus, num_gpus=wide.gpus)(_nothing)
                asked_for = [probe.remote() for _ in range(max(wide.num_workers, num_needed))]
            limit_s = stage.resources.worker_timeout_s
            limit_s = limit_s if grows else min(limit_s, _FIXED_WAIT_S)
            each = f"{wide.cpus} CPUs" + (f" and {wide.gpus:g} GPUs" if wide.gpus else "")
            has = ray.cluster_resources()
            text = (
                f"{stage.stage.name}: {num_needed} workers of {each} are needed, and the cluster has room for {room} (it has "
                f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
                f"{'' if grows else ', and no autoscaler is seen'})"
            )
            now = time.monotonic()
            if now - began >= limit_s:
                kind = WmddError if grows else ConfigError
                raise kind(
                    f"{text} after {limit_s:g} s; lower --num-workers, --cpus-per-worker or --gpus-per-worker, or add nodes"
                )
            if now - warned >= _TELL_EVERY_S:
                logger.warning("%s; waiting for up to %.0f s", text, limit_s - (now - began))
                warned = now
            time.sleep(0.5)
    finally:
        for task in asked_for:
            ray.cancel(task)


def _nothing() -> None:
    """Do nothing, where there is room for it."""


def _room(wide: Width) -> int:
    """Return how many workers fit on the nodes that are alive, were they idle."""
    room = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        fits = int(has.get("CPU", 0) // wide.cpus)
        room += min(fits, workers_on(has.get("GPU", 0), wide.gpus)) if wide.gpus else fits
    return room


def has_autoscaler(address: str) -> bool:
    """Return whether an autoscaler that can add nodes has reported to the cluster."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(address)
    except Exception:  # an experimental part of Ray: knowing nothing is no failure
        return False
    # A head without one reports too, and calls each node by its id.
    names = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    return any(name and not name.startswith("node_") for name in names)
