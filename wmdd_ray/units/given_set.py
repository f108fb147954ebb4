"""A distilled set that is given: one of ours at any URI, or labelled images that somebody else distilled.

Of ours the stored views and labels are used. Images of others have their classes, and soft labels when a teacher is
given: views are drawn and labeled by it as `relabel` does. Baselines are real images under the same views and teacher.

Legend: N images that a student sees, V views, Y classes, H W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from wmdd_ray.config import DistillConfig, LabelKind
from wmdd_ray.core.architectures import refuse_foreign_code
from wmdd_ray.core.networks import labeler_of
from wmdd_ray.core.views import Images, StoredImages, take
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.errors import ArtifactError, DataError
from wmdd_ray.records import Teacher, Views
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.documents import load_json, read_manifest, set_id
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source
from wmdd_ray.units.held_out import Listed
from wmdd_ray.units.labels import stored_logits, views_of
from wmdd_ray.units.real_images import random_real
from wmdd_ray.units.teacher import labelers_of, read_teacher
from wmdd_ray.units.tensor_set import TensorSet
from wmdd_ray.units.training_sets import (
    Input,
    LabelEpoch,
    Sets,
    TrainingSet,
    fresh_labels,
    hard_views,
    load_all_real,
)

_SET_BYTES = 8 << 30
# Images, tables and what our own sets have; no code.
_FROM_HUB = ["*.parquet", "*.tar", "*.png", "*.jpg", "*.jpeg", "*.JPEG", "*.json", "*.jsonl", "*.safetensors"]  # fmt: skip
_CHUNK_IMAGES = 512


@dataclass(frozen=True, kw_only=True)
class OwnSet:
    """One of our distilled sets: where it lies, and what its manifest says. Stands in for a `Source`."""

    uri: str
    meta: dict[str, Any]
    identity: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        return tuple(self.meta["class_names"])

    def fingerprint(self) -> str:
        """Return the SHA-256 over the files of the set."""
        return self.identity


def own_set(uri: str) -> OwnSet | None:
    """Return the set of ours at `uri`, or in `dataset/` of a run at `uri`; None when what is there is none of ours.

    Raises:
        ArtifactError: It is one of ours, and was changed.
    """
    for store in (Store(uri), Store(uri).child("dataset")):
        try:
            manifest = load_json(store.get("manifest.json"), store.url("manifest.json"))
        except (FileNotFoundError, IsADirectoryError):
            continue
        except ArtifactError:
            if store.exists("teacher.safetensors"):
                raise
            continue
        if isinstance(manifest, dict) and "label_epochs" in manifest:
            meta, files = read_manifest(store)
            return OwnSet(uri=store.uri, meta=meta, identity=set_id(files))
    return None


def on_this_disk(uri: str) -> str:
    """Return the folder that a set of the Hugging Face hub is downloaded to, unless it is there; any other URI as it is.

    Args:
        uri: `hub:OWNER/NAME`, or `rethinkdc:METHOD-ipc-K`, one of the ImageNet-1K sets that "Rethinking Large-scale Dataset
            Compression" (Xiao et al. 2025, arXiv 2502.06434) has published.

    Raises:
        ArtifactError: The hub did not give it.
    """
    kind, _, name = uri.partition(":")
    if kind not in ("hub", "rethinkdc"):
        return uri
    name = name if kind == "hub" else f"he-yang/2025-rethinkdc-imagenet-{name}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HOME

        # Files, not the links that the hub's cache is made of.
        folder = f"{HF_HOME}/wmdd_ray/{name.replace('/', '--')}"
        return snapshot_download(
            name, repo_type="dataset", local_dir=folder, allow_patterns=_FROM_HUB
        )
    except Exception as error:
        # The hub's client raises what its HTTP library does; all of it means that the set was not had.
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtifactError(
            f"{uri}: the Hugging Face hub did not give {name} ({type(error).__name__}: {said[0]}); check name and connection, or "
            f"download it elsewhere with `hf download {name} --repo-type dataset --local-dir FOLDER` and pass the folder"
        ) from error


def listed_set(source: Source, config: DistillConfig) -> Listed:
    """Return the images of a foreign set; they are brought to the input's size whole, not cropped from a larger one."""
    own = replace(config.source, resize=config.source.image_size)
    return Listed.of(source, own, _CHUNK_IMAGES)


def open_given(
    device: torch.device,
    *,
    given: OwnSet | TensorSet | Listed,
    real: Listed | None,
    teacher_room: Room | None,
    config: DistillConfig,
) -> Sets:
    """Open a set of ours, or the images of somebody else's."""
    if isinstance(given, OwnSet):
        dataset = DistilledDataset(given.uri)
        for teacher in dataset.teachers():
            refuse_foreign_code(teacher.arch, given.uri)
        return GivenSets(
            Given(
                images=dataset.images,
                classes_N=dataset.labels,
                weights_N=dataset.weights,
                tiles=dataset.tiles,
                stored=dataset.label_epoch,
                label_epochs=dataset.label_epochs,
                in_float=dataset.stored_images().in_float,
            ),
            Input.of(dataset.teacher()),
            dataset.teachers(),
            real,
            config,
            device,
        )
    images, classes_N, num_classes = _foreign_images(given)
    order_N = np.argsort(classes_N, kind="stable")
    source = config.source
    shown = Input(num_classes, source.channels, source.image_size, source.mean, source.std)
    return GivenSets(
        Given(
            images=images[order_N],
            classes_N=classes_N[order_N],
            weights_N=np.ones(len(order_N)),
            tiles=1,
            stored=None,
            label_epochs=config.relabel.epochs,
        ),
        shown,
        ()
        if teacher_room is None
        else tuple(read_teacher(teacher_room, unit) for unit in labelers_of(config)),
        real,
        config,
        device,
    )


def _foreign_images(given: TensorSet | Listed) -> tuple[Any, np.ndarray, int]:
    """Return (images as `Given` has them, classes, number of classes) of somebody else's set."""
    if isinstance(given, TensorSet):
        inputs_NCHW, classes_N = given.read()
        return inputs_NCHW, classes_N.numpy(), len(given.class_names)
    loaded = given.load(_SET_BYTES)
    if loaded is None:
        raise DataError(
            f"{given.source.root}: expected a distilled set, found images of more than {_SET_BYTES >> 30} GiB decoded"
        )
    return *loaded, len(given.source.class_names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """A distilled set in memory; `tiles` as in `DistilledDataset`, `stored` its views and labels where it has them.

    `images` are pixels, uint8 NHWC, or inputs of a network, a float32 tensor NCHW. Stored views are those of `StoredImages` with
    `in_float`.
    """

    images: np.ndarray | torch.Tensor
    classes_N: np.ndarray
    weights_N: np.ndarray
    tiles: int
    stored: LabelEpoch | None
    label_epochs: int
    in_float: bool = False


class GivenSets(Sets):
    """The given set (`distilled`), and `random_real` and `all_real` images beside it."""

    def __init__(
        self,
        given: Given,
        shown: Input,
        teachers: Sequence[Teacher],
        real: Listed | None,
        config: DistillConfig,
        device: torch.device,
    ) -> None:
        super().__init__(shown)
        self._given, self._teachers = given, teachers
        self._real, self._config, self._device = real, config, device

    def _make(self, row: str, labels: LabelKind) -> TrainingSet:
        given, config, shown = self._given, self._config, self.input
        epochs = config.evaluate.epochs
        pixels: Any = given.images
        classes_N, weights_N = given.classes_N, given.weights_N
        if row == "all_real":
            assert self._real is not None
            pixels, classes_N = load_all_real(self._real)
            epochs = config.evaluate.all_real_epochs
        elif row == "random_real":
            assert self._real is not None
            # As many stored pictures; whole ones are fewer than tiles, and get as many more passes.
            classes_N = given.classes_N[:: given.tiles**2]
            epochs *= given.tiles**2
            pixels = random_real(self._real, classes_N, seed=config.seed)
        if row != "distilled":
            weights_N = np.ones(len(pixels))
        if labels == "hard":
            label_epoch, cycle = hard_views(len(pixels), shown.image_size, config), epochs
        elif row == "distilled" and given.stored is not None:
            label_epoch, cycle = given.stored, given.label_epochs
        else:
            assert self._teachers, "soft labels need a teacher"
            label_epoch, cycle = (
                (fresh_labels(pixels, self._teachers, config, self._device), epochs)
                if row == "all_real"
                else self._labeled(pixels)
            )
        images = self._shown(pixels, in_float=given.in_float and label_epoch is given.stored)
        return TrainingSet(images, classes_N, label_epoch, weights_N, epochs, cycle)

    def _views(self, epoch: int) -> Views:
        """Return the views of an epoch: those that the set has stored, dealt out to whole images where it has tiles."""
        given, config, num_tiles = self._given, self._config, self._given.tiles**2
        if given.stored is None:
            epoch %= given.label_epochs
            return views_of(config, len(given.images), self.input.image_size, "0000", epoch)
        stored, _ = given.stored(epoch // num_tiles)
        if num_tiles == 1:
            return stored
        part = take(stored, np.flatnonzero(stored.image_V % num_tiles == epoch % num_tiles))
        return replace(
            part,
            image_V=part.image_V // num_tiles,
            partner_V=part.partner_V // num_tiles,
        )

    def _shown(self, images: np.ndarray | torch.Tensor, *, in_float: bool = False) -> Images:
        """Return images as a network's input, looked up by index."""
        if isinstance(images, torch.Tensor):
            return images.to(self._device)
        shown = self.input
        return StoredImages(images, shown.mean_C, shown.std_C, self._device, in_float=in_float)

    def _labeled(self, pixels: np.ndarray | torch.Tensor) -> tuple[LabelEpoch, int]:
        """Return epoch -> the set's views and the teachers' logits on these images, and the epochs after which they come again."""
        teacher, config = self._teachers[0], self._config
        network = labeler_of(self._teachers, self._device, own_code=True)
        images = self._shown(pixels)
        period = self._given.label_epochs * self._given.tiles**2

        def label_epoch(epoch: int) -> tuple[Views, np.ndarray | None]:
            views = self._views(epoch % period)
            return views, stored_logits(network, images, views, teacher.image_size, config)

        return label_epoch, period
