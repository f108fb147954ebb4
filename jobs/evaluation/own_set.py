"""What a set of ours or a run of teachers says of itself: its recipe, how real images are brought to it, how labels are stored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wmdd_ray.config import DistillConfig, EvaluateConfig, SourceConfig
from wmdd_ray.core.published import is_published
from wmdd_ray.errors import ArtifactError
from wmdd_ray.recipes import RECIPES, recipe_of
from wmdd_ray.records import Teacher
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.taken import teacher_room
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import load_json, read_alike
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units.auto import choose
from wmdd_ray.units.own_data import Measured

from ..command_line import typed

logger = logging.getLogger(__name__)


def set_of_ours(uri: str, arguments: Sequence[str]) -> Any:
    """Return the set of ours at a URI; None when it is none of ours, or only --source.bucket.* leads to it, as to real images."""
    # Imported here: it loads torch, which a wrong option should not have to wait for.
    from wmdd_ray.units.given_set import own_set

    try:
        return own_set(uri)
    except ArtifactError:
        if can_be_read(uri) or not any(word.startswith("--source.bucket.") for word in arguments):
            raise
        return None


def can_be_read(uri: str) -> bool:
    """Return whether a URI can be looked into, whatever lies there."""
    try:
        Store(uri).exists("manifest.json")
    except ArtifactError:
        return False
    return True


def recipe_of_ours(own: Any) -> DistillConfig:
    """Return the recipe that a set of ours was made by, or the general options."""
    general = DistillConfig(evaluate=EvaluateConfig())
    if own is None:
        return general
    name, ipc = own.meta["provenance"]["recipe"], own.meta["ipc"]
    if name in RECIPES:
        return recipe_of(name, ipc)
    if name == "auto":
        run = Store(own.uri.removesuffix("/dataset"))
        try:
            # What was measured, and not the options beside it: a stranger's could name code to run.
            auto = load_json(run.get("run.json"), run.url("run.json"))["auto"]
            measured, size = Measured.read(auto["measured"]), own.meta["image_size"]
            return choose(measured, auto["has_gpu"], ipc, image_size=size)[0]
        except (
            OSError,
            ArtifactError,
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
        ) as error:
            logger.warning(
                "%s: recipe auto chose its students by what run.json beside dataset/ says of the images, which cannot be read "
                "(%s: %s): the general student is trained; --students, --evaluate.epochs or --recipe NAME say another",
                own.uri, type(error).__name__, error,
            )  # fmt: skip
    return general


def source_of_ours(own: Any, recipe: SourceConfig, arguments: Sequence[str]) -> SourceConfig:
    """Return how real images are read and brought to the input of a set of ours: as `read_alike` says of those that are given."""
    from wmdd_ray.units.teacher import source_of  # which loads torch

    meta, content = own.meta, Store(own.uri).get("teacher.safetensors")
    teacher = codecs.decode_teacher_of(meta, content, f"{own.uri}/teacher.safetensors")
    source = replace(source_of(teacher, recipe), format="auto")
    source = replace(source, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    places = typed(arguments, "data", "val-data")
    options = {
        word.partition("=")[0].removeprefix("--source.").replace("-", "_")
        for word in arguments
        if word.startswith("--source.")
    }
    given = next((f"--{place}" for place, uri in places.items() if uri), "")
    return read_alike(own.uri, meta, source, given=given, typed=options)


def committed_teachers(spec: str) -> tuple[Teacher, int] | None:
    """Return the first teacher of a run or a teacher room, and how many label; None when `spec` is another kind of teacher."""
    if is_published(spec):
        return None
    room = teacher_room(spec)
    if room is None:
        return None
    commit = room.committed()
    first = codecs.decode_teacher(room.read(commit.file("teacher.safetensors")))
    # A run may have others, which its images alone were made with.
    run = Store(room.store.uri.rpartition("/")[0])
    labels = Room(run, "labels").read_commit()
    labelers = len(commit.units) if labels is None else labels.options["relabel"].get("teachers", 1)
    return first, labelers


def stored_as(own: Any) -> dict[str, Any]:
    """Return how the labels of a set of ours are stored: those of baselines are rounded alike."""
    options = own.meta.get("labels", {}) if own is not None else {}
    return {
        name: options[name]
        for name in ("compression", "top_k", "precision", "step", "batch_size")
        if name in options
    }
