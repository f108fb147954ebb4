"""The recipe `auto`: the options for images of which nothing is known but what was measured.

`choose` takes the recipe that was made for images of that size, and fits its network to what trains it, its epochs and batches to
the number of images, its labels to that of the classes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from wmdd_ray.config import DistillConfig, NetworkConfig
from wmdd_ray.recipes import imagenette, recipe_of, variant_of
from wmdd_ray.units.own_data import Measured, input_of, snapped

# Images of the data set that a recipe's epochs are made for, the fewest and the most: its teacher sees epochs x images.
_MADE_FOR = {
    "fashion_mnist": (60_000, 60_000),
    "cifar10": (50_000, 50_000),
    "tiny_imagenet": (100_000, 100_000),
    "imagenet1k": (9_469, 1_281_167),
}
_MOST_EPOCHS = 200
_LEAST_STEPS = 8
_FEW_CLASSES = 100
# From so many images a class on no recipe has tiles.
_WHOLE_IPC = 50
# Without a GPU a ResNet's epochs are no more than these images take, or a quarter where that is more. At 64 pixels a core trains on
# 190 a second: these take it an hour and three quarters, and 50 epochs of 100,000 would take it seven. A quarter is also where
# CIFAR-10's labels are best (jobs/benches/results).
_IMAGES_WITHOUT_GPU = 1_200_000


def choose(
    measured: Measured,
    has_gpu: bool,
    ipc: int,
    *,
    image_size: int | None = None,
    variant: str = "best",
) -> tuple[DistillConfig, dict[str, str]]:
    """Return the options for images, and why: the recipe that was made for their size, fitted to their number and classes.

    `has_gpu` says that networks are trained on one. `image_size` is the side that somebody wants, pixels; None takes the images'.
    `variant` is as in `recipes.variant_of`.
    """
    side = image_size or snapped(measured.shorter_side)
    name = _recipe_for(side, measured.channels)
    fraction = None if measured.held_out is not None else _held_out_share(measured)
    smallest = _left(measured.smallest_class, fraction)
    like = recipe_of(name, ipc)
    fits = smallest is None or smallest >= like.num_atoms
    if not fits:
        like = replace(recipe_of(name, max(ipc, _WHOLE_IPC)), ipc=ipc)
    few = measured.num_classes <= _FEW_CLASSES
    recover = like.recover
    if name == "imagenet1k":
        recover = replace(recover, roll_px=round(recover.roll_px * side / 224))
        if few:
            recover = replace(recover, bn_weight=imagenette(ipc).recover.bn_weight)
    network = _network_for(like.squeeze.network, side, has_gpu)
    fitted = _fitted(like, round(measured.num_images * (1 - (fraction or 0))), has_gpu)
    config = replace(
        like,
        data="",
        val_fraction=fraction,
        source=input_of(side, measured.channels, measured.mean, measured.std),
        squeeze=replace(fitted.squeeze, network=network),
        recover=recover,
        evaluate=replace(fitted.evaluate, network=network),
    )
    # As published by the name of the recipe, whose lambda and rate these are.
    config = replace(variant_of(config, variant), recipe="auto")
    return config, _reasons(measured, name, has_gpu=has_gpu, fits=fits, fraction=fraction)


def _recipe_for(side: int, channels: int) -> str:
    """Return the name of the recipe that was made for images of a size."""
    if side < math.sqrt(32 * 64):
        return "cifar10" if channels == 3 else "fashion_mnist"
    return "tiny_imagenet" if side < math.sqrt(64 * 96) else "imagenet1k"


def _network_for(network: NetworkConfig, side: int, has_gpu: bool) -> NetworkConfig:
    """Return a recipe's network, larger or smaller by what trains it.

    A ResNet-18 whose first convolution keeps 64 pixels costs ten times one that halves them twice.
    """
    if network.arch == "convnet3":
        return replace(network, width=128) if has_gpu else network
    return replace(network, small_stem=side <= 64 and has_gpu)


def _fitted(like: DistillConfig, num_images: int, has_gpu: bool) -> DistillConfig:
    """Return a recipe whose networks see about as many real images, however many there are, in batches that they fill.

    Those made for a GPU see fewer without one.
    """
    least, most = _MADE_FOR[like.recipe]
    ratio = min(max(num_images, least), most) / max(1, num_images)
    old = like.squeeze
    batch = old.batch_size
    while batch > 16 and num_images < _LEAST_STEPS * batch:
        batch //= 2

    def epochs(usual: int) -> int:
        count = min(_MOST_EPOCHS, max(usual // 2, round(usual * ratio)))
        if has_gpu or old.network.arch == "convnet3":
            return count
        return max(1, count // 4, min(count, _IMAGES_WITHOUT_GPU // max(1, num_images)))

    squeeze = replace(
        old,
        epochs=epochs(old.epochs),
        batch_size=batch,
        learning_rate=old.learning_rate * batch / old.batch_size,
    )
    evaluate = replace(like.evaluate, all_real_epochs=epochs(like.evaluate.all_real_epochs))
    return replace(like, squeeze=squeeze, evaluate=evaluate)


def _held_out_share(measured: Measured) -> float:
    """Return the share of a class that makes ten images to test on, from a twentieth to a fifth."""
    share = 10 * measured.num_classes / max(1, measured.num_images)
    return round(min(0.2, max(0.05, share)), 2)


def _left(smallest: int | None, fraction: float | None) -> int | None:
    """Return what remains of the smallest class when a share is held out."""
    if smallest is None or fraction is None:
        return smallest
    return smallest - max(1, round(smallest * fraction))


def _reasons(
    measured: Measured, name: str, *, has_gpu: bool, fits: bool, fraction: float | None
) -> dict[str, str]:
    sampled = measured.sampled
    those = f"{sampled} sampled images" if sampled else "all images (prepared.json)"
    each = measured.num_images // max(1, measured.num_classes)
    about = "about " if measured.smallest_class is None else ""
    smallest = measured.smallest_class
    if fraction is not None:
        held = "cut off by a hash of their names, because none come with the images"
    else:
        count = measured.held_out or 0
        held = f"{count} images of the data's own" if count > 0 else "as they come with the data"
    return {
        "size": f"{measured.shorter_side} px is the median shorter side of {those}",
        "color": f"measured on {those}",
        "teacher": f"as recipe {name}, for {measured.num_classes} classes of {about}{each} images and "
        f"{'a GPU' if has_gpu else 'no GPU'}",
        "images": f"as recipe {name}"
        + ("" if fits else f", without its tiles, for a class has {smallest} images"),
        "held out": held,
    }
