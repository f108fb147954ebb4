"""What a committed result must have to be shown: all that a reader would need to doubt a number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.documents import unseal

from .definitions import FULL, RANDOM
from .scores import scored_rows, spread

_NEEDED = {
    "a result": "table dataset data fingerprint split opened num_images teachers groups hardware versions git_revision",
    "a teacher": "top1 top1_val squeeze seconds",
    "a teacher's recipe": "epochs mixed_precision",
    "a group": "title ipc labeled_by relabel student distill_seeds student_seeds rows",
    "a row": "name title kind recover barycenters epochs num_stored num_read image_bytes label_bytes distill_seconds soft hard",
    "the optimization of a row": "iterations mixed_precision tiles",
    "the students of a row": "mean std top1 seeds views weights",
    "a student recipe": (
        "network epochs batch_size optimizer learning_rate weight_decay temperature mixed_precision hard"
    ),
    "a network": "arch width norm",
    "a hard-label recipe": "norm optimizer learning_rate views",
    "the views of a student": "crop_scale_min flip mix mix_alpha",
}

# Real images that stand in every group of the table `main`, and those beside rows with several small images in a stored one.
_REAL = (RANDOM, "herding", "nearest_real", "mosaic")
_REAL_TILES = ("random_tiles", "nearest_tiles", "mosaic_tiles")


def read_result(content: bytes, where: str) -> dict[str, Any]:
    """Return a sealed result that may be shown.

    Raises:
        ArtifactError: It was changed by hand, lacks what a table must have, or is not of the test split.
    """
    result = unseal(content, where)
    check_result(result, where)
    return result


def check_result(result: dict[str, Any], where: str) -> None:
    """Refuse a result without recipe, teacher, seeds, versions, both label kinds, or the real images that each group must have."""

    def refuse(what: str) -> ArtifactError:
        return ArtifactError(f"{where}: {what}; run the table again: it is not rendered without")

    def need(kind: str, value: Any, name: str) -> None:
        for key in _NEEDED[kind].split():
            if not isinstance(value, dict) or key not in value or value[key] in ("", [], {}):
                raise refuse(f"{kind} ({name}) has no {key}")

    need("a result", result, str(result.get("table")))
    if result["split"] != "test" or not result["opened"]:
        raise refuse(f"expected numbers of the test split, found {result['split']}")
    # Results of before 2026-11-22 do not have it.
    before = result.get("opened_before", [])
    if not isinstance(before, list) or any(
        not isinstance(each, dict) or not each.keys() >= {"table", "opened"} for each in before
    ):
        raise refuse(f"opened_before: expected tables and times, found {before!r}")
    for name, teacher in result["teachers"].items():
        need("a teacher", teacher, name)
        need("a teacher's recipe", teacher["squeeze"], name)
    for group in result["groups"]:
        _check_group(group, result, need, refuse)
    for row, expected in scored_rows(result["groups"]):
        if ("lrs" in row) != (expected is not None):
            raise refuse(f"row {row['name']}: LRS and the row {FULL} go together")
        if expected is not None and not _same(row["lrs"], expected):
            raise refuse(f"row {row['name']}: LRS does not follow from the accuracies")


def _check_group(group: dict[str, Any], result: dict[str, Any], need: Any, refuse: Any) -> None:
    need("a group", group, str(group.get("title")))
    student = group["student"]
    need("a student recipe", student, group["title"])
    need("a network", student["network"], group["title"])
    need("a hard-label recipe", student["hard"], group["title"])
    for labels, options in (("soft", group["relabel"]), ("hard", student["hard"])):
        views = options.get("views")
        need("the views of a student", views, f"{group['title']}, {labels} labels")
    if group["labeled_by"] not in result["teachers"]:
        raise refuse(f"group {group['title']} is labeled by an unknown teacher")
    for row in group["rows"]:
        _check_row(row, group, need, refuse)
    names = {row["name"] for row in group["rows"]}
    required = required_rows(result["table"], group["ipc"], group["rows"])
    missing = [name for name in required if name not in names]
    if missing:
        raise refuse(f"group {group['title']} has no row {' and no '.join(missing)}")
    budgets = {
        (r["num_stored"], r[k]["views"], len(r[k]["top1"]))
        for r in group["rows"]
        if r["kind"] != "full"
        for k in ("soft", "hard")
    }
    if len(budgets) > 1:
        raise refuse(f"rows of {group['title']} had other budgets: {sorted(budgets)}")


def required_rows(table: str, ipc: int, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the names of the rows of real images that a group with these rows must have."""
    if not ipc:
        return ()
    if table != "main":
        return (RANDOM,)
    tiled = any(row["recover"]["tiles"] > 1 for row in rows if row["kind"] == "recover")
    return _REAL + _REAL_TILES * tiled


def _check_row(row: dict[str, Any], group: dict[str, Any], need: Any, refuse: Any) -> None:
    need("a row", row, f"{row.get('name')}, {group['title']}")
    if row["kind"] == "recover":
        need("the optimization of a row", row["recover"], f"{row['name']}, {group['title']}")
    for kind in ("soft", "hard"):
        stated = row[kind]
        need("the students of a row", stated, f"{row['name']}, {kind} labels")
        if not len(stated["top1"]) == len(stated["seeds"]) == len(stated["weights"]):
            raise refuse(f"row {row['name']} has students without seeds or weights")
        both = {name: stated[name] for name in ("mean", "std")}
        if not _same(both, spread(stated["top1"])):
            raise refuse(f"row {row['name']}: mean and std are not those of its students")
        if len(set(zip(stated["weights"], stated["top1"], strict=True))) != len(
            set(stated["weights"])
        ):
            raise refuse(f"row {row['name']} has students of the same weights and other top-1")
        # Then the mean of all, which LRS is made of, is that of the different ones.
        if len(set(Counter(stated["weights"]).values())) > 1:
            raise refuse(f"row {row['name']} has students that are there more often than others")


def _same(stated: dict[str, float], expected: dict[str, float]) -> bool:
    return stated.keys() == expected.keys() and all(
        math.isclose(stated[k], expected[k], rel_tol=0, abs_tol=1e-12) for k in expected
    )
