"""The table `ablation`: `best` less one thing or with another, and all of `paper`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from wmdd_ray.config import DistillConfig

from .definitions import RANDOM, Group, Options, Row, variants
from .rows import divides, group_of, main_rows, recovered

# What differs between recipes without being a choice that an ablation asks about; student and label epochs go together.
_NO_CHOICE = {"network", "num_seeds", "baselines", "all_real_epochs", "diffusion"} | {
    *("epochs", "epochs_per_unit", "slice_images")
}


def ablation(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    """Return `best` with each of its differences from `paper` taken back, and with each option that neither has, one at a time.

    What is of the images are rows of one group; what is of labels and student are groups, each with random real images. The last
    group is all of `paper`.
    """
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        random, ours = (r for r in main_rows(paper, best) if r.name in (RANDOM, "best"))
        rows = {row.name: row for row in (random, ours)}
        for part in ("barycenters", "recover"):
            for name, value in differences(getattr(best, part), getattr(paper, part)).items():
                if name in _NO_CHOICE:
                    continue
                changes = {name: value}
                if name == "start" and value == "noise":
                    changes["residual_blends"] = 0  # noise has nothing to go back to
                if not _applies(best, changes):
                    continue
                title = f"`best` with {_words(name)} {value}"
                rows[f"without_{name}"] = _changed_row(
                    f"without_{name}", title, best, part, changes
                )
        for name, (part, title, changes) in IMAGE_OPTIONS.items():
            if not _applies(best, changes):
                continue
            row = _changed_row(name, f"`best` with {title}", best, part, changes)
            # What `best` has, or `paper`, which is there then.
            if all(images_of(row) != images_of(other) for other in rows.values()):
                rows[name] = row
        whole = group_of(f"images, ipc {ipc}", ipc, best, tuple(rows.values()), options)
        groups.append(whole)
        students = _students_of_paper(paper, best)
        for title, changed in {**students, **_students_of_neither(best)}.items():
            group = group_of(f"{title}, ipc {ipc}", ipc, changed, (random, ours), options)
            # A batch is at most all images.
            if (group.relabel, group.student) != (whole.relabel, whole.student):
                groups.append(group)
        published = recovered("paper", "WMDD `paper`", paper)
        title = f"WMDD `paper`, its own labels and student, ipc {ipc}"
        groups.append(group_of(title, ipc, paper, (random, published), options))
    return groups


# What was built for images and neither variant has: row -> (part, title, changes).
IMAGE_OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sliced": ("barycenters", "a sliced Wasserstein barycenter", {"solver": "sliced"}),
    "lloyd": ("barycenters", "atoms of free weight", {"solver": "lloyd"}),
    "with_margin": ("barycenters", "3 of 10 atoms at the class's margin", {"margin_fraction": 0.3}),
    "with_rbf_mmd": ("recover", "RBF MMD for the Wasserstein term", {"feature_term": "rbf_mmd"}),
    "with_mean": ("recover", "mean matching for the Wasserstein term", {"feature_term": "mean"}),
    "with_none": ("recover", "no feature term", {"feature_term": "none"}),
    "with_global_moments": ("recover", "global moments", {"moments": "global"}),
    "with_blended_moments": ("recover", "global and class moments, half each", {"moments": "blend"}),
    "with_weighted_moments": ("recover", "moments by the atoms' weights", {"weighted_moments": True}),
    "with_ema_statistics": ("recover", "running moments (0.8)", {"ema_statistics": 0.8}),
    "with_ce": ("recover", "cross-entropy beside the Wasserstein term", {"ce_weight": 1.0}),
    "with_anchors": ("recover", "features held near real images' (CIM)", {"anchor_weight": 1.0}),
    "with_residual_blends": ("recover", "three residual blends (FADRM)", {"residual_blends": 3}),
    "with_random_start": ("recover", "a start from random images", {"start": "random"}),
    "with_mosaic_start": ("recover", "a start from mosaics of easiest crops", {"start": "mosaic"}),
    "with_teachers": ("recover", "images by 3 teachers in turn (G-VBSM)", {"teachers": 3}),
    "with_tiles": ("recover", "4 small images in each stored one (IDC)", {"tiles": 2}),
}  # fmt: skip

# The same for labels and student: title -> (part, changes).
_STUDENT_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels by the batch's statistics (BSSL)": ("relabel", {"batch_statistics": True}),
    "KL at T 4": ("evaluate", {"temperature": 4.0}),
    "MSE to logits and CE (EDC)": ("evaluate", {"loss": "mse", "ce_weight": 0.025}),
    "averaged weights": ("evaluate", {"ema_decay": 0.99}),
    "rate to half its peak": ("evaluate", {"schedule": "half_cosine"}),
    "loss by the atoms' weights": ("evaluate", {"weighted_loss": True}),
}
_MORE_EPOCHS = 3
_SMALLER_CROPS = 0.5
# Of one atom, the mean of its class, these are what `best` is: it has all the weight, and no margin.
_OF_SEVERAL = ("solver", "margin_fraction", "weighted_moments", "weighted_loss")


def _applies(best: DistillConfig, changes: dict[str, Any]) -> bool:
    """Return whether an option goes with what else `best` has, and does something to it."""
    if "residual_blends" in changes:
        enough = changes["residual_blends"] < best.recover.iterations
        return enough and best.recover.start != "noise"
    if "tiles" in changes:
        return divides(best, changes["tiles"])
    alike = changes.get("feature_term") == "mean" or any(name in changes for name in _OF_SEVERAL)
    return best.num_atoms > 1 or not alike


def _changed_row(
    name: str, title: str, best: DistillConfig, part: str, changes: dict[str, Any]
) -> Row:
    return recovered(name, title, replace(best, **{part: replace(getattr(best, part), **changes)}))


def images_of(row: Row) -> tuple[Any, ...]:
    """Return what the images of a row depend on."""
    return row.kind, row.barycenters, row.recover


def _students_of_paper(paper: DistillConfig, best: DistillConfig) -> dict[str, DistillConfig]:
    """Return `best` by title, with one of its differences from `paper` in labels or student taken back in each."""
    students = {}
    for part in ("relabel", "evaluate"):
        for name, value in differences(getattr(best, part), getattr(paper, part)).items():
            if name in _NO_CHOICE:
                continue
            text = value
            if name == "views":
                text = ", ".join(
                    f"{_words(each)} {one}"
                    for each, one in differences(getattr(best, part).views, value).items()
                )
            changed = replace(best, **{part: replace(getattr(best, part), **{name: value})})
            students[f"{_words(name)} {text}"] = changed
    if best.evaluate.epochs != paper.evaluate.epochs:
        students[f"{paper.evaluate.epochs} epochs"] = _with_epochs(best, paper.evaluate.epochs)
    return students


def _students_of_neither(best: DistillConfig) -> dict[str, DistillConfig]:
    """Return `best` by title, with one of the options of labels and student that neither variant has in each."""
    changed = {
        title: replace(best, **{part: replace(getattr(best, part), **changes)})
        for title, (part, changes) in _STUDENT_OPTIONS.items()
        if _applies(best, changes)
    }
    views = best.evaluate.hard.views
    mix = "none" if views.mix != "none" else "cutmix"
    changed["smaller crops by hard labels"] = _with_hard_views(best, crop_scale_min=_SMALLER_CROPS)
    changed[f"mix {mix} by hard labels"] = _with_hard_views(best, mix=mix)
    epochs = _MORE_EPOCHS * best.evaluate.epochs
    students = {**changed, f"{epochs} epochs": _with_epochs(best, epochs)}
    return {title: config for title, config in students.items() if config != best}


def _with_hard_views(config: DistillConfig, **changes: Any) -> DistillConfig:
    """Return the recipe with other views for hard labels; `paper` says nothing of them, and has those of `best`."""
    hard = config.evaluate.hard
    hard = replace(hard, views=replace(hard.views, **changes))
    return replace(config, evaluate=replace(config.evaluate, hard=hard))


def _with_epochs(config: DistillConfig, epochs: int) -> DistillConfig:
    return replace(
        config,
        relabel=replace(config.relabel, epochs=epochs),
        evaluate=replace(config.evaluate, epochs=epochs),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def differences(best: Any, paper: Any) -> dict[str, Any]:
    """Return field -> the paper's value of what `best` has otherwise."""
    return {
        f.name: getattr(paper, f.name)
        for f in fields(best)
        if getattr(best, f.name) != getattr(paper, f.name)
    }
