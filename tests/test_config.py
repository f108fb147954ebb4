from __future__ import annotations

import ast
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmdd_ray import config as options
from wmdd_ray.config import BucketAccess, DistillConfig, RelabelConfig, Resources, SourceConfig
from wmdd_ray.errors import ConfigError
from wmdd_ray.options import fingerprint_options
from wmdd_ray.recipes import RECIPES, recipe_of


def test_every_option_says_what_it_means() -> None:
    tree = ast.parse(Path(str(options.__file__)).read_text())
    silent = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign):
                continue
            described = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            is_group = "Config" in ast.unparse(statement.annotation)
            if not described and not is_group:
                silent.append(f"{node.name}.{ast.unparse(statement.target)}")
    assert silent == []


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DistillConfig, {"ipc": 0}, "--ipc: expected >= 1, got 0"),
        (DistillConfig, {"seed": -1}, "--seed: expected >= 0, got -1"),
        (
            DistillConfig,
            {"evaluate": options.EvaluateConfig(epochs=301)},
            "--evaluate.epochs: expected at most the 300 stored label epochs .*, got 301",
        ),
        (SourceConfig, {"image_size": 4, "resize": 8}, "--source.image-size: expected >= 8, got 4"),
        (SourceConfig, {"image_size": 64}, "--source.resize: expected at least image_size 64"),
        (SourceConfig, {"channels": 1}, "--source.mean: expected 1 values, one a channel"),
        (options.SqueezeConfig, {"epochs": 0}, "--squeeze.epochs: expected >= 1"),
        (options.SqueezeConfig, {"optimizer": "lion"}, "--squeeze.optimizer: .*adamw"),
        (
            options.SqueezeConfig,
            {"epochs": 3, "warmup_epochs": 3.5},
            "--squeeze.warmup-epochs: expected at most the 3 epochs that there are, got 3.5",
        ),
        (
            DistillConfig,
            {"features": options.FeaturesConfig(chunk_images=0)},
            "--features.chunk-images: expected >= 1, got 0",
        ),
        (options.BarycenterConfig, {"num_starts": 0}, "--barycenters.num-starts: expected >= 1"),
        (options.RecoverConfig, {"beta1": 1.0}, r"--recover.beta1: expected in \[0, 1\), got 1.0"),
        (options.RecoverConfig, {"crop_scale_min": 0}, r"--recover.crop-scale-min.*\(0, 1\]"),
        (
            RelabelConfig,
            {"views": options.ViewConfig(crop_scale_min=0)},
            r"--relabel.views.crop-scale-min: expected in \(0, 1\]",
        ),
        (
            RelabelConfig,
            {"views": options.ViewConfig(mix_alpha=0.8)},
            r"--relabel.views.mix-alpha: expected in \[1, 1\], got 0.8",
        ),
        (
            options.EvaluateConfig,
            {"hard": options.HardLabelConfig(views=options.ViewConfig(crop_scale_min=0))},
            r"--evaluate.hard.views.crop-scale-min: expected in \(0, 1\]",
        ),
        (RelabelConfig, {"slice_images": 0}, "--relabel.slice-images: expected >= 1"),
        (options.EvaluateConfig, {"batch_size": 1}, "--evaluate.batch-size: expected >= 2, got 1"),
        (
            options.SqueezeConfig,
            {"weight_decay": float("nan")},
            "--squeeze.weight-decay: expected a finite number, got nan",
        ),
        (
            options.EvaluateConfig,
            {"learning_rate": float("inf")},
            "--evaluate.learning-rate: expected a finite number > 0, got inf",
        ),
        (SourceConfig, {"std": (0.2, 0.0, 0.2)}, "--source.std: expected > 0, got .0.2, 0.0, 0.2."),
        (options.EvaluateConfig, {"labels": ("soft", "firm")}, "--evaluate.labels: .* soft, hard"),
        (options.RecoverConfig, {"start": "zeros"}, "--recover.start: expected one of noise, ne"),
        (
            options.NetworkConfig,
            {"arch": "resnet18", "norm": "instance"},
            "--norm: expected batch, the only one that resnet18 has, got 'instance'",
        ),
        (
            options.SqueezeConfig,
            {"network": options.NetworkConfig(norm="instance")},
            "--squeeze.network.norm: expected batch, .* got 'instance'",
        ),
        (
            options.EvaluateConfig,
            {"hard": options.HardLabelConfig(optimizer="lion")},
            "--evaluate.hard.optimizer: expected one of adamw",
        ),
        (
            options.RecoverConfig,
            {"diffusion": options.DiffusionConfig(ot_weight=0.5)},
            "--recover.diffusion.ot-weight: .*; add --recover.method diffusion, .* got 0.5",
        ),
        (
            options.RecoverConfig,
            {"diffusion": options.DiffusionConfig(diversity_weight=0.5)},
            "--recover.diffusion.diversity-weight: .*; add --recover.method diffusion",
        ),
        (
            options.RecoverConfig,
            {"diffusion": options.DiffusionConfig(influence_weight=0.5)},
            "--recover.diffusion.influence-weight: .*; add --recover.method diffusion",
        ),
        (
            options.SqueezeConfig,
            {"curvature_ipc_power": 0.5},
            "--squeeze.curvature-ipc-power: expected 0 without --squeeze.curvature-weight; .* got 0.5",
        ),
        (
            DistillConfig,
            {"teacher": "runs/a", "squeeze": options.SqueezeConfig(curvature_weight=1.0)},
            "--squeeze.curvature-weight: expected 0 with --teacher runs/a, .* got 1.0",
        ),
        (
            options.EvaluateConfig,
            {"labels": ("hard",), "sinkhorn_weight": 0.3},
            "--evaluate.sinkhorn-weight: expected 0 .* add soft to --evaluate.labels, .* got 0.3",
        ),
        (
            options.EvaluateConfig,
            {"labels": ("hard",), "ce_weight": 0.3},
            "--evaluate.ce-weight: expected 0 .* add soft to --evaluate.labels, .* got 0.3",
        ),
        (Resources, {"num_workers": -2}, "--num-workers: expected >= -1, got -2"),
        (
            Resources,
            {"gpus_per_worker": 1.5},
            "--gpus-per-worker: expected a part of one, or whole ones, got 1.5",
        ),
    ],
)
def test_a_bad_value_is_named_as_it_was_typed(
    section: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**values)


def test_students_of_hard_labels_have_a_recipe_of_their_own() -> None:
    hard = options.HardLabelConfig(norm="instance", optimizer="sgd", learning_rate=0.5)
    config = options.EvaluateConfig(optimizer="muon", learning_rate=0.25, hard=hard)
    assert config.for_labels("soft") is config
    changed = config.for_labels("hard")
    assert (changed.network.norm, changed.optimizer, changed.learning_rate) == (
        "instance",
        "sgd",
        0.5,
    )
    residual = options.EvaluateConfig(network=options.NetworkConfig(arch="resnet18"), hard=hard)
    assert residual.for_labels("hard").network == residual.network
    # What is for the soft labels of one recipe does not speak against its hard ones.
    both = options.EvaluateConfig(sinkhorn_weight=0.3, ce_weight=0.1)
    assert both.for_labels("hard").sinkhorn_weight == 0.3


def test_every_part_of_a_configuration_is_frozen_and_hashable() -> None:
    config = recipe_of("imagenet1k", 50)
    assert hash(config) == hash(recipe_of("imagenet1k", 50))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            with pytest.raises(AttributeError):
                setattr(value, fields(value)[0].name, None)


# WMDD as its paper and its authors' scripts have it; what is not here is of the recipe's data, or of where it runs.
PAPER: dict[str, dict[str, object]] = {
    "barycenters": {
        "solver": "uniform", "max_iters": 100, "tol": 1e-6, "num_starts": 1,
        "margin_fraction": 0.0, "label_weight": None,
    },
    "recover": {
        "method": "inversion", "iterations": 2000, "beta1": 0.5, "beta2": 0.9, "start": "noise",
        "feature_term": "wasserstein", "feature_weight": 1.0, "moments": "per_class",
        "weighted_moments": False, "ema_statistics": 0.0, "ce_weight": 0.0, "tiles": 1,
        "residual_blends": 0, "mixed_precision": False, "crop_scale_min": 0.08, "anchor_weight": 0.0,
        "teachers": 1,
    },
    "relabel": {
        "epochs": 300, "compression": "full", "precision": "fp16", "labels": "stored",
        "batch_statistics": False, "teachers": 1, "teacher_schedule": (),
    },
    "evaluate": {
        "epochs": 300, "batch_size": 100, "optimizer": "adamw", "learning_rate": 1e-3,
        "schedule": "cosine", "weight_decay": 0.01, "loss": "kl", "temperature": 20.0,
        "ce_weight": 0.0, "sinkhorn_weight": 0.0, "ema_decay": 0.0, "weighted_loss": False,
        "mixed_precision": False,
    },
}  # fmt: skip
# Recipe -> lambda, image learning rate, largest roll in pixels.
OF_DATA = {
    "imagenette": (10.0, 0.25, 32),
    "imagenet1k": (500.0, 0.25, 32),
    "tiny_imagenet": (300.0, 0.1, 9),
    "fashion_mnist": (10.0, 0.25, 4),
    "cifar10": (10.0, 0.25, 4),
    "cifar100": (10.0, 0.25, 4),
    "digits": (10.0, 0.25, 2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_paper_variant_is_what_the_paper_and_its_scripts_say(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper, best = recipe_of(name, 10, "paper"), recipe_of(name, 10)
    for part, values in PAPER.items():
        assert values == {key: getattr(getattr(paper, part), key) for key in values}
    views = paper.relabel.views
    assert (views.crop_scale_min, views.mix) == (0.08, "cutmix")
    recover = paper.recover
    assert (recover.bn_weight, recover.learning_rate, recover.roll_px) == OF_DATA[name]
    assert (recover.flip, views.flip) == (best.recover.flip, best.relabel.views.flip)
    # The defaults are those of `best` and move with what is measured; these do not.
    for part in PAPER:
        of_part = type(getattr(best, part))
        for field in fields(of_part):
            # Of solvers that it does not have, or of a term that is off.
            if field.name not in ("reg", "num_projections") and not field.metadata.get("only_with"):
                defaults = of_part.__init__.__kwdefaults__
                monkeypatch.setitem(defaults, field.name, "a default that changed")
    monkeypatch.setattr("wmdd_ray.recipes.RECIPES", {name: lambda ipc: best})
    assert recipe_of(name, 10, "paper") == paper


@pytest.mark.parametrize("name", RECIPES)
def test_the_weighted_paper_variant_differs_in_the_weights_and_where_they_count(name: str) -> None:
    paper = recipe_of(name, 10, "paper")
    assert recipe_of(name, 10, "paper_weighted") == replace(
        paper,
        variant="paper_weighted",
        barycenters=replace(paper.barycenters, solver="lloyd"),
        recover=replace(paper.recover, weighted_moments=True),
        evaluate=replace(paper.evaluate, weighted_loss=True),
    )


@given(
    num_classes=st.integers(1, 300),
    ipc=st.integers(1, 120),
    images=st.integers(1, 500),
    epochs=st.integers(1, 40),
)
def test_units_cover_every_class_once_whatever_the_numbers(
    num_classes: int, ipc: int, images: int, epochs: int
) -> None:
    from dataclasses import replace

    from wmdd_ray.units import dataset_files
    from wmdd_ray.units import images as images_of
    from wmdd_ray.units import labels as labels_of

    config = recipe_of("digits", ipc)
    config = replace(
        config,
        recover=replace(config.recover, images_per_group=images),
        relabel=replace(config.relabel, slice_images=images, epochs=epochs, epochs_per_unit=7),
        evaluate=replace(config.evaluate, epochs=epochs),
    )
    everything = list(range(num_classes))
    groups = images_of.groups(config, num_classes).values()
    assert [label for group in groups for label in group.labels] == everything
    files = dataset_files.image_files(config, num_classes).values()
    assert [label for labels in files for label in labels] == everything
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(epochs)}
    for labeled, labels in labels_of.blocks(config, num_classes).values():
        for epoch in labeled:
            seen[epoch] += labels.tolist()
    assert all(sorted(labels) == everything for labels in seen.values())


def test_options_of_reading_that_are_not_used_leave_fingerprints_as_they_were() -> None:
    before = {
        *("format", "image_size", "resize", "channels", "mean", "std"),
        *("max_bad_images", "max_image_pixels", "follow_links"),
    }
    assert fingerprint_options(SourceConfig()).keys() == before
    assert fingerprint_options(SourceConfig(bucket=BucketAccess(anonymous=True))).keys() == before
    named = fingerprint_options(SourceConfig(label_column="fine_label", numbers="index"))
    assert named.keys() - before == {"label_column", "numbers"}


@pytest.mark.parametrize(
    ("recover", "needed"),
    [
        ({"anchor_weight": 1.0}, True),
        ({"anchor_weight": 0.0}, False),
        ({"anchor_weight": 1.0, "method": "real", "start": "nearest"}, False),
    ],
)
def test_anchors_need_norms_of_the_teacher(recover: dict[str, Any], needed: bool) -> None:
    config = recipe_of("digits", 10)
    own = replace(config.recover, moments="none", **recover)
    assert replace(config, recover=own).needs_norms == needed
