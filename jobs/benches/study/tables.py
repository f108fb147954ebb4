"""The tables by name. A new row is one line, and a new option of a recipe needs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wmdd_ray.config import DistillConfig, NetworkConfig
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of

from .ablation import ablation
from .definitions import (
    FULL,
    RANDOM,
    Group,
    Options,
    Row,
    Table,
    TableName,
    TeacherRecipe,
    require_equal_budgets,
    variants,
)
from .rows import group_of, main_rows, recovered, several_teachers, teacher_of
from .splits import held_out_of

# What a table is of, unless it is of Fashion-MNIST.
_DATASETS: dict[TableName, str] = {
    "digits": "digits",
    "cifar10": "cifar10",
    "cifar10_resnet18": "cifar10",
    "longtail": "digits",
    "alignment_digits": "digits",
}

_Maker = Callable[[str, tuple[int, ...], Options], list[Group]]

# The smallest class of the long-tailed digits keeps 11 images to train on.
_IMBALANCE = 12.0
_LABEL_WEIGHTS = (0.1, 1.0, 10.0)
# Teachers that label in the groups of LIA, which a schedule is chosen from; the largest joins OTM.
_LABELERS = (2, 4)
# EDC's weight of cross-entropy beside mean squared error, and the transport term's.
_OTM: dict[str, Any] = {"loss": "mse", "ce_weight": 0.025}
_SINKHORN_WEIGHT = 0.1
# A pass of ResNet-18 takes as long as fifty of the narrow ConvNet-3: eight would be over an hour of one core.
_RESIDUAL_EPOCHS = 3
_RESIDUAL = NetworkConfig(arch="resnet18", small_stem=True)


def table_of(name: TableName, options: Options) -> Table:
    """Return a table with what the options change of it.

    Raises:
        ConfigError: Rows of a group would have different budgets, or there is no such row or group.
    """
    dataset = _DATASETS.get(name, "fashion_mnist")
    makers: dict[TableName, tuple[_Maker, tuple[int, ...]]] = {
        "main": (_main, (1, 10, 50)),
        "digits": (_main, (1, 5, 10)),
        "cifar10": (_main, (1, 10, 50)),
        "cifar10_resnet18": (_resnet18, (1, 10, 50)),
        "cross": (_cross, (10,)),
        "ablation": (ablation, (10,)),
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
        wanted = {*options.rows, RANDOM}
        groups = [replace(g, rows=tuple(r for r in g.rows if r.name in wanted)) for g in groups]
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
        held_out=held_out_of(dataset),
        groups=tuple(groups),
        imbalance=_IMBALANCE if name == "longtail" else 1.0,
    )


def _main(
    dataset: str,
    ipcs: tuple[int, ...],
    options: Options,
    change: Callable[[DistillConfig], DistillConfig] = lambda config: config,
) -> list[Group]:
    groups = []
    for ipc in ipcs:
        paper, best = (change(config) for config in variants(dataset, ipc, options))
        groups.append(group_of(f"ipc {ipc}", ipc, best, main_rows(paper, best), options))
    best = change(variants(dataset, max(ipcs), options)[1])
    full = Row(name=FULL, title="all real training images", kind="full")
    return [*groups, group_of("all real images", 0, best, (full,), options)]


def _resnet18(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    """Return `main` with a ResNet-18 as teacher and student, trained without Muon.

    On two cores a step of Muon takes as long as the passes of 128 images of this network, and four times those of a student's 25.
    """

    def change(config: DistillConfig) -> DistillConfig:
        squeeze = replace(config.squeeze, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4)
        evaluate = replace(config.evaluate, optimizer="adamw", learning_rate=1e-3)
        return replace(
            config,
            squeeze=replace(squeeze, network=_RESIDUAL),
            recover=replace(config.recover, mixed_precision=True),
            evaluate=replace(evaluate, network=_RESIDUAL),
        )

    return _main(dataset, ipcs, options, change)


def _cross(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        keep = {RANDOM, "nearest_real", "best"}
        rows = tuple(row for row in main_rows(paper, best) if row.name in keep)
        seen = teacher_of(best, options)
        # Two cores take hours for these networks; bfloat16 halves them.
        epochs = options.teacher_epochs or _RESIDUAL_EPOCHS
        squeeze = replace(best.squeeze, network=_RESIDUAL, mixed_precision=True, epochs=epochs)
        other = TeacherRecipe(name="resnet18", squeeze=squeeze)
        pairs: list[tuple[TeacherRecipe, NetworkConfig]] = [
            (seen, best.evaluate.network),
            (seen, _RESIDUAL),
            (other, NetworkConfig(arch="mobilenet_v2", small_stem=True)),
            (other, NetworkConfig(arch="vit_tiny")),
        ]
        for teacher, network in pairs:
            title = f"{teacher.name} to {network.arch}, ipc {ipc}"
            student = replace(best.evaluate, network=network, mixed_precision=True)
            recipe = replace(best, evaluate=student)
            groups.append(group_of(title, ipc, recipe, rows, options, teacher))
    return groups


def _longtail(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    """Return barycenters class by class against those of images and labels together, at several weights of the labels."""
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        keep = {RANDOM, "nearest_real", "best"}
        rows = [row for row in main_rows(paper, best) if row.name in keep]
        for weight in _LABEL_WEIGHTS:
            barycenters = replace(best.barycenters, solver="lloyd", label_weight=weight)
            title = f"`best`, images and labels together, label weight {weight:g}"
            changed = replace(best, barycenters=barycenters)
            rows.append(recovered(f"joint_{weight:g}", title, changed))
        groups.append(group_of(f"ipc {ipc}", ipc, best, tuple(rows), options))
    return groups


def _alignment(dataset: str, ipcs: tuple[int, ...], options: Options) -> list[Group]:
    """Return `best` by one teacher and by the mean of several (LIA), with the transport term in the student's loss and without.

    OTM is cross-entropy, squared error and transport together: a group without the last tells what is whose.
    """
    groups = []
    for ipc in ipcs:
        paper, best = variants(dataset, ipc, options)
        rows = tuple(row for row in main_rows(paper, best) if row.name in (RANDOM, "best"))
        first = teacher_of(best, options)
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
            group = group_of(f"{title}, ipc {ipc}", ipc, recipe, rows, options, first)
            groups.append(replace(group, labelers=several_teachers(first, count)))
    return groups
