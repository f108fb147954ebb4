"""A bar a stage: done/total, rate, time left. Redrawn on a terminal; a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TextIO

from wmdd_ray.redaction import printable
from wmdd_ray.spine.run import Progress

_TERMINAL_S = 0.2
_PLAIN_S = 10.0
_COLUMNS = 80  # of a terminal that does not tell


def duration(seconds: float) -> str:
    """Return seconds as people say them: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 59.5:  # bounds of what rounds to 60 and to 10
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


class AboveTheBar(logging.StreamHandler[TextIO]):
    """Writes log lines where a bar may stand: clears it, and the next redraw puts it below."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
        super().emit(record)


class StageLine(Progress):
    """The line of one stage, on standard error where no `stream` is given, so that standard output holds results only.

    With log lines of level INFO in between (`--verbose`) it is plain on a terminal too.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name = name
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and not logging.getLogger().isEnabledFor(logging.INFO)
        self._lock = threading.Lock()
        self._total: int | None = None
        self._begun = self._shown = time.monotonic()
        self._found = self._done = 0.0
        self._note = ""
        self._open = self._works = False

    def start(self, total: int | None, done: float) -> None:
        """Begin with `done` of `total` units found finished (total None: not known before the data streamed)."""
        with self._lock:
            self._total, self._found, self._done = total, done, max(done, self._done)
            self._begun = time.monotonic()
            self._open = True
            if done != total:
                self._show(force=True)

    def work_begins(self) -> None:
        """Count the time from here, once: what it takes to start workers tells nothing of how fast they are."""
        with self._lock:
            if not self._works and self._done == self._found:
                self._begun = time.monotonic()
            self._works = True

    def update(self, done: float, note: str = "") -> None:
        """Go forward to `done` units; going backward is ignored (a retried unit was counted in part before)."""
        with self._lock:
            self._done = max(self._done, done)
            self._note = note or self._note
            self._show()

    def finish(self, note: str = "") -> None:
        """Write the last state of the line and end it."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            done = self._done if self._total is None else self._total
            spent = duration(time.monotonic() - self._begun)
            text = f"{self._name:<12}{_units(done)}/{_units(done)} {note or f'done in {spent}'}"
            if self._note and not note:
                text += f", {self._note}"
            self._write(text, end="\n")

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not self._open or (
            not force and now - self._shown < (_TERMINAL_S if self._live else _PLAIN_S)
        ):
            return
        self._shown = now
        total = "?" if self._total is None else _units(self._total)
        bar = ""
        if self._live and self._total:
            cells = max(4, _columns(self._stream) // 8)
            bar = f"{_bar(self._done / self._total, cells, self._stream.encoding)} "
        text = f"{self._name:<12}{bar}{_units(self._done)}/{total}"
        fresh = self._done - self._found
        if fresh > 0 and now > self._begun:
            rate = fresh / (now - self._begun)
            text += f" {rate:.2f}/s" if rate >= 0.1 else f" {60 * rate:.2f}/min"
            if self._total is not None:
                left = max(0.0, self._total - self._done)
                text += f", {duration(left / rate)} left"
        if self._note:
            text += f", {self._note}"
        self._write(text, end="" if self._live else "\n")

    def _write(self, text: str, *, end: str) -> None:
        text = " ".join(printable(text).split("\n"))
        if self._live:
            # A line that wraps would not be redrawn but repeated. The last column makes some terminals wrap.
            columns = _columns(self._stream)
            text = text if len(text) < columns else f"{text[: columns - 4]}..."
            text = f"\r\x1b[K{text}"
        self._stream.write(f"{text}{end}")
        self._stream.flush()


def _bar(fraction: float, cells: int, encoding: str | None) -> str:
    """Return a bar of a fraction in [0, 1], in eighths of a cell where the terminal writes Unicode."""
    fraction = min(1.0, max(0.0, fraction))
    if not (encoding or "").lower().startswith("utf"):
        full = int(fraction * cells)
        return "[" + "#" * full + "-" * (cells - full) + "]"
    full, eighths = divmod(int(fraction * cells * 8), 8)
    bar = "█" * full + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")
    return f"▕{bar:<{cells}}▏"


def _columns(stream: TextIO) -> int:
    """Return the width of a terminal now: windows are resized."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def _units(count: float) -> str:
    return f"{count:.0f}" if abs(count - round(count)) < 0.05 else f"{count:.1f}"
