"""What storage shows of a run: the one thing that outlives every kill."""

from __future__ import annotations

import json
from datetime import datetime

from tests.stages.tiny import ROOM_OF, STAGES
from wmdd_ray.store.filesystem import Store

# All clocks are one; but a unit that is begun looks at the clock a moment before it looks for its marker.
_SAME_MOMENT_S = 1.0


class Record:
    """What storage shows of a run, and what it showed before."""

    def __init__(self, uri: str) -> None:
        self.store = Store(uri)
        self._first: dict[str, bytes] = {}

    def stage(self) -> str:
        """Return the stage that is worked on."""
        for stage, room in ROOM_OF.items():
            if not self.store.exists(f"{room}/stage.json"):
                return stage
        return STAGES[-1]

    def progress(self, stage: str) -> dict[str, int]:
        """Return what changes when a unit of the stage begins, begins again or is finished; no marker is lost."""
        room = ROOM_OF[stage]
        found = self.store.list(room)
        lost = [k for k in self._first if k.startswith(f"{room}/") and k not in found]
        assert not lost, f"units lost: {lost}"
        for key in found:
            if "/units/" in key and key not in self._first:
                self._first[key] = self.store.get(key)
        kinds = ("/units/", "/attempts/", "/plan.json")
        return {key: size for key, size in found.items() if any(kind in key for kind in kinds)}

    def check(self) -> int:
        """Check that no finished unit was touched or begun again, and nothing unfinished is left; count units begun again."""
        found = self.store.list()
        left = [key for key in found if {"partial", "train"} & set(key.split("/"))]
        assert not left, f"left behind: {left}"
        markers = {key: self.store.get(key) for key in found if "/units/" in key}
        changed = [key for key, content in self._first.items() if markers.get(key) != content]
        assert not changed, f"lost or done again: {changed}"
        begun_again = 0
        for key, content in markers.items():
            attempts = json.loads(self.store.get(key.replace("/units/", "/attempts/")))["attempts"]
            finished = datetime.fromisoformat(json.loads(content)["finished"])
            began = [datetime.fromisoformat(attempt["began"]) for attempt in attempts]
            late_s = (max(began) - finished).total_seconds()
            assert late_s < _SAME_MOMENT_S, f"{key}: begun {late_s:.1f} s after it was finished"
            begun_again += len(attempts) - 1
        return begun_again
