"""The doctor's look ahead: what is there already, what each stage has to do, and whether it fits on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wmdd_ray.errors import ConfigError
from wmdd_ray.product.tables import size
from wmdd_ray.spine.claims import difference
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import Progress, StageRun, expected_plan

from .report import Finding, Visit
from .storage import free_bytes

_MARGIN = 1.2


def check_plan(visit: Visit) -> Iterator[Finding]:
    """Compare every room with what the options would make of it, and add up the bytes to come."""
    from wmdd_ray.stages.pipeline import PIPELINE

    run, job = visit.run, visit.job
    fingerprints: dict[str, str] = {}
    states: list[str] = []
    to_come = 0
    for stage in PIPELINE:
        room = run.room(stage.room)
        work = stage.plan(StageRun(run=run, stage=stage, room=room, progress=Progress()))
        finished, plan, commit = room.finished(), _plan_of(room), room.read_commit()
        # Without the rooms to its left, nobody can say what a room will be made of.
        expected = None
        if all(name in fingerprints for name in stage.inputs):
            expected = expected_plan(run, stage, fingerprints)
        if expected and plan and plan["fingerprint"] != expected["fingerprint"]:
            if not job.overwrite:
                yield Finding(
                    "FAIL",
                    f"{room.store.uri} was made with {difference(plan, expected)}",
                    "pass --overwrite to replace this room and those after it, or another --out to keep both"
                    if run.owns(stage.room)
                    else "give both runs the same, or leave --features out",
                    exit_code=ConfigError.exit_code,
                )
            commit, finished = None, set()
        if expected and commit:
            fingerprints[stage.room] = commit.fingerprint
            states.append(f"{stage.name} done")
            continue
        total = "?" if work.units is None else len(work.units)
        done = len(finished if work.units is None else finished & {*work.units})
        states.append(f"{stage.name} {f'{done}/' if done else ''}{total}")
        to_come += work.estimated_bytes
    yield Finding("ok", f"units: {', '.join(states)}")
    free = free_bytes(run.store)
    fits = free is None or free >= _MARGIN * to_come
    on_disk = "" if free is None else f", {size(free)} free on the disk of --out"
    yield Finding(
        "ok" if fits else "FAIL",
        f"about {size(to_come)} to come{on_disk}",
        "" if fits else "make room, or put --out on another disk",
    )


def _plan_of(room: Room) -> dict[str, Any] | None:
    plan = room.read_plan()
    return None if plan is None or "vacant" in plan else plan
