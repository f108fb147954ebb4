"""Whose folder it is: that of the plan which lies there.

One rule for rooms, exports, prepared images and trained models. A folder without a plan is free when it holds nothing of anybody
else's. One of the same plan is gone on with. One of another plan is refused by the options that differ, or replaced where that was
asked for.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from wmdd_ray.errors import ArtifactError, ConfigError, LostRaceError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.documents import find_sealed, seal
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources.classes import shown

Plan = dict[str, Any]
"""What a folder is made by: `version`, `options`, `inputs`, and the `fingerprint` over them."""


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of canonical JSON, first 16 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def plan_of(head: Plan) -> Plan:
    """Return a plan: `version`, `options` and `inputs` as they will be read again (tuples become lists), and their fingerprint."""
    plain = json.loads(json.dumps(head))
    return {**plain, "fingerprint": fingerprint(plain)}


def read_claim(store: Store, key: str, mine: str, ours: tuple[str, ...] = ()) -> Plan | None:
    """Return the document `key` that claims a folder, or None when the folder is free.

    Raises:
        ConfigError: It holds neither, but files that do not begin as `ours`; `mine` says what would be right.
    """
    if (there := find_sealed(store, key)) is not None:
        return there
    foreign = [name for name in store.list() if not name.startswith(ours)]
    if foreign:
        raise ConfigError(
            f"--out {store.uri}: expected an empty or new folder, or {mine}, found {len(foreign)} other files: {shown(foreign)}; "
            "give another --out"
        )
    return None


def is_of(uri: str, there: Plan, plan: Plan, *, overwrite: bool | None, what: str = "it") -> bool:
    """Return whether what is `there` is made by `plan`; False where it is not and is to be replaced.

    Raises:
        ConfigError: It is not, and must not be replaced; names the options. Where `overwrite` is None there is no such option.
    """
    same = bool(there.get("fingerprint") == plan["fingerprint"])
    if not (same or overwrite):
        replace = "delete it first" if overwrite is None else f"pass --overwrite to replace {what}"
        raise ConfigError(
            f"{uri} was made with {difference(there, plan)}; {replace}, or another --out to keep both"
        )
    return same


def claim_room(
    room: Room, plan: Plan, begin_writing: Callable[[], None], *, overwrite: bool
) -> Plan:
    """Write the room's plan, or check that the one which lies there is the same; return it with its space."""
    there = room.read_plan()
    if there is None:
        begin_writing()
        if room.store.create("plan.json", seal({**plan, "space": ""})):
            return {**plan, "space": ""}
        there, overwrite = room.read_plan(), False
        assert there is not None, "a plan is replaced and never taken away"
    vacant = "vacant" in there
    what = "this room and those after it"
    if is_of(room.store.uri, there, plan, overwrite=overwrite or vacant, what=what):
        plan = {**plan, "space": there.get("space", "")}
        if vacant:
            room.store.put("plan.json", seal(plan))
        return plan
    begin_writing()
    room.clear()
    # Whoever worked there has the space of the plan before, and may not have seen yet that it is gone.
    plan = {**plan, "space": uuid.uuid4().hex[:8]}
    room.store.put("plan.json", seal(plan))
    return plan


def leave_room(
    room: Room, plan: Plan, error: BaseException, open_room: Callable[[str], Room]
) -> None:
    """Find out, when a stage fails, whether another run took its room or an input; else make way where nothing was done.

    A room where work was begun and nothing done (a teacher that was refused, say) has nothing to lose, and takes other options
    without `--overwrite`.
    """
    try:
        check_ours(room, plan)
        for name, made_as in plan["inputs"].items():
            commit = open_room(name).read_commit() if name not in ("data", "val_data") else None
            if commit is not None and commit.fingerprint != made_as:
                raise _replaced(open_room(name))
        tops = {key.partition("/")[0] for key in room.store.list()}
        if tops <= {"plan.json", "attempts"}:
            room.store.put("plan.json", seal({**plan, "vacant": True}))
    except LostRaceError as lost:
        if isinstance(error, Exception):
            raise lost from error
    except ArtifactError:
        pass  # the store is what fails


def check_ours(room: Room, plan: Plan) -> None:
    """Raise a LostRaceError when another run has taken over the room by `--overwrite` in the meantime."""
    there = room.read_plan() or {}
    if (there.get("fingerprint"), there.get("space", "")) != (plan["fingerprint"], plan["space"]):
        raise _replaced(room)


def _replaced(room: Room) -> LostRaceError:
    return LostRaceError(
        f"{room.store.uri} was replaced by another run with other options while this one worked on it; give each "
        "run its own --out"
    )


def difference(there: Plan, plan: Plan) -> str:
    """Return the differing options in words: name, value there, value asked for."""
    old, new = (flatten(p["options"]) for p in (there, plan))
    changed = []
    for name in sorted(old.keys() | new.keys(), key=lambda n: (n not in new, n not in old, n)):
        if name not in old:
            changed.append(f"no {name} (this run has {new[name]!r})")
        elif name not in new:
            changed.append(f"{name}={old[name]!r} (this run has none)")
        elif old[name] != new[name]:
            changed.append(f"{name}={old[name]!r} (this run asks for {new[name]!r})")
    for name in sorted(there["inputs"].keys() | plan["inputs"].keys()):
        if there["inputs"].get(name) != plan["inputs"].get(name):
            changed.append(f"another version of its input {name}")
    if there["version"] != plan["version"]:
        changed.append(f"version {there['version']} of the stage (this is {plan['version']})")
    return ", ".join(changed)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat.update(flatten(item, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = item
    return flat
