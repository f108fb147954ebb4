"""The store in front of an S3 that fails: what passes is waited for, what lasts is told at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import s3fs

from tests.conftest import S3Uri
from tests.store.faulty_s3 import FaultyS3
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store import filesystem, retries
from wmdd_ray.store.filesystem import Store

ATTEMPTS = len(retries.WAITS_S) + 1
OPERATIONS: dict[str, Callable[[Store], Any]] = {
    "get": lambda store: store.get("a/x"),
    "put": lambda store: store.put("b/y", b"new"),
    "create": lambda store: store.create("stage.json", b"mine"),
    "list": lambda store: store.list("a"),
    "exists": lambda store: store.exists("a/x"),
    "delete": lambda store: store.delete("b"),
}
# A deletion lists first.
METHODS = {"delete": "POST"}
ANSWERS = {
    "get": b"content",
    "put": None,
    "create": True,
    "list": {"a/x": 7},
    "exists": True,
    "delete": None,
}


@pytest.fixture
def faulty(
    s3_server: S3Uri, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyS3]:
    """The proxy, which is the endpoint of every store that the test opens; waits are cut to nothing."""
    server = FaultyS3(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setattr(retries, "WAITS_S", (0.0,) * len(retries.WAITS_S))
    # A client keeps the endpoint that it was made with.
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(faulty: FaultyS3, s3_server: S3Uri) -> Store:
    store = Store(s3_server())
    store.put("a/x", b"content")
    return store


@pytest.mark.parametrize("fault", [500, 503, 409, "refuse", "drop"])
def test_a_fault_that_passes_is_not_noticed(
    store: Store, faulty: FaultyS3, fault: int | str
) -> None:
    for operation, do in OPERATIONS.items():
        faulty.break_down(fault, times=1, method=METHODS.get(operation, ""))
        assert do(store) == ANSWERS[operation], operation
        assert faulty.left == 0, operation


def test_a_body_that_breaks_off_is_read_again(store: Store, faulty: FaultyS3) -> None:
    faulty.break_down("cut", times=1, method="GET")
    assert store.get("a/x") == b"content"
    assert faulty.left == 0


@pytest.mark.parametrize("fault", [500, "refuse"])
def test_a_fault_that_stays_is_named_after_as_many_attempts_as_there_are(
    store: Store, faulty: FaultyS3, fault: int | str
) -> None:
    for operation, do in OPERATIONS.items():
        faulty.break_down(fault, times=1000)
        with pytest.raises(ArtifactError, match=rf"cannot .*{store.uri}.*AWS_ENDPOINT_URL"):
            do(store)
        # aiohttp asks again by itself when an old connection turns out closed; a create looks after its object.
        assert ATTEMPTS <= len(faulty.requests) <= 2 * ATTEMPTS, operation


def test_wrong_credentials_are_told_at_once(store: Store, faulty: FaultyS3) -> None:
    for operation, do in OPERATIONS.items():
        faulty.break_down(403, times=1000)
        with pytest.raises(ArtifactError, match=rf"{store.uri}.*access denied.*credentials"):
            do(store)
        assert len(faulty.requests) <= 2, operation


def test_what_the_server_will_never_do_is_asked_once(store: Store, faulty: FaultyS3) -> None:
    faulty.break_down(501, times=1000)
    with pytest.raises(ArtifactError, match="cannot write"):
        store.put("key", b"x")
    assert len(faulty.requests) == 1


def test_missing_credentials_are_told_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=rf"cannot write {store.uri}/key.*credentials"):
        Store(store.uri).put("key", b"x")
    assert time.monotonic() - started < 10


def test_a_server_that_hangs_is_left_after_as_many_timeouts_as_attempts(
    store: Store, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = {**filesystem._S3_OPTIONS["config_kwargs"], "read_timeout": 0.1}
    options = {**filesystem._S3_OPTIONS, "config_kwargs": impatient}
    monkeypatch.setattr(filesystem, "_S3_OPTIONS", options)
    faulty.break_down("hang", times=1000)
    with pytest.raises(ArtifactError, match="cannot read .*imeout"):
        Store(store.uri).get("a/x")
    assert len(faulty.requests) == ATTEMPTS


def test_a_missing_object_is_not_asked_for_again(store: Store, faulty: FaultyS3) -> None:
    faulty.break_down("", times=0)
    with pytest.raises(FileNotFoundError):
        store.get("nothing")
    assert len(faulty.requests) <= 2


def test_a_create_is_a_conditional_write_whose_lost_reply_is_not_a_lost_run(
    store: Store, faulty: FaultyS3
) -> None:
    faulty.break_down("drop", times=1, method="PUT")
    assert store.create("stage.json", b"mine")
    puts = [headers for method, _, headers in faulty.requests if method == "PUT"]
    assert len(puts) == 2
    assert [headers.get("If-None-Match") for headers in puts] == ["*", "*"]
    faulty.break_down("drop", times=1, method="PUT")
    assert not store.create("stage.json", b"theirs")
    assert store.get("stage.json") == b"mine"


def _in_parts(monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    """Let s3fs send an object in parts from twice `part_bytes` on, which it does from 100 MiB on."""
    whole = s3fs.S3FileSystem._pipe_file

    async def parts(self: Any, path: str, data: bytes, **options: Any) -> Any:
        return await whole(self, path, data, chunksize=part_bytes, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", parts)
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_object_that_is_sent_in_parts_is_one_conditional_commit(
    store: Store, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_parts(monkeypatch, 5 << 20)
    store = Store(store.uri)
    content = bytes(range(256)) * (12 << 12)  # 12 MiB
    faulty.break_down("", times=0)
    assert store.create("large", content)
    assert faulty.asked("PUT") == 3
    begin, commit = (headers for method, _, headers in faulty.requests if method == "POST")
    assert (begin.get("If-None-Match"), commit.get("If-None-Match")) == (None, "*")
    assert not store.create("large", content[::-1])
    assert store.get("large") == content


def test_an_object_whose_parts_do_not_arrive_is_not_there_at_all(
    store: Store, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_parts(monkeypatch, 5 << 20)
    store = Store(store.uri)
    faulty.break_down(500, times=1000, method="PUT")
    with pytest.raises(ArtifactError, match="cannot write"):
        store.put("large", bytes(12 << 20))
    assert store.list() == {"a/x": 7}
    # Parts that nobody completes would be paid for until somebody looks.
    assert faulty.asked("DELETE") == ATTEMPTS
