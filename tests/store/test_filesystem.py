from __future__ import annotations

import errno
import os
import pickle
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import S3Uri, free_port
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store import filesystem, retries
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import arrow_filesystem


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    if request.param == "memory":
        return Store(f"memory://test-{uuid.uuid4().hex}/root")
    return Store(request.getfixturevalue("s3_server")())


def test_what_is_put_is_got_listed_and_deleted(store: Store) -> None:
    assert store.list() == {}
    store.put("a/one.bin", b"1")
    store.put("a/two.bin", b"22")
    store.put("b/three.bin", b"333")
    assert store.get("a/two.bin") == b"22"
    assert store.list() == {"a/one.bin": 1, "a/two.bin": 2, "b/three.bin": 3}
    assert store.list("a") == {"a/one.bin": 1, "a/two.bin": 2}
    store.put("a/one.bin", b"again")
    assert store.get("a/one.bin") == b"again"
    store.delete("a")
    store.delete("nothing")
    assert store.list() == {"b/three.bin": 3}
    assert store.child("b").get("three.bin") == b"333"


@pytest.mark.parametrize(
    "key",
    [
        "../victim",
        "a/../../victim",
        "/victim",
        "",
        "a//b",
        "a/./b",
        "a/",
        "a\\..\\b",
        "a\0b",
        "C:x",
        "\ud800",
    ],
)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_keys_that_lead_out_of_the_root_are_refused_before_a_byte_is_written(
    kind: str, key: str, tmp_path: Path
) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    name = f"memory://test-{uuid.uuid4().hex}/root"
    store = Store(str(tmp_path / "root") if kind == "local" else name)
    for write in (store.put, store.create):
        with pytest.raises(ArtifactError, match="expected a relative key below its folder"):
            write(key, b"overwritten")
    with pytest.raises(ArtifactError, match="expected a relative key below its folder"):
        store.get(key)
    if key.startswith("/") or ".." in key.split("/") or "\0" in key:
        for ask in (store.list, store.exists, store.delete):
            with pytest.raises(ArtifactError, match="expected a relative key below its folder"):
                ask(key)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert store.list() == {}


def test_existing_is_told_from_missing(store: Store) -> None:
    store.put("folder/here", b"x")
    assert store.exists("folder/here")
    assert not store.exists("folder/there")
    assert not store.exists("folder")
    with pytest.raises(FileNotFoundError):
        store.get("folder/there")


def test_create_is_won_once_and_a_lost_reply_is_not_a_lost_write(store: Store) -> None:
    assert store.create("commit", b"mine")
    assert store.create("commit", b"mine"), "the same content again is our own write"
    assert not store.create("commit", b"theirs")
    assert store.get("commit") == b"mine"


def test_the_probe_accepts_a_store_where_one_writer_wins_and_leaves_nothing(store: Store) -> None:
    store.put("mine", b"x")
    store.probe()
    assert store.list() == {"mine": 1}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_disk_without_hard_links_is_refused_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_links(source: Path, target: Path) -> None:  # what exFAT and many mounts answer
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filesystem.os, "link", no_links)
    with pytest.raises(
        ArtifactError, match=rf"cannot create {tmp_path}/probe.*no hard links.*--out"
    ):
        Store(str(tmp_path)).probe()
    assert list(tmp_path.iterdir()) == []


def test_deleting_takes_one_object_or_one_folder_and_not_their_namesakes(store: Store) -> None:
    for key in ("units/a.json", "units2/a.json", "units.json", "plan.json", "plan.json.old"):
        store.put(key, b"x")
    store.delete("plan.json")
    store.delete("units")
    assert list(store.list()) == ["plan.json.old", "units.json", "units2/a.json"]
    assert store.list("unit") == {}


KEYS = st.sampled_from(["a", "b", "b2/c", "b2/d", "b3/é f"])
CONTENTS = st.sampled_from([b"1", b"22", b"333"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, CONTENTS),
        st.tuples(st.just("create"), KEYS, CONTENTS),
        st.tuples(st.just("delete"), st.sampled_from(["", "a", "b", "b2", "b2/c"])),
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", ["local", "memory"])
@given(steps=STEPS)
@settings(max_examples=40)
def test_a_store_behaves_as_a_dictionary_of_bytes(kind: str, steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder if kind == "local" else f"memory://law-{uuid.uuid4().hex}")
        model: dict[str, bytes] = {}
        for action, key, *content in steps:
            if action == "put":
                store.put(key, content[0])
                model[key] = content[0]
            elif action == "create":
                won = store.create(key, content[0])
                assert won == (model.setdefault(key, content[0]) == content[0])
            else:
                store.delete(key)
                model = {k: v for k, v in model.items() if key and f"{k}/".find(f"{key}/") != 0}
            assert store.list() == {k: len(model[k]) for k in sorted(model)}
        assert {key: store.get(key) for key in store.list()} == model


def test_one_of_many_writers_wins_a_create(store: Store) -> None:
    barrier = threading.Barrier(8)

    def write(i: int) -> bool:
        barrier.wait()
        return store.create("stage.json", b"writer %d" % i)

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert sum(won) == 1
        assert store.get("stage.json") == b"writer %d" % won.index(True)
        store.delete("")


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem.os, "fsync", no_space)
    with pytest.raises(ArtifactError, match="cannot write .*key.*No space left"):
        store.put("key", b"content")
    assert list(tmp_path.iterdir()) == []
    assert store.list() == {}


def test_a_file_that_is_removed_while_its_folder_is_listed_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.put("a/one.bin", b"1")
    walk = os.walk

    def with_one_more(*args: Any, **options: Any) -> Any:
        return (
            (place, folders, [*names, "gone.bin"])
            for place, folders, names in walk(*args, **options)
        )

    monkeypatch.setattr(os, "walk", with_one_more)
    assert store.list() == {"a/one.bin": 1}
    assert store.list("nothing") == store.list("a/one.bin") == {}


def test_a_staged_file_of_a_killed_writer_is_never_listed(tmp_path: Path) -> None:
    (tmp_path / ".key.0123.part").write_bytes(b"half")
    assert Store(str(tmp_path)).list() == {}


def test_only_staged_files_of_ours_are_swept(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    staged = tmp_path / "room" / f".key.json.{'0a' * 16}.part"
    download = tmp_path / "room" / ".film.mkv.part"
    for path in (staged, download):
        path.write_bytes(b"half")
    Store(str(tmp_path)).sweep(time.time() + 1)
    assert download.exists() and not staged.exists()


def test_what_only_marks_a_folder_on_s3_is_not_an_object(s3_server: S3Uri) -> None:
    store = Store(s3_server())
    store.put("train/state.json", b"{}")
    arrow, path = arrow_filesystem(store.uri)
    arrow.create_dir(f"{path}/train/empty", recursive=True)
    assert store.list() == {"train/state.json": 2}
    store.delete("train")
    assert store.list() == {}


def test_a_large_object_is_one_commit_on_s3(s3_server: S3Uri) -> None:
    store = Store(s3_server())
    content = bytes(range(256)) * (12 << 12)
    store.put("large.bin", content)
    assert store.create("large2.bin", content)
    assert store.list() == {"large.bin": len(content), "large2.bin": len(content)}
    assert store.get("large2.bin") == content


def test_a_store_travels_as_its_uri(store: Store) -> None:
    store.put("key", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.uri == store.uri
    assert copy.get("key") == b"x"


def test_a_missing_bucket_is_named_quickly(s3_server: S3Uri) -> None:
    s3_server()
    store = Store("s3://no-such-bucket-here/run")
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=r"s3://no-such-bucket-here/run/key.*bucket"):
        store.put("key", b"x")
    assert time.monotonic() - started < 30


def test_a_store_that_does_not_answer_is_given_up_in_bounded_time(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(retries, "WAITS_S", (0.0, 0.0, 0.0))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    try:
        with pytest.raises(ArtifactError, match="cannot read s3://bucket/run/key.*endpoint"):
            Store("s3://bucket/run").get("key")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert time.monotonic() - started < 10


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ArtifactError, match="nonsense://x"):
        Store("nonsense://x/y").get("key")


def test_arrow_reads_what_the_store_wrote(store: Store) -> None:
    store.put("folder/data.bin", b"arrow")
    fs, path = arrow_filesystem(store.uri)
    with fs.open_input_file(f"{path}/folder/data.bin") as file:
        assert file.read() == b"arrow"
