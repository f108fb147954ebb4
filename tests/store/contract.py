"""What every object store has to keep, whoever serves it."""

from __future__ import annotations

import pytest

from wmdd_ray.store.documents import entry_of, read_verified
from wmdd_ray.store.filesystem import Store

CONTENTS = {
    "a": b"1",
    "b2/c": b"22",
    "b2/c-d": b"333",
    "b/ä ö+ü%20&=?#'()*~/数据.bin": b"4444",
    "b/c/d/e": bytes(range(256)) * 4000,
}


def assert_what_is_put_is_got_listed_and_deleted_under_any_name(store: Store) -> None:
    for key, content in CONTENTS.items():
        store.put(key, content)
    assert store.list() == {key: len(CONTENTS[key]) for key in sorted(CONTENTS)}
    for key, content in CONTENTS.items():
        assert store.get(key) == content
        assert read_verified(store, entry_of(key, content)) == content
        assert store.exists(key)
    assert not store.exists("b")
    assert not store.exists("nothing")
    assert store.list("b").keys() == {key for key in CONTENTS if key.startswith("b/")}
    for key in ("b2", "nothing"):
        with pytest.raises(FileNotFoundError):
            store.get(key)
    store.put("a", b"another")
    assert store.get("a") == b"another"
    store.delete("b")
    store.delete("nothing")
    assert list(store.list()) == ["a", "b2/c", "b2/c-d"]


def assert_a_create_is_won_once(store: Store) -> None:
    assert store.create("commit", b"mine")
    assert store.create("commit", b"mine"), "the same content again is our own write"
    assert not store.create("commit", b"theirs")
    assert store.get("commit") == b"mine"
    store.probe()
    assert list(store.list()) == ["commit"]
