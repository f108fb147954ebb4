from __future__ import annotations

import io

import pytest

from wmdd_ray import progress
from wmdd_ray.progress import StageLine, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_line_tells_done_total_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), Terminal()
    line = StageLine("recover", stream)
    line.start(10, 2)
    clock.now += 4
    line.update(4, "step 7")
    assert stream.getvalue().endswith("recover     4/10 0.50/s, 12 s left, step 7")
    clock.now += 16
    line.update(10)
    line.finish()
    assert stream.getvalue().endswith("recover     10/10 done in 20 s, step 7\n")


def test_progress_never_goes_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), Terminal()
    line = StageLine("recover", stream)
    line.start(10, 0)
    for done in (3.5, 3.0, 2.0):
        clock.now += 1
        line.update(done)
    assert stream.getvalue().count("3.5/10") == 3
    assert "3/10" not in stream.getvalue().replace("3.5/10", "")


def test_a_file_gets_plain_lines_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    line = StageLine("relabel", stream)
    line.start(1000, 0)
    for done in range(1, 1001):
        clock.now += 0.1
        line.update(done)
    line.finish()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert 10 <= len(lines) <= 13
    assert lines[-1].startswith("relabel     1000/1000 done in 1 min 40 s")


def test_an_unknown_total_is_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), Terminal()
    line = StageLine("features", stream)
    line.start(None, 0)
    clock.now += 2
    line.update(4)
    assert stream.getvalue().endswith("features    4/? 2.00/s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (8, "8.0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
