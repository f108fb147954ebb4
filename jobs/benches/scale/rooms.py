"""An S3 server on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import fsspec


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
