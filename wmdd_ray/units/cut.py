"""The real images of a run by split, where the source brings a held-out part and where one is cut off its training images.

Legend: N images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress

import numpy as np

from wmdd_ray.config import DistillConfig
from wmdd_ray.store.parts import rank_of
from wmdd_ray.store.sources import RawImage, Shard, Source, open_source
from wmdd_ray.store.sources.base import class_shards
from wmdd_ray.store.sources.files import read_ahead
from wmdd_ray.store.sources.listing import Split
from wmdd_ray.store.sources.parquet import ParquetSource
from wmdd_ray.store.sources.passed import OTHER_SPLIT, Tally
from wmdd_ray.store.sources.webdataset import WebDatasetSource
from wmdd_ray.units.splitting import held_out

# Shards of the random-access formats are class by class; here they are only looked through for their keys.
_CHUNK_IMAGES = 1 << 16
# Of the ranks by which images are held out. A run's seed does not change what it is tested on.
_SEED = 0


class CutSource(Source):
    """The training images of a source without those that are held out, or these: what `splitting.held_out` says of its keys.

    Of Parquet files and WebDataset's shards every one is read whole, and the records of the other part are left out.
    """

    format = "cut"
    _transient = (*Source._transient, "_keys", "_sizes")

    def __init__(self, whole: Source, split: Split, fraction: float) -> None:
        shards = whole.shards(_CHUNK_IMAGES)
        images = [*read_ahead(partial(_images_in, whole), shards)]
        keys = [key for named, _ in images for key in named]
        labels_N = np.concatenate([np.empty(0, dtype=np.int64), *(of for _, of in images)])
        ranks_N = np.array([rank_of(_SEED, key) for key in keys], dtype=np.uint64)
        held_N = np.zeros(len(keys), dtype=bool)
        has_label_N = labels_N >= 0
        held_N[has_label_N] = held_out(labels_N[has_label_N], ranks_N[has_label_N], fraction)
        own_N = held_N == (split == "val")
        # Keys of tables end in `#LABEL`.
        files_N = [key if key in whole.files else key.rpartition("#")[0] for key in keys]
        own = {files_N[i] for i in np.flatnonzero(own_N)}
        other = {*files_N} & whole.files.keys() - own
        super().__init__(
            root=whole.root,
            files={name: size for name, size in whole.files.items() if name not in other},
            config=whole.config,
            class_names=whole.class_names,
            places=whole.places,
        )
        self._whole = whole
        self._cut = (whole.fingerprint(), split, fraction)
        self._keys: dict[int, list[str]] = {}
        for i in np.flatnonzero(own_N):
            self._keys.setdefault(int(labels_N[i]), []).append(keys[i])
        sizes = [size for shard in shards if shard.keys for size in shard.sizes]
        self._sizes = dict(zip(keys, sizes, strict=True)) if sizes else None
        self.titles = whole.titles
        tally, inside = Tally(), Tally()
        tally.add_all(whole.passed_over)
        for name in sorted(other):
            tally.add(OTHER_SPLIT, name)
        self.passed_over = tally.groups()
        for i in np.flatnonzero(~own_N):
            if files_N[i] not in other:
                inside.add(OTHER_SPLIT, files_N[i] or keys[i])
        self._inside = inside.groups()
        ends = np.cumsum([len(named) for named, _ in images])
        # Which records of a shard that is read whole are of this part.
        self._own = {
            shard.id: of_N
            for shard, of_N in zip(shards, np.split(own_N, ends[:-1]), strict=True)
            if shard.file
        }
        self._first = next((shard.id for shard in self.shards(_CHUNK_IMAGES)), "")

    @property
    def num_images(self) -> int:
        return sum(map(len, self._keys.values()))

    @property
    def counts(self) -> Counter[int]:
        """Images of every class, those without a label left out. Driver only."""
        return Counter({label: len(keys) for label, keys in self._keys.items() if label >= 0})

    def shards(self, chunk_images: int) -> list[Shard]:
        if not self._own:
            return class_shards(sorted(self._keys.items()), chunk_images, self._sizes)
        return [
            replace(shard, num_images=int(self._own[shard.id].sum()))
            for shard in self._whole.shards(chunk_images)
            if shard.file in self.files
        ]

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        own_N = self._own.get(shard.id)
        if own_N is None:
            yield from self._whole.read_shard(shard)
        else:
            whole = replace(shard, num_images=len(own_N))
            yield from compress(self._whole.read_shard(whole), own_N)
        passed = Tally()
        passed.add_all(self._whole.passed_inside)
        passed.add_all(self._inside if shard.id == self._first else ())
        self.passed_inside = passed.groups()

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        return self._whole.read_keys(keys)

    def _numbering(self) -> object:
        return self._cut


def _images_in(whole: Source, shard: Shard) -> tuple[Sequence[str], np.ndarray]:
    """Return key and class (int64 N, -1 where there is none) of every image of a shard."""
    if shard.keys:
        assert shard.labels is not None, "random-access formats list class by class"
        return shard.keys, np.full(len(shard.keys), shard.labels[0])
    assert isinstance(whole, ParquetSource | WebDatasetSource), whole.format
    return whole.images_in(shard)


def open_split(
    config: DistillConfig, split: Split, class_names: tuple[str, ...] | None = None
) -> Source:
    """Return the real images of a split, as the options of a run say; `class_names` are what they are matched to, in label order.

    Raises:
        DataError: As `open_source`; of a part cut off tar shards also as they are read.
    """
    if config.val_fraction is not None:
        whole = open_source(config.data, config.source, split="train", class_names=class_names)
        return CutSource(whole, split, config.val_fraction)
    apart = split == "val" and config.val_data is not None
    uri = config.val_data if apart and config.val_data else config.data
    return open_source(uri, config.source, split=split, class_names=class_names, dedicated=apart)
