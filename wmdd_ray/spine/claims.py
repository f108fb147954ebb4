"""Whose folder it is: that of the plan which lies there."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from wmdd_ray.errors import ArtifactError, ConfigError, LostRaceError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.documents import seal


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of canonical JSON, first 16 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def claim_room(
    room: Room,
    plan: dict[str, Any],
    *,
    overwrite: bool,
    began: float,
    begin_writing: Callable[[], None],
) -> dict[str, Any]:
    """Write the room's plan, or check that the one which lies there is the same; return it with its space."""
    found = room.read_plan()
    room.store.sweep(began)
    if found is None:
        begin_writing()
        plan = {**plan, "space": ""}
        if room.store.create("plan.json", seal(plan)):
            return plan
        return claim_room(room, plan, overwrite=False, began=began, begin_writing=begin_writing)
    if found.get("fingerprint") == plan["fingerprint"]:
        plan = {**plan, "space": found.get("space", "")}
        if "vacant" in found:
            room.store.put("plan.json", seal(plan))
        return plan
    if not (overwrite or "vacant" in found):
        raise ConfigError(
            f"{room.store.uri} was made with {difference(found, plan)}; pass --overwrite to replace this room "
            "and those after it, or another --out to keep both"
        )
    begin_writing()
    room.clear()
    # Whoever worked there has the space of the plan before, and may not have seen yet that it is gone.
    plan = {**plan, "space": uuid.uuid4().hex[:8]}
    room.store.put("plan.json", seal(plan))
    return plan


def leave_room(
    room: Room, plan: dict[str, Any], error: BaseException, open_room: Callable[[str], Room]
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


def check_ours(room: Room, plan: dict[str, Any]) -> None:
    """Raise a LostRaceError when another run has taken over the room by `--overwrite` in the meantime."""
    found = room.read_plan() or {}
    if (found.get("fingerprint"), found.get("space", "")) != (plan["fingerprint"], plan["space"]):
        raise _replaced(room)


def _replaced(room: Room) -> LostRaceError:
    return LostRaceError(
        f"{room.store.uri} was replaced by another run with other options while this one worked on it; give each "
        "run its own --out"
    )


def difference(found: dict[str, Any], plan: dict[str, Any]) -> str:
    """Return the differing options in words: name, value there, value asked for."""
    old, new = (flatten(p["options"]) for p in (found, plan))
    changed = [
        f"{name}={old.get(name)!r} (this run asks for {new.get(name)!r})"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
    changed += [
        f"no {name} (this run has {new[name]!r})" for name in sorted(new.keys() - old.keys())
    ]
    changed += [
        f"{name}={old[name]!r} (this run has none)" for name in sorted(old.keys() - new.keys())
    ]
    for name in sorted(found["inputs"].keys() | plan["inputs"].keys()):
        if found["inputs"].get(name) != plan["inputs"].get(name):
            changed.append(f"another version of its input {name}")
    if found["version"] != plan["version"]:
        changed.append(f"version {found['version']} of the stage (this is {plan['version']})")
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
