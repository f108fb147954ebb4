"""Rows and groups that several tables have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from wmdd_ray.config import DistillConfig, RecoverConfig

from .definitions import RANDOM, Group, Kind, Options, Row, TeacherRecipe

_TILED: tuple[Kind, ...] = ("random", "nearest", "mosaic")


def teacher_of(config: DistillConfig, options: Options) -> TeacherRecipe:
    """Return the teacher of a recipe."""
    return TeacherRecipe(
        name=config.squeeze.network.arch, squeeze=config.squeeze, given=options.teacher
    )


def several_teachers(first: TeacherRecipe, count: int) -> tuple[TeacherRecipe, ...]:
    """Return a teacher and `count` - 1 more of its recipe, from other random starts."""
    others = [replace(first, name=f"{first.name}-{i}", given="") for i in range(1, count)]
    return (first, *others)


def group_of(
    title: str,
    ipc: int,
    recipe: DistillConfig,
    rows: tuple[Row, ...],
    options: Options,
    teacher: TeacherRecipe | None = None,
) -> Group:
    """Return a group by a recipe's labels, student and tiles: at least 5 students a row, 3 distilled sets up to ipc 10.

    An `ipc` of 0 stands for all real images. A `teacher` takes the place of the recipe's own.
    """
    distill_seeds = options.distill_seeds or (3 if 0 < ipc <= 10 else 1)
    batch_size = min(recipe.evaluate.batch_size, 10 * ipc) if ipc else recipe.evaluate.batch_size
    return Group(
        title=title,
        ipc=ipc,
        tiles=recipe.recover.tiles,
        teacher=teacher or teacher_of(recipe, options),
        relabel=recipe.relabel,
        student=replace(recipe.evaluate, batch_size=batch_size),
        rows=rows,
        distill_seeds=distill_seeds,
        student_seeds=options.student_seeds or -(-5 // distill_seeds),
    )


def recovered(name: str, title: str, recipe: DistillConfig, **changes: Any) -> Row:
    """Return a row of images that a recipe recovers, with changes of `recover`."""
    return Row(
        name=name,
        title=title,
        kind="recover",
        barycenters=recipe.barycenters,
        recover=replace(recipe.recover, **changes),
    )


def divides(best: DistillConfig, tiles: int) -> bool:
    """Return whether students of tiles x tiles small images can have the views, labels and steps of those of `best`."""
    passes = (best.evaluate.epochs, best.relabel.epochs)
    images = 10 * best.ipc
    return images % min(best.evaluate.batch_size, images) == 0 and all(
        epochs * best.recover.tiles**2 % tiles**2 == 0 for epochs in passes
    )


def main_rows(paper: DistillConfig, best: DistillConfig) -> tuple[Row, ...]:
    """Return the rows of the table `main`: real images by selections, published methods, `paper`'s ablation, and both variants."""
    atoms, crops = best.barycenters, best.recover.crop_scale_min
    tiles, grid = best.recover.tiles, RecoverConfig(crop_scale_min=crops)
    area = f"{100 * crops:g} % of the area or more"
    rows = [
        Row(name=RANDOM, title="random real images", kind="random"),
        Row(name="herding", title="herding (Welling 2009)", kind="herding"),
        Row(
            name="nearest_real",
            title="real image nearest to each atom",
            kind="nearest",
            barycenters=atoms,
        ),
        # With the crops that a start of `best` from mosaics has.
        Row(
            name="mosaic",
            title=f"mosaics of 2 x 2 easiest crops of {area} (RDED's: 8 %)",
            kind="mosaic",
            recover=grid,
        ),
    ]
    # Easiest crops of which a student sees each by itself, also where `best` is whole images.
    tiled, side = (_TILED, tiles) if tiles > 1 else (("mosaic",), 2)
    if tiles > 1 or divides(best, side):
        small = f"{side**2} small real images in each stored one"
        rows += [
            Row(
                name=f"{kind}_tiles",
                title=f"{small}: {f'easiest crops of {area}' if kind == 'mosaic' else kind}",
                kind=kind,
                barycenters=atoms,
                recover=replace(grid, tiles=side),
            )
            for kind in tiled
        ]
    ce, everywhere = {"feature_term": "cross_entropy"}, {"moments": "global"}
    mean: dict[str, Any] = {"feature_term": "mean", "moments": "none", "start": "random"}
    return (
        *rows,
        recovered("mean_matching", "mean matching (DM's feature term)", paper, **mean),
        recovered("sre2l", "cross-entropy + global BN (SRe2L)", paper, **ce, **everywhere),
        recovered("ce_pcbn", "cross-entropy + per-class BN", paper, **ce),
        recovered("wasserstein_bn", "Wasserstein + global BN", paper, **everywhere),
        recovered("paper", "WMDD `paper`: Wasserstein + per-class BN", paper),
        recovered("best", "**WMDD `best`**", best),
    )
