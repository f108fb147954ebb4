"""Listing, reading and committing the units of a room, on a disk and on an S3 server."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from unittest import mock

import fsspec

from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.store.filesystem import Store

from ..reporting import Row


def store_rows(uri: str, name: str, num_units: int) -> list[Row]:
    """Say how long a room of so many units takes: markers written side by side as by actors, the rest as the driver does."""
    room = Room(Store(uri), "barycenters", "bench")
    units = [f"{label:05d}" for label in range(num_units)]
    metrics = {"cost": 1.0, "num_iters": 10, "converged": True, "num_images": 1300}
    rows: list[Row] = []

    @contextlib.contextmanager
    def clocked(what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        rows.append({"what": f"{name}: {what}", "actors": "-", "value": seconds, "unit": "s"})

    def commit_unit(unit: str) -> None:
        key = f"classes/{unit}.safetensors"
        room.commit_unit(unit, {key: b"x" * 100_000}, metrics=metrics, attempt=1)

    with ThreadPoolExecutor(32) as actors:
        list(actors.map(commit_unit, units))
    with clocked("list"):
        assert room.finished() == set(units)
    with clocked("read markers"):
        markers = room.read_units(units)
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
    with clocked("commit"):
        assert room.commit(commit)
    return rows


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Yield the URI of an empty bucket on an S3 server (moto) in another process of this machine."""
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        endpoint = process.submit(_serve).result()
        request = urllib.request.Request(f"{endpoint}/bench", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        with mock.patch.dict(os.environ, environment | credentials):
            # What fsspec keeps for s3:// does not depend on the endpoint, which comes from the environment.
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            yield "s3://bench/run"
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def _serve() -> str:
    """Start a server that ends with this process, and return its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"
