from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from wmdd_ray.errors import ArtifactError, WmddError
from wmdd_ray.spine.rooms import MAX_ATTEMPTS, Room
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
    from wmdd_ray.store.documents import seal

    room = open_room("one")
    room.commit_unit("g0", {"g0.bin": b"x"}, attempt=1)
    path = tmp_path / "images" / "units" / "g0.json"
    marker = json.loads(path.read_text())
    del marker["checksum"]
    marker["files"][0]["key"] = key
    path.write_bytes(seal(marker))
    with pytest.raises(ArtifactError, match="expected a relative key below its folder"):
        room.read_unit("g0")
