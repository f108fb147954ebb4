"""The job on clusters that others started: `ray job submit`, with and without a token, and two nodes."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray  # noqa: F401 - puts the psutil that Ray brings on the path

from tests.conftest import free_port
from tests.stages import tiny

import psutil  # isort: skip

pytestmark = pytest.mark.slow

BESIDE_PYTHON = Path(sys.executable).parent
RAY = str(BESIDE_PYTHON / "ray")


@dataclass(frozen=True)
class Head:
    """A running head node: the address of its dashboard and the environment that may talk to it."""

    address: str
    environment: dict[str, str]


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    path = os.pathsep.join([str(BESIDE_PYTHON), kept["PATH"]])
    return {**kept, "PATH": path, "PYTHONWARNINGS": "default", **changes}


@contextmanager
def ended_with_its_children(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process and all that it started, however the test ends."""
    root = psutil.Process(process.pid)
    try:
        yield
    finally:
        started = root.children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in started:
            if child.is_running():
                child.kill()
        psutil.wait_procs(started, timeout=10)


@contextmanager
def head_node(**auth: str) -> Iterator[Head]:
    """Start a head node on 127.0.0.1, with ports and a folder of its own."""
    # Not under pytest's folder: the path of a socket has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="wmdd-")
    dashboard = free_port()
    start = [RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000"]
    start += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    start += [f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    names = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "ray-client-server",
        "metrics-export",
    )
    start += [f"--{name}-port={free_port()}" for name in names]
    start += ["--min-worker-port=0", "--max-worker-port=0"]  # any that is free
    with open(Path(folder) / "log", "w") as log:
        process = subprocess.Popen(
            start,
            stdout=log,
            stderr=log,
            env=environment(**auth),
            text=True,
            start_new_session=True,
        )
    head = Head(f"http://127.0.0.1:{dashboard}", environment(**auth))
    try:
        with ended_with_its_children(process):
            wait_for(f"{head.address}/api/version", process, Path(folder) / "log")
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except urllib.error.HTTPError as refused:
            refused.close()
            return  # it answers: that it wants a token is for the test to see
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no head node: {log.read_text()}") from None
        time.sleep(0.3)


def submit(
    head: Head, out: Path, *options: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    job = ["python", *tiny.command(out, *options)[1:]]
    command = [RAY, "job", "submit", "--address", head.address, "--working-dir", ".", "--", *job]
    return subprocess.run(
        command,
        cwd=tiny.ROOT,
        env=env or head.environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_cluster_with_a_token_runs_the_submitted_job_of_who_has_it_only(tmp_path: Path) -> None:
    token = secrets.token_hex(32)
    with head_node(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as head:
        stranger = environment(RAY_AUTH_MODE="disabled")
        refused = submit(head, tmp_path / "refused", "--until", "squeeze", env=stranger)
        assert refused.returncode != 0
        assert "authentication" in (refused.stdout + refused.stderr).lower()
        assert not (tmp_path / "refused").exists()

        done = submit(head, tmp_path / "run")
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "succeeded" in said
        assert "features    20/20 done" in said
        assert "(d) all real images | 1437 | 1 |" in said
        assert token not in said
    commits = [
        json.loads((tmp_path / "run" / room / "stage.json").read_text()) for room in tiny.ROOMS
    ]
    assert {commit["stage"]: len(commit["units"]) for commit in commits} == tiny.UNITS


def test_a_cluster_without_authentication_runs_the_submitted_job(tmp_path: Path) -> None:
    with head_node(RAY_AUTH_MODE="disabled") as head:
        done = submit(head, tmp_path / "run", "--until", "squeeze")
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/teacher/stage.json").exists()


TWO_NODES = """
import os, sys
import ray
from ray.cluster_utils import Cluster
node = dict(num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=80 << 20)
cluster = Cluster(initialize_head=True, head_node_args=node | dict(include_dashboard=False))
cluster.add_node(**node)
os.environ["RAY_ADDRESS"] = cluster.address
from jobs import distill
code = distill.main(sys.argv[1:])
ray.shutdown()
cluster.shutdown()
sys.exit(code)
"""


def test_two_nodes_refuse_an_output_folder_of_one_of_them(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES, *tiny.command(out)[2:]],
        cwd=tiny.ROOT,
        env=environment(RAY_AUTH_MODE="disabled", PYTHONPATH=str(tiny.ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with ended_with_its_children(process):
        _, errors = process.communicate(timeout=150)
    assert process.returncode == 2, errors
    assert f"error: --out {out}: expected a URI that all 2 nodes of the cluster see" in errors
    assert not (out / "teacher/stage.json").exists()
