"""The distilled data set as an ordinary torch data set.

    loader = DataLoader(dataset := DistilledDataset("s3://bucket/run/dataset"), batch_size=100)
    for views, teacher_logits, weights in loader:
        loss = soft_label_loss(student(views), teacher_logits, temperature=20)

Item i is image i mod N as the label epoch i // N shows it, so one pass of a loader is the whole
training. Views are stored as self-contained draws and rendered on demand: any batch size, any order
and any number of workers give the same pixels. Every object is verified by size and SHA-256 when it
is read. Needs neither Ray nor a GPU.

Legend: N images, V views, Y classes, C channels, H W pixels.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, Subset

from wmdd_ray.core.batches import order_of
from wmdd_ray.core.soft_labels import concatenate_labels, decompress, take_labels
from wmdd_ray.core.tiles import untile
from wmdd_ray.core.views import StoredImages, concatenate_views, render_views, take
from wmdd_ray.errors import ArtifactError
from wmdd_ray.records import SoftLabels, Teacher, Views
from wmdd_ray.store import codecs, documents
from wmdd_ray.store.filesystem import Store

Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Block = tuple[Views, SoftLabels]

# First and last label epoch of a file; several files of the same epochs hold slices of the images.
# labels/epochs-00000-00024.parquet or labels/e00000-00024-s0000.parquet
_LABEL_KEY = re.compile(r"labels/e(?:pochs-)?(\d+)-(\d+)[^/]*\.parquet")
_READ_THREADS = 8


class DistilledDataset(Dataset[Item]):
    """Views of the distilled images with the teacher's logits.

    An item is (view float32 (C, S, S), normalized; teacher's logits float32 (Y,), up to a constant;
    weight float32 (), of mean 1 over the images). The images are decoded once, when the data set is
    opened; label epochs are read when they are first asked for.

    Attributes:
        uri: where the data set lies.
        class_names: names of the Y classes.
        image_size: side S of a view, pixels.
        mean_C: per-channel mean of the input in [0, 1].
        std_C: per-channel standard deviation of the input in [0, 1].
        num_images: N, the images that a student sees: `tiles`^2 of each stored one.
        tiles: t, a stored image holds t x t images of a t-th of its side; 1 is no tiling.
        label_epochs: stored label epochs.
        manifest: everything else that the data set says about itself.
    """

    def __init__(self, uri: str, *, cache_gib: float = 2.0) -> None:
        """Open the data set.

        Args:
            uri: its `dataset/` folder: a local path, `s3://`, or any URI that fsspec knows.
            cache_gib: most memory of a process for label epochs. When all of them are larger, an
                order that stays within an epoch (`sampler`, `epoch`) reads each of them once.

        Raises:
            ArtifactError: There is no data set, or it is incomplete or changed.
        """
        self.uri = str(uri)
        self.cache_bytes = int(cache_gib * 2**30)
        self.manifest, self._files = documents.read_manifest(Store(self.uri))
        try:
            self.class_names: tuple[str, ...] = tuple(self.manifest["class_names"])
            self.image_size: int = self.manifest["image_size"]
            self.mean_C: tuple[float, ...] = tuple(self.manifest["mean"])
            self.std_C: tuple[float, ...] = tuple(self.manifest["std"])
            self.tiles: int = self.manifest["tiles"]
            self.num_images: int = self.manifest["num_images"] * self.tiles**2
            self.label_epochs: int = self.manifest["label_epochs"]
        except KeyError as error:
            raise ArtifactError(f"{self.uri}/manifest.json: expected the entry {error}") from None
        self._spans = self._label_spans()
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._arrays: tuple[np.ndarray, np.ndarray, np.ndarray] | None = self._read_images()

    def __len__(self) -> int:
        return self.num_images * self.label_epochs

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return many items, rendered together: what a DataLoader calls for a batch."""
        index_B = np.asarray(indices, dtype=np.int64)
        outside = (index_B < 0) | (index_B >= len(self))
        if outside.any():
            raise IndexError(f"item {index_B[outside][0]} of {len(self)}")
        span_B = np.searchsorted(self._starts, index_B // self.num_images, side="right") - 1
        items: list[Item | None] = [None] * len(index_B)
        for span in np.unique(span_B):
            members = np.flatnonzero(span_B == span)
            row_V = index_B[members] - self._starts[span] * self.num_images
            views, logits_VY = self._rows(int(span), row_V)
            pixels = render_views(self._stored_images(), views, self.image_size)
            weights = torch.from_numpy(self._loss_weights()[views.image_V])
            rows = zip(pixels, torch.from_numpy(logits_VY), weights, strict=True)
            for position, row in zip(members, rows, strict=True):
                items[position] = row
        return [item for item in items if item is not None]

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the arrays; they are read again there when needed."""
        return {**self.__dict__, "_arrays": None, "_blocks": OrderedDict()}

    @property
    def images(self) -> np.ndarray:
        """The distilled images as views are cropped from them, uint8 (N, H, W, C): of tiled ones, the tiles."""
        return self._image_arrays()[0]

    @property
    def labels(self) -> np.ndarray:
        """The class that each image was made for, int64 (N,)."""
        return self._image_arrays()[1]

    @property
    def weights(self) -> np.ndarray:
        """The weight of each image's atom, float64 (N,), sum 1 a class."""
        return self._image_arrays()[2]

    def teacher(self) -> Teacher:
        """Return the teacher; `core.networks.network_of` makes a network of it."""
        return codecs.decode_teacher(self._read("teacher.safetensors"))

    def epoch(self, epoch: int) -> Subset[Item]:
        """Return the N items of one label epoch."""
        first = self._checked(epoch) * self.num_images
        return Subset(self, range(first, first + self.num_images))

    def sampler(self, seed: int = 0) -> EpochSampler:
        """Return an order of all items that is shuffled inside each label epoch."""
        return EpochSampler(self.label_epochs, self.num_images, seed)

    def label_epoch(self, epoch: int) -> tuple[Views, np.ndarray]:
        """Return one label epoch as arrays: its views in the images' order, and float32 logits_VY.

        Together with `images` this is what `core.training.train_student` takes.
        """
        span = bisect_right(self._starts, self._checked(epoch)) - 1
        first = (epoch - self._starts[span]) * self.num_images
        return self._rows(span, slice(first, first + self.num_images))

    def _checked(self, epoch: int) -> int:
        if not 0 <= epoch < self.label_epochs:
            raise IndexError(f"label epoch {epoch} of {self.label_epochs}")
        return epoch

    def _read(self, key: str) -> bytes:
        # A fresh Store each time: connections do not survive a fork into a loader's worker.
        entry = next((f for f in self._files if f.key == key), None)
        if entry is None:
            raise ArtifactError(f"{self.uri}/manifest.json: expected a file {key}")
        return documents.read_verified(Store(self.uri), entry)

    def _read_images(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys = [f.key for f in self._files if f.key.startswith("data/")]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            parts = list(pool.map(lambda key: codecs.decode_images(self._read(key)), keys))
        stored, labels, weights_NT = (np.concatenate(part) for part in zip(*parts, strict=True))
        images = untile(stored, self.tiles)
        if len(images) != self.num_images or weights_NT.size != self.num_images:
            raise ArtifactError(
                f"{self.uri}: expected {self.num_images} images with a weight each, found {len(images)} with "
                f"{weights_NT.size} weights; run assemble again"
            )
        return images, np.repeat(labels, self.tiles**2), weights_NT.reshape(-1)

    def _image_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._arrays is None:
            self._arrays = self._read_images()
        return self._arrays

    def _stored_images(self) -> StoredImages:
        return StoredImages(self.images, self.mean_C, self.std_C)

    def _loss_weights(self) -> np.ndarray:
        weights_N: np.ndarray = self.weights / self.weights.mean()
        return weights_N.astype(np.float32)

    def _label_spans(self) -> list[tuple[int, int, list[str]]]:
        """Return (first epoch, number of epochs, keys) of each block of label epochs, in order."""
        keys_of: dict[tuple[int, int], list[str]] = {}
        for entry in self._files:
            if match := _LABEL_KEY.fullmatch(entry.key):
                keys_of.setdefault((int(match[1]), int(match[2])), []).append(entry.key)
        spans = [(first, last - first + 1, keys) for (first, last), keys in sorted(keys_of.items())]
        self._starts = [first for first, _, _ in spans]
        covered = [epoch for first, count, _ in spans for epoch in range(first, first + count)]
        if covered != list(range(self.label_epochs)):
            raise ArtifactError(
                f"{self.uri}/manifest.json: expected files for label epochs 0 to "
                f"{self.label_epochs - 1}, found {len(covered)} epochs; run assemble again"
            )
        return spans

    def _rows(self, span: int, index: np.ndarray | slice) -> tuple[Views, np.ndarray]:
        """Return views and decompressed logits of rows of a block, read when it is not held."""
        if span in self._blocks:
            self._blocks.move_to_end(span)
        else:
            self._blocks[span] = self._read_block(span)
            while len(self._blocks) > 1 and sum(map(_size_bytes, self._blocks.values())) > (
                self.cache_bytes
            ):
                self._blocks.popitem(last=False)
        views, labels = self._blocks[span]
        return take(views, index), decompress(take_labels(labels, index))

    def _read_block(self, span: int) -> Block:
        """Return a block with its rows in order: epoch by epoch, image by image."""
        first, count, keys = self._spans[span]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            blocks = list(pool.map(lambda k: codecs.decode_soft_labels(self._read(k)), keys))
        views = concatenate_views([block.views for block in blocks])
        labels = concatenate_labels([block.labels for block in blocks])
        # A file holds its images once an epoch, epoch by epoch.
        epochs = [np.arange(len(b.views)) * b.num_epochs // len(b.views) for b in blocks]
        place_V = np.concatenate(epochs) * self.num_images + views.image_V
        order_V = np.argsort(place_V, kind="stable")
        as_named = all((b.first_epoch, b.num_epochs) == (first, count) for b in blocks)
        if not as_named or not np.array_equal(place_V[order_V], np.arange(count * self.num_images)):
            raise ArtifactError(
                f"{self.uri}/{keys[0]}: expected one view of each of {self.num_images} images in "
                f"each of label epochs {first} to {first + count - 1}; run relabel and assemble "
                "again"
            )
        return take(views, order_V), take_labels(labels, order_V)


class EpochSampler(Sampler[int]):
    """All items, label epoch by label epoch, shuffled inside each."""

    def __init__(self, label_epochs: int, num_images: int, seed: int) -> None:
        self.label_epochs, self.num_images, self.seed = label_epochs, num_images, seed

    def __len__(self) -> int:
        return self.label_epochs * self.num_images

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self.label_epochs):
            order_N = order_of(self.num_images, seed=self.seed, epoch=epoch)
            yield from (epoch * self.num_images + order_N).tolist()


def _size_bytes(block: Block) -> int:
    arrays = [value for record in block for value in vars(record).values()]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
