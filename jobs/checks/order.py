"""Whether a teacher numbers the classes as the data does: its accuracy on a sample of the images."""

from __future__ import annotations

from dataclasses import replace

from wmdd_ray.config import SourceConfig
from wmdd_ray.core.device import device_for
from wmdd_ray.core.published import is_published, published
from wmdd_ray.errors import DataError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.taken import teacher_room
from wmdd_ray.store.sources import Source
from wmdd_ray.units.given_teacher import given_network
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.teacher import measure, read_teacher, source_of

from .images import held_out_sample


def probe_class_order(spec: str, source: Source, recipe: str) -> float:
    """Return the top-1 of a teacher on some images of up to a hundred classes, in [0, 1].

    `spec` is a committed teacher (a run, or its teacher/ folder), `torchvision:WEIGHTS`, `timm:MODEL`, or a checkpoint file, which
    was trained with network and input of `recipe`.

    Raises:
        ConfigError: There is no such teacher.
        DataError: Its class names or their order are others, or it is at chance level.
    """
    config = recipe_of(recipe, 10, "best")
    # Bad images are told elsewhere.
    seen = replace(_input_of(spec, config.source), max_bad_images=1_000_000)
    # Chance level is judged here, in words that fit.
    config = replace(config, source=seen, squeeze=replace(config.squeeze, min_top1=1e-9))
    num_classes = len(source.class_names)
    _, network = given_network(config, spec, source.class_names)
    device = device_for(-1)
    sample = Listed(source=source, shards=held_out_sample(source), config=seen)
    name = f"--teacher {spec}"
    top1 = measure(network.to(device).eval(), sample, config, name, device, check_order=True)
    needed = min(3 / num_classes, (1 + 1 / num_classes) / 2)
    if top1 < needed:
        raise DataError(
            f"{name}: top-1 {top1:.3f} on a sample of the images, expected at least {needed:.3f} (chance is "
            f"{1 / num_classes:.3f}): its classes are others than the data's or in another order, or it was trained with another "
            "input; give the class names in its order by --classes, or the recipe of a checkpoint file by --recipe"
        )
    return top1


def _input_of(spec: str, otherwise: SourceConfig) -> SourceConfig:
    """Return the input that a teacher was trained with, where it says so."""
    if is_published(spec):
        return published(spec).source(otherwise)
    room = teacher_room(spec)
    return otherwise if room is None else source_of(read_teacher(room), SourceConfig())
