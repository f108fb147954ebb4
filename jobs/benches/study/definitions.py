"""What the tables hold: rows and groups as data.

A group is what may be compared: one number of stored images a class, one labeling teacher, one student recipe. Its rows
differ in the images alone: they have no field for labels or students. Every group of stored images has `random_real`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from wmdd_ray.config import (
    BarycenterConfig,
    DistillConfig,
    EvaluateConfig,
    RecoverConfig,
    RelabelConfig,
    SourceConfig,
    SqueezeConfig,
)
from wmdd_ray.core.batches import student_steps
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of

Kind = Literal["random", "nearest", "herding", "mosaic", "recover", "full"]
TableName = Literal[
    "main", "cross", "digits", "cifar10", "cifar10_resnet18", "ablation", "longtail", "alignment", "alignment_digits"
]  # fmt: skip

RANDOM, FULL = "random_real", "full_data"


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
    """A teacher as it is trained, or a run whose teacher is given."""

    name: str
    squeeze: SqueezeConfig
    seed: int = 0
    given: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows under one budget. `teacher` labels, or the mean of `labelers`, the first of which it is.

    `student.epochs` and `relabel.epochs` are passes over stored images that are read as tiles x tiles small ones; a row with
    fewer small images has as many more passes.
    """

    title: str
    ipc: int
    tiles: int
    teacher: TeacherRecipe
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
    """What the command line changes of a table; absent, it is as the recipe or the table has it."""

    ipc: tuple[int, ...] = ()
    """Images a class."""
    rows: tuple[str, ...] = ()
    """Rows to have; `random_real` always is. A result of `main` is rendered with all its rows of real images only."""
    groups: tuple[str, ...] = ()
    """Groups to have, by parts of their titles ("LIA"); each keeps all its rows."""
    distill_seeds: int | None = None
    """Distilled sets a row; 3 up to ipc 10, 1 above."""
    student_seeds: int | None = None
    """Students a distilled set; by default at least 5 a row."""
    width: int | None = None
    """Channels of teachers' and students' ConvNet-3 blocks."""
    epochs: int | None = None
    """Student epochs and label epochs."""
    full_epochs: int | None = None
    """Student epochs on all real images."""
    teacher_epochs: int | None = None
    """Epochs of the teacher."""
    iterations: int | None = None
    """Recover iterations."""
    tiles: int | None = None
    """Small images along a side of each stored one, in `best` and in the real rows beside it."""
    bf16: bool = False
    """Train and recover in bfloat16: 1.5 to 2.5 times as fast on processors that have it, and much slower on others."""
    teacher: str = ""
    """A run whose teacher is taken instead of training one (ConvNet-3)."""


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


def budget_of(group: Group, row: Row, num_images: int) -> Budget:
    """Return what a student of the row is given, who reads `num_images` in an epoch.

    Epochs are fewer where an image is read as tiles x tiles small ones.
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
    steps = epochs * student_steps(num_images, student.batch_size)
    return Budget(epochs=epochs, label_epochs=label_epochs, views=epochs * num_images, steps=steps)


def require_equal_budgets(group: Group, num_classes: int = 10) -> None:
    """Refuse a group whose rows would have different numbers of views or optimizer steps, or no random real images."""
    names = {row.name for row in group.rows}
    if group.ipc and RANDOM not in names:
        raise ConfigError(f"group {group.title}: a table without the row {RANDOM} proves nothing")
    budgets = {
        (budget.views, budget.steps, budget.views // budget.epochs * budget.label_epochs)
        for row in group.rows
        if row.kind != "full"
        for budget in [budget_of(group, row, num_classes * group.ipc * row.tiles**2)]
    }
    if len(budgets) > 1:
        raise ConfigError(
            f"group {group.title}: rows differ in (views, steps, labels): {sorted(budgets)}; give the student a batch size "
            f"that divides {num_classes * group.ipc} images"
        )


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
