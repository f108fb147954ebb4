"""A stage's folder: units that are finished whole, and the commit that makes them one artifact.

One root URI holds a room a stage. A room is built in this order, and each step is one whole object:

    plan.json          what the room is being built from: options, inputs, their fingerprints
    <payloads>         the arrays, tables and images of a unit of work
    units/<id>.json    the unit is finished: its files with sizes and checksums, its metrics
    stage.json         the room is committed: every unit's files, metrics, seconds

A reader follows `stage.json` and verifies what it names; nothing is found by listing, renamed or overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.codecs import FileEntry, dump_json, entry_of, load_json, read_verified
from wmdd_ray.store.filesystem import Store

_READERS = 32


@dataclass(frozen=True, kw_only=True)
class UnitMarker:
    """One finished unit of work. `seconds` is the time inside core functions and storage of that unit."""

    unit: str
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any]
    seconds: float
    host: str


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

    def file(self, key: str) -> FileEntry:
        """Return the committed file `key`."""
        for marker in self.units.values():
            for entry in marker.files:
                if entry.key == key:
                    return entry
        raise ArtifactError(
            f"stage {self.stage} committed no file {key}; run it again with --overwrite"
        )


class Room:
    """One stage's folder. Small and picklable: workers open it again from its URI."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.store = store.child(name)

    def finished(self) -> set[str]:
        """Return the ids of the units that are committed, by one listing."""
        keys = self.store.list("units")
        return {k.removeprefix("units/").removesuffix(".json") for k in keys if k.endswith(".json")}

    def commit_unit(
        self,
        unit: str,
        payloads: Mapping[str, bytes],
        *,
        metrics: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        host: str = "",
    ) -> UnitMarker:
        """Store the payloads, then publish the unit. A unit that somebody else finished first is left as it is.

        Units are pure functions of their inputs, so a second writer of the same payload puts the same bytes.
        """
        for key, content in payloads.items():
            self.store.put(key, content)
        marker = UnitMarker(
            unit=unit,
            files=tuple(entry_of(key, content) for key, content in payloads.items()),
            metrics=dict(metrics or {}),
            seconds=round(seconds, 4),
            host=host,
        )
        self.store.create(f"units/{unit}.json", dump_json(asdict(marker)))
        return marker

    def read_unit(self, unit: str) -> UnitMarker:
        """Return the marker of a finished unit."""
        key = f"units/{unit}.json"
        return marker_of(load_json(self.store.get(key), self.store.url(key)))

    def read_units(self, units: Iterable[str]) -> dict[str, UnitMarker]:
        """Return the markers of finished units, read side by side, in the order given."""
        units = list(units)
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(units, pool.map(self.read_unit, units), strict=True))

    def read_commit(self) -> StageCommit | None:
        """Return what `stage.json` says, or None when the room is not committed."""
        try:
            found = load_json(self.store.get("stage.json"), self.store.url("stage.json"))
        except FileNotFoundError:
            return None
        units = {unit: marker_of(marker) for unit, marker in found.pop("units").items()}
        return StageCommit(units=units, **found)

    def committed(self) -> StageCommit:
        """Return what `stage.json` says; an ArtifactError when the room is not committed."""
        commit = self.read_commit()
        if commit is None:
            raise ArtifactError(f"{self.store.uri} is not committed: run its stage first")
        return commit

    def clear(self) -> None:
        """Empty the room: the commit first, so that nobody follows it, and the plan last.

        A clearing that is killed then leaves units under the plan that they were made by, never under the next one's.
        """
        tops = {key.partition("/")[0] for key in self.store.list()}
        for top in sorted(tops, key=lambda top: (top != "stage.json", top == "plan.json")):
            self.store.delete(top)

    def read(self, entry: FileEntry) -> bytes:
        """Return the verified content of a committed file."""
        return read_verified(self.store, entry)


def marker_of(found: dict[str, Any]) -> UnitMarker:
    """Return the marker that was written as JSON."""
    files = tuple(FileEntry(**entry) for entry in found.pop("files"))
    return UnitMarker(files=files, **found)
