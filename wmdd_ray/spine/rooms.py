"""A stage's folder: units that are finished whole, and the commit that makes them one artifact.

One root URI holds a room a stage. A room is built in this order, and each step is one whole object:

    plan.json            what the room is being built from: options, inputs, their fingerprints
    attempts/<id>.json   who began the unit, when, and how often
    <payloads>           the arrays, tables and images of a unit of work
    units/<id>.json      the unit is finished: its files with sizes and checksums, its metrics
    stage.json           the room is committed: every unit's files, metrics, seconds

A reader follows `stage.json` and verifies what it names; nothing is found by listing, renamed or overwritten. Markers
and commits carry the token of the run that wrote them: one of several writers wins, and knows it although a reply got lost.

A writer may be frozen and wake when its unit, or the whole room, is somebody else's by now. A payload is created where nothing
is; where other bytes are (of a machine whose arithmetic differs, or of other options) it goes to a name with its checksum, and
the marker says which one counts. A room that is taken over for other options gets a space of its own in `attempts/`, `units/` and
`partial/`, which its plan names, so that nothing of those who worked there before is taken for its work.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import uuid4

from wmdd_ray.errors import ArtifactError, LostRaceError, WmddError
from wmdd_ray.store.documents import (
    FileEntry,
    entry_of,
    find_sealed,
    read_sealed,
    read_verified,
    seal,
)
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.schemas import check

MAX_ATTEMPTS = 3
"""Times that a unit may end the process that works on it, at the same point and in the same run."""

_READERS = 32
# People read their files by the names, and publish the folder as it is: the assembled set, prepared images.
_PUBLISHED = ("dataset", "data")
# Hexadecimal digits of a checksum in the name of a payload.
_TAG = 16
_TAGGED = re.compile(rf"\.[0-9a-f]{{{_TAG}}}(\.[^./]*)?$")


@dataclass(frozen=True, kw_only=True)
class UnitMarker:
    """One finished unit of work.

    `seconds` is the time inside core functions and storage of the attempt that finished, `attempt` its number over all
    runs, `run` the token of its run, `finished` the time in UTC.
    """

    unit: str
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any]
    seconds: float
    host: str
    run: str
    attempt: int
    finished: str


@dataclass(frozen=True, kw_only=True)
class StageCommit:
    """What `stage.json` says. `options` are the config values that the room was made with, `inputs` room -> fingerprint."""

    stage: str
    version: int
    fingerprint: str
    options: dict[str, Any]
    inputs: dict[str, str]
    units: dict[str, UnitMarker]
    metrics: dict[str, Any]
    seconds: float
    host: str
    run: str
    finished: str
    space: str = ""

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """The files of all units by key."""
        return {entry.key: entry for marker in self.units.values() for entry in marker.files}

    def file(self, key: str) -> FileEntry:
        if (entry := self.files.get(key)) is None:
            raise ArtifactError(
                f"stage {self.stage} committed no file {key}; run it again with --overwrite"
            )
        return entry


class Room:
    """One stage's folder. Small and picklable: workers open it again from its URI.

    Args:
        store: The run's root.
        name: The folder.
        run: Token of the run that writes, unique to its driver process; empty for one that only reads.
        space: That of the plan which the run has claimed the room for; None takes that of the plan which is there.
    """

    def __init__(self, store: Store, name: str, run: str = "", space: str | None = None) -> None:
        self.name = name
        self.run = run
        self.store = store.child(name)
        self._space = space
        self._is_published = name in _PUBLISHED

    @property
    def host(self) -> str:
        """This machine's name, for attempts, markers and the commit; empty in a room that is published."""
        return "" if self._is_published else socket.gethostname()

    @property
    def space(self) -> str:
        """The folder inside `attempts/`, `units/` and `partial/` that the room's plan has to itself; empty of its first plan."""
        if self._space is None:
            space = str((self.read_plan() or {}).get("space", ""))
            if not re.fullmatch("[0-9a-f]*", space):
                raise ArtifactError(
                    f"{self.store.url('plan.json')}: expected a space of hexadecimal digits, found {space[:40]!r}; somebody else "
                    "wrote it"
                )
            self._space = space
        return self._space

    def place(self, kind: str, name: str = "") -> str:
        """Return the key of a document or a folder of the room's plan."""
        return "/".join(part for part in (kind, self.space, name) if part)

    def read_plan(self) -> dict[str, Any] | None:
        """Return what `plan.json` says, or None when nobody has claimed the room."""
        return find_sealed(self.store, "plan.json")

    def finished(self) -> set[str]:
        """Return the ids of the units that are committed, by one listing."""
        folder = f"{self.place('units')}/"
        keys = self.store.list(folder.rstrip("/"))
        return {k.removeprefix(folder).removesuffix(".json") for k in keys if k.endswith(".json")}

    def begin_unit(self, unit: str, *, point: int | None = None) -> int | None:
        """Count an attempt at a unit in storage, before its work.

        Returns:
            The number of the attempt over all runs, from 1; None when an earlier attempt finished the unit, and ended
            before it could say so.

        Args:
            unit: Unit id.
            point: How far earlier attempts came (a step, or a number of parts), where the executor restarts a process
                that died without telling: after `MAX_ATTEMPTS` of this run at one point the unit is given up.

        Raises:
            WmddError: The unit was given up.
        """
        key = self.place("attempts", f"{unit}.json")
        # The nonce tells this attempt from another of the same run in the same millisecond: `create` compares contents.
        attempt = {
            "run": self.run,
            "host": self.host,
            "began": _now(),
            "point": point,
            "nonce": uuid4().hex,
        }
        if self.store.create(key, seal({"attempts": [attempt]})):
            return 1
        if self.store.exists(self.place("units", f"{unit}.json")):
            return None
        attempts = read_sealed(self.store, key)["attempts"]
        here = [a for a in attempts if (a["run"], a["point"]) == (self.run, point)]
        if point is not None and len(here) >= MAX_ATTEMPTS:
            raise unit_given_up(unit, f"on {here[-1]['host'] or 'one of the nodes'}")
        self.store.put(key, seal({"attempts": [*attempts, attempt]}))
        return len(attempts) + 1

    def begin(self, unit: str, *, point: int | None = None) -> Attempt | None:
        """Begin a unit, as `begin_unit` does; None when it is finished."""
        began = time.perf_counter()
        number = self.begin_unit(unit, point=point)
        return None if number is None else Attempt(self, unit, number, began)

    def commit_unit(
        self,
        unit: str,
        payloads: Mapping[str, bytes],
        *,
        attempt: int,
        metrics: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> UnitMarker:
        """Store the payloads, then publish the unit, and return the marker that counts: that of who finished it first.

        Raises:
            LostRaceError: Somebody else's content is at the key of a published file.
        """
        files = tuple(self._store(*payload) for payload in payloads.items())
        marker = UnitMarker(
            unit=unit,
            files=files,
            metrics=dict(metrics or {}),
            seconds=round(seconds, 4),
            host=self.host,
            run=self.run,
            attempt=attempt,
            finished=_now(),
        )
        if self.store.create(self.place("units", f"{unit}.json"), seal(_document(marker))):
            return marker
        return self.read_unit(unit)

    def _store(self, key: str, content: bytes) -> FileEntry:
        """Store a payload where nothing of somebody else's is, and return where."""
        entry = entry_of(key, content)
        if self.store.create(key, content):
            return entry
        if self._is_published:
            raise LostRaceError(
                f"{self.store.url(key)} holds other bytes than this run makes: another run with other options, or on another kind "
                "of machine, writes here or was killed here; give each run its own --out, or pass --overwrite when no other is at "
                "work"
            )
        stem, dot, ending = key.rpartition(".")
        at = f"{stem}.{entry.sha256[:_TAG]}.{ending}" if dot else f"{key}.{entry.sha256[:_TAG]}"
        self.store.put(at, content)  # whoever else writes this name writes these bytes
        return replace(entry, at=at)

    def read_unit(self, unit: str) -> UnitMarker:
        return marker_of(read_sealed(self.store, self.place("units", f"{unit}.json")))

    def read_units(self, units: Iterable[str]) -> dict[str, UnitMarker]:
        """Return the markers of finished units, read side by side, in the order given."""
        units = list(units)
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(units, pool.map(self.read_unit, units), strict=True))

    def commit(self, commit: StageCommit) -> bool:
        """Publish the room unless another run did so first; return whether this commit is there now."""
        units = {unit: _document(marker) for unit, marker in commit.units.items()}
        return self.store.create(
            "stage.json", seal({**asdict(replace(commit, units={})), "units": units})
        )

    def read_commit(self) -> StageCommit | None:
        """Return what `stage.json` says, or None when the room is not committed."""
        commit = find_sealed(self.store, "stage.json")
        if commit is None:
            return None
        check(commit, "the commit of a stage", self.store.url("stage.json"))
        units = {unit: marker_of(marker) for unit, marker in commit.pop("units").items()}
        return StageCommit(units=units, **commit)

    def committed(self) -> StageCommit:
        """Return what `stage.json` says; an ArtifactError when the room is not committed."""
        commit = self.read_commit()
        if commit is None:
            raise ArtifactError(f"{self.store.uri} is not committed: run its stage first")
        return commit

    def clear(self) -> None:
        """Empty the room: its plan is put down first, so that who works there sees it, and then the commit, which others follow.

        What a run that works there writes from now on is in a space that nobody looks into.
        """
        self.store.put("plan.json", seal({"fingerprint": "", "space": "", "vacant": True}))
        tops = {key.partition("/")[0] for key in self.store.list()} - {"plan.json"}
        for top in sorted(tops, key=lambda top: top != "stage.json"):
            self.store.delete(top)

    def sweep(self, commit: StageCommit) -> None:
        """Remove payloads of attempts that lost, once the room is committed."""
        files = commit.files.values()
        named = {entry.at or entry.key for entry in files}
        # What was at its key when an entry was stored elsewhere.
        lost = {entry.key for entry in files if entry.at} - named
        for key in self.store.list():
            if key in lost or (_TAGGED.search(key) and key not in named):
                self.store.delete(key)

    def read(self, entry: FileEntry) -> bytes:
        """Return the verified content of a committed file."""
        return read_verified(self.store, entry)


@dataclass(frozen=True)
class Attempt:
    """A unit under way: the room, the number of the attempt over all runs, and when it began (`time.perf_counter`)."""

    room: Room
    unit: str
    number: int
    began: float

    def commit(
        self, payloads: Mapping[str, bytes], metrics: Mapping[str, Any] | None = None
    ) -> UnitMarker:
        """Commit the unit, as `Room.commit_unit` does, with the seconds that have gone by."""
        seconds = time.perf_counter() - self.began
        return self.room.commit_unit(
            self.unit, payloads, attempt=self.number, metrics=metrics, seconds=seconds
        )


def _document(marker: UnitMarker) -> dict[str, Any]:
    return {**asdict(marker), "files": [entry.document() for entry in marker.files]}


def unit_given_up(unit: str, cause: str) -> WmddError:
    """Return the error of a unit that kept ending the process which worked on it."""
    return WmddError(
        f"unit {unit} ended its worker {MAX_ATTEMPTS} times (killed, out of memory, or out of shared memory), at last {cause}; "
        "finished units are kept: look at the workers' logs, give a worker more memory, and run the same command again"
    )


def seconds_in_core(markers: Mapping[str, UnitMarker]) -> float:
    """Return what units took inside core functions, added up."""
    return round(sum(marker.metrics["seconds_in_core"] for marker in markers.values()), 3)


def marker_of(marker: Any) -> UnitMarker:
    """Return the marker that was written as JSON; an ArtifactError when it is another document."""
    check(marker, "the marker of a unit", "units")
    files = tuple(FileEntry(**entry) for entry in marker["files"])
    return UnitMarker(**{**marker, "files": files})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
