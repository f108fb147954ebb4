"""The doctor's look at the cluster, and at every node of it from inside."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from wmdd_ray.errors import ArtifactError, ConfigError, DataError
from wmdd_ray.product.tables import size
from wmdd_ray.spine.provenance import installed
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Shard, Source

from ..distill import default_out
from .report import Finding, Visit, many
from .storage import Speed, measure_speed, told_speed

_HEAD_TIMEOUT_S = 10
_TOKEN_TIMEOUT_S = 10
_NODE_TIMEOUT_S = 60
_FULL = 0.95  # no more objects are spilled to a disk that is fuller
_SHARD_IMAGES = 512
PACKAGES = ("ray", "torch", "torchvision", "numpy", "scipy", "POT", "pyarrow", "pillow", "s3fs", "safetensors")  # fmt: skip
"""Packages that must be the same on all nodes: a result depends on them, or they unpack each other's data."""


def check_cluster(visit: Visit) -> Iterator[Finding]:
    """Join the cluster, or start Ray here as a run would, and tell how wide a stage works on it."""
    import ray

    from wmdd_ray.executors import cluster

    address = os.environ.get("RAY_ADDRESS", "")
    verbose = visit.job.verbose
    try:
        if address:
            cluster.require_head(address)
    except ConfigError as error:
        yield Finding("FAIL", str(error), exit_code=error.exit_code)
        return
    try:
        # Ray's core tells once a second that it has the wrong token.
        with contextlib.nullcontext() if verbose else cluster.hushed():
            cluster.connect(visit.job.out or default_out(visit.job.config), verbose=verbose)
    except ConfigError as error:
        yield Finding("FAIL", str(error), exit_code=error.exit_code)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        yield Finding(
            "FAIL",
            f"cannot join {address or 'a Ray on this machine'}: {str(error).partition('. ')[0]}",
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN (or ~/.ray/auth_token) must be the cluster's",
        )
    visit.joined = ray.is_initialized()
    if not visit.joined:
        return
    has = ray.cluster_resources()
    joined = "at" if address else "started at"
    address = ray.get_runtime_context().gcs_address
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    yield Finding(
        "ok",
        f"Ray {ray.__version__} {joined} {address}: "
        f"{many(num_nodes, 'node')}, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs, {size(has.get('memory', 0))} of "
        f"memory, {size(has.get('object_store_memory', 0))} for objects",
    )
    yield _workers(visit, has, grows=cluster.has_autoscaler(address))
    yield authentication(ray._private.worker.get_dashboard_url())


def _workers(visit: Visit, has: Mapping[str, float], *, grows: bool) -> Finding:
    """Tell how wide a stage works on the cluster's resources."""
    from wmdd_ray.executors.cluster import width, workers_on

    growth = "an autoscaler adds nodes" if grows else "no autoscaler is seen"
    try:
        wide = width(visit.job.resources)
    except ConfigError as error:
        return Finding("FAIL", f"{error}; {growth}", exit_code=error.exit_code)
    if wide.num_workers == 0:
        return Finding("ok", f"stages work in this process; {growth}")
    rooms = [has.get("CPU", 0) // wide.cpus]
    rooms += [workers_on(has.get("GPU", 0), wide.gpus)] if wide.gpus else []
    each = many(wide.cpus, "CPU") + (f" and {many(wide.gpus, 'GPU')}" if wide.gpus else "")
    text = f"stages work on {many(wide.num_workers, 'worker')} of {each} each, with room for {min(rooms):g} now; {growth}"
    if min(rooms) < wide.num_workers and not grows:
        return Finding("FAIL", text, "add nodes, or lower --num-workers and what a worker asks for")
    return Finding("ok", text)


def authentication(dashboard: str | None) -> Finding:
    """Ask the job API, which runs any command, without a token; look at the mode where there is no such API."""
    mode = os.environ.get("RAY_AUTH_MODE")
    asks, where = mode == "token", f"RAY_AUTH_MODE is {mode or 'not set'}"
    if dashboard:
        jobs = f"http://{dashboard}/api/jobs/"
        try:
            with urllib.request.urlopen(jobs, timeout=_TOKEN_TIMEOUT_S):
                asks, where = False, f"{jobs} runs commands of anybody, without a token"
        except urllib.error.HTTPError as refused:
            asks = refused.code in (401, 403)
            where = f"{jobs} answers {refused.code} to who has no token"
            refused.close()
    if asks:
        return Finding("ok", where)
    advice = "start the cluster with RAY_AUTH_MODE=token (cluster/README.md)"
    return Finding("warning", where, advice)


@dataclass(frozen=True)
class Node:
    """What a node sees."""

    versions: dict[str, str]
    temp_folder: str
    temp_free_bytes: int
    temp_total_bytes: int
    shm_total_bytes: int
    sees_driver: bool
    data_problem: str
    speed: Speed | None


def look_at_node(
    name: str, probe: Store | None, sample: tuple[Source, Shard] | None, timed: bool
) -> Node:
    """Return what this node sees: its versions and disks, the driver's object, an image of the data."""
    import ray

    temp_folder = ray._private.worker._global_node.get_session_dir_path()
    temp = shutil.disk_usage(temp_folder)
    sees_driver, data_problem = True, ""
    if probe is not None:
        try:
            sees_driver = probe.get("driver") == b"driver"
        except FileNotFoundError:
            sees_driver = False
        probe.put(name, name.encode())
    if sample is not None:
        source, shard = sample
        try:
            next(iter(source.read_shard(shard)))
        except Exception as error:
            data_problem = str(error)
    return Node(
        versions=versions_here(),
        temp_folder=temp_folder,
        temp_free_bytes=temp.free,
        temp_total_bytes=temp.total,
        shm_total_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        sees_driver=sees_driver,
        data_problem=data_problem,
        speed=measure_speed(probe.child(f"speed-{name}")) if probe and timed else None,
    )


def versions_here() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES` where this runs."""
    packages = {name: installed(name) or "none" for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def check_nodes(visit: Visit) -> Iterator[Finding]:
    """Run a task on every node, and compare what they see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not visit.joined:
        yield Finding("skipped", "needs cluster")
        return
    probe: Store | None = None
    if "storage" not in visit.failed:
        probe = visit.probe.child("nodes")
        probe.put("driver", b"driver")
    sample: tuple[Source, Shard] | None = None
    if "data" not in visit.failed:
        source: Source = visit.run.source("train")
        sample = source, source.shards(_SHARD_IMAGES)[0]
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    here = ray.get_runtime_context().get_node_id()
    away = next((node_id for node_id in alive if node_id != here), None)
    look = ray.remote(num_cpus=0, max_retries=0)(look_at_node)
    refs = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(node_id, probe, sample, node_id == away): node_id
        for node_id in alive
    }
    ray.wait(list(refs), num_returns=len(refs), timeout=_NODE_TIMEOUT_S)
    good: list[Node] = []
    for ref, node_id in refs.items():
        name = alive[node_id]["NodeManagerAddress"]
        try:
            node: Node = ray.get(ref, timeout=1)
            shared = node.sees_driver and (probe is None or probe.get(node_id) == node_id.encode())
        except FileNotFoundError:
            shared = False
        except Exception as error:
            cause = str(getattr(error, "cause", None) or error).strip() or repr(error)
            yield Finding(
                "FAIL",
                f"{name}: {cause.splitlines()[-1]}",
                "is this checkout there (ray job submit --working-dir .), with requirements-run.txt installed?",
            )
            continue
        store_bytes = int(alive[node_id]["Resources"].get("object_store_memory", 0))
        problems = list(_problems(visit, node, store_bytes, shared=shared))
        yield from (replace(problem, found=f"{name}: {problem.found}") for problem in problems)
        if not problems:
            good.append(node)
        if node.speed is not None:
            yield told_speed(f"from {name}", node.speed)
    if good:
        sees = [*(["--out"] if probe else []), *(["--data"] if sample else [])]
        yield Finding(
            "ok",
            f"{many(len(good), 'node')} with the versions of here{', seeing ' if sees else ''}{' and '.join(sees)}; "
            f"{size(min(node.temp_free_bytes for node in good))} free for Ray in {good[0].temp_folder}, "
            f"{size(min(node.shm_total_bytes for node in good))} of shared memory",
        )


def _problems(visit: Visit, node: Node, store_bytes: int, *, shared: bool) -> Iterator[Finding]:
    here = versions_here()
    others = [
        f"{name} {node.versions[name]} (here {v})"
        for name, v in here.items()
        if node.versions[name] != v
    ]
    if others:
        yield Finding("FAIL", ", ".join(others), "install requirements-run.txt on every node")
    if not shared:
        yield Finding(
            "FAIL",
            f"what is written under {visit.run.store.uri} is not the same place there",
            "use a URI that all nodes see, such as s3://bucket/prefix or a disk that every node has mounted",
            exit_code=ArtifactError.exit_code,
        )
    if node.data_problem:
        yield Finding("FAIL", node.data_problem, exit_code=DataError.exit_code)
    if node.temp_free_bytes < (1 - _FULL) * node.temp_total_bytes:
        yield Finding(
            "warning",
            f"{size(node.temp_free_bytes)} free in {node.temp_folder}, less than 5 %",
            "Ray spills no objects to a disk that is so full: make room, or set RAY_TMPDIR",
        )
    if node.shm_total_bytes < store_bytes:
        yield Finding(
            "warning",
            f"{size(node.shm_total_bytes)} of shared memory for {size(store_bytes)} of objects",
            "Ray then keeps objects on disk: give the container more (docker run --shm-size)",
        )
