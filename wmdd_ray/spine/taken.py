"""A run that takes the teacher and the features of another one: which rooms these are, where they lie, and whether they fit.

`taken.json` at the root of the run says from where (`..`: from the folder above), and the checksums of the teachers that its
rooms are made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.claims import difference
from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.spine.run import TAKEN, Run, Stage, expected_plan
from wmdd_ray.store.documents import find_sealed, seal
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import check_named

KEY = "taken.json"
RUNS_KEY = "runs.json"
_ABOVE = ".."


def origin_of(store: Store) -> Store | None:
    """Return the run whose teacher and features the run under `store` uses; None when it has its own."""
    note = find_sealed(store, KEY)
    if note is None:
        return None
    uri = str(note["from"])
    if uri == _ABOVE:
        return Store(store.uri.rpartition("/")[0])
    # What lies in a store that the user has opened may name others there, and no other kind of store.
    if uri.partition("://")[0] != store.uri.partition("://")[0]:
        check_named(uri, store.url(KEY), "pass the run that is meant")
    return Store(uri)


def is_above(origin: Store, store: Store) -> bool:
    """Return whether a run lies in the folder of another, and so the same hands wrote both."""
    return origin.uri == store.uri.rpartition("/")[0]


def teacher_room(spec: str) -> Room | None:
    """Return the committed room of teachers that `spec` names: itself, that of a run, or of the folder above it; None without one.

    Raises:
        ConfigError: The run has its teacher from elsewhere.
    """
    store = Store(spec)
    origin = origin_of(store)
    if origin is not None and not is_above(origin, store):
        raise ConfigError(f"{spec} has its teacher from {origin.uri}; pass that run")
    rooms = (Room(store, ""), Room(origin or store, "teacher"))
    return next((room for room in rooms if room.read_commit() is not None), None)


def take(run: Run, stages: Sequence[Stage], *, overwrite: bool = False, anew: bool = False) -> None:
    """Make sure that the rooms which a run takes are those that it would make, and note which ones they are.

    With `overwrite` the run may replace what it made of others, with `anew` it does so in any case.

    Raises:
        ConfigError: They are not there, were made with other options or of other data, are not of each other, or the run was begun
            with others.
    """
    noted, before = find_sealed(run.store, KEY), origin_of(run.store)
    if run.origin is None:
        if before is not None:
            raise ConfigError(
                f"{run.store.uri} was begun with the features of {before.uri}; pass that by --features, or another --out"
            )
        return
    option = f"--features {run.origin.uri}"
    run.relatives = (*run.relatives, run.origin, *runs_in(run.origin))
    if any(Room(run.store, name).read_plan() is not None for name in TAKEN):
        raise ConfigError(
            f"{option}: expected an --out without a teacher/ or features/ of its own, found one in {run.store.uri}; pass another "
            "--out, or leave --features out"
        )
    note = _checked(run, stages, option)
    same = noted is not None and noted["features"] == note["features"]
    if noted is not None and same and noted["teacher"] != note["teacher"] and not anew:
        raise ConfigError(
            f"{run.store.uri} was begun with another teacher than that of {option}, which was made anew since; pass another --out"
        )
    # Without --overwrite the stage whose input is another one says so.
    if noted != note and (noted is None or same or overwrite):
        run.begin_writing()
        run.store.put(KEY, seal(note))


def _checked(run: Run, stages: Sequence[Stage], option: str) -> dict[str, Any]:
    """Return what is noted of the rooms that a run takes; a ConfigError says why they are not those that it would make."""
    assert run.origin is not None
    commits: dict[str, StageCommit] = {}
    for stage in (stage for stage in stages if stage.room in TAKEN):
        commit = run.room(stage.room).read_commit()
        if commit is None:
            raise ConfigError(
                f"{option}: expected the --out of a run with a committed teacher/ and features/, found no {stage.room}/stage.json "
                "there; let that run come so far first (--until features)"
            )
        plan = expected_plan(run, stage, {name: c.fingerprint for name, c in commits.items()})
        if commit.fingerprint != plan["fingerprint"]:
            raise ConfigError(
                f"{option}: its {stage.room}/ was made with {difference(asdict(commit), plan)}; give both runs the same, or leave "
                "--features out"
            )
        commits[stage.room] = commit
    teachers = {key: entry.sha256 for key, entry in commits["teacher"].files.items()}
    # Features of before there was this entry do not say.
    of = commits["features"].metrics.get("teacher_sha256")
    if of is not None and of not in teachers.values():
        raise ConfigError(
            f"{option}: expected features of the teacher that lies there, whose SHA-256 is {next(iter(teachers.values()))[:12]}"
            f"..., found those of {of[:12]}...; make them again there (--from features --overwrite)"
        )
    return {
        "from": _ABOVE if is_above(run.origin, run.store) else run.origin.uri,
        "teacher": teachers,
        "features": commits["features"].fingerprint,
    }


def note_runs(store: Store, ipcs: Sequence[int]) -> None:
    """Note that there is a run of each ipc in a folder of its own under `store`, beside those that are there."""
    known = (find_sealed(store, RUNS_KEY) or {}).get("ipcs", [])
    if not {*ipcs} <= {*known}:
        store.put(RUNS_KEY, seal({"ipcs": sorted({*known, *ipcs})}))


def runs_in(store: Store) -> list[Store]:
    """Return the runs in the folders under `store`, by rising ipc."""
    known = (find_sealed(store, RUNS_KEY) or {}).get("ipcs", [])
    return [store.child(f"ipc{int(ipc)}") for ipc in known]
