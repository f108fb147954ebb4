"""The table of contents: the seven stages in order, each with its room and the rooms that it reads."""

from __future__ import annotations

from types import ModuleType

from wmdd_ray.spine.numbers import StageNumbers
from wmdd_ray.spine.run import Stage
from wmdd_ray.stages import assemble, barycenters, evaluate, features, recover, relabel, squeeze


def _stage(
    module: ModuleType, room: str, *inputs: str, reads_data: bool = False, version: int = 1
) -> Stage:
    """Return the stage of a module; raise `version` when the same options would make other bytes."""
    return Stage(
        name=module.__name__.rpartition(".")[2],
        room=room,
        version=version,
        inputs=inputs,
        reads_data=reads_data,
        options=module.options,
        plan=module.plan,
        work=module.work,
        numbers=getattr(module, "NUMBERS", StageNumbers()),
    )


PIPELINE: tuple[Stage, ...] = (
    _stage(squeeze, "teacher", reads_data=True),
    _stage(features, "features", "teacher", reads_data=True),
    _stage(barycenters, "barycenters", "features"),
    _stage(recover, "images", "teacher", "features", "barycenters", version=2),
    _stage(relabel, "labels", "teacher", "features", "images", version=3),
    _stage(assemble, "dataset", "teacher", "features", "images", "labels", version=3),
    _stage(evaluate, "evaluation", "teacher", "barycenters", "dataset", reads_data=True, version=2),
)
