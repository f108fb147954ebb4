"""A head without CPUs and a worker node with two, on 127.0.0.1: processes of our own, so that all of them can be killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray  # noqa: F401 - puts the psutil that Ray brings on the path

from tests.conftest import free_port

import psutil  # isort: skip

_RAY = str(Path(sys.executable).parent / "ray")
# A lost node is noticed in five seconds; a busy one has ten to answer.
_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_register_timeout_seconds": "120",
}
# Daemons among them: a raylet ends itself when one of these is lost, so that would be the loss of a node.
_NOT_WORKERS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")

# Ray's own detached actors. A PlacementGroupCleaner waits for the dashboard, which is not here, to say that its controller died.
_KEPT = ("ray::_", "ray::ActorLocationTracker", "ray::PlacementGroupCleaner")
_MARK = "WMDD_CHAOS_CLUSTER"

_NODE = """
import sys, threading
from ray._private.node import Node
from ray._private.parameter import RayParams

parameters = RayParams(
    node_ip_address="127.0.0.1", gcs_address=sys.argv[1], redis_address=sys.argv[1], num_cpus=2, num_gpus=0,
    object_store_memory=100_000_000, min_worker_port=0, max_worker_port=0, node_manager_port=0,
    dashboard_agent_listen_port=None, include_log_monitor=False,
)
Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
threading.Event().wait()
"""


class TwoNodes:
    """A cluster whose head and worker node are started, killed and replaced one by one."""

    def __init__(self) -> None:
        # Not under pytest's folder: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="wmdd-"))
        # The mark by which all that belongs to this cluster is found, whoever its parent has become.
        self.environment = {**os.environ, **_SETTINGS, _MARK: str(self.folder)}
        self.environment.pop("RAY_ADDRESS", None)
        self.address = ""
        self._head: psutil.Popen | None = None
        self._node: psutil.Popen | None = None
        self._known: set[object] = set()

    def start(self) -> None:
        """Start what is not running."""
        if self._head is None:
            port = free_port()
            self.address = f"127.0.0.1:{port}"
            self._head = self._ray(
                "--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={self.folder}/{port}",
                "--include-dashboard=false", f"--ray-client-server-port={free_port()}",
            )  # fmt: skip
            self._wait()
        if self._node is None:
            # Not `ray start --address`, which refuses the setting that keeps Ray on 127.0.0.1.
            self._node = self._popen([sys.executable, "-c", _NODE, self.address])
            self._wait()

    def kill_node(self) -> int:
        """Take the worker node away with everything that runs on it; return the number of processes."""
        assert self._node is not None
        killed = _kill(self._node)
        self._node = None
        return killed

    def kill_head(self) -> int:
        """Take the head away, and with it the cluster."""
        assert self._head is not None
        killed = _kill(self._head)
        self._head = None
        return killed + self.kill_node()

    def workers(self, *, kept: bool = True) -> list[psutil.Process]:
        """Return the worker processes of both nodes that are at work, with or without those that Ray keeps when a job ends."""
        not_these = _NOT_WORKERS if kept else (*_NOT_WORKERS, *_KEPT)
        found = []
        for node in (self._head, self._node):
            with contextlib.suppress(psutil.Error):
                found += node.children(recursive=True) if node else []
        return [process for process in found if _is_at_work(process, not_these)]

    def orphans(self) -> list[psutil.Process]:
        """Return the processes that belong to no running node and are still there."""
        own = {process.pid for node in (self._head, self._node) if node for process in _tree(node)}
        return [
            process
            for process in psutil.process_iter()
            if process.pid not in own and self._has(process)
        ]

    def end(self) -> None:
        """Kill everything and remove the session's files."""
        for node in (self._node, self._head):
            if node is not None:
                _kill(node)
        self._node = self._head = None
        while left := self.orphans():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _has(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get(_MARK) == str(self.folder)
        return False

    def _ray(self, *options: str) -> psutil.Popen:
        command = [_RAY, "start", "--block", "--node-ip-address=127.0.0.1", *options]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # any that is free
        return self._popen(command)

    def _popen(self, command: list[str]) -> psutil.Popen:
        with open(self.folder / "log", "a") as log:
            return psutil.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def _wait(self) -> None:
        """Wait until a node is alive that was not before, as the control store sees it."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                infos = GcsClient(address=self.address).get_all_node_info(timeout=5)
                alive = {node for node, info in infos.items() if info.state == 0}
                if alive - self._known:
                    self._known |= alive
                    return
            time.sleep(0.3)
        raise TimeoutError(f"no new node: {(self.folder / 'log').read_text()}")


def _is_at_work(process: psutil.Process, not_these: tuple[str, ...]) -> bool:
    try:
        name = " ".join(process.cmdline())
        return name.startswith("ray::") and not name.startswith(not_these)
    except psutil.Error:
        return False


def _kill(root: psutil.Popen) -> int:
    """Kill a process and all that it started, parents first so that none is replaced."""
    tree = _tree(root)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=20)
    root.wait()
    return len(tree)


def _tree(root: psutil.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [root, *root.children(recursive=True)]
    return [root]


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Yield a running cluster and end it."""
    cluster = TwoNodes()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
