"""The store in front of an S3 that fails: what passes is waited for, what lasts is told at once."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3fs

from tests.conftest import S3Uri
from tests.store import faulty_s3
from tests.store.faulty_s3 import PASSING, FaultyS3
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store import retries
from wmdd_ray.store.documents import entry_of, read_verified
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources.files import reading
from wmdd_ray.store.uris import arrow_filesystem

ATTEMPTS = len(retries.WAITS_S) + 1
OPERATIONS: dict[str, Callable[[Store], Any]] = {
    "get": lambda store: store.get("a/x"),
    "put": lambda store: store.put("b/y", b"new"),
    "create": lambda store: store.create("stage.json", b"mine"),
    "list": lambda store: store.list("a"),
    "exists": lambda store: store.exists("a/x"),
    "delete": lambda store: store.delete("b"),
}
# What each asks the server; a deletion lists first.
METHODS = {
    "get": "GET",
    "put": "PUT",
    "create": "PUT",
    "list": "GET",
    "exists": "HEAD",
    "delete": "DELETE",
}
ANSWERS = {
    "get": b"content",
    "put": None,
    "create": True,
    "list": {"a/x": 7},
    "exists": True,
    "delete": None,
}
# After these aiohttp asks a second time by itself.
CLOSING = ("refuse", "reset", "drop", "hang")


@pytest.fixture
def faulty(
    s3_server: S3Uri, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyS3]:
    """The proxy, which is the endpoint of every store that the test opens; waits are cut to nothing."""
    monkeypatch.setattr(retries, "WAITS_S", (0.0,) * len(retries.WAITS_S))
    with FaultyS3(s3_endpoint) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        # A client keeps the endpoint that it was made with.
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def store(faulty: FaultyS3, s3_server: S3Uri) -> Store:
    store = Store(s3_server())
    store.put("a/x", b"content")
    return store


@pytest.mark.parametrize("fault", [*(f for f in PASSING if f != "slow"), 409])
def test_two_faults_that_pass_are_not_noticed(
    store: Store, faulty: FaultyS3, fault: int | str
) -> None:
    faulty.hang_s = 0.02
    for operation, do in OPERATIONS.items():
        if fault == "cut" and METHODS[operation] != "GET":
            continue  # nothing to cut
        faulty.break_down(fault, times=2, method=METHODS[operation])
        assert do(store) == ANSWERS[operation], operation
        assert faulty.left == 0, operation
        store.put("b/y", b"new")


def test_a_server_that_drips_is_left_for_another_connection(
    store: Store, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 3.0)
    faulty.break_down("slow", times=2)
    assert store.get("a/x") == b"content"
    assert faulty.asked("GET") == 3


@pytest.mark.parametrize("fault", [f for f in PASSING if f not in ("slow", "hang")])
def test_a_fault_that_stays_is_named_after_as_many_attempts_as_there_are(
    store: Store, faulty: FaultyS3, fault: int | str
) -> None:
    for operation in ("get", "create", "exists") if fault != "cut" else ("get", "list"):
        faulty.break_down(fault, times=1000)
        with pytest.raises(
            ArtifactError, match=rf"cannot .*{store.uri}.* run the same command again"
        ):
            OPERATIONS[operation](store)
        most = 2 * ATTEMPTS if fault in CLOSING else ATTEMPTS
        assert ATTEMPTS <= len(faulty.requests) <= most, operation


@pytest.mark.parametrize("fault", ["hang", "slow"])
def test_a_server_without_an_end_is_left_at_the_deadline(
    store: Store, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 1.0)
    faulty.hang_s = 60
    for operation in ("get", "create"):
        faulty.break_down(fault, times=1000)
        started = time.monotonic()
        with pytest.raises(
            ArtifactError, match=rf"cannot .*{store.uri}.*no whole answer in time \(at most 1 s"
        ):
            OPERATIONS[operation](store)
        # Not the server's 60 s and more; the margin is a busy machine's.
        assert 0.9 < time.monotonic() - started < 20
        assert len(faulty.requests) <= ATTEMPTS


def test_an_attempt_that_ends_past_the_deadline_is_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 0.01)
    attempts: list[float] = []

    def late(seconds: float) -> None:
        attempts.append(seconds)
        time.sleep(0.02)
        raise TimeoutError("as of a busy machine")

    with pytest.raises(TimeoutError, match="as of a busy machine"):
        retries.retried(late, renew=lambda: None)
    assert len(attempts) == 1


def test_wrong_credentials_are_told_at_once(store: Store, faulty: FaultyS3) -> None:
    for operation, do in OPERATIONS.items():
        faulty.break_down(403, times=1000)
        with pytest.raises(ArtifactError, match=rf"{store.uri}.*access denied.*credentials"):
            do(store)
        assert len(faulty.requests) == 1, operation


@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "RequestExpired"])
def test_a_clock_that_is_wrong_is_told_as_such_by_every_operation(
    store: Store, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    said = rf"{store.uri}.*clock and the store's are too far apart; set the clock"
    monkeypatch.setitem(faulty_s3.CODES, 403, code)
    # The reply to a HEAD has no page with the code, but the store's own time.
    late = SimpleNamespace(
        time=lambda: time.time() - 3600, monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr(retries, "time", late)
    for operation, do in OPERATIONS.items():
        faulty.break_down(403, times=1000)
        with pytest.raises(ArtifactError, match=said):
            do(store)
        assert len(faulty.requests) <= 2, operation
    arrows = "AWS Error " + re.sub("(?<=[a-z])(?=[A-Z])", "_", code).upper()
    with pytest.raises(ArtifactError, match="set the clock"), reading("s3://b/x", "a tar"):
        raise OSError(f"When reading information for key 'x': {arrows} during HeadObject operation")


def test_expired_credentials_are_read_again_once(store: Store, faulty: FaultyS3) -> None:
    for operation in ("get", "create", "exists"):
        do = OPERATIONS[operation]
        faulty.break_down(400, times=1, method=METHODS[operation])
        assert do(store) == ANSWERS[operation], operation
        assert faulty.left == 0
        faulty.break_down(400, times=1000)
        with pytest.raises(
            ArtifactError, match=rf"{store.uri}.*credentials have expired.*the same command again"
        ):
            do(store)
        # Where a HEAD is refused with 400, botocore asks for the region of the bucket.
        assert len(faulty.requests) == (4 if operation == "exists" else 2), operation


def test_keys_that_are_replaced_in_the_credentials_file_are_used_from_then_on(
    store: Store, faulty: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"

    def write_keys(name: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id={name}\naws_secret_access_key=secret\n")

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    s3fs.S3FileSystem.clear_instance_cache()
    write_keys("old")
    store = Store(store.uri)
    assert store.get("a/x") == b"content"
    faulty.expired.add("old")
    with pytest.raises(ArtifactError, match="credentials have expired"):
        store.get("a/x")
    write_keys("new")
    faulty.break_down("", times=0)
    assert store.get("a/x") == b"content"
    assert [asked.fault for asked in faulty.requests] == [400, ""]


def test_arrow_asks_as_often_and_names_the_key(store: Store, faulty: FaultyS3) -> None:
    fs, path = arrow_filesystem(store.uri)
    faulty.break_down(500, times=1000)
    with pytest.raises(OSError, match=r"run/a/x'.*AWS Error.* 500"):
        fs.open_input_file(f"{path}/a/x")
    assert len(faulty.requests) == ATTEMPTS


def test_objects_are_deleted_one_by_one_where_a_list_of_them_is_refused(
    store: Store, faulty: FaultyS3
) -> None:
    for number in range(40):
        store.put(f"a/{number}", b"x")
    faulty.break_down(501, times=1, method="POST")  # JuiceFS and MinIO's code miss a Content-MD5
    store.delete("a")
    assert (faulty.asked("DELETE"), faulty.asked("POST"), store.list("a")) == (41, 0, {})


def test_a_listing_that_ends_early_is_asked_for_again(store: Store, faulty: FaultyS3) -> None:
    faulty.break_down("short", times=2)
    assert store.list("a") == {"a/x": 7}
    assert len(faulty.requests) == 3


@pytest.mark.parametrize("fault", ["short", "flip"])
def test_wrong_bytes_of_an_object_with_a_checksum_are_never_content(
    store: Store, faulty: FaultyS3, fault: str
) -> None:
    faulty.break_down(fault, times=1)
    assert store.get("a/x") == b"content"
    assert faulty.left == 0
    faulty.break_down(fault, times=1000)
    with pytest.raises(ArtifactError, match=rf"cannot read {store.uri}/a/x.*hecksum"):
        store.get("a/x")
    assert len(faulty.requests) == ATTEMPTS


@pytest.mark.parametrize("fault", ["short", "flip"])
def test_wrong_bytes_of_an_object_without_one_are_refused_by_what_was_committed(
    store: Store, faulty: FaultyS3, fault: str
) -> None:
    content = bytes(range(256)) * 50
    plain = store.uri.replace("s3:/", faulty.endpoint) + "/plain"
    as_bytes = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(plain, content, as_bytes, method="PUT")
    with urllib.request.urlopen(request, timeout=30):
        pass
    entry = entry_of("plain", content)
    assert read_verified(store, entry) == content
    faulty.break_down(fault, times=1)
    assert store.get("plain") != content, "the proxy's fault would be found without the entry"
    faulty.break_down(fault, times=1)
    assert read_verified(store, entry) == content
    assert len(faulty.requests) == 2
    faulty.break_down(fault, times=1000)
    with pytest.raises(ArtifactError, match=rf"{store.uri}/plain: expected 12800 bytes"):
        read_verified(store, entry)
    assert len(faulty.requests) == 2


def test_a_bucket_that_is_not_there_is_told_at_once_by_every_operation(
    faulty: FaultyS3, s3_server: S3Uri
) -> None:
    s3_server()
    store = Store("s3://no-such-bucket-here/run")
    for operation, do in OPERATIONS.items():
        faulty.break_down("", times=0)
        with pytest.raises(ArtifactError, match=rf"{store.uri}.*no such bucket.*create it"):
            do(store)
        assert len(faulty.requests) <= 2, operation


def test_the_probe_finds_a_store_that_ignores_conditions(store: Store, faulty: FaultyS3) -> None:
    faulty.break_down("", times=0)
    store.probe()
    assert len(faulty.requests) <= 9
    faulty.ignores_conditions = True
    with pytest.raises(
        ArtifactError,
        match=rf"{store.uri}.*two writers created .*both publish.*--allow-unsafe-commits",
    ):
        store.probe()
    assert store.list() == {"a/x": 7}


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
    puts = [asked.headers for asked in faulty.requests if asked.method == "PUT"]
    assert len(puts) == 2
    assert [headers.get("If-None-Match") for headers in puts] == ["*", "*"]
    faulty.break_down("drop", times=1, method="PUT")
    assert not store.create("stage.json", b"theirs")
    assert store.get("stage.json") == b"mine"


def test_an_object_of_any_size_is_one_request_and_one_conditional_commit(
    store: Store, faulty: FaultyS3
) -> None:
    # From 100 MiB on s3fs would send it in parts, which a killed writer leaves to be paid for.
    content = bytes(range(256)) * (101 << 12)
    faulty.break_down("", times=0)
    assert store.create("large", content)
    assert [(asked.method, asked.headers.get("If-None-Match")) for asked in faulty.requests] == [
        ("PUT", "*")
    ]
    assert not store.create("large", content[::-1])
    assert store.get("large") == content
