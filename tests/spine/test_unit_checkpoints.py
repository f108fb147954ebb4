from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from wmdd_ray.errors import ArtifactError
from wmdd_ray.spine.checkpoints import Checkpoints, State
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.filesystem import Store


def state(step: int) -> State:
    return {"step": np.array(step), "pixels": np.full((3, 4), step, np.float32)}


def kept(tmp_path: Path, steps: int) -> Room:
    room = Room(Store(str(tmp_path)), "images", "one")
    keep = Checkpoints(room, "g0", 0.0)
    for step in range(1, steps + 1):
        keep.maybe(lambda step=step: state(step))
        if keep._pending is not None:
            keep._pending.result()
    return room


def loaded(room: Room) -> int | None:
    found = Checkpoints(room, "g0", 0.0).load()
    if found is None:
        return None
    step = int(found["step"])
    assert found.keys() == {"step", "pixels"}
    np.testing.assert_array_equal(found["pixels"], np.full((3, 4), step, np.float32))
    return step


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_the_newest_state_is_found_again_among_two(steps: int, tmp_path: Path) -> None:
    room = kept(tmp_path, steps)
    assert loaded(room) == (steps or None)
    assert len(room.store.list("partial")) == min(2, steps)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "removed"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(damage: str, tmp_path: Path) -> None:
    room = kept(tmp_path, 5)
    newest = max((tmp_path / "images/partial/g0").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1  # inside the pixels, where nothing but the checksum sees it
    newest.write_bytes({"cut": content[:-7], "emptied": b""}.get(damage, content))
    if damage == "removed":
        newest.unlink()
    assert loaded(room) == 4


def test_what_was_damaged_twice_begins_again(tmp_path: Path) -> None:
    room = kept(tmp_path, 2)
    for path in (tmp_path / "images/partial/g0").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert loaded(room) is None


def test_going_on_from_a_state_never_overwrites_it_first(tmp_path: Path) -> None:
    room = kept(tmp_path, 3)
    keep = Checkpoints(room, "g0", 0.0)
    assert keep.load() is not None
    keep.maybe(lambda: state(4))
    assert keep._pending is not None
    keep._pending.result()
    steps = [int(Checkpoints(room, "g0", 0.0).load()["step"])]
    newest = max((tmp_path / "images/partial/g0").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    newest.unlink()
    assert [*steps, loaded(room)] == [4, 3]


def test_seconds_are_those_of_a_run_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("wmdd_ray.spine.checkpoints.time.monotonic", lambda: now)
    for began, stored, killed, expected in ((100, 107, 109, 9), (500, 504, 506, 13), (0, 1, 1, 12)):
        now = began
        keep = Checkpoints(Room(Store(str(tmp_path)), "images", "one"), "g0", 0.5)
        keep.load()
        now = stored
        keep.maybe(lambda: state(1))
        assert keep._pending is not None
        keep._pending.result()
        now = killed
        assert keep.seconds == expected


def test_a_state_is_put_while_the_work_goes_on_and_none_is_taken_before_it_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive, put = threading.Event(), Store.put

    def slow(store: Store, key: str, content: bytes) -> None:
        arrive.wait(10)
        put(store, key, content)

    monkeypatch.setattr(Store, "put", slow)
    keep = Checkpoints(Room(Store(str(tmp_path)), "images", "one"), "g0", 0.0)
    taken: list[int] = []

    def take(step: int) -> State:
        taken.append(step)
        return state(step)

    for step in (1, 2, 3):
        keep.maybe(lambda step=step: take(step))
    assert taken == [1]
    arrive.set()
    keep.clear()
    assert Store(str(tmp_path)).list("images/partial") == {}


def test_a_store_that_refuses_the_state_is_an_error_at_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: Store, key: str, content: bytes) -> None:
        raise ArtifactError("No space left")

    monkeypatch.setattr(Store, "put", refuse)
    keep = Checkpoints(Room(Store(str(tmp_path)), "images", "one"), "g0", 0.0)
    keep.maybe(lambda: state(1))
    assert keep._pending is not None
    assert isinstance(keep._pending.exception(), ArtifactError)
    with pytest.raises(ArtifactError, match="No space left"):
        keep.maybe(lambda: state(2))
