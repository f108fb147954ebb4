"""The real images of a run by split, where the source brings a held-out part and where one is cut off its training images.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from wmdd_ray.config import DistillConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.parts import rank_of
from wmdd_ray.store.sources import RawImage, Shard, Source, open_source
from wmdd_ray.store.sources.base import class_shards
from wmdd_ray.store.sources.listing import Split
from wmdd_ray.store.sources.parquet import ParquetSource
from wmdd_ray.store.sources.passed import OTHER_SPLIT, Tally
from wmdd_ray.units.splitting import held_out

# Shards of the random-access formats are class by class; here they are only looked through for their keys.
_CHUNK_IMAGES = 1 << 16
# Of the ranks by which images are held out. A run's seed does not change what it is tested on.
_SEED = 0


class CutSource(Source):
    """The training images of a source without those that are held out, or these: what `splitting.held_out` says of its keys.

    Of Parquet files every shard is read whole, and the rows of the other part are left out.
    """

    format = "cut"
    _transient = (*Source._transient, "_keys", "_sizes")

    def __init__(self, whole: Source, split: Split, fraction: float) -> None:
        keys, sizes, labels_N = _images_of(whole)
        ranks_N = np.array([rank_of(_SEED, key) for key in keys], dtype=np.uint64)
        held_N = np.zeros(len(keys), dtype=bool)
        has_label_N = labels_N >= 0
        held_N[has_label_N] = held_out(labels_N[has_label_N], ranks_N[has_label_N], fraction)
        files_N = [_file_of(key, whole.files) for key in keys]
        rows_N = np.flatnonzero(held_N == (split == "val"))
        own = {files_N[i] for i in rows_N}
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
        for i in rows_N:
            self._keys.setdefault(int(labels_N[i]), []).append(keys[i])
        self._sizes = dict(zip(keys, sizes, strict=True)) if sizes else None
        self.titles = whole.titles
        tally, inside = Tally(), Tally()
        tally.add_all(whole.passed_over)
        for name in sorted(other):
            tally.add(OTHER_SPLIT, name)
        self.passed_over = tally.groups()
        left_out: dict[str, list[str]] = {}
        for i in np.flatnonzero(held_N != (split == "val")):
            if files_N[i] not in other:
                inside.add(OTHER_SPLIT, files_N[i] or keys[i])
                left_out.setdefault(files_N[i], []).append(keys[i])
        self._inside = inside.groups()
        self._left_out = {
            file: frozenset(of_file)
            for file, of_file in left_out.items()
            if isinstance(whole, ParquetSource)
        }
        self._first = next((shard.id for shard in self.shards(_CHUNK_IMAGES)), "")

    @property
    def num_images(self) -> int:
        return sum(map(len, self._keys.values()))

    def shards(self, chunk_images: int) -> list[Shard]:
        if not isinstance(self._whole, ParquetSource):
            return class_shards(sorted(self._keys.items()), chunk_images, self._sizes)
        return [
            replace(shard, num_images=shard.num_images - len(self._left_out.get(shard.file, ())))
            for shard in self._whole.shards(chunk_images)
            if shard.file in self.files and shard.num_images is not None
        ]

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        left_out = self._left_out.get(shard.file, frozenset())
        for record in self._whole.read_shard(shard):
            if record.key not in left_out:
                yield record
        passed = Tally()
        passed.add_all(self._whole.passed_inside)
        passed.add_all(self._inside if shard.id == self._first else ())
        self.passed_inside = passed.groups()

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        return self._whole.read_keys(keys)

    def _numbering(self) -> object:
        return self._cut


def _images_of(whole: Source) -> tuple[list[str], list[int], np.ndarray]:
    """Return keys, sizes where they are files, and classes (int64 N, -1 where there is none) of all images.

    Raises:
        DataError: They are known only when they are read.
    """
    shards = whole.shards(_CHUNK_IMAGES)
    if isinstance(whole, ParquetSource):
        classes = {shard.file: whole.row_classes(shard.file) for shard in shards}
        keys = [f"{file}#{row}" for file, rows_N in classes.items() for row in range(len(rows_N))]
        return keys, [], np.concatenate([*classes.values()])
    if not can_cut(shards):
        raise DataError(
            f"{whole.root}: no images of it are held out to test on, and none can be put aside while {whole.format} files are "
            "read; pass held-out images as --val-data, or write it anew with some put aside: "
            f"python jobs/prepare.py {whole.root} --out PREPARED, then --data PREPARED"
        )
    labels_N = np.repeat(
        [shard.labels[0] if shard.labels else 0 for shard in shards],
        [len(shard.keys) for shard in shards],
    )
    sizes = [size for shard in shards for size in shard.sizes]
    return [key for shard in shards for key in shard.keys], sizes, labels_N


def can_cut(shards: Sequence[Shard]) -> bool:
    """Return whether a source names its images before they are read, so that some can be left out."""
    return all(shard.keys and shard.labels for shard in shards)


def _file_of(key: str, files: Mapping[str, int]) -> str:
    """Return the file of an image that has one to itself; keys of tables end in `#LABEL`."""
    return key if key in files else key.rpartition("#")[0]


def open_split(
    config: DistillConfig, split: Split, class_names: tuple[str, ...] | None = None
) -> Source:
    """Return the real images of a split, as the options of a run say.

    Args:
        config: Data, held-out data, how they are read, and the share that is cut off.
        split: `train` or `val`.
        class_names: Classes in label order that the images are matched to.

    Raises:
        DataError: As `open_source`, or the format does not allow to cut a part off.
    """
    if config.val_fraction is not None:
        whole = open_source(config.data, config.source, split="train", class_names=class_names)
        return CutSource(whole, split, config.val_fraction)
    apart = split == "val" and config.val_data is not None
    uri = config.val_data if apart and config.val_data else config.data
    return open_source(uri, config.source, split=split, class_names=class_names, dedicated=apart)
