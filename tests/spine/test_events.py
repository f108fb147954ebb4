from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest

from wmdd_ray.spine import events
from wmdd_ray.spine.events import EventLog, read_events
from wmdd_ray.store.filesystem import Store


def test_on_a_disk_an_event_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    log = EventLog(store, "one")
    log.write("unit_done", stage="recover", unit="g0", seconds=1.5)
    log.write("run_ended", exit_code=0)
    done, ended = read_events(store)
    assert done["event"] == "unit_done" and done["unit"] == "g0" and done["run"] == "one"
    assert ended["at"] >= done["at"]
    assert ended.keys() == {"at", "run", "event", "exit_code"}


def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    EventLog(store, "one").write("run_started")
    (path,) = (tmp_path / "events").iterdir()
    path.write_bytes(path.read_bytes() + b'{"at": "2026-')
    EventLog(store, "two").write("run_started")
    assert [event["run"] for event in read_events(store)] == ["one", "two"]


def test_on_an_object_store_events_are_put_now_and_then_in_parts_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "_PUT_EVERY_S", 0.05)
    monkeypatch.setattr(events, "_PART_BYTES", 2000)
    store = Store(f"memory://events-{uuid.uuid4().hex}")
    log = EventLog(store, "one")
    for i in range(60):
        log.write("unit_done", unit=f"g{i}")
        time.sleep(0.005)
    deadline = time.monotonic() + 10
    while len(read_events(store)) < 60 and time.monotonic() < deadline:
        time.sleep(0.05)  # without a flush: the log puts what is new by itself
    assert [event["unit"] for event in read_events(store)] == [f"g{i}" for i in range(60)]
    assert len(store.list("events")) > 1


def test_a_disk_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    EventLog(Store(str(tmp_path)), "one").write("run_started")
    assert "events: " in caplog.text
