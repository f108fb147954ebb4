"""The table of contents: the seven stages in order, each with its room and what it reads."""

from __future__ import annotations

from wmdd_ray.run import Stage
from wmdd_ray.stages import assemble, barycenters, evaluate, features, recover, relabel, squeeze

PIPELINE: tuple[Stage, ...] = (
    Stage(
        name="squeeze",
        room="teacher",
        version=1,
        inputs=(),
        reads_data=True,
        options=squeeze.options,
        plan=squeeze.plan,
        work=squeeze.work,
    ),
    Stage(
        name="features",
        room="features",
        version=1,
        inputs=("teacher",),
        reads_data=True,
        options=features.options,
        plan=features.plan,
        work=features.work,
    ),
    Stage(
        name="barycenters",
        room="barycenters",
        version=1,
        inputs=("features",),
        reads_data=False,
        options=barycenters.options,
        plan=barycenters.plan,
        work=barycenters.work,
    ),
    Stage(
        name="recover",
        room="images",
        version=1,
        inputs=("teacher", "features", "barycenters"),
        reads_data=False,
        options=recover.options,
        plan=recover.plan,
        work=recover.work,
    ),
    Stage(
        name="relabel",
        room="labels",
        version=1,
        inputs=("teacher", "features", "images"),
        reads_data=False,
        options=relabel.options,
        plan=relabel.plan,
        work=relabel.work,
    ),
    Stage(
        name="assemble",
        room="dataset",
        version=1,
        inputs=("teacher", "features", "images", "labels"),
        reads_data=False,
        options=assemble.options,
        plan=assemble.plan,
        work=assemble.work,
    ),
    Stage(
        name="evaluate",
        room="evaluation",
        version=1,
        inputs=("teacher", "barycenters", "dataset"),
        reads_data=True,
        options=evaluate.options,
        plan=evaluate.plan,
        work=evaluate.work,
    ),
)
