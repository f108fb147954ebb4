"""What happened in a run, as JSON lines that survive it: `events/<token>-<part>.jsonl`, one token a driver process.

A line is an event: `at` (UTC), `run`, `event`, and what it is about: `stage`, `unit`, `node`, `attempt`, `seconds`, `reason`.

    run_started, stage_started, unit_started, unit_done, unit_retried, unit_failed, stage_committed, run_ended
    data_statistics (Ray Data's own, as `text`, after each of its executions)

On a disk a line is there as soon as it is written. An object store has no appending: the part under way is put again every
few seconds, and a kill costs the lines since; what is finished is told by the markers, which carry the same facts.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import local_path

logger = logging.getLogger(__name__)

FOLDER = "events"
_PUT_EVERY_S = 5.0
_PART_BYTES = 1 << 20


class EventLog:
    """Writes the events of one run, by its token, under its root. Safe to call from several threads."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store.child(FOLDER)
        self._path = local_path(self._store.uri)
        self._run = run
        self._lock = threading.Lock()
        self._part = 0
        self._lines = bytearray()
        self._put_bytes = 0
        self._given_up = False
        if self._path is None:
            threading.Thread(target=self._put_now_and_then, daemon=True).start()

    def write(self, event: str, **about: Any) -> None:
        """Add an event; `about` holds JSON values."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": at, "run": self._run, "event": event, **about}, ensure_ascii=False)
        with self._lock:
            self._lines += line.encode() + b"\n"
            if self._path is not None:
                self._append(self._path)

    def flush(self) -> None:
        """Put what is not stored yet."""
        # A put that hangs shall not hold up the end of the run.
        if self._lock.acquire(timeout=_PUT_EVERY_S):
            try:
                if len(self._lines) > self._put_bytes and not self._given_up:
                    self._put()
            finally:
                self._lock.release()

    def _append(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / self._key(), "ab") as file:
                file.write(self._lines)
        except OSError as error:
            # A disk that is full shows in the work itself; the log alone ends no run.
            if not self._given_up:
                logger.warning("events: %s", error)
            self._given_up = True
        self._lines.clear()

    def _put(self) -> None:
        try:
            self._store.put(self._key(), bytes(self._lines))
        except ArtifactError as error:
            logger.warning("events: %s", error)
            self._given_up = True  # it was asked for long enough; the work will meet the same
            return
        self._put_bytes = len(self._lines)
        if self._put_bytes >= _PART_BYTES:
            self._part += 1
            self._lines.clear()
            self._put_bytes = 0

    def _put_now_and_then(self) -> None:
        while not self._given_up:
            time.sleep(_PUT_EVERY_S)
            self.flush()

    def _key(self) -> str:
        return f"{self._run}-{self._part:05d}.jsonl"


def read_events(store: Store) -> list[dict[str, Any]]:
    """Return the events of all runs under a root, in order of time; a line that a kill cut is left out."""
    log = store.child(FOLDER)
    events = []
    for key in log.list():
        for line in log.get(key).splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return sorted(events, key=lambda event: str(event["at"]))
