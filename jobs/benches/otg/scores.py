"""How far a set is from real images, how much it teaches of them, and what students make of it; the tables of it.

Legend: N images, K images of one class, H W pixels, C channels.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from jobs.benches.accuracy.splits import Labeled, Workplace
from jobs.benches.accuracy.units import ImagesUnit, formed_images, network_at
from jobs.benches.otg.units import SurrogateUnit, influences_at, model_at
from wmdd_ray.core.synthesis import features_of
from wmdd_ray.core.transport import exact_cost
from wmdd_ray.core.views import to_input
from wmdd_ray.diffusion.influence import influence


def w2(place: Workplace, unit: ImagesUnit, real: Labeled) -> float:
    """Return the root of the mean over classes of W2^2 between a set's features, with its weights, and those of real images."""
    network = network_at(place, unit.features[0].teacher)
    found = formed_images(place, unit)
    costs = []
    for label in range(len(place.class_names)):
        own_N = found.classes_N == label
        costs.append(
            exact_cost(
                _features(network, found.images_NHWC[own_N], place),
                found.weights_N[own_N],
                _features(network, real.images_NHWC[real.of_class(label)], place),
            )
        )
    return float(np.sqrt(np.mean(costs)))


def mean_influence(place: Workplace, unit: ImagesUnit, surrogate: SurrogateUnit) -> float:
    """Return the mean over a set's images of their influence on their class, in [-1, 1]: what IGD's term raises."""
    model, found = model_at(place, surrogate.unet), formed_images(place, unit)
    values = []
    for of in influences_at(place, surrogate):
        for latent_CHW in model.encode(found.images_NHWC[found.classes_N == of.label]):
            values.append(influence(latent_CHW.flatten(), of).item())
    return statistics.fmean(values)


def _features(network: torch.nn.Module, images_NHWC: np.ndarray, place: Workplace) -> np.ndarray:
    source = place.source
    pixels = to_input(images_NHWC, source.mean, source.std, place.device)
    return features_of(network, pixels, source.image_size)


def markdown(record: dict[str, Any]) -> str:
    """Return the tables of the bench: the choice of the weights, and what came of it."""

    def text(found: dict[str, Any], scale: float = 1, digits: int = 2) -> str:
        return f"{scale * found['mean']:.{digits}f} ± {scale * found['std']:.{digits}f}"

    lines = [
        "| led by | weight | W2 to val | transport | influence | soft labels, val | hard labels, val | seconds a set |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in record["candidates"]:
        cells = [one["led_by"], f"{one['weight']:g}", text(one["w2_val"]), text(one["transport"])]
        cells += [text(one["influence"], 1, 3), text(one["soft_val"], 100, 1)]
        cells += [text(one["hard_val"], 100, 1), f"{min(one['seconds_a_set']['values']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| images | W2 to test | soft labels | hard labels |", "|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = [row["title"], text(row["w2_test"]), text(row["soft"], 100, 1)]
        cells.append(text(row["hard"], 100, 1))
        lines.append(f"| {' | '.join(cells)} |")
    count = len(record["rows"][0]["soft"]["values"])
    lines.append(
        f"\n{record['dataset']}, ipc {record['ipc']}: mean ± sample standard deviation of {count} sets, a student each"
    )
    return "\n".join(lines)
