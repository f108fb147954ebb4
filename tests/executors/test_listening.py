"""What listens while a run is at work on this machine, who may write into Ray's folder, and workers that can never exist."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from tests.stages import scarcity, tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.config import Resources
from wmdd_ray.errors import ConfigError, WmddError
from wmdd_ray.executors import cluster
from wmdd_ray.executors.cluster import Width
from wmdd_ray.spine.run import StageRun

LISTEN = "0A"


def listening_of(pids: set[int]) -> Iterator[str]:
    """Yield the addresses on which processes of this machine listen (TCP), as the kernel lists them."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue  # closed, or its process has ended
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                count = len(words) // 4
                packed = struct.pack(f"={count}I", *struct.unpack(f">{count}I", words))
                yield socket.inet_ntop(family, packed).removeprefix("::ffff:")


def test_a_socket_on_every_interface_is_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0)):
        assert {"0.0.0.0", "127.0.0.1"} <= set(listening_of({os.getpid()}))
    if socket.has_ipv6:
        with socket.create_server(("::", 0), family=socket.AF_INET6):
            assert "::" in set(listening_of({os.getpid()}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rooms", "options"),
    [
        # A process group of torch in a group of Ray Train, Ray Data, actors of barycenters.
        pytest.param(
            (), ("--until", "barycenters", "--num-workers", "2", "--executor", "train"), id="groups"
        ),
        pytest.param(
            tiny.ROOMS[:3],
            ("--until", "recover", "--num-workers", "1", "--executor", "actors"),
            id="actors",
            marks=pytest.mark.chaos_long,
        ),
    ],
)
def test_nothing_of_a_local_run_listens_beyond_this_machine_and_its_folder_is_closed(
    rooms: tuple[str, ...], options: tuple[str, ...], finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms)
    # Not under pytest's folder: the path of a socket has at most 107 characters.
    folder = Path("/tmp") / f"wmdd-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    mark = uuid.uuid4().hex
    environment = {**os.environ, "WMDD_RAY_MARK": mark, "RAY_TMPDIR": str(folder)}
    command = tiny.command(out, *options)
    job = subprocess.Popen(
        command, cwd=tiny.ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )  # fmt: skip
    found: set[str] = set()
    try:
        while job.poll() is None:
            found |= set(listening_of({p.pid for p in scarcity.marked_processes(mark)}))
            time.sleep(0.5)
        assert job.returncode == 0, job.communicate()[1]
    finally:
        job.kill()
        job.communicate()
    assert found == {"127.0.0.1"}
    (closed,) = folder.iterdir()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert list((closed / "ray").glob("session_*"))
    shutil.rmtree(folder)


def test_a_folder_that_somebody_opened_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    closed = Path(cluster._own_folder()).parent
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    closed.chmod(0o777)
    with pytest.raises(ConfigError, match="that nobody else may enter, found mode 777"):
        cluster._own_folder()
    closed.rmdir()
    closed.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="that nobody else may enter"):
        cluster._own_folder()


def test_the_address_of_a_dashboard_is_told_from_that_of_a_head() -> None:
    with pytest.raises(ConfigError, match="expected the head's HOST:6379, got the address of its"):
        cluster.require_head("http://127.0.0.1:8265")


@pytest.mark.parametrize(
    ("limits", "left"),
    [((256, 4096), (1024, 4096)), ((4096, 4096), (4096, 4096)), ((64, -1), (1024, -1))],
)
def test_a_soft_limit_of_open_files_is_raised(
    limits: tuple[int, int], left: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [limits]
    monkeypatch.setattr(cluster.resource, "getrlimit", lambda _: found[-1])
    monkeypatch.setattr(cluster.resource, "setrlimit", lambda _, new: found.append(new))
    cluster._allow_files()
    assert found[-1] == left


def test_too_few_open_files_are_told_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(ConfigError, match="at most 64 open files are allowed .*, Ray needs 1024"):
        cluster._start_local(40, verbose=True)


@pytest.mark.parametrize("kind", [RuntimeError, Exception])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_did_not_start_is_started_once_more(
    failures: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def init(level: int, verbose: bool) -> None:
        tries.append(level)
        if len(tries) <= failures:
            raise kind("Failed to start GCS. Last 0 lines of error files:\n\n.")

    monkeypatch.setattr(cluster, "_init_local", init)
    monkeypatch.setattr(cluster, "ray", SimpleNamespace(shutdown=lambda: None))
    if failures == 1:
        cluster._start_local(40, verbose=True)
    else:
        told = "did not start on this machine, twice: Failed to start GCS. Last 0 lines"
        with pytest.raises(WmddError, match=told):
            cluster._start_local(40, verbose=True)
    assert tries == [40, 40]


def test_a_folder_of_one_machine_is_refused_where_an_autoscaler_may_add_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Nodes(monkeypatch, True, {"CPU": 4.0})
    monkeypatch.setattr(cluster, "require_head", lambda address: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect("runs/mine")  # a Ray of this machine alone
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    cluster.connect("s3://bucket/run")
    with pytest.raises(ConfigError, match="expected a URI that every node of the cluster see"):
        cluster.connect("runs/mine")
    monkeypatch.setattr(cluster, "has_autoscaler", lambda _: False)
    cluster.connect("runs/mine")


# Workers that can never exist --------------------------------------------------------------------


class Nodes:
    """A cluster of nodes that are there at some time, and tasks that nobody runs."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, grows: bool, *nodes: dict[str, float]
    ) -> None:
        self.now, self.later = 0.0, [(0.0, node) for node in nodes]
        self.asked: list[dict[str, float]] = []
        self.cancelled = 0
        monkeypatch.setattr(cluster, "ray", self)
        monkeypatch.setattr(cluster, "has_autoscaler", lambda _: grows)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(cluster, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": at <= self.now, "Resources": node} for at, node in self.later]

    def cluster_resources(self) -> dict[str, float]:
        alive = [node["Resources"] for node in self.nodes() if node["Alive"]]
        return {kind: sum(has.get(kind, 0.0) for has in alive) for kind in ("CPU", "GPU")}

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="")

    def remote(self, **wanted: float) -> Any:
        return lambda _: SimpleNamespace(remote=lambda: self.asked.append(wanted))

    def cancel(self, task: None) -> None:
        self.cancelled += 1


def stage_of(worker_timeout_s: float) -> StageRun:
    resources = Resources(worker_timeout_s=worker_timeout_s)
    named = SimpleNamespace(name="squeeze")
    return cast(StageRun, SimpleNamespace(stage=named, resources=resources))


def test_workers_for_which_no_node_is_large_enough_are_told_each_minute_and_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = Nodes(monkeypatch, False, {"CPU": 2.0})
    cluster.await_room(stage_of(3600), Width(2, 1, 0.0), num_needed=2)
    assert caplog.messages == [] and nodes.asked == []
    with pytest.raises(
        ConfigError, match="8 workers of 1 CPUs are needed, and the cluster has room for 2"
    ) as told:
        cluster.await_room(stage_of(3600), Width(8, 1, 0.0), num_needed=8)
    assert "no autoscaler is seen) after 300 s; lower --num-workers" in str(told.value)
    assert len(caplog.messages) == 5
    assert nodes.cancelled == len(nodes.asked) == 8
    with pytest.raises(ConfigError, match="1 workers of 1 CPUs and 1 GPUs are needed"):
        cluster.await_room(stage_of(3600), Width(1, 1, 1.0))
    # Two CPUs of two nodes are no worker of two.
    nodes.later = [(0.0, {"CPU": 1.0}), (0.0, {"CPU": 1.0})]
    with pytest.raises(ConfigError, match="has room for 0"):
        cluster.await_room(stage_of(3600), Width(1, 2, 0.0))


def test_a_cluster_that_grows_is_asked_for_all_workers_and_waited_for_as_long_as_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = Nodes(monkeypatch, True, {"CPU": 0.0})
    nodes.later.append((1000.0, {"CPU": 8.0, "GPU": 1.0}))
    cluster.await_room(stage_of(3600), Width(4, 1, 1.0))
    assert nodes.now == 1000.0
    assert nodes.asked == 4 * [{"num_cpus": 1, "num_gpus": 1.0}]
    assert "waiting for up to 3600 s" in caplog.messages[0] and len(caplog.messages) == 17
    with pytest.raises(WmddError, match="after 100 s") as told:
        cluster.await_room(stage_of(100), Width(1, 16, 0.0))
    assert told.value.exit_code == 1, "starting it again may find machines"


@pytest.mark.parametrize(
    ("cpus", "free_bytes", "expected"),
    [(4, 1 << 40, 512 << 20), (64, 1 << 40, None), (64, 64 << 20, 512 << 20)],
    ids=["laptop", "server", "container"],
)
def test_a_local_ray_has_half_a_gigabyte_for_objects_but_on_a_server(
    cpus: int, free_bytes: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    assert cluster._object_store_bytes() == expected


@pytest.mark.parametrize(("gpus", "num_workers"), [(0.5, 4), (0.6, 2), (1.0, 2), (2.0, 1)])
def test_parts_of_gpus_are_counted_by_the_gpu(
    gpus: float, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(monkeypatch, False, {"CPU": 8.0, "GPU": 2.0})
    wide = cluster.width(Resources(gpus_per_worker=gpus))
    assert wide == Width(num_workers, 1, gpus)
    cluster.await_room(stage_of(3600), wide, num_needed=num_workers)
    with pytest.raises(ConfigError, match="this machine has 2 GPUs"):
        cluster.width(Resources(num_workers=num_workers + 1, gpus_per_worker=gpus))
    with pytest.raises(ConfigError, match=f"has room for {num_workers} "):
        cluster.await_room(stage_of(3600), wide, num_needed=num_workers + 1)
    assert nodes.cancelled == len(nodes.asked)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_real_ray_without_an_autoscaler_is_given_up_and_left_free() -> None:
    cluster.await_room(stage_of(1), Width(2, 1, 0.0), num_needed=2)
    for wide in (Width(3, 64, 0.0), Width(1, 1, 1.0)):
        with pytest.raises(ConfigError, match="no autoscaler is seen"):
            cluster.await_room(stage_of(1), wide)
    ray.get(ray.remote(num_cpus=2)(cluster._nothing).remote(), timeout=60)
