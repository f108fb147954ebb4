"""The store on a GCS server, and in front of one that fails: as on S3, by another client."""

from __future__ import annotations

import json
import pickle
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.conftest import S3Uri, free_port
from tests.store import contract
from tests.store.fake_gcs import FaultyGcs
from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store import retries
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources.files import open_whole
from wmdd_ray.store.sources.listing import NothingThereError, list_files
from wmdd_ray.store.uris import arrow_filesystem

ATTEMPTS = len(retries.WAITS_S) + 1
LARGE = bytes(range(256)) * (51 << 12)
"""51 MiB: from 50 MiB on gcsfs would send it in a session of several requests."""
OPERATIONS: dict[str, tuple[Callable[[Store], Any], Any, str]] = {
    "get": (lambda store: store.get("a/x"), b"content", "GET"),
    "put": (lambda store: store.put("b/y", b"new"), None, "POST"),
    "create": (lambda store: store.create("stage.json", b"mine"), True, "POST"),
    "list": (lambda store: store.list("a"), {"a/x": 7}, "GET"),
    "exists": (lambda store: store.exists("a/x"), True, "GET"),
    "delete": (lambda store: store.delete("b"), None, "DELETE"),
}
"""What is done, what it returns, and the method by which the server is asked (a deletion lists first)."""


@pytest.fixture(scope="module")
def bucket(gcs_server: S3Uri) -> str:
    return gcs_server()


@pytest.fixture
def store(bucket: str) -> Store:
    return Store(f"{bucket}/{uuid.uuid4().hex}")


@pytest.fixture
def faulty(gcs_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyGcs]:
    """The proxy, which every store asks from now on; waits are cut to nothing."""
    monkeypatch.setattr(retries, "WAITS_S", (0.0,) * len(retries.WAITS_S))
    with FaultyGcs(gcs_endpoint) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        yield server


def test_what_is_put_is_got_listed_and_deleted_under_any_name(store: Store) -> None:
    contract.assert_what_is_put_is_got_listed_and_deleted_under_any_name(store)


def test_a_store_travels_and_has_children_and_either_scheme(store: Store) -> None:
    store.put("child/key", b"content")
    child = pickle.loads(pickle.dumps(store)).child("child")
    assert child.uri == f"{store.uri}/child"
    assert child.get("key") == b"content"
    assert Store(child.uri.replace("gs://", "gcs://")).list() == {"key": 7}


def test_a_create_is_won_once(store: Store) -> None:
    contract.assert_a_create_is_won_once(store)


def test_the_server_itself_refuses_the_second_create(store: Store, gcs_endpoint: str) -> None:
    bucket = store.uri.removeprefix("gs://").split("/")[0]

    def upload(content: bytes) -> urllib.request.Request:
        body = b'--x\nContent-Type: application/json\n\n{"name": "raw"}\n--x\nContent-Type: text/plain\n\n%s\n--x--'
        return urllib.request.Request(
            f"{gcs_endpoint}/upload/storage/v1/b/{bucket}/o?uploadType=multipart&ifGenerationMatch=0",
            body % content,
            {"Content-Type": "multipart/related; boundary=x"},
        )

    urllib.request.urlopen(upload(b"first"), timeout=30).close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(upload(b"second"), timeout=30)
    refused.value.close()
    assert refused.value.code == 412


def test_one_of_many_writers_wins_each_key(store: Store) -> None:
    start = threading.Barrier(8)

    def create_all(writer: str) -> list[bool]:
        mine, won = Store(store.uri), []
        for i in range(20):
            start.wait()
            won.append(mine.create(f"units/{i}", writer.encode()))
        return won

    with ThreadPoolExecutor(8) as pool:
        won = dict(zip("abcdefgh", pool.map(create_all, "abcdefgh"), strict=True))
    for i in range(20):
        assert [writer.encode() for writer in won if won[writer][i]] == [store.get(f"units/{i}")]


def test_a_large_object_is_one_conditional_request(store: Store, faulty: FaultyGcs) -> None:
    faulty.break_down("", times=0)
    assert store.create("large", LARGE)
    asked = [(asked.method, "ifGenerationMatch=0" in asked.path) for asked in faulty.requests]
    assert asked == [("POST", True)]
    assert not store.create("large", LARGE[::-1])
    assert store.get("large") == LARGE


def test_a_writer_that_ends_in_the_middle_leaves_nothing(
    store: Store, gcs_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "WAITS_S", ())
    store.put("replaced", b"what was there before")
    passed: list[int] = []
    with socket.create_server(("127.0.0.1", free_port())) as listener:

        def cut() -> None:
            for _ in range(2):
                address = gcs_endpoint.removeprefix("http://").split(":")
                client, _ = listener.accept()
                with client, socket.create_connection((address[0], int(address[1]))) as behind:
                    passed.append(0)
                    while passed[-1] < len(LARGE) // 2:
                        piece = client.recv(1 << 20)
                        behind.sendall(piece)
                        passed[-1] += len(piece)

        threading.Thread(target=cut, daemon=True).start()
        with monkeypatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{listener.getsockname()[1]}")
            for key, write in (("created", store.create), ("replaced", store.put)):
                with pytest.raises(ArtifactError, match=rf"{store.uri}/{key}.* the same command"):
                    write(key, LARGE)
    assert len(passed) == 2
    assert store.list() == {"replaced": 21}
    assert store.create("created", LARGE)


@pytest.mark.parametrize(
    "fault", [408, 409, 429, 500, 502, 503, 504, "503 html", "refuse", "reset", "hang", "drop"]
)
def test_two_faults_that_pass_are_not_noticed(
    store: Store, faulty: FaultyGcs, fault: int | str
) -> None:
    faulty.hang_s = 0.02
    store.put("a/x", b"content")
    store.put("b/y", b"old")
    for operation, (do, answer, method) in OPERATIONS.items():
        faulty.break_down(fault, times=2, method=method)
        assert do(store) == answer, operation
        assert faulty.left == 0, operation
        store.put("b/y", b"new")


def test_a_reply_that_breaks_off_is_asked_for_again(store: Store, faulty: FaultyGcs) -> None:
    store.put("a/x", b"content")
    for operation in ("get", "list"):
        do, answer, method = OPERATIONS[operation]
        faulty.break_down("cut", times=2, method=method)
        assert do(store) == answer, operation
        assert len(faulty.requests) == 3


@pytest.mark.parametrize("fault", [429, 502, 503, "refuse"])
def test_a_fault_that_stays_is_named_after_as_many_attempts_as_there_are(
    store: Store, faulty: FaultyGcs, fault: int | str
) -> None:
    for operation in ("get", "put", "create", "list"):
        faulty.break_down(fault, times=1000)
        with pytest.raises(
            ArtifactError, match=rf"cannot .*{store.uri}.* run the same command again"
        ) as told:
            OPERATIONS[operation][0](store)
        # After a connection that is closed without a reply aiohttp repeats what is no POST.
        twice = fault == "refuse" and OPERATIONS[operation][2] == "GET"
        assert len(faulty.requests) == ATTEMPTS * (2 if twice else 1), operation
        assert "AWS" not in str(told.value)
        assert "\n" not in str(told.value)


def test_a_server_without_an_end_is_left_at_the_deadline(
    store: Store, faulty: FaultyGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 1.0)
    faulty.hang_s = 60
    faulty.break_down("hang", times=1000)
    started = time.monotonic()
    with pytest.raises(
        ArtifactError, match=rf"cannot create {store.uri}.*no whole answer in time \(at most 1 s"
    ):
        store.create("key", b"x")
    # Not the server's 60 s and more; the margin is a busy machine's.
    assert 0.9 < time.monotonic() - started < 20
    assert len(faulty.requests) <= ATTEMPTS


@pytest.mark.parametrize(
    ("status", "said", "told", "attempts"),
    [
        (
            401,
            "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object.",
            r"no credentials were found \(HTTP 401: Anonymous.*GOOGLE_APPLICATION_CREDENTIALS",
            1,
        ),
        (
            401,
            "Invalid Credentials",
            r"credentials have expired or are not valid \(authError: .*same command",
            2,
        ),
        (403, "a@b does not have storage.objects.get access", r"access denied \(HTTP 403: a@b", 1),
        (404, "The specified bucket does not exist.", "no such bucket .*create it", 1),
        (400, "invalid argument", "OSError: HTTP 400: invalid argument; check that", 1),
        (501, "Not Implemented", "does not know this kind of request .*ifGenerationMatch", 1),
    ],
)
def test_what_lasts_is_told_at_once_with_what_to_do(
    store: Store, faulty: FaultyGcs, status: int, said: str, told: str, attempts: int
) -> None:
    faulty.said = said
    for operation, (do, _, _) in OPERATIONS.items():
        faulty.break_down(status, times=1000)
        with pytest.raises(ArtifactError, match=rf"cannot .*{store.uri}.*: .*{told}") as error:
            do(store)
        assert "AWS" not in str(error.value)
        assert len(faulty.requests) == attempts, operation


def test_a_bucket_that_is_not_there_is_told_by_whoever_asks_for_more_than_an_object(
    gcs_server: S3Uri,
) -> None:
    store = Store("gs://no-such-bucket-here/run")
    for operation, (do, _, _) in OPERATIONS.items():
        if operation != "get":  # Google says it there too; this server does not
            with pytest.raises(ArtifactError, match=rf"{store.uri}.*no such bucket.*create it"):
                do(store)
    with pytest.raises(ArtifactError, match="no such bucket.*create it"):
        list_files(store.uri, SourceConfig())


def test_the_probe_finds_a_store_that_ignores_conditions(
    store: Store, faulty: FaultyGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Store.put

    def unconditional(store: Store, key: str, content: bytes) -> bool:
        put(store, key, content)
        return True

    monkeypatch.setattr(Store, "_create_remote", unconditional)
    with pytest.raises(ArtifactError, match="two writers created .*--allow-unsafe-commits"):
        store.probe()
    assert store.list() == {}


def test_a_deletion_of_many_that_fails_for_some_is_repeated(
    store: Store, faulty: FaultyGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wmdd_ray.store.gcs import Gcs

    # Where Google answers gcsfs deletes in batches, with repetitions of its own and without a status.
    monkeypatch.setattr(Gcs, "on_google", True)
    for i in range(150):
        store.put(f"units/{i}", b"x")
    store.put("other", b"x")
    faulty.break_down(503, times=50, method="DELETE")
    store.delete("units")
    assert store.list() == {"other": 1}
    faulty.break_down(503, times=1000, method="DELETE")
    with pytest.raises(ArtifactError, match="cannot delete .*asks for fewer requests"):
        store.delete("other")
    assert faulty.asked("DELETE") == ATTEMPTS


def test_arrow_lists_and_reads_what_the_store_wrote(store: Store) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"image": [bytes([i]) * 50_000 for i in range(200)], "label": range(200)})
    pq.write_table(table, sink, row_group_size=20)
    content = sink.getvalue().to_pybytes()
    store.put("train/part-0.parquet", content)
    store.put("train/part-1.parquet", content)
    store.put("train/.hidden", b"x")
    assert list_files(f"{store.uri}/train", SourceConfig()) == (
        f"{store.uri}/train",
        {f"part-{i}.parquet": len(content) for i in range(2)},
        (".hidden",),
    )
    assert list_files(f"{store.uri}/train/part-{{0..1}}.parquet", SourceConfig())[1].keys() == {
        "part-0.parquet",
        "part-1.parquet",
    }
    with pytest.raises(NothingThereError, match=f"{store.uri}/none: expected images"):
        list_files(f"{store.uri}/none", SourceConfig())
    fs, path = arrow_filesystem(f"{store.uri}/train")
    with open_whole(fs, f"{path}/part-1.parquet", "part 1", len(content)) as file:
        assert pq.read_table(file).equals(table)
    with open_whole(fs, f"{path}/part-0.parquet", "part 0", None) as file:
        file.seek(1000)
        assert file.read(5000) == content[1000:6000]


@pytest.mark.parametrize("fault", [503, "reset", "cut"])
def test_a_reader_of_images_asks_again_and_no_more_often_than_a_store(
    store: Store, faulty: FaultyGcs, fault: int | str
) -> None:
    store.put("images/a.png", b"content")
    for times in (2, 1000):
        fs, path = arrow_filesystem(store.uri)
        faulty.break_down("", times=0)
        with fs.open_input_file(f"{path}/images/a.png") as file:
            faulty.break_down(fault, times=times)
            if times == 2:
                assert file.read() == b"content"
                assert faulty.left == 0
            else:
                with pytest.raises(OSError, match=r"HTTP 503|[Dd]isconnected|[Pp]ayload|reset"):
                    file.read()
                # aiohttp repeats a request whose connection is closed without a reply.
                assert len(faulty.requests) == ATTEMPTS * (2 if fault == "reset" else 1)


def test_a_store_of_images_that_fails_or_refuses_is_not_taken_for_an_empty_folder(
    store: Store, faulty: FaultyGcs
) -> None:
    for status, told in ((503, "the store asks for fewer"), (403, "access denied .HTTP 403")):
        faulty.break_down(status, times=1000)
        with pytest.raises(ArtifactError, match=f"cannot read {store.uri}/images: {told}"):
            list_files(f"{store.uri}/images", SourceConfig())
        assert len(faulty.requests) == (ATTEMPTS if status == 503 else 1)
        fs, path = arrow_filesystem(store.uri)
        with pytest.raises(OSError, match=f"HTTP {status}"):
            fs.open_input_file(f"{path}/images/a.png")
        with pytest.raises(OSError, match=f"HTTP {status}"):
            fs.get_file_info(pafs.FileSelector(f"{path}/images"))


def test_without_gcsfs_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    monkeypatch.delitem(sys.modules, "wmdd_ray.store.gcs", raising=False)
    with pytest.raises(ArtifactError, match="cannot open gs://b/run: .*pip install gcsfs"):
        Store("gs://b/run").get("key")


class Accounts(ThreadingHTTPServer):
    """Google's token server: gives what it has to give, and counts what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Accounts)
        self.status, self.asked = 200, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class _Accounts(BaseHTTPRequestHandler):
    server: Accounts

    def do_POST(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        reply = {"access_token": f"token-{self.server.asked}", "expires_in": 3600}
        refusal = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
        content = json.dumps(reply if self.server.status == 200 else refusal).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def accounts(
    faulty: FaultyGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Accounts]:
    """The token server of a service account whose key file is in the environment, and the proxy for Google's store."""
    from wmdd_ray.store.gcs import Gcs

    server = Accounts()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "client_email": "account@project.iam.gserviceaccount.com",
        "token_uri": f"http://127.0.0.1:{server.server_port}/token",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setattr("gcsfs.core._location", lambda *_: faulty.endpoint)
    Gcs.clear_instance_cache()
    yield server
    Gcs.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_key_file_opens_the_store_and_is_read_again_when_its_token_is_refused(
    store: Store, faulty: FaultyGcs, accounts: Accounts
) -> None:
    store.put("key", b"content")
    faulty.said = "Invalid Credentials"
    faulty.break_down(401, times=1)
    assert store.get("key") == b"content"
    assert [asked.headers["authorization"] for asked in faulty.requests] == [
        "Bearer token-1",
        "Bearer token-2",
    ]


def test_a_key_that_google_refuses_is_told_at_once_and_never_shown(
    store: Store, faulty: FaultyGcs, accounts: Accounts
) -> None:
    accounts.status = 400
    faulty.break_down("", times=0)
    with pytest.raises(
        ArtifactError,
        match=f"cannot read {store.uri}/key: the credentials have expired.*Invalid JWT",
    ) as told:
        store.get("key")
    assert faulty.requests == []
    assert accounts.asked == 2
    assert "PRIVATE" not in str(told.value)
    assert "token-" not in str(told.value)


def test_a_token_server_that_does_not_answer_is_asked_as_often_as_a_store(
    store: Store, accounts: Accounts
) -> None:
    accounts.shutdown()
    accounts.server_close()
    with pytest.raises(ArtifactError, match=f"cannot read {store.uri}/key: ConnectionError"):
        store.get("key")
