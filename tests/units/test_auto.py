"""The recipe `auto`: what is chosen for images of which all that counts was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from wmdd_ray.recipes import (
    cifar10,
    fashion_mnist,
    imagenet1k,
    imagenette,
    recipe_of,
    tiny_imagenet,
)
from wmdd_ray.units.auto import choose
from wmdd_ray.units.own_data import Measured, snapped

MEASURED = Measured(
    shorter_side=32, channels=3, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), sampled=256,
    num_classes=10, num_images=50_000, smallest_class=5_000, held_out=10_000,
)  # fmt: skip


def seen(**changed: Any) -> Measured:
    if changed.get("channels") == 1:
        changed |= {"mean": (0.4,), "std": (0.2,)}
    return replace(MEASURED, **changed)


# Side, channels, classes, images, a GPU -> size, resize, architecture, width, small stem, epochs, batch.
TABLE = {
    "cifar10": (32, 3, 10, 50_000, False, 32, 32, "convnet3", 128, False, 5, 128),
    "cifar100": (32, 3, 100, 50_000, True, 32, 32, "convnet3", 128, False, 5, 128),
    "fashion": (28, 1, 10, 60_000, False, 28, 28, "convnet3", 32, False, 8, 128),
    "fashion on a GPU": (28, 1, 10, 60_000, True, 28, 28, "convnet3", 128, False, 8, 128),
    "24 of a class": (32, 3, 10, 240, False, 32, 32, "convnet3", 128, False, 200, 16),
    "a million": (32, 3, 10, 1_000_000, False, 32, 32, "convnet3", 128, False, 2, 128),
    "many classes": (32, 3, 200, 50_000, False, 32, 32, "convnet3", 128, False, 5, 128),
    "tiny": (64, 3, 200, 100_000, True, 64, 64, "resnet18", 64, True, 50, 128),
    "tiny on a CPU": (64, 3, 200, 100_000, False, 64, 64, "resnet18", 64, False, 12, 128),
    "imagenette": (375, 3, 10, 9_469, True, 224, 256, "resnet18", 64, False, 50, 256),
    "imagenet": (375, 3, 1000, 1_281_167, True, 224, 256, "resnet18", 64, False, 50, 256),
    "flowers": (500, 3, 102, 1_020, True, 224, 256, "resnet18", 64, False, 200, 64),
    "flowers on a CPU": (500, 3, 102, 1_020, False, 224, 256, "resnet18", 64, False, 200, 64),
    "imagenet on a CPU": (375, 3, 1000, 1_281_167, False, 224, 256, "resnet18", 64, False, 12, 256),
    "small photos": (90, 3, 10, 20_000, True, 96, 96, "resnet18", 64, False, 50, 256),
    "large and gray": (200, 1, 10, 20_000, True, 224, 256, "resnet18", 64, False, 50, 256),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_size_network_epochs_and_batch_follow_from_what_was_measured(
    row: tuple[Any, ...],
) -> None:
    side, channels, classes, images, has_gpu, *expected = row
    measured = seen(shorter_side=side, channels=channels, num_classes=classes, num_images=images)
    config, _ = choose(measured, has_gpu, 10)
    squeeze, source = config.squeeze, config.source
    assert (
        source.image_size, source.resize, squeeze.network.arch, squeeze.network.width, squeeze.network.small_stem,
        squeeze.epochs, squeeze.batch_size,
    ) == tuple(expected)  # fmt: skip
    assert (source.channels, source.mean, source.std) == (
        measured.channels,
        measured.mean,
        measured.std,
    )
    assert config.evaluate.network == squeeze.network and config.relabel.precision == "int8"
    assert (config.recipe, config.ipc, config.val_fraction) == ("auto", 10, None)
    flips = (
        squeeze.flip,
        config.recover.flip,
        config.relabel.views.flip,
        config.evaluate.hard.views.flip,
    )
    assert flips == (True,) * 4


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        (cifar10, {}),
        (fashion_mnist, {"shorter_side": 28, "channels": 1, "num_images": 60_000}),
        (tiny_imagenet, {"shorter_side": 64, "num_classes": 200, "num_images": 100_000}),
        (imagenet1k, {"shorter_side": 375, "num_classes": 1000, "num_images": 1_281_167}),
    ],
)
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_images_like_those_of_a_recipe_get_that_recipe(
    recipe: Any, changed: dict[str, Any], ipc: int
) -> None:
    large = changed.get("channels") != 1  # a GPU makes the gray network wider
    config, reasons = choose(seen(**changed), large, ipc)
    like = recipe(ipc)
    assert (config.squeeze, config.recover, config.barycenters) == (
        like.squeeze,
        like.recover,
        like.barycenters,
    )
    assert (config.evaluate, config.relabel) == (like.evaluate, like.relabel)
    assert like.recipe in reasons["teacher"] and like.recipe in reasons["images"]


def test_ten_classes_of_large_images_have_imagenette_s_moment_term_and_no_classes_of_its_model() -> (
    None
):
    config, _ = choose(seen(shorter_side=375, num_images=9_469), True, 10)
    assert config.recover.bn_weight == imagenette(10).recover.bn_weight
    assert config.recover.diffusion.class_ids == ()


def test_a_class_too_small_for_tiles_gets_whole_images() -> None:
    tiled, _ = choose(seen(num_images=240, smallest_class=24), False, 5)
    assert (tiled.recover.tiles, tiled.num_atoms) == (2, 20)
    held, reasons = choose(seen(num_images=240, smallest_class=24, held_out=None), False, 5)
    assert held.val_fraction == 0.2  # 19 remain
    assert (held.recover.tiles, held.num_atoms, held.ipc) == (1, 5, 5)
    assert held.barycenters == cifar10(10).barycenters
    assert "without its tiles, for a class has 24 images" in reasons["images"]


@pytest.mark.parametrize(
    ("num_images", "share"), [(240, 0.2), (1_000, 0.1), (2_000, 0.05), (50_000, 0.05)]
)
def test_ten_images_of_a_class_are_held_out_where_none_come(num_images: int, share: float) -> None:
    config, reasons = choose(seen(num_images=num_images, held_out=None), False, 1)
    assert config.val_fraction == share
    assert "cut off" in reasons["held out"]


def test_smaller_batches_have_a_rate_that_is_smaller_by_as_much() -> None:
    config, _ = choose(seen(num_images=240, smallest_class=24), False, 1)
    assert config.squeeze.learning_rate / 16 == pytest.approx(
        cifar10(1).squeeze.learning_rate / 128
    )


def test_a_size_that_is_asked_for_decides_instead_of_that_of_the_images() -> None:
    config, _ = choose(seen(), True, 10, image_size=64)
    assert (config.source.image_size, config.squeeze.network.arch) == (64, "resnet18")
    config, _ = choose(seen(), True, 10, image_size=48)
    assert (config.source.image_size, config.source.resize) == (48, 48)


def test_the_variant_of_the_paper_keeps_data_and_networks() -> None:
    best, _ = choose(seen(), False, 10)
    paper, _ = choose(seen(), False, 10, variant="paper")
    assert (paper.source, paper.squeeze) == (best.source, best.squeeze)
    assert (paper.variant, paper.recover.start, paper.recover.tiles) == ("paper", "noise", 1)


@pytest.mark.parametrize(
    ("side", "size"),
    [
        *((1, 28), (8, 28), (28, 28), (29, 28), (31, 32), (32, 32), (45, 32), (46, 64), (64, 64)),
        *((78, 64), (79, 96), (112, 128), (168, 128), (170, 224), (500, 224), (4000, 224)),
    ],
)
def test_a_side_is_snapped_to_the_size_that_is_nearest_in_ratio(side: int, size: int) -> None:
    assert snapped(side) == size


@pytest.mark.parametrize(
    ("name", "side", "classes"), [("tiny_imagenet", 64, 200), ("imagenet1k", 375, 1000)]
)
def test_as_published_lambda_and_rate_are_those_of_the_recipe_that_was_chosen(
    name: str, side: int, classes: int
) -> None:
    measured = seen(shorter_side=side, num_classes=classes, num_images=1_000_000)
    chosen, _ = choose(measured, True, 10, variant="paper")
    recover = recipe_of(name, 10, "paper").recover
    assert (chosen.recipe, chosen.variant) == ("auto", "paper")
    assert chosen.recover.bn_weight == recover.bn_weight
    assert chosen.recover.learning_rate == recover.learning_rate
