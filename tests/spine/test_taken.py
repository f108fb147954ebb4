"""What a run says of the run whose teacher it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.taken import KEY, origin_of
from wmdd_ray.store.documents import seal
from wmdd_ray.store.filesystem import Store


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9/evil", "ftp://host/run"])
def test_a_run_does_not_choose_which_kind_of_store_is_opened(uri: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    store.put(KEY, seal({"from": uri}))
    with pytest.raises(ConfigError, match=r"taken.json names .*pass the run that is meant"):
        origin_of(store)


def test_a_run_names_another_of_its_own_store(tmp_path: Path) -> None:
    for store, uri in (
        (Store(str(tmp_path / "run")), str(tmp_path / "other")),
        (Store(str(tmp_path / "run2")), "s3://bucket/other"),
        (Store("memory://run"), "memory://other"),
    ):
        store.put(KEY, seal({"from": uri}))
        origin = origin_of(store)
        assert origin is not None and origin.uri == uri
