from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wmdd_ray.errors import ArtifactError, LostRaceError, WmddError
from wmdd_ray.spine.rooms import MAX_ATTEMPTS, Room, StageCommit, UnitMarker
from wmdd_ray.store import filesystem
from wmdd_ray.store.documents import read_sealed, seal
from wmdd_ray.store.filesystem import Store


@pytest.fixture
def open_room(tmp_path: Path) -> Callable[[str], Room]:
    return lambda run: Room(Store(str(tmp_path)), "images", run)


def test_of_two_runs_that_finish_one_unit_the_first_ones_marker_stays(
    open_room: Callable[[str], Room],
) -> None:
    for run in ("one", "two"):
        room = open_room(run)
        room.commit_unit("g0", {"g0.bin": b"pixels"}, attempt=1, seconds=1.0)
    assert room.finished() == {"g0"}
    marker = room.read_unit("g0")
    assert (marker.run, marker.attempt) == ("one", 1)
    assert room.read(marker.files[0]) == b"pixels"


def test_attempts_are_counted_in_storage_over_all_runs(
    open_room: Callable[[str], Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmdd_ray.spine.rooms._now", lambda: "all in one millisecond")
    numbers = [open_room(run).begin_unit("g0") for run in ("one", "one", "two", "three", "three")]
    assert numbers == [1, 2, 3, 4, 5]


def test_a_unit_that_ends_its_process_at_one_point_is_given_up_by_name_until_the_next_run(
    open_room: Callable[[str], Room],
) -> None:
    room = open_room("one")
    for _ in range(MAX_ATTEMPTS):
        room.begin_unit("g0", point=0)
    with pytest.raises(WmddError, match=f"unit g0 ended its worker {MAX_ATTEMPTS} times"):
        room.begin_unit("g0", point=0)
    assert open_room("two").begin_unit("g0", point=0) == MAX_ATTEMPTS + 1


def test_a_unit_that_comes_further_every_time_is_not_given_up(
    open_room: Callable[[str], Room],
) -> None:
    room = open_room("one")
    for point in range(4 * MAX_ATTEMPTS):
        room.begin_unit("g0", point=point // 2)


def test_each_file_of_a_unit_is_flushed_before_it_has_its_name(
    open_room: Callable[[str], Room], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, link = os.fsync, os.link
    flushed: dict[int, int] = {}  # inode -> bytes
    named: list[str] = []

    def flush_noted(descriptor: int) -> None:
        flush(descriptor)
        file = os.fstat(descriptor)
        flushed[file.st_ino] = file.st_size

    def link_noted(source: Path, target: Path) -> None:
        file = source.stat()
        if flushed.get(file.st_ino) == file.st_size:
            named.append(target.relative_to(tmp_path / "images").as_posix())
        link(source, target)

    monkeypatch.setattr(filesystem.os, "fsync", flush_noted)
    monkeypatch.setattr(filesystem.os, "link", link_noted)
    room = open_room("one")
    room.begin_unit("g0")
    room.commit_unit("g0", {"g0.bin": b"pixels"}, attempt=1)
    assert named == ["attempts/g0.json", "g0.bin", "units/g0.json"]


def test_a_unit_that_is_finished_is_not_begun_again(open_room: Callable[[str], Room]) -> None:
    room = open_room("one")
    assert room.begin_unit("g0") == 1
    room.commit_unit("g0", {"g0.bin": b"pixels"}, attempt=1)
    assert room.begin_unit("g0") is None


@pytest.mark.parametrize("document", ["units/g0.json", "attempts/g0.json"])
def test_a_changed_digit_in_a_document_is_an_error_and_not_another_number(
    document: str, open_room: Callable[[str], Room], tmp_path: Path
) -> None:
    room = open_room("one")
    room.begin_unit("g0")
    if document.startswith("units"):
        room.commit_unit("g0", {"g0.bin": b"x"}, attempt=1, metrics={"cost": 163.25})
    path = tmp_path / "images" / document
    content = path.read_bytes()
    old = b"163.25" if document.startswith("units") else b'"run": "one"'
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, b"183.25" if old == b"163.25" else b'"run": "ond"'))
    with pytest.raises(
        ArtifactError, match=rf"{re.escape(str(path))}: expected a document with the checksum"
    ):
        room.read_unit("g0") if document.startswith("units") else room.begin_unit("g0")


@pytest.mark.parametrize(
    "key", ["../secret", "/etc/passwd", "a/../../b", "a//b", "C:x", "a\\b", "", "a\0b"]
)
def test_a_marker_that_names_a_file_outside_its_room_is_refused(
    key: str, open_room: Callable[[str], Room], tmp_path: Path
) -> None:
    room = open_room("one")
    room.commit_unit("g0", {"g0.bin": b"x"}, attempt=1)
    path = tmp_path / "images" / "units" / "g0.json"
    marker = json.loads(path.read_text())
    del marker["checksum"]
    marker["files"][0]["key"] = key
    path.write_bytes(seal(marker))
    with pytest.raises(ArtifactError, match="expected a relative key below its folder"):
        room.read_unit("g0")


# Writers that are frozen, and wake when the unit or the room is somebody else's -------------------


def frozen_before(key: str, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Let `meanwhile` happen just before the next write to a key: its writer was stopped there, and wakes after it."""
    create, put = Store.create, Store.put
    waiting = [key]

    def stopped(write: Callable[..., Any]) -> Callable[..., Any]:
        def go_on(store: Store, key: str, content: bytes) -> Any:
            if waiting and key.startswith(waiting[0]):
                waiting.clear()
                meanwhile()
            return write(store, key, content)

        return go_on

    monkeypatch.setattr(Store, "create", stopped(create))
    monkeypatch.setattr(Store, "put", stopped(put))


@pytest.mark.parametrize("frozen_at", ["g0.bin", "g0.json", "units/g0.json"])
def test_a_frozen_writer_of_other_bytes_does_not_harm_the_unit_that_was_committed_meanwhile(
    frozen_at: str, open_room: Callable[[str], Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie, other = open_room("one"), open_room("one")
    assert (zombie.begin_unit("g0"), other.begin_unit("g0")) == (1, 2)
    winner = {"g0.bin": b"bytes of one machine", "g0.json": b"its numbers"}

    def meanwhile() -> None:
        other.commit_unit("g0", winner, attempt=2)

    frozen_before(frozen_at, monkeypatch, meanwhile)
    late = {"g0.bin": b"bytes of another machine", "g0.json": b"other numbers"}
    told = zombie.commit_unit("g0", late, attempt=1)
    marker = open_room("").read_unit("g0")
    assert told == marker and marker.attempt == 2
    assert {entry.key: other.read(entry) for entry in marker.files} == winner
    commit = commit_of({"g0": marker})
    assert other.commit(commit)
    other.sweep(commit)
    read = open_room("").committed()
    assert {e.key: other.read(read.file(e.key)) for e in marker.files} == winner
    left = [key for key in other.store.list() if not key.startswith(("units/", "attempts/"))]
    assert sorted(left) == sorted([*(e.at or e.key for e in marker.files), "stage.json"])


def commit_of(units: dict[str, UnitMarker], **entries: Any) -> StageCommit:
    given = {"stage": "recover", "version": 1, "fingerprint": "f", "options": {}, "inputs": {}}
    given |= {"metrics": {}, "seconds": 1.0, "host": "h", "run": "one", "finished": "now"}
    return StageCommit(**{**given, **entries}, units=units)


def test_bytes_that_are_equal_are_stored_once(open_room: Callable[[str], Room]) -> None:
    for run in ("one", "two"):
        marker = open_room(run).commit_unit("g0", {"g0.bin": b"pixels"}, attempt=1)
        assert marker.files[0].at == ""
    assert [k for k in open_room("").store.list() if "units" not in k] == ["g0.bin"]


def test_what_people_read_by_its_name_has_no_other(open_room: Callable[[str], Room]) -> None:
    store = open_room("").store
    room, other = (Room(store, "dataset", run) for run in ("one", "two"))
    room.commit_unit("g0", {"data/train.parquet": b"mine"}, attempt=1)
    with pytest.raises(LostRaceError, match="data/train.parquet holds other bytes.*own --out"):
        other.commit_unit("g0", {"data/train.parquet": b"theirs"}, attempt=2)
    assert room.store.get("data/train.parquet") == b"mine"


def test_a_marker_that_names_another_place_outside_its_room_is_refused(
    open_room: Callable[[str], Room],
) -> None:
    room = open_room("one")
    room.commit_unit("g0", {"g0.bin": b"x"}, attempt=1)
    marker = read_sealed(room.store, "units/g0.json")
    marker["files"][0]["at"] = "../secret"
    room.store.put("units/g0.json", seal(marker))
    with pytest.raises(ArtifactError, match="expected a relative key below its folder"):
        room.read_unit("g0")


def test_a_plan_whose_space_leads_out_of_the_room_is_refused(
    open_room: Callable[[str], Room],
) -> None:
    room = open_room("")
    room.store.put("plan.json", seal({"fingerprint": "f", "space": "../../elsewhere"}))
    with pytest.raises(ArtifactError, match="expected a space of hexadecimal digits"):
        room.finished()


def test_units_of_one_plan_are_none_of_the_next_ones(open_room: Callable[[str], Room]) -> None:
    zombie = open_room("one")
    assert zombie.finished() == set()  # it has seen the plan, and works
    owner = Room(zombie.store, "", "two", "a1b2c3d4")
    zombie.begin_unit("g0")
    zombie.commit_unit("g0", {"g0.bin": b"of the first plan"}, attempt=1)
    assert owner.finished() == set() and owner.begin_unit("g0") == 1
    marker = owner.commit_unit("g0", {"g0.bin": b"of the second plan"}, attempt=1)
    assert owner.finished() == {"g0"} and owner.read(marker.files[0]) == b"of the second plan"
    assert zombie.read(zombie.read_unit("g0").files[0]) == b"of the first plan"
