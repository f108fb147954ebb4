from __future__ import annotations

import io
import logging
import os
import pty
import select
import termios
from collections.abc import Iterator

import pytest

from wmdd_ray.telling import progress
from wmdd_ray.telling.progress import AboveTheBar, StageLine, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Window:
    """A terminal that speaks UTF-8 and is so many columns wide."""

    def __init__(self, columns: int) -> None:
        self._screen, tty = pty.openpty()
        termios.tcsetwinsize(tty, (24, columns))
        self.stream = os.fdopen(tty, "w", encoding="utf-8")

    def lines(self) -> list[str]:
        """What the line showed, one state after another."""
        written = b""
        while select.select([self._screen], [], [], 0.2)[0]:  # it comes in pieces
            written += os.read(self._screen, 1 << 16)
        return written.decode().split("\r\x1b[K")[1:]

    def close(self) -> None:
        self.stream.close()
        os.close(self._screen)


@pytest.fixture
def window() -> Iterator[Window]:
    opened = Window(80)
    yield opened
    opened.close()


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
    assert stream.getvalue().endswith("recover     [####------] 4/10 0.50/s, 12 s left, step 7")
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


def test_a_bar_fills_from_left_to_right_in_eighths_of_a_cell(
    monkeypatch: pytest.MonkeyPatch, window: Window
) -> None:
    clock = Clock(monkeypatch)
    line = StageLine("recover", window.stream)
    line.start(80, 0)
    for done in (1, 4, 41, 80):
        clock.now += 1
        line.update(done)
    bars = [shown[12:24] for shown in window.lines()]
    assert bars == [
        "▕          ▏",
        "▕▏         ▏",
        "▕▌         ▏",
        "▕█████▏    ▏",
        "▕██████████▏",
    ]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_line_is_cut_before_it_wraps(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    clock, window = Clock(monkeypatch), Window(columns)
    line = StageLine("evaluate", window.stream)
    line.start(16, 0)
    clock.now += 60
    line.update(4.4, "random_real, soft labels, seed 3, " + "epoch 7/20, " * 20)
    line.finish()
    shown = window.lines()
    window.close()
    assert [len(text) for text in shown[1:]] == [columns - 1, columns - 1 + len("\r\n")]
    assert shown[1].endswith("...")
    assert columns == 40 or "4.4/16 4.40/min, 2 min 38 s left" in shown[1]


def test_a_log_line_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch, window: Window) -> None:
    clock, log = Clock(monkeypatch), logging.Logger("alone")
    log.addHandler(AboveTheBar(window.stream))
    line = StageLine("recover", window.stream)
    line.start(2, 0)
    log.warning("a tracker failed")
    clock.now += 1
    line.update(1)
    _, warning, after = window.lines()
    assert warning == "a tracker failed\r\n"
    assert after.startswith("recover ")


def test_log_lines_in_a_file_carry_no_control_characters() -> None:
    stream, log = io.StringIO(), logging.Logger("alone")
    log.addHandler(AboveTheBar(stream))
    log.warning("a tracker failed")
    assert stream.getvalue() == "a tracker failed\n"


def test_between_the_log_lines_of_verbose_the_terminal_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, stream = Clock(monkeypatch), Terminal()
    caplog.set_level(logging.INFO)
    line = StageLine("recover", stream)
    line.start(4, 0)
    clock.now += 1
    line.update(2)
    line.finish()
    assert stream.getvalue() == "recover     0/4\nrecover     4/4 done in 1.0 s\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (8, "8.0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
