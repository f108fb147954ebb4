"""What a run would find: of each stage whether its room is done, begun, or made of something else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.spine.run import TAKEN, Progress, Run, Stage, StageRun, Work, expected_plan


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A stage of a run before it begins.

    Without the rooms to its left nobody can say what a room will be made of: `plan` is None then, and so are `commit`, of a room
    that is made of `plan` and whole, and `other`, the plan of a room that was made or begun of something else.
    """

    run: Run
    stage: Stage
    room: Room
    work: Work
    finished: frozenset[str]
    plan: dict[str, Any] | None
    commit: StageCommit | None
    other: dict[str, Any] | None

    @property
    def num_units(self) -> int | None:
        """The units of the stage; None where only the data tell."""
        return None if self.work.units is None else len(self.work.units)

    @property
    def num_finished(self) -> int:
        """Those of them that are finished in the room, for whatever plan."""
        every = self.work.units
        return len(self.finished if every is None else self.finished & {*every})


def outlooks(runs: Sequence[tuple[Run, Sequence[Stage]]]) -> Iterator[Outlook]:
    """Yield every stage of runs that share their first rooms; a run that takes rooms comes after the one that makes them."""
    fingerprints: dict[str, str] = {}
    for run, stages in runs:
        fingerprints = {name: of for name, of in fingerprints.items() if name in TAKEN}
        for stage in stages:
            room, other = run.room(stage.room), None
            made, commit = room.read_plan(), room.read_commit()
            ready = all(name in fingerprints for name in stage.inputs)
            plan = expected_plan(run, stage, fingerprints) if ready else None
            if (
                plan
                and made
                and "vacant" not in made
                and made["fingerprint"] != plan["fingerprint"]
            ):
                other = made
            if other is not None or plan is None:
                commit = None
            elif commit is not None:
                fingerprints[stage.room] = commit.fingerprint
            progress = Progress()
            work = stage.plan(StageRun(run=run, stage=stage, room=room, progress=progress))
            finished = frozenset(room.finished())
            yield Outlook(
                run=run,
                stage=stage,
                room=room,
                work=work,
                finished=finished,
                plan=plan,
                commit=commit,
                other=other,
            )
