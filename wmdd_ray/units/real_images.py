"""Random images of chosen classes, out of a source that is too large to be read for them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from wmdd_ray.errors import BadImageError, DataError
from wmdd_ray.spine.run import unit_seed
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources import RawImage
from wmdd_ray.units.held_out import Listed

_READ_KEYS = 64


def random_real(real: Listed, classes_N: np.ndarray, *, seed: int) -> np.ndarray:
    """Return a random real image of each class in `classes_N`, without repetition, uint8 (N, H, W, C).

    The images of a class depend on `seed` and on the class alone. Only what is chosen is decoded. Formats without random access are
    read through once. Unreadable images are passed over.

    Raises:
        DataError: A class has fewer images than wanted.
    """
    wanted = Counter(classes_N.tolist())
    chosen = draw_of_classes(real, wanted, seed=seed)
    for label, count in wanted.items():
        if len(chosen.get(label, [])) < count:
            raise DataError(
                f'{real.source.root}: class {label} ("{real.source.class_names[label]}") has '
                f"{len(chosen.get(label, []))} readable images, the distilled set {count}; leave random_real out of --baselines"
            )
    pools = {label: iter(images) for label, images in chosen.items()}
    return np.stack([next(pools[label]) for label in classes_N.tolist()])


def draw_of_classes(
    real: Listed, wanted: Mapping[int, int], *, seed: int
) -> dict[int, list[np.ndarray]]:
    """Return class -> up to `wanted` of its images, drawn at random without repetition, uint8 (H, W, C).

    Only what is chosen is decoded. Formats without random access are read through once. Unreadable images are passed over.
    """
    drawn = _drawn_keys if all(shard.keys for shard in real.shards) else _drawn_in_passing
    return drawn(real, wanted, seed)


def _rng(seed: int, label: int) -> np.random.Generator:
    return np.random.default_rng(unit_seed(seed, "random_real", str(label)))


def _drawn_keys(real: Listed, wanted: Mapping[int, int], seed: int) -> dict[int, list[np.ndarray]]:
    """Draw among the keys of each class, and read those alone."""
    keys: dict[int, list[str]] = {}
    for shard in real.shards:
        assert shard.labels is not None and len(shard.labels) == 1
        keys.setdefault(shard.labels[0], []).extend(shard.keys)
    chosen: dict[int, list[np.ndarray]] = {}
    for label, count in wanted.items():
        of_class = keys.get(label, [])
        order = [of_class[i] for i in _rng(seed, label).permutation(len(of_class))]
        good = chosen.setdefault(label, [])
        for image in _readable(real, order):
            if len(good) == count:
                break
            good.append(image)
    return chosen


def _readable(real: Listed, keys: Sequence[str]) -> Iterator[np.ndarray]:
    for first in range(0, len(keys), _READ_KEYS):
        for raw in real.source.read_keys(keys[first : first + _READ_KEYS]):
            image = _decoded(raw, real)
            if image is not None:
                yield image


def _drawn_in_passing(
    real: Listed, wanted: Mapping[int, int], seed: int
) -> dict[int, list[np.ndarray]]:
    """Give every image of a class a random number as it comes by, and keep those with the largest."""
    rngs = {label: _rng(seed, label) for label in wanted}
    heaps: dict[int, list[tuple[float, int, np.ndarray]]] = {label: [] for label in wanted}
    position = 0
    for shard in real.shards:
        for raw in real.source.read_shard(shard):
            if raw.label not in heaps:
                continue
            position += 1
            heap, number = heaps[raw.label], float(rngs[raw.label].random())
            if len(heap) == wanted[raw.label] and number <= heap[0][0]:
                continue
            image = _decoded(raw, real)
            if image is None:
                continue
            push = heapq.heapreplace if len(heap) == wanted[raw.label] else heapq.heappush
            push(heap, (number, position, image))
    return {label: [image for _, _, image in sorted(heap)] for label, heap in heaps.items()}


def _decoded(raw: RawImage, real: Listed) -> np.ndarray | None:
    if raw.problem:
        return None
    try:
        return decode_image(raw.content, real.config, raw.key)
    except BadImageError:
        return None
