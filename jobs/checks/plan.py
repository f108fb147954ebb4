"""The doctor's look ahead: what is there already, what each stage has to do, and whether it fits on the disk."""

from __future__ import annotations

from collections.abc import Iterator

from wmdd_ray.errors import ConfigError
from wmdd_ray.product.tables import size
from wmdd_ray.spine.claims import difference
from wmdd_ray.spine.outlook import outlooks

from .report import Finding, Visit
from .storage import free_bytes

_MARGIN = 1.2


def check_plan(visit: Visit) -> Iterator[Finding]:
    """Compare every room with what the options would make of it, and add up the bytes to come."""
    from wmdd_ray.stages.pipeline import PIPELINE

    run, job = visit.run, visit.job
    states: list[str] = []
    to_come = 0
    for one in outlooks([(run, PIPELINE)]):
        done, room = one.num_finished, one.stage.room
        if one.plan and one.other:
            if not job.overwrite:
                yield Finding(
                    "FAIL",
                    f"{one.room.store.uri} was made with {difference(one.other, one.plan)}",
                    "pass --overwrite to replace this room and those after it, or another --out to keep both"
                    if run.owns(room)
                    else "give both runs the same, or leave --features out",
                    exit_code=ConfigError.exit_code,
                )
            done = 0
        if one.commit:
            states.append(f"{one.stage.name} done")
            continue
        total = "?" if one.num_units is None else one.num_units
        states.append(f"{one.stage.name} {f'{done}/' if done else ''}{total}")
        to_come += one.work.estimated_bytes
    yield Finding("ok", f"units: {', '.join(states)}")
    free = free_bytes(run.store)
    fits = free is None or free >= _MARGIN * to_come
    on_disk = "" if free is None else f", {size(free)} free on the disk of --out"
    yield Finding(
        "ok" if fits else "FAIL",
        f"about {size(to_come)} to come{on_disk}",
        "" if fits else "make room, or put --out on another disk",
    )
