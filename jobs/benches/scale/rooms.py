"""Listing, reading and committing the units of a room, on a disk and on an S3 server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from unittest import mock

import fsspec

from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.store.documents import seal
from wmdd_ray.store.filesystem import Store

from ..reporting import Row


def store_rows(uri: str, name: str, num_units: int) -> list[Row]:
    """Say how long a room of so many units takes: markers written side by side as by actors, the rest as the driver does."""
    room = Room(Store(uri), "barycenters", "bench")
    units = [f"{label:05d}" for label in range(num_units)]
    metrics = {"cost": 1.0, "num_iters": 10, "converged": True, "num_images": 1300}
    rows: list[Row] = []

    def clocked(what: str, started: float) -> None:
        seconds = time.perf_counter() - started
        rows.append({"what": f"{name}: {what}", "actors": "-", "value": seconds, "unit": "s"})

    def commit_unit(unit: str) -> None:
        key = f"classes/{unit}.safetensors"
        room.commit_unit(unit, {key: b"x" * 100_000}, metrics=metrics, attempt=1)

    started = time.perf_counter()
    with ThreadPoolExecutor(32) as actors:
        list(actors.map(commit_unit, units))
    clocked("commit units from 32 threads", started)
    started = time.perf_counter()
    assert room.finished() == set(units)
    clocked("list", started)
    started = time.perf_counter()
    markers = room.read_units(units)
    clocked("read markers", started)
    started = time.perf_counter()
    commit = StageCommit(
        stage="barycenters",
        version=1,
        fingerprint="bench",
        options={},
        inputs={},
        units=markers,
        metrics={},
        seconds=0.0,
        host=socket.gethostname(),
        run="bench",
        finished="",
    )
    assert room.commit(commit)
    clocked("commit", started)
    started = time.perf_counter()
    assert len(room.committed().units) == num_units
    clocked("read the commit", started)
    size = len(seal(asdict(commit))) / 1e6
    return [*rows, {"what": f"{name}: stage.json", "actors": "-", "value": size, "unit": "MB"}]


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Yield the URI of an empty bucket on an S3 server (moto) on this machine."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", **credentials}
    try:
        _wait_for(server, endpoint)
        request = urllib.request.Request(f"{endpoint}/bench", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        with mock.patch.dict(os.environ, environment):
            _forget_connections()
            yield "s3://bench/run"
    finally:
        _forget_connections()
        server.kill()
        server.wait()


def _forget_connections() -> None:
    """Drop what fsspec keeps for s3://: the endpoint, which comes from the environment, is not among what it is kept by."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def _wait_for(server: subprocess.Popen[bytes], endpoint: str) -> None:
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(endpoint, timeout=10).close()
            return
        time.sleep(0.2)
    raise RuntimeError("moto does not answer; it comes with the package's [test] extra")
