"""What the tables hold: rows and groups as data. A new row is one line, and a new option of a recipe needs none.

A group is what may be compared: one number of stored images a class, one labeling teacher, one student recipe. Its rows
differ in the images alone: they have no field for labels or students. Every group of stored images has `random_real`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from wmdd_ray.config import (
    BarycenterConfig,
    DistillConfig,
    EvaluateConfig,
    NetworkConfig,
    RecoverConfig,
    RelabelConfig,
    SourceConfig,
    SqueezeConfig,
)
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of

Kind = Literal["random", "nearest", "herding", "mosaic", "recover", "full"]
TableName = Literal[
    "main", "cross", "digits", "ablation", "longtail", "alignment", "alignment_digits"
]

RANDOM, FULL = "random_real", "full_data"
_TILED: tuple[Kind, ...] = ("random", "nearest", "mosaic")


@dataclass(frozen=True, kw_only=True)
class Row:
    """How the images of a row come about: real ones by a selection, or recovered; `full` is all training images."""

    name: str
    title: str
    kind: Kind
    barycenters: BarycenterConfig = field(default_factory=BarycenterConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)

    @property
    def tiles(self) -> int:
        """Small images along a side of a stored one."""
        return self.recover.tiles


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """A teacher as it is trained, or the SHA-256 of one that was given as a file."""

    name: str
    squeeze: SqueezeConfig
    seed: int = 0
    given: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows under one budget. The first of `teachers` labels, or the mean of `labelers`; recovered rows use all of `teachers`.

    `student.epochs` and `relabel.epochs` are passes over stored images that are read as tiles x tiles small ones; a row with
    fewer small images has as many more passes.
    """

    title: str
    ipc: int
    tiles: int
    teachers: tuple[TeacherRecipe, ...]
    relabel: RelabelConfig
    student: EvaluateConfig
    rows: tuple[Row, ...]
    distill_seeds: int
    student_seeds: int
    labelers: tuple[TeacherRecipe, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a student of a row is given, in total."""

    epochs: int
    label_epochs: int
    views: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line changes of a table; None keeps the recipe's value."""

    ipc: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    distill_seeds: int | None = None
    student_seeds: int | None = None
    width: int | None = None
    epochs: int | None = None
    full_epochs: int | None = None
    teacher_epochs: int | None = None
    iterations: int | None = None
    tiles: int | None = None
    bf16: bool = False
    given: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: its data set and its groups.

    `held_out` training images are `val` (0: the last tenth of each class); of what is left the first class has `imbalance`
    times the images of the last.
    """

    name: TableName
    dataset: str
    source: SourceConfig
    held_out: int
    groups: tuple[Group, ...]
    imbalance: float = 1.0


def table_of(name: TableName, options: Options) -> Table:
    """Return a table with what the options change of it.

    Raises:
        ConfigError: Rows of a group would have different budgets, or there is no such row or group.
    """
    on_digits = name in ("digits", "longtail", "alignment_digits")
    dataset = "digits" if on_digits else "fashion_mnist"
    makers: dict[TableName, tuple[_Maker, tuple[int, ...]]] = {
        "main": (_main, (1, 10, 50)),
        "digits": (_main, (1, 5, 10)),
        "cross": (_cross, (10,)),
        "ablation": (_ablation, (10,)),
        "longtail": (_longtail, (1, 5)),
        "alignment": (_alignment, (1, 10, 50)),
        "alignment_digits": (_alignment, (1, 10, 50)),
    }
    make, ipcs = makers[name]
    groups = make(dataset, options.ipc or ipcs, options)
    if options.rows:
        there = {row.name for group in groups for row in group.rows}
        unknown = sorted(set(options.rows) - there)
        if unknown:
            raise ConfigError(f"--rows: expected some of {', '.join(sorted(there))}, got {unknown}")
        asked = {*options.rows, RANDOM}
        groups = [replace(g, rows=tuple(r for r in g.rows if r.name in asked)) for g in groups]
        groups = [g for g in groups if g.rows]
    if options.groups:
        titles = [group.title for group in groups]
        for text in options.groups:
            if not any(text in title for title in titles):
                raise ConfigError(f"--groups: expected parts of {titles}, got {text!r}")
        groups = [g for g in groups if any(text in g.title for text in options.groups)]
    for group in groups:
        require_equal_budgets(group)
    return Table(
        name=name,
        dataset=dataset,
        source=recipe_of(dataset, 1).source,
        held_out=5000 if dataset == "fashion_mnist" else 0,
        groups=tuple(groups),
        imbalance=_IMBALANCE if name == "longtail" else 1.0,
    )


def budget_of(group: Group, row: Row, num_images: int) -> Budget:
    """Return what a student of the row is given: epochs are fewer where an image is read as tiles x tiles small ones.

    Args:
        group: Its group.
        row: The row.
        num_images: Images that the student reads in an epoch.
    """
    student, scale = group.student, group.tiles**2
    passes, stored = student.epochs * scale, group.relabel.epochs * scale
    if row.kind == "full":
        epochs = label_epochs = student.all_real_epochs
    else:
        share = row.tiles**2
        if passes % share or stored % share:
            raise ConfigError(
                f"row {row.name}: expected student and label epochs that {share} small images a stored one divide, got "
                f"{passes} and {stored}"
            )
        epochs, label_epochs = passes // share, min(stored, passes) // share
    steps = epochs * -(-num_images // student.batch_size)
    return Budget(epochs=epochs, label_epochs=label_epochs, views=epochs * num_images, steps=steps)


def require_equal_budgets(group: Group, num_classes: int = 10) -> None:
    """Refuse a group whose rows would have different numbers of views or optimizer steps, or no random real images."""
    names = {row.name for row in group.rows}
    if group.ipc and RANDOM not in names:
        raise ConfigError(f"group {group.title}: a table without the row {RANDOM} proves nothing")
    found = {
        (budget.views, budget.steps, budget.views // budget.epochs * budget.label_epochs)
        for row in group.rows
        if row.kind != "full"
        for budget in [budget_of(group, row, num_classes * group.ipc * row.tiles**2)]
    }
    if len(found) > 1:
        raise ConfigError(
            f"group {group.title}: rows differ in (views, steps, labels): {sorted(found)}; give the student a batch size "
            f"that divides {num_classes * group.ipc} images"
        )


# Variants ---------------------------------------------------------------------------------------


def variants(dataset: str, ipc: int, options: Options) -> tuple[DistillConfig, DistillConfig]:
    """Return the recipe as the paper has it and as it is best."""
    paper, best = recipe_of(dataset, ipc, "paper"), recipe_of(dataset, ipc)
    if options.tiles is not None:
        best = replace(best, recover=replace(best.recover, tiles=options.tiles))
    return _changed(paper, options), _changed(best, options)


def _changed(config: DistillConfig, options: Options) -> DistillConfig:
    network, recover = config.evaluate.network, config.recover
    squeeze, relabel, student = config.squeeze, config.relabel, config.evaluate
    if options.width is not None:
        network = replace(network, width=options.width)
    if options.iterations is not None:
        recover = replace(recover, iterations=options.iterations)
    if options.teacher_epochs is not None:
        squeeze = replace(squeeze, epochs=options.teacher_epochs)
    if options.full_epochs is not None:
        student = replace(student, all_real_epochs=options.full_epochs)
    if options.epochs is not None:
        student = replace(student, epochs=options.epochs)
        relabel = replace(relabel, epochs=options.epochs)
    if options.bf16:
        squeeze = replace(squeeze, mixed_precision=True)
        recover = replace(recover, mixed_precision=True)
        student = replace(student, mixed_precision=True)
    return replace(
        config,
        squeeze=replace(squeeze, network=network),
        recover=recover,
        relabel=relabel,
        evaluate=replace(student, network=network),
    )


def _teachers(config: DistillConfig, options: Options) -> tuple[TeacherRecipe, ...]:
    return (TeacherRecipe(name="convnet3", squeeze=config.squeeze, given=options.given),)


def _group(
    title: str,
    ipc: int,
    recipe: DistillConfig,
    rows: tuple[Row, ...],
    options: Options,
    teachers: tuple[TeacherRecipe, ...] | None = None,
) -> Group:
    distill_seeds = options.distill_seeds or (3 if 0 < ipc <= 10 else 1)
    batch_size = min(recipe.evaluate.batch_size, 10 * ipc) if ipc else recipe.evaluate.batch_size
    return Group(
        title=title,
        ipc=ipc,
        tiles=recipe.recover.tiles,
        teachers=teachers or _teachers(recipe, options),
        relabel=recipe.relabel,
        student=replace(recipe.evaluate, batch_size=batch_size),
        rows=rows,
        distill_seeds=distill_seeds,
        student_seeds=options.student_seeds or -(-5 // distill_seeds),
    )


# What differs between recipes without being a choice that an ablation asks about; student and label epochs go together.
_NO_CHOICE = {"network", "num_seeds", "baselines", "all_real_epochs", "diffusion"} | {
    *("epochs", "epochs_per_unit", "slice_images")
}


# Tables -----------------------------------------------------------------------------------------

_Maker = Callable[[str, tuple[int, ...], Options], list[Group]]

# The smallest class of the long-tailed digits keeps 11 images to train on.
_IMBALANCE = 12.0
_LABEL_WEIGHTS = (0.1, 1.0, 10.0)
# Teachers that label in the groups of LIA, which a schedule is chosen from; the largest joins OTM.
_LABELERS = (2, 4)
# EDC's weight of cross-entropy beside mean squared error, and the transport term's.
_OTM: dict[str, Any] = {"loss": "mse", "ce_weight": 0.025}
_SINKHORN_WEIGHT = 0.1


def _recovered(name: str, title: str, recipe: DistillConfig, **changes: Any) -> Row:
    return Row(
        name=name,
        title=title,
        kind="recover",
        barycenters=recipe.barycenters,
        recover=replace(recipe.recover, **changes),
    )


def _divides(best: DistillConfig, tiles: int) -> bool:
    """Return whether students of tiles x tiles small images can have the views, labels and steps of those of `best`."""
    passes = (best.evaluate.epochs, best.relabel.epochs)
    images = 10 * best.ipc
    return images % min(best.evaluate.batch_size, images) == 0 and all(
        epochs * best.recover.tiles**2 % tiles**2 == 0 for epochs in passes
    )


def _main_rows(paper: DistillConfig, best: DistillConfig) -> tuple[Row, ...]:
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
    if tiles > 1 or _divides(best, side):
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
        _recovered("mean_matching", "mean matching (DM's feature term)", paper, **mean),
        _recovered("sre2l", "cross-entropy + global BN (SRe2L)", paper, **ce, **everywhere),
        _recovered("ce_pcbn", "cross-entropy + per-class BN", paper, **ce),
        _recovered("wasserstein_bn", "Wasserstein + global BN", paper, **everywhere),
        _recovered("paper", "WMDD `paper`: Wasserstein + per-class BN", paper),
        _recovered("best", "**WMDD `best`**", best),
    )


def _main(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        groups.append(_group(f"ipc {ipc}", ipc, best, _main_rows(paper, best), options))
    _, best = variants(dataset, max(ipcs), options)
    full = Row(name=FULL, title="all real training images", kind="full")
    return [*groups, _group("all real images", 0, best, (full,), options)]


def _cross(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    groups = []
    residual = NetworkConfig(arch="resnet18", small_stem=True)
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        keep = {RANDOM, "nearest_real", "best"}
        rows = tuple(row for row in _main_rows(paper, best) if row.name in keep)
        seen = _teachers(best, options)
        # Two cores take hours for these networks; bfloat16 halves them.
        squeeze = replace(best.squeeze, network=residual, mixed_precision=True)
        other = TeacherRecipe(name="resnet18", squeeze=squeeze)
        pairs: list[tuple[tuple[TeacherRecipe, ...], NetworkConfig]] = [
            (seen, best.evaluate.network),
            (seen, residual),
            ((other,), NetworkConfig(arch="mobilenet_v2", small_stem=True)),
            ((other,), NetworkConfig(arch="vit_tiny")),
        ]
        for teachers, network in pairs:
            title = f"{teachers[0].name} to {network.arch}, ipc {ipc}"
            student = replace(best.evaluate, network=network, mixed_precision=True)
            recipe = replace(best, evaluate=student)
            groups.append(_group(title, ipc, recipe, rows, options, teachers))
    return groups


def _ablation(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    """Return `best` with each of its differences from `paper` taken back, and with each option that neither has, one at a time.

    What is of the images are rows of one group; what is of labels and student are groups, each with random real images. The
    last group is all of `paper`.
    """
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        random, ours = (r for r in _main_rows(paper, best) if r.name in (RANDOM, "best"))
        rows = {row.name: row for row in (random, ours)}
        for part in ("barycenters", "recover"):
            for name, value in _differences(getattr(best, part), getattr(paper, part)).items():
                if name in _NO_CHOICE:
                    continue
                changes = {name: value}
                if name == "start" and value == "noise":
                    changes["residual_blends"] = 0  # noise has nothing to go back to
                title = f"`best` with {_words(name)} {value}"
                rows[f"without_{name}"] = _changed_row(
                    f"without_{name}", title, best, part, changes
                )
        for name, (part, title, changes) in _IMAGE_OPTIONS.items():
            if not _applies(best, changes):
                continue
            row = _changed_row(name, f"`best` with {title}", best, part, changes)
            # What `best` has, or `paper`, which is there then.
            if all(_images_of(row) != _images_of(other) for other in rows.values()):
                rows[name] = row
        whole = _group(f"images, ipc {ipc}", ipc, best, tuple(rows.values()), options)
        groups.append(whole)
        students = _students_of_paper(paper, best)
        for title, changed in {**students, **_students_of_neither(best)}.items():
            group = _group(f"{title}, ipc {ipc}", ipc, changed, (random, ours), options)
            # A batch is at most all images.
            if (group.relabel, group.student) != (whole.relabel, whole.student):
                groups.append(group)
        published = _recovered("paper", "WMDD `paper`", paper)
        title = f"WMDD `paper`, its own labels and student, ipc {ipc}"
        groups.append(_group(title, ipc, paper, (random, published), options))
    return groups


# What was built for images and neither variant has: row -> (part, title, changes).
_IMAGE_OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sliced": ("barycenters", "a sliced Wasserstein barycenter", {"solver": "sliced"}),
    "with_margin": ("barycenters", "3 of 10 atoms at the class's margin", {"margin_fraction": 0.3}),
    "with_rbf_mmd": ("recover", "RBF MMD for the Wasserstein term", {"feature_term": "rbf_mmd"}),
    "with_mean": ("recover", "mean matching for the Wasserstein term", {"feature_term": "mean"}),
    "with_none": ("recover", "no feature term", {"feature_term": "none"}),
    "with_global_moments": ("recover", "global moments", {"moments": "global"}),
    "with_blended_moments": ("recover", "global and class moments, half each", {"moments": "blend"}),
    "with_weighted_moments": ("recover", "moments by the atoms' weights", {"weighted_moments": True}),
    "with_ema_statistics": ("recover", "running moments (0.8)", {"ema_statistics": 0.8}),
    "with_ce": ("recover", "cross-entropy beside the Wasserstein term", {"ce_weight": 1.0}),
    "with_residual_blends": ("recover", "three residual blends (FADRM)", {"residual_blends": 3}),
    "with_random_start": ("recover", "a start from random images", {"start": "random"}),
    "with_mosaic_start": ("recover", "a start from mosaics of easiest crops", {"start": "mosaic"}),
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
# Of one atom, the mean of its class, these are what `best` is: it has all the weight, and no margin.
_OF_SEVERAL = ("solver", "margin_fraction", "weighted_moments", "weighted_loss")


def _applies(best: DistillConfig, changes: dict[str, Any]) -> bool:
    """Return whether an option goes with what else `best` has, and does something to it."""
    if "residual_blends" in changes:
        enough = changes["residual_blends"] < best.recover.iterations
        return enough and best.recover.start != "noise"
    if "tiles" in changes:
        return _divides(best, changes["tiles"])
    alike = changes.get("feature_term") == "mean" or any(name in changes for name in _OF_SEVERAL)
    return best.num_atoms > 1 or not alike


def _changed_row(
    name: str, title: str, best: DistillConfig, part: str, changes: dict[str, Any]
) -> Row:
    return _recovered(name, title, replace(best, **{part: replace(getattr(best, part), **changes)}))


def _images_of(row: Row) -> tuple[Any, ...]:
    return row.kind, row.barycenters, row.recover


def _students_of_paper(paper: DistillConfig, best: DistillConfig) -> dict[str, DistillConfig]:
    """Return `best` by title, with one of its differences from `paper` in labels or student taken back in each."""
    found = {}
    for part in ("relabel", "evaluate"):
        for name, value in _differences(getattr(best, part), getattr(paper, part)).items():
            if name in _NO_CHOICE:
                continue
            told = value
            if name == "views":
                told = ", ".join(
                    f"{_words(each)} {one}"
                    for each, one in _differences(getattr(best, part).views, value).items()
                )
            changed = replace(best, **{part: replace(getattr(best, part), **{name: value})})
            found[f"{_words(name)} {told}"] = changed
    if best.evaluate.epochs != paper.evaluate.epochs:
        found[f"{paper.evaluate.epochs} epochs"] = _with_epochs(best, paper.evaluate.epochs)
    return found


def _students_of_neither(best: DistillConfig) -> dict[str, DistillConfig]:
    """Return `best` by title, with one of the options of labels and student that neither variant has in each."""
    changed = {
        title: replace(best, **{part: replace(getattr(best, part), **changes)})
        for title, (part, changes) in _STUDENT_OPTIONS.items()
        if _applies(best, changes)
    }
    epochs = _MORE_EPOCHS * best.evaluate.epochs
    found = {**changed, f"{epochs} epochs": _with_epochs(best, epochs)}
    return {title: config for title, config in found.items() if config != best}


def _with_epochs(config: DistillConfig, epochs: int) -> DistillConfig:
    return replace(
        config,
        relabel=replace(config.relabel, epochs=epochs),
        evaluate=replace(config.evaluate, epochs=epochs),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _longtail(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    """Return barycenters class by class against those of images and labels together, at several weights of the labels."""
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        keep = {RANDOM, "nearest_real", "best"}
        rows = [row for row in _main_rows(paper, best) if row.name in keep]
        for weight in _LABEL_WEIGHTS:
            barycenters = replace(best.barycenters, label_weight=weight)
            title = f"`best`, images and labels together, label weight {weight:g}"
            changed = replace(best, barycenters=barycenters)
            rows.append(_recovered(f"joint_{weight:g}", title, changed))
        groups.append(_group(f"ipc {ipc}", ipc, best, tuple(rows), options))
    return groups


def _alignment(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    """Return `best` by one teacher and by the mean of several (LIA), with the transport term in the student's loss and without.

    OTM is cross-entropy, squared error and transport together: a group without the last tells what is whose.
    """
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        rows = tuple(row for row in _main_rows(paper, best) if row.name in (RANDOM, "best"))
        first = _teachers(best, options)[0]
        others = [
            replace(first, name=f"{first.name}-{number}", given="")
            for number in range(1, max(_LABELERS))
        ]
        squared = replace(best, evaluate=replace(best.evaluate, **_OTM))
        otm = replace(squared, evaluate=replace(squared.evaluate, sinkhorn_weight=_SINKHORN_WEIGHT))
        settings = [
            ("one teacher", 1, best),
            *((f"LIA: {count} teachers", count, best) for count in _LABELERS),
            ("one teacher, CE + MSE", 1, squared),
            ("OTM: CE + MSE + Sinkhorn", 1, otm),
            (f"LIA + OTM: {max(_LABELERS)} teachers", max(_LABELERS), otm),
        ]
        for title, count, recipe in settings:
            group = _group(f"{title}, ipc {ipc}", ipc, recipe, rows, options, (first,))
            groups.append(replace(group, labelers=(first, *others[: count - 1])))
    return groups


def _differences(best: Any, paper: Any) -> dict[str, Any]:
    """Return field -> the paper's value of what `best` has otherwise."""
    return {
        f.name: getattr(paper, f.name)
        for f in fields(best)
        if getattr(best, f.name) != getattr(paper, f.name)
    }
