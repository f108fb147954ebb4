"""Bytes of soft labels against the accuracy of students that learn from them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np

from jobs.benches.reporting import Row, report, write
from wmdd_ray.config import RelabelConfig
from wmdd_ray.recipes import recipe_of
from wmdd_ray.records import SoftLabelBlock, Teacher, ViewDraw, Views

if TYPE_CHECKING:
    import torch

    from wmdd_ray.config import DistillConfig

# Logits of the synthetic set: spread of the others, and how far the true class and the mixed-in one stand out.
_SPREAD, _PEAK = 2.5, 8.0
_SYNTHETIC_CLASSES, _SYNTHETIC_VIEWS, _SYNTHETIC_EPOCHS = 1000, 8192, 300


Trained = Literal["fkd", "fine", "coarse", "shared", "lpld"]


@dataclass(frozen=True)
class Option:
    """A way to store labels: what `relabel` is told, whose students it has, how many of a student's epochs share a label epoch."""

    name: str
    relabel: RelabelConfig
    students: Trained
    shared: int = 1


def _options(full: RelabelConfig, shared: int) -> list[Option]:
    """Return FKD's labels first, then ever smaller ones."""
    seed = replace(full, stored_views="seed")
    fine = replace(seed, precision="int8")
    coarse = replace(fine, step=1.0)
    alone = 10 * shared
    return [
        Option("fp16, views stored (FKD)", full, "fkd"),
        Option("fp16, views by seed", seed, "fkd"),
        Option("int8, steps of 1/8", fine, "fine"),
        Option("int8, steps of 1", coarse, "coarse"),
        Option(f"int8, steps of 1, 1/{shared} of the epochs", coarse, "shared", shared),
        Option(f"fp16, views stored, 1/{alone} of the epochs (LPLD alone)", full, "lpld", alone),
        Option("online: the teacher only", replace(seed, labels="online"), "fkd"),
    ]


def labels(
    teacher: str,
    data: str,
    ipc: tuple[int, ...] = (10, 50),
    seeds: tuple[int, ...] = (4, 3),
    images: str | None = None,
    epochs: int = 300,
    shared: int = 5,
    width: int = 32,
    mixed_precision: bool = True,
    trained: tuple[Trained, ...] = ("fkd", "coarse", "shared", "lpld"),
    out: str | None = None,
) -> None:
    """Bytes of soft labels against student accuracy on Fashion-MNIST, and the bytes for 1000 synthetic classes.

    Every option stores the very same views and logits of the teacher; students learn from what is read back of the files, by
    the recipe of `fashion_mnist`. Views by seed read back to FKD's labels, so they share its students; so does `online`, whose
    labels differ from FKD's by float16's rounding alone. The JSON file is written again after every student: a benchmark that
    is stopped leaves what it has.

    Args:
        teacher: A run whose teacher labels; `python jobs/distill.py --recipe fashion_mnist` makes one.
        data: Folder of IDX files (Fashion-MNIST).
        ipc: Images a class.
        seeds: Students of every option, for each ipc.
        images: A run whose distilled images are labeled where it has that ipc; otherwise real images nearest to the atoms.
        epochs: Passes of a student over the images, and FKD's label epochs.
        shared: The epochs are this many times the label epochs where they are shared.
        width: Channels of a student's ConvNet-3 block.
        mixed_precision: Students compute in bfloat16.
        trained: Options that get students of their own; the others show their bytes alone.
        out: JSON file to write.
    """
    import torch

    from wmdd_ray.rooms import Room
    from wmdd_ray.stages.teacher import read_teacher
    from wmdd_ray.store.filesystem import Store

    torch.set_num_threads(1)
    if len(ipc) != len(seeds) or epochs < 10 * shared:
        raise SystemExit(
            f"expected a number of seeds for every ipc, got {seeds} for {ipc}; and at least 10 x {shared} epochs, got {epochs}"
        )
    given = read_teacher(Room(Store(teacher), "teacher", "bench"))
    settings = {"teacher_top1": given.top1, "epochs": epochs, "images": images or "nearest real"}
    settings |= {"seeds": dict(zip(ipc, seeds, strict=True))}
    rows: list[Row] = synthetic_rows(shared)
    for one, num_seeds in zip(ipc, seeds, strict=True):
        recipe = recipe_of("fashion_mnist", one)
        student = replace(
            recipe.evaluate,
            epochs=epochs,
            mixed_precision=mixed_precision,
            network=replace(recipe.evaluate.network, width=width),
        )
        stored = replace(recipe.relabel, epochs=epochs, stored_views="rows")
        config = replace(recipe, data=data, relabel=stored, evaluate=student)
        settings["student"] = asdict(student)
        comparison = _Comparison(config, given, images, shared)
        before = rows
        rows = before + comparison.rows()
        # Seed by seed: what is compared takes turns.
        for seed, option in product(range(num_seeds), comparison.options):
            if option.students not in trained or not comparison.train(option, seed):
                continue
            rows = before + comparison.rows()
            if out is not None:
                write(rows, settings, out)
    report(rows, settings, out)


class _Comparison:
    """The options at one ipc."""

    def __init__(
        self, config: DistillConfig, teacher: Teacher, images: str | None, shared: int
    ) -> None:
        import torch

        from wmdd_ray.core.networks import network_of
        from wmdd_ray.core.views import StoredImages
        from wmdd_ray.stages.held_out import HeldOut, Listed
        from wmdd_ray.store.sources import open_source

        self._config, self._teacher = config, teacher
        self.options = _options(config.relabel, shared)
        self._device = torch.device("cpu")
        network = network_of(teacher, self._device)
        pixels = _distilled(images, config, teacher.num_classes) if images else None
        self._kind = "distilled" if pixels is not None else "nearest real"
        if pixels is None:
            pixels = nearest_pixels(config, teacher, network)
        self._images = StoredImages(pixels, teacher.mean_C, teacher.std_C)
        val = open_source(config.data, config.source, split="val")
        self._val = HeldOut(
            Listed.of(val, config.source), teacher.mean_C, teacher.std_C, self._device
        )
        self._label(network)
        self._stored = {option.name: self._store(option) for option in self.options}
        self._top1: dict[str, dict[int, float]] = {}

    def _label(self, network: torch.nn.Module) -> None:
        """Draw all views and ask the teacher, once for all options."""
        from wmdd_ray.core.soft_labels import label_views
        from wmdd_ray.core.views import draw_block
        from wmdd_ray.stages.relabel import draw_of

        size, relabel = self._teacher.image_size, self._config.relabel
        index_N = np.arange(len(self._images), dtype=np.int32)
        self._draw = draw_of(self._config, index_N, image_size=size, name="0000")
        self._views: list[Views] = []
        self._logits: list[np.ndarray] = []
        for epoch in range(relabel.epochs):
            views = draw_block(self._draw, range(epoch, epoch + 1))
            self._views.append(views)
            self._logits.append(label_views(network, self._images, views, size, relabel.batch_size))

    def rows(self) -> list[Row]:
        """Return a row an option, with the students so far."""
        found: list[Row] = []
        for option in self.options:
            size_bytes, _ = self._stored[option.name]
            row: Row = {
                "ipc": self._config.ipc,
                "images": self._kind,
                "labels": option.name,
                "label_epochs": self._config.relabel.epochs // option.shared,
                "bytes": size_bytes,
            }
            row["bytes_a_view"] = round(size_bytes / len(self._images) / row["label_epochs"], 1)
            row["times_smaller"] = round((found[0] if found else row)["bytes"] / size_bytes, 1)
            if option.relabel.labels == "online":
                row["with_teacher"] = size_bytes + self._teacher_bytes()
            top1, fkd = (self._top1.get(name, {}) for name in (option.students, "fkd"))
            if top1:
                percent = [100 * value for value in top1.values()]
                row["top1"] = round(statistics.mean(percent), 2)
                row["std"] = round(statistics.stdev(percent), 2) if len(percent) > 1 else None
                paired = [100 * (top1[seed] - fkd[seed]) for seed in top1.keys() & fkd.keys()]
                row["difference"] = round(statistics.mean(paired), 2) if paired else None
                row["students"] = [round(value, 2) for value in percent]
            found.append(row)
        return found

    def _teacher_bytes(self) -> int:
        from wmdd_ray.store import codecs

        return len(codecs.encode_teacher(self._teacher))

    def _store(self, option: Option) -> tuple[int, Callable[[int], tuple[Views, np.ndarray]]]:
        """Return the bytes of an option's files, and epoch -> (views, logits) as they are read back."""
        from wmdd_ray.core.soft_labels import decompress
        from wmdd_ray.core.views import draw_block
        from wmdd_ray.dataset import cycled
        from wmdd_ray.store import codecs

        relabel, stored = option.relabel, self._config.relabel.epochs // option.shared
        size_bytes, blocks = 0, []
        for first in range(0, stored, relabel.epochs_per_unit):
            block = self._block(range(first, min(first + relabel.epochs_per_unit, stored)), relabel)
            content = codecs.encode_soft_labels(block)
            size_bytes += len(content)
            blocks.append(codecs.decode_soft_labels(content, draw_block))
        if relabel.labels == "online":
            logits = self._logits
        else:
            num_images = len(self._images)
            logits = [
                part
                for block in blocks
                for part in np.split(decompress(block.labels), len(block.views) // num_images)
            ]
        order = cycled(stored, self._config.relabel.epochs)
        return size_bytes, lambda epoch: (self._views[order[epoch]], logits[order[epoch]])

    def _block(self, epochs: range, relabel: RelabelConfig) -> SoftLabelBlock:
        from wmdd_ray.core.soft_labels import compress
        from wmdd_ray.core.views import concatenate_views
        from wmdd_ray.stages.relabel import unlabeled_block

        draw: ViewDraw | None = self._draw if relabel.stored_views == "seed" else None
        if relabel.labels == "online":
            block = unlabeled_block(self._draw, epochs, num_classes=self._teacher.num_classes)
            return replace(block, draw=draw)
        part = slice(epochs.start, epochs.stop)
        return SoftLabelBlock(
            first_epoch=epochs.start,
            num_epochs=len(epochs),
            views=concatenate_views(self._views[part]),
            labels=compress(np.concatenate(self._logits[part]), relabel),
            draw=draw,
        )

    def train(self, option: Option, seed: int) -> bool:
        """Train an option's student from scratch and keep its top-1 on held-out images, after the last epoch; once."""
        import torch

        from wmdd_ray.core.networks import build_network
        from wmdd_ray.core.training import accuracy, train_student

        config, teacher = self._config, self._teacher
        top1_of = self._top1.setdefault(option.students, {})
        if seed in top1_of:
            return False
        torch.manual_seed(seed)
        network = build_network(
            config.evaluate.network,
            num_classes=teacher.num_classes,
            channels=teacher.channels,
            image_size=teacher.image_size,
        )
        train_student(
            network,
            self._images,
            self._stored[option.name][1],
            None,
            config.evaluate,
            epochs=config.evaluate.epochs,
            image_size=teacher.image_size,
            seed=seed,
        )
        top1_of[seed], _ = accuracy(network, self._val)
        told = f"ipc {config.ipc}, {option.name}, seed {seed}: {100 * top1_of[seed]:.2f}"
        print(told, file=sys.stderr, flush=True)
        return True


def _distilled(run: str, config: DistillConfig, num_classes: int) -> np.ndarray | None:
    """Return a run's distilled images, uint8 NHWC; None where it has another ipc."""
    from wmdd_ray.rooms import Room
    from wmdd_ray.stages.recover import read_images
    from wmdd_ray.store.filesystem import Store

    classes = read_images(Room(Store(run), "images", "bench"), range(num_classes))
    if any(len(found.images_KHWC) != config.ipc for found in classes):
        return None
    return np.concatenate([found.images_KHWC for found in classes])


def nearest_pixels(config: DistillConfig, teacher: Teacher, network: torch.nn.Module) -> np.ndarray:
    """Return the real training images nearest to the barycenters' atoms, class by class, uint8 NHWC."""
    from wmdd_ray.core.barycenter import nearest_images, solve_barycenter
    from wmdd_ray.core.embedding import features_and_moments
    from wmdd_ray.core.views import to_input
    from wmdd_ray.store.sources import decoded_chunks, open_source

    source = open_source(config.data, config.source, split="train")
    pixels, features, labels_N = [], [], []
    for shard in source.shards(config.features.chunk_images):
        for chunk in decoded_chunks(source, shard, config.source, config.features.chunk_images):
            images = to_input(chunk.images_NHWC, teacher.mean_C, teacher.std_C)
            found, _ = features_and_moments(
                network, images, chunk.labels_N, batch_size=config.features.batch_size
            )
            pixels.append(chunk.images_NHWC)
            features.append(found)
            labels_N.append(chunk.labels_N)
    pixels_NHWC, features_ND = np.concatenate(pixels), np.concatenate(features)
    label_N = np.concatenate(labels_N)
    chosen = []
    for label in range(teacher.num_classes):
        members = np.flatnonzero(label_N == label)
        atoms = solve_barycenter(
            features_ND[members], config.ipc, config.barycenters, seed=label, where=str(label)
        ).atoms_KD
        chosen.append(members[nearest_images(atoms, features_ND[members])])
    return pixels_NHWC[np.concatenate(chosen)]


def synthetic_rows(shared: int, num_views: int = _SYNTHETIC_VIEWS) -> list[Row]:
    """Return the bytes of labels of 1000 classes at 10 images a class and 300 epochs, from a sample of the views.

    The logits are not a network's: normal, with a peak for the view's class and up to as high a one for its partner's.
    """
    from wmdd_ray.config import ViewConfig
    from wmdd_ray.core.soft_labels import compress
    from wmdd_ray.core.views import draw_block
    from wmdd_ray.store import codecs

    classes = _SYNTHETIC_CLASSES
    rng = np.random.default_rng(0)
    logits_VY = (_SPREAD * rng.standard_normal((num_views, classes))).astype(np.float32)
    view_V = np.arange(num_views)
    views = ViewConfig()
    draw = ViewDraw(
        seed=0,
        image_size=224,
        index_N=view_V.astype(np.int32),
        crop_scale_min=views.crop_scale_min,
        flip=views.flip,
        mix=views.mix,
        mix_alpha=views.mix_alpha,
    )
    drawn = draw_block(draw, range(1))
    logits_VY[view_V, view_V % classes] += _PEAK * drawn.share_V
    logits_VY[view_V, drawn.partner_V % classes] += _PEAK * (1 - drawn.share_V)
    full = RelabelConfig(stored_views="rows")
    top = replace(full, compression="top_k", top_k=10, stored_views="seed")
    options = [
        *_options(full, shared)[:4],
        Option("top 10, fp16", top, "fkd"),
        Option("top 10, int8, steps of 1", replace(top, precision="int8", step=1.0), "coarse"),
        Option(
            f"top 10, int8, steps of 1, 1/{shared} of the epochs",
            replace(top, precision="int8", step=1.0),
            "shared",
            shared,
        ),
    ]
    rows: list[Row] = []
    for option in options:
        block = SoftLabelBlock(
            first_epoch=0,
            num_epochs=1,
            views=drawn,
            labels=compress(logits_VY, option.relabel),
            draw=draw if option.relabel.stored_views == "seed" else None,
        )
        bytes_a_view = len(codecs.encode_soft_labels(block)) / num_views
        label_epochs = _SYNTHETIC_EPOCHS // option.shared
        row: Row = {
            "ipc": 10,
            "images": "1000 synthetic classes",
            "labels": option.name,
            "label_epochs": label_epochs,
            "bytes": round(bytes_a_view * 10 * classes * label_epochs),
            "bytes_a_view": round(bytes_a_view, 1),
        }
        row["times_smaller"] = round((rows[0] if rows else row)["bytes"] / row["bytes"], 1)
        rows.append(row)
    return rows
