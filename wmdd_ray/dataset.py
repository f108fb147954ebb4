"""The distilled data set as an ordinary torch data set.

    dataset = DistilledDataset("s3://bucket/run/dataset")
    loader = DataLoader(dataset, batch_sampler=dataset.batches(25))
    for epoch in range(dataset.epochs):
        for views, teacher_logits, weights in loader:
            loss = soft_label_loss(student(views), teacher_logits, temperature=20)

Item i is image i mod N as pass i // N over the images shows it; `batches` gives one pass for each time that
the loader is iterated. Views are self-contained and rendered on demand: any batch size, any order and any
number of workers give the same pixels. Views that were not stored are drawn again, and compared with what
was labeled; logits that were not stored (`labels=online`) are computed by the teacher, batch by
batch, in the process that loads them: another batch changes them by about 1e-6. Every object is
verified by size and SHA-256 when it is read. Needs neither Ray nor a GPU.

Legend: N images, V views, Y classes, C channels, H W pixels.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from wmdd_ray.config import READING, SourceConfig
from wmdd_ray.core.batches import Batch, EpochBatches, eval_batches
from wmdd_ray.core.networks import labeler_of
from wmdd_ray.core.soft_labels import concatenate_labels, decompress, label_views, take_labels
from wmdd_ray.core.tiles import untile
from wmdd_ray.core.views import (
    StoredImages,
    concatenate_views,
    draw_block,
    render_views,
    take,
)
from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.records import SoftLabels, Teacher, Views
from wmdd_ray.store import codecs, documents, packing
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import decode_png
from wmdd_ray.store.label_files import VIEW_BYTES

Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Block = tuple[Views, SoftLabels]
# Images, their classes, their atoms' weights, and these as they weight a loss.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# First and last label epoch of a file; several files of the same epochs hold slices of the images.
# labels/epochs-00000-00024.parquet or labels/e00000-00024-s0000.parquet
_TEACHER_KEY = re.compile(r"teacher-(\d+)\.safetensors")
_LABEL_KEY = re.compile(r"labels/e(?:pochs-)?(\d+)-(\d+)[^/]*\.parquet")
_READ_THREADS = 8
_BATCH_IMAGES = 256
# Rows that are read again for each row that is used, above which the order is at fault. In an order that stays within a pass it is
# at most the number of processes that share the passes.
_MOST_REREAD = 10


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
        label_epochs: label epochs of the data set, L.
        epochs: E, passes over the images that the items make; past L, the label epochs come again from the first.
        online: whether the logits are computed by the teacher instead of read.
        manifest: everything else that the data set says about itself.
    """

    def __init__(
        self,
        uri: str,
        *,
        epochs: int | None = None,
        cache_gib: float = 2.0,
        teacher_device: str = "cpu",
    ) -> None:
        """Open the data set.

        Args:
            uri: its `dataset/` folder: a local path, `s3://`, or any URI that fsspec knows.
            cache_gib: most memory of a process for label epochs. When all of them are larger, an order that stays within a
                pass (`batches`, `epoch`) reads them once a cycle, and a shuffle over all items for every batch.
            epochs: passes over the images; None is one of every label epoch. More of them use the labels several times, which
                at 60 of 300 costs little (jobs/benches/results); fewer leave the last label epochs out.
            teacher_device: where the teacher computes logits that were not stored. A loader with workers needs "cpu" or
                `multiprocessing_context="spawn"`.

        Raises:
            ArtifactError: There is no data set, or it is incomplete or changed, or an earlier version wrote it.
            ConfigError: `epochs` is less than 1.
        """
        if epochs is not None and epochs < 1:
            raise ConfigError(f"DistilledDataset: expected epochs >= 1 or None, got {epochs}")
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
            self.online: bool = self.manifest["labels"]["labels"] == "online"
            self._batch_size: int = self.manifest["labels"]["batch_size"]
        except KeyError as error:
            raise ArtifactError(
                f"{self.uri}/manifest.json: expected the entry {error}; an earlier wmdd_ray wrote this data set: run its "
                "relabel and assemble again (--overwrite), or install that version"
            ) from None
        self.epochs = self.label_epochs if epochs is None else epochs
        self._teacher_device = teacher_device
        self._network: torch.nn.Module | None = None
        self._spans = self._label_spans()
        logits_bytes = 4 * self.num_images * len(self.class_names)
        packing.check_budget(logits_bytes, sum(f.size_bytes for f in self._files), "a label epoch")
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._seen_spans: set[int] = set()
        self._rows_reread = self._rows_used = 0
        self._arrays: Arrays | None = self._read_images()

    def __len__(self) -> int:
        return self.num_images * self.epochs

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return many items, rendered together: what a DataLoader calls for a batch."""
        index_B = np.asarray(indices, dtype=np.int64)
        outside = (index_B < -len(self)) | (index_B >= len(self))
        if outside.any():
            raise IndexError(f"item {index_B[outside][0]} of {len(self)}")
        pass_B, image_B = np.divmod(index_B % len(self), self.num_images)
        epoch_B = pass_B % self.label_epochs
        span_B = np.searchsorted(self._starts, epoch_B, side="right") - 1
        order, parts = [], []
        for span in np.unique(span_B):
            members = np.flatnonzero(span_B == span)
            row_V = (epoch_B[members] - self._starts[span]) * self.num_images + image_B[members]
            order.append(members)
            parts.append(self._rows(int(span), row_V))
        # All blocks' views are rendered together: small tensors cost their overhead.
        place_B = np.argsort(np.concatenate(order))
        views = take(concatenate_views([views for views, _ in parts]), place_B)
        labels = take_labels(concatenate_labels([labels for _, labels in parts]), place_B)
        pixels = render_views(self.stored_images(), views, self.image_size)
        logits = self._logits_of(pixels) if self.online else torch.from_numpy(decompress(labels))
        weights = torch.from_numpy(self._image_arrays()[3][views.image_V])
        return list(zip(pixels.unbind(), logits.unbind(), weights.unbind(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the arrays; they are read again there when needed."""
        left: dict[str, Any] = {
            "_arrays": None,
            "_blocks": OrderedDict(),
            "_seen_spans": set(),
            "_network": None,
        }
        return {**self.__dict__, **left}

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
        return self._teacher_at("teacher.safetensors")

    def _teacher_at(self, key: str) -> Teacher:
        return codecs.decode_teacher_of(self.manifest, self._read(key), f"{self.uri}/{key}")

    def teachers(self) -> tuple[Teacher, ...]:
        """Return the teachers that gave the labels, the first of them the one that the images were made for.

        `core.networks.labeler_of` makes a network of them.
        """
        numbers = [int(m[1]) for f in self._files if (m := _TEACHER_KEY.fullmatch(f.key))]
        keys = [f"teacher-{number}.safetensors" for number in sorted(numbers)]
        return (self.teacher(), *map(self._teacher_at, keys))

    def epoch(self, epoch: int) -> Subset[Item]:
        """Return the N items of one pass over the images.

        Args:
            epoch: the pass, from 0 to `epochs` - 1.

        Raises:
            IndexError: There is no such pass.
        """
        if not 0 <= epoch < self.epochs:
            raise IndexError(f"epoch {epoch} of {self.epochs}")
        first = epoch * self.num_images
        return Subset(self, range(first, first + self.num_images))

    def batches(
        self, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> EpochBatches:
        """Return the `batch_sampler` of a DataLoader: the batches that `core.training.train_student` takes, by the same seed.

        Each iteration of the loader is the next pass over the images, shuffled by (seed, pass); `set_epoch` goes on from any.

        Args:
            batch_size: most images of a batch, summed over the ranks.
            seed: of the shuffling; the same seed gives the same batches.
            rank: this process among those that train together (DDP), each with its own loader.
            world: number of those processes.

        Raises:
            ConfigError: A batch has fewer images than there are processes.
        """
        return EpochBatches(
            self.num_images, min(self.epochs, self.label_epochs), batch_size, seed, rank, world
        )

    def held_out(
        self, uri: str | None = None, *, follow_data: bool = False, **reading: str | None
    ) -> Iterator[Batch]:
        """Yield held-out real images as students are tested on them: (float32 (B, C, S, S), normalized; classes int64 (B,)).

        Args:
            uri: images with the set's class names, in any layout that jobs/distill.py reads; None are those that lie beside the
                images that the set was distilled from: digits, which come with scikit-learn.
            follow_data: whether any other place is opened because the set names it; say so of sets that are yours.
            **reading: options of --source by which labels are found (`label_column`, `image_column`, `numbers`, `layout`,
                `tar_keys`, `format`). Images beside the set's are read by those of its run; at a `uri`, those that were not at
                their defaults are asked for, because nothing says whether these images are labelled alike.

        Raises:
            ConfigError: The set names another place, or one that no set may name, or digits without scikit-learn; or its
                students were tested on images that `--val-fraction` cut off its training images; or options of the run are to
                be repeated or changed.
            DataError: There are none, or they have other classes.
        """
        # Imported here: training alone reads no real image.
        from wmdd_ray.store.sources import decoded_chunks, open_source

        if unknown := reading.keys() - {*READING}:
            raise TypeError(
                f"held_out: expected options among {', '.join(READING)}, got {', '.join(sorted(unknown))}"
            )
        named = str(self.manifest["source"]["uri"])
        if uri is None and named != "digits":
            if not follow_data:
                raise ConfigError(
                    f"{self.uri} says that its real images are at {named}, which is not read because a set says so: pass the "
                    "URI of held-out images, or follow_data=True if this set is yours"
                )
            named = documents.real_images_of(self.uri, self.manifest)
        if uri is None and (share := self.manifest["source"].get("val_fraction")):
            raise ConfigError(
                f"{self.uri}: its students were tested on {share:g} of the training images, which jobs/evaluate.py holds out "
                "again; here pass the URI of held-out images"
            )
        teacher = self.teacher()
        config = SourceConfig(
            image_size=self.image_size,
            resize=teacher.resize,
            channels=self.manifest["channels"],
            mean=self.mean_C,
            std=self.std_C,
            interpolation=teacher.interpolation,
            exif_orientation=teacher.exif_orientation,
        )
        given = "" if uri is None else "held_out(uri)"
        config = documents.read_alike(self.uri, self.manifest, config, given=given, typed=reading)
        config = replace(config, **cast(Any, reading))
        source = open_source(
            uri or named,
            config,
            split="val",
            class_names=self.class_names,
            dedicated=uri is not None,
        )
        for shard in source.shards(_BATCH_IMAGES):
            for chunk in decoded_chunks(source, shard, config, _BATCH_IMAGES):
                yield from eval_batches(
                    chunk.images_NHWC,
                    chunk.labels_N,
                    mean_C=self.mean_C,
                    std_C=self.std_C,
                    batch_size=_BATCH_IMAGES,
                )

    def label_epoch(self, epoch: int) -> tuple[Views, np.ndarray]:
        """Return the label epoch of one pass as arrays: its views in the images' order, and float32 logits_VY.

        Together with `images` this is what `core.training.train_student` takes. Past the last label epoch they come again from
        the first, in the same order: another one changed nothing (digits, 5 label epochs used 40 times: top-1 98.9 +- 0.2
        either way, and with 200; 6 students each).

        Args:
            epoch: the pass over the images, from 0.

        Raises:
            ArtifactError: Its file is missing, changed, or does not hold one view of each image.
        """
        epoch %= self.label_epochs
        span = bisect_right(self._starts, epoch) - 1
        first = (epoch - self._starts[span]) * self.num_images
        views, labels = self._rows(span, slice(first, first + self.num_images))
        if not self.online:
            return views, decompress(labels)
        images = self.stored_images(self._teacher_device)
        network, batch_size = self._teacher_network(), self._batch_size
        return views, label_views(network, images, views, self.image_size, batch_size)

    def _teacher_network(self) -> torch.nn.Module:
        if self._network is None:
            self._network = labeler_of(self.teachers(), torch.device(self._teacher_device))
        return self._network

    def _logits_of(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits = self._teacher_network()(pixels.to(self._teacher_device)).float().cpu()
        return logits.clone()  # a tensor of inference mode could not be used in training

    def _read(self, key: str) -> bytes:
        # A fresh Store each time: connections do not survive a fork into a loader's worker.
        entry = next((f for f in self._files if f.key == key), None)
        if entry is None:
            raise ArtifactError(f"{self.uri}/manifest.json: expected a file {key}")
        return documents.read_verified(Store(self.uri), entry)

    @packing.checked
    def _read_images(self) -> Arrays:
        files = [f for f in self._files if f.key.startswith("data/")]
        side, channels = self.image_size, self.manifest["channels"]

        def rows_of(file: documents.FileEntry) -> tuple[list[bytes], np.ndarray, np.ndarray]:
            return codecs.decode_png_rows(self._read(file.key), len(self.class_names))

        with ThreadPoolExecutor(_READ_THREADS) as pool:
            parts = list(pool.map(rows_of, files))
            pngs = [png for part, _, _ in parts for png in part]
            weights = [weights_NT.shape[1] for _, _, weights_NT in parts]
            if len(pngs) * self.tiles**2 != self.num_images or {*weights} != {self.tiles**2}:
                raise ArtifactError(
                    f"{self.uri}: expected {self.num_images} images with a weight each, found {len(pngs)} stored ones with "
                    f"{sorted({*weights})} weights each; run assemble again"
                )
            shape = (side, side, channels)
            stored_bytes = sum(f.size_bytes for f in files)
            packing.check_budget(len(pngs) * np.prod(shape, dtype=float), stored_bytes, "a set")
            stored = np.stack(list(pool.map(lambda png: decode_png(png, shape), pngs)))
        images = untile(stored, self.tiles)
        weights_N = np.concatenate([weights_NT for _, _, weights_NT in parts]).reshape(-1)
        loss_weights_N = (weights_N / weights_N.mean()).astype(np.float32)
        labels = np.concatenate([labels_N for _, labels_N, _ in parts])
        return images, np.repeat(labels, self.tiles**2), weights_N, loss_weights_N

    def _image_arrays(self) -> Arrays:
        if self._arrays is None:
            self._arrays = self._read_images()
        return self._arrays

    def stored_images(self, device: torch.device | str = "cpu") -> StoredImages:
        """Return the images as `core.views.render_views` takes them, in the arithmetic that the set's labels belong to."""
        in_float = self.manifest["format_version"] == documents.FLOAT_VIEWS_VERSION
        return StoredImages(self.images, self.mean_C, self.std_C, device, in_float=in_float)

    def _label_spans(self) -> list[tuple[int, int, list[str]]]:
        """Return (first epoch, number of epochs, keys) of each block of label epochs, in order."""
        files_of: dict[tuple[int, int], list[documents.FileEntry]] = {}
        for entry in self._files:
            if match := _LABEL_KEY.fullmatch(entry.key):
                files_of.setdefault((int(match[1]), int(match[2])), []).append(entry)
        images_bytes = sum(f.size_bytes for f in self._files if f.key.startswith("data/"))
        spans, covered = [], 0
        for (first, last), files in sorted(files_of.items()):
            if first != covered or last < first:
                break
            # Views are drawn again from a few bytes, so that names and counts alone could ask for any memory. The images, of which
            # `_read_images` finds as many, justify theirs.
            views = (last - first + 1) * self.num_images
            stored_bytes = images_bytes + sum(f.size_bytes for f in files)
            packing.check_budget(views * VIEW_BYTES, stored_bytes, "a block of label epochs")
            spans.append((first, last - first + 1, [file.key for file in files]))
            covered = last + 1
        if covered != self.label_epochs or len(spans) < len(files_of):
            num_epochs = sum(max(0, last - first + 1) for first, last in files_of)
            raise ArtifactError(
                f"{self.uri}/manifest.json: expected files for label epochs 0 to "
                f"{self.label_epochs - 1}, found {num_epochs} epochs; run assemble again"
            )
        self._starts = [first for first, _, _ in spans]
        return spans

    def _rows(self, span: int, index: np.ndarray | slice) -> Block:
        """Return rows of a block, read when it is not held."""
        if span in self._blocks:
            self._blocks.move_to_end(span)
        else:
            self._blocks[span] = self._read_block(span)
            self._note_reading(span)
            while len(self._blocks) > 1 and sum(map(_size_bytes, self._blocks.values())) > (
                self.cache_bytes
            ):
                self._blocks.popitem(last=False)
        views, labels = self._blocks[span]
        taken = take(views, index)
        self._rows_used += len(taken)
        return taken, take_labels(labels, index)

    def _note_reading(self, span: int) -> None:
        """Warn when label epochs are read again and again for a few rows each."""
        if span in self._seen_spans:
            self._rows_reread += self._spans[span][1] * self.num_images
        self._seen_spans.add(span)
        if self._rows_reread > _MOST_REREAD * self._rows_used:
            warnings.warn(
                f"{self.uri}: label epochs are read again for a few of their rows at a time, because all of them are larger than "
                f"cache_gib={self.cache_bytes / 2**30:g}; pass batch_sampler=dataset.batches(batch_size) to the DataLoader, which "
                "stays within a pass over the images, or a larger cache_gib",
                stacklevel=2,
            )

    @packing.checked
    def _read_block(self, span: int) -> Block:
        """Return a block with its rows in order: epoch by epoch, image by image."""
        first, count, keys = self._spans[span]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            most = count * self.num_images
            blocks = list(
                pool.map(lambda k: codecs.decode_soft_labels(self._read(k), draw_block, most), keys)
            )
        views = concatenate_views([block.views for block in blocks])
        classes = {block.labels.num_classes for block in blocks}
        inside = (
            views.partner_V.max() < self.num_images and views.mix_box_V4.max() <= self.image_size
        )
        if not inside or classes != {len(self.class_names)}:
            raise ArtifactError(
                f"{self.uri}/{keys[0]}: expected views of {self.num_images} images of {self.image_size} pixels and logits of "
                f"{len(self.class_names)} classes, found others; run relabel and assemble again"
            )
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


def _size_bytes(block: Block) -> int:
    arrays = [value for record in block for value in vars(record).values()]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
