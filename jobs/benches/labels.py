"""Bytes of soft labels against the accuracy of students that learn from them."""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.benches.reporting import Row, report, write
from wmdd_ray.config import RelabelConfig
from wmdd_ray.recipes import recipe_of
from wmdd_ray.records import SoftLabelBlock, Teacher, ViewDraw, Views
from wmdd_ray.run import fingerprint
from wmdd_ray.store import codecs

if TYPE_CHECKING:
    import torch

    from jobs.benches.accuracy.splits import Labeled, Workplace
    from wmdd_ray.config import DistillConfig

# Logits of the synthetic set: spread of the others, and how far the true class and the mixed-in one stand out.
_SPREAD, _PEAK = 2.5, 8.0
_BATCH_IMAGES = 256
_SYNTHETIC_CLASSES, _SYNTHETIC_VIEWS, _SYNTHETIC_EPOCHS = 1000, 8192, 300


Split = Literal["val", "test"]
Trained = Literal["fkd", "fine", "coarse", "shared", "lpld"]


@dataclass(frozen=True)
class Option:
    """A way to store labels: what `relabel` is told, the kind of its students, how many epochs of a student share a label epoch."""

    name: str
    relabel: RelabelConfig
    students: Trained
    shared: int = 1

    @property
    def key(self) -> str:
        """Name of the option's students: those of equal labels are the same."""
        step = f"-{self.relabel.step:g}" if self.students in ("coarse", "shared") else ""
        return f"{self.students}{step}" + (f"-{self.shared}" if self.shared > 1 else "")


def _options(
    full: RelabelConfig, steps: tuple[float, ...], shared: tuple[int, ...], alone: int
) -> list[Option]:
    """Return FKD's labels first, then ever smaller ones."""
    seed = replace(full, stored_views="seed")
    fine = replace(seed, precision="int8")
    stepped = [replace(fine, step=step) for step in steps]
    return [
        Option("fp16, views stored (FKD)", full, "fkd"),
        Option("fp16, views by seed", seed, "fkd"),
        Option("int8, steps of 1/8", fine, "fine"),
        *(Option(f"int8, steps of {one.step:g}", one, "coarse") for one in stepped),
        *(
            Option(f"int8, steps of {one.step:g}, 1/{n} of the epochs", one, "shared", n)
            for one, n in product(stepped, shared)
        ),
        Option(f"fp16, views stored, 1/{alone} of the epochs (LPLD alone)", full, "lpld", alone),
        Option("online: the teacher only", replace(seed, labels="online"), "fkd"),
    ]


def labels(
    teacher: str,
    data: str,
    split: Split = "val",
    ipc: tuple[int, ...] = (10, 50),
    seeds: tuple[int, ...] = (3, 3),
    steps: tuple[float, ...] = (1.0,),
    shared: tuple[int, ...] = (5,),
    alone: int = 50,
    held_out: int = 5000,
    images: str | None = None,
    epochs: int = 300,
    width: int = 32,
    mixed_precision: bool = True,
    trained: tuple[Trained, ...] = ("fkd", "coarse", "shared", "lpld"),
    folder: str = "runs/labels",
    out: str | None = None,
    plan: bool = False,
) -> None:
    """Bytes of soft labels against student accuracy on Fashion-MNIST, and the bytes for 1000 synthetic classes. Resumable.

    Every option stores the very same views and logits of the teacher; students learn from what is read back of the files, by
    the recipe of `fashion_mnist`. Views by seed read back to FKD's labels, so they share its students; so does `online`, whose
    labels differ from FKD's by float16's rounding alone.

    Choose `--steps` and `--shared` with `--split val`: students are scored on training images that were held out from what is
    labeled (the teacher has seen them, for every option alike). The same command with `--split test` finds the students and
    scores them on the test images: pass the chosen options only.

    Args:
        teacher: A run whose teacher labels; `python jobs/distill.py --recipe fashion_mnist` makes one.
        data: Folder of IDX files (Fashion-MNIST).
        split: Images that students are scored on.
        ipc: Images a class.
        seeds: Students of every option, for each ipc.
        steps: Steps of int8 logits that are compared.
        shared: Where epochs share labels, they are this many times the label epochs.
        alone: The same, for float16 logits.
        held_out: Training images that become `val`: the last of the file; 0 takes the last tenth of every class.
        images: A run whose distilled images are labeled where it has that ipc; otherwise real images nearest to the atoms.
        epochs: Passes of a student over the images, and FKD's label epochs.
        width: Channels of a student's ConvNet-3 block.
        mixed_precision: Students compute in bfloat16.
        trained: Options that get students of their own; the others show their bytes alone.
        folder: Where students are kept; what is there already is not trained again.
        out: JSON file to write, again after every student.
        plan: Print how many students are missing and about how long they take, and stop.
    """
    import torch

    from jobs.benches.accuracy.splits import load_split, make_splits
    from jobs.benches.accuracy.work import duration, speed_on
    from wmdd_ray.rooms import Room
    from wmdd_ray.stages.teacher import read_teacher
    from wmdd_ray.store.filesystem import Store

    torch.set_num_threads(1)
    if len(ipc) != len(seeds) or epochs < max(*shared, alone):
        raise SystemExit(
            f"expected a number of seeds for every ipc, got {seeds} for {ipc}; and at least {max(*shared, alone)} epochs "
            f"(--shared, --alone), got {epochs}"
        )
    given = read_teacher(Room(Store(teacher), "teacher", "bench"))
    place = make_splits(folder, data, recipe_of("fashion_mnist", 1).source, held_out, "cpu")
    settings: dict[str, Any] = {
        "split": split,
        "held_out": len(place.val.labels_N),
        "teacher_top1": given.top1,
        "epochs": epochs,
        "images": images or "nearest real",
        "seeds": dict(zip(ipc, seeds, strict=True)),
    }
    comparisons: list[tuple[_Comparison, int]] = []
    for one, num_seeds in zip(ipc, seeds, strict=True):
        recipe = recipe_of("fashion_mnist", one)
        student = replace(
            recipe.evaluate,
            epochs=epochs,
            mixed_precision=mixed_precision,
            network=replace(recipe.evaluate.network, width=width),
        )
        stored = replace(recipe.relabel, epochs=epochs, stored_views="rows")
        settings["student"] = asdict(student)
        config = replace(recipe, data=data, relabel=stored, evaluate=student)
        options = _options(stored, steps, shared, alone)
        comparisons.append((_Comparison(config, given, images, options, place), num_seeds))
    # A kind of labels that several options have has its students once.
    missing = {
        (comparison.unit(option, seed), comparison.num_images)
        for comparison, num_seeds in comparisons
        for option, seed in product(comparison.options, range(num_seeds))
        if option.students in trained
        and comparison.unit(option, seed) not in place.room("students").finished()
    }
    views = sum(num_images * epochs for _, num_images in missing)
    each = speed_on(place)(comparisons[0][0].student.network, mixed_precision) if views else 0.0
    told = f"{len(missing)} students to train, about {duration(views * each)} on one thread"
    print(told, file=sys.stderr, flush=True)
    if plan:
        return
    scored = (
        place.val if split == "val" else load_split(data, place.source, "val", place.class_names)
    )
    rows: list[Row] = synthetic_rows(steps[0], shared[0])
    for comparison, num_seeds in comparisons:
        before = rows
        comparison.label()
        rows = before + comparison.rows()
        # Seed by seed: what is compared takes turns.
        for seed, option in product(range(num_seeds), comparison.options):
            if option.students not in trained or not comparison.score(option, seed, scored):
                continue
            rows = before + comparison.rows()
            if out is not None:
                write(rows, settings, out)
    report(rows, settings, out)


class _Comparison:
    """The options at one ipc."""

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        images: str | None,
        options: list[Option],
        place: Workplace,
    ) -> None:
        import torch

        from wmdd_ray.core.networks import network_of
        from wmdd_ray.core.views import StoredImages

        self._config, self._teacher, self._place = config, teacher, place
        self.options, self.student = options, config.evaluate
        self._network = network_of(teacher, torch.device("cpu"))
        pixels = _distilled(images, config, teacher.num_classes) if images else None
        self._kind = "distilled" if pixels is not None else "nearest real"
        if pixels is None:
            pixels = nearest_pixels(config, teacher, self._network, place.train)
        self._images = StoredImages(pixels, teacher.mean_C, teacher.std_C)
        self.num_images = len(pixels)
        self._labeled_by = {
            "teacher": hashlib.sha256(codecs.encode_teacher(teacher)).hexdigest(),
            "pixels": hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
        }
        self._top1: dict[str, dict[int, float]] = {}

    def unit(self, option: Option, seed: int) -> str:
        """Return the id of a student: what it is in words, and the fingerprint of all that its weights depend on."""
        about = {
            **self._labeled_by,
            "relabel": asdict(option.relabel),
            "shared": option.shared,
            # What a student of soft labels does not depend on is set to one value.
            "student": asdict(replace(self.student, num_seeds=1, baselines=(), all_real_epochs=1)),
            "seeds": [self._config.seed, seed],
        }
        if option.students == "fkd":  # three options have these labels
            about["relabel"] = asdict(self.options[0].relabel)
        return f"i{self._config.ipc:03d}-{option.key}-s{seed}-{fingerprint(about)[:10]}"

    def label(self) -> None:
        """Draw all views, ask the teacher, and store the labels of every option."""
        self._ask()
        self._stored = {option.name: self._store(option) for option in self.options}

    def _ask(self) -> None:
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
            self._logits.append(
                label_views(self._network, self._images, views, size, relabel.batch_size)
            )

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
            top1, fkd = (self._top1.get(name, {}) for name in (option.key, "fkd"))
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
        return len(codecs.encode_teacher(self._teacher))

    def _store(self, option: Option) -> tuple[int, Callable[[int], tuple[Views, np.ndarray]]]:
        """Return the bytes of an option's files, and epoch -> (views, logits) as they are read back."""
        from wmdd_ray.core.soft_labels import decompress
        from wmdd_ray.core.views import draw_block
        from wmdd_ray.dataset import cycled

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

    def score(self, option: Option, seed: int, scored: Labeled) -> bool:
        """Keep the top-1 of an option's student, which is trained where it is not there yet; False when it was kept before."""
        import torch

        from wmdd_ray.core.batches import eval_batches
        from wmdd_ray.core.networks import load_weights
        from wmdd_ray.core.training import accuracy

        top1_of = self._top1.setdefault(option.key, {})
        if seed in top1_of:
            return False
        network, unit, room = self._new(seed), self.unit(option, seed), self._place.room("students")
        attempt = room.begin_unit(unit) if unit not in room.finished() else None
        if attempt is not None:
            self._train(network, option, seed, unit, attempt)
        state = codecs.decode_state(room.read(room.read_unit(unit).files[0]))
        load_weights(network, {k: torch.tensor(v) for k, v in state.items()}, f"student {unit}")
        batches = eval_batches(
            scored.images_NHWC,
            scored.labels_N,
            mean_C=self._teacher.mean_C,
            std_C=self._teacher.std_C,
            batch_size=_BATCH_IMAGES,
        )
        top1_of[seed], _ = accuracy(network.eval(), batches)
        told = f"ipc {self._config.ipc}, {option.name}, seed {seed}: {100 * top1_of[seed]:.2f}"
        print(told, file=sys.stderr, flush=True)
        return True

    def _new(self, seed: int) -> torch.nn.Module:
        import torch

        from wmdd_ray.core.networks import build_network

        torch.manual_seed(seed)
        return build_network(
            self.student.network,
            num_classes=self._teacher.num_classes,
            channels=self._teacher.channels,
            image_size=self._teacher.image_size,
        )

    def _train(
        self, network: torch.nn.Module, option: Option, seed: int, unit: str, attempt: int
    ) -> None:
        """Train a student from scratch and commit its weights, those after the last epoch."""
        from wmdd_ray.core.networks import weights_of
        from wmdd_ray.core.training import train_student

        started = time.perf_counter()
        train_student(
            network,
            self._images,
            self._stored[option.name][1],
            None,
            self.student,
            epochs=self.student.epochs,
            image_size=self._teacher.image_size,
            seed=seed,
        )
        self._place.room("students").commit_unit(
            unit,
            {f"{unit}.safetensors": codecs.encode_state(weights_of(network))},
            attempt=attempt,
            seconds=time.perf_counter() - started,
        )


def _distilled(run: str, config: DistillConfig, num_classes: int) -> np.ndarray | None:
    """Return a run's distilled images, uint8 NHWC; None where it has another ipc."""
    from wmdd_ray.rooms import Room
    from wmdd_ray.stages.recover import read_images
    from wmdd_ray.store.filesystem import Store

    classes = read_images(Room(Store(run), "images", "bench"), range(num_classes))
    if any(len(found.images_KHWC) != config.ipc for found in classes):
        return None
    return np.concatenate([found.images_KHWC for found in classes])


def nearest_pixels(
    config: DistillConfig, teacher: Teacher, network: torch.nn.Module, train: Labeled
) -> np.ndarray:
    """Return the real images of `train` nearest to the barycenters' atoms, class by class, uint8 NHWC."""
    from wmdd_ray.core.barycenter import nearest_images, solve_barycenter
    from wmdd_ray.core.batches import eval_batches
    from wmdd_ray.core.embedding import features_and_moments

    features_ND = np.concatenate(
        [
            features_and_moments(
                network, images, labels_B.numpy(), batch_size=config.features.batch_size
            )[0]
            for images, labels_B in eval_batches(
                train.images_NHWC,
                train.labels_N,
                mean_C=teacher.mean_C,
                std_C=teacher.std_C,
                batch_size=config.features.chunk_images,
            )
        ]
    )
    chosen = []
    for label in range(teacher.num_classes):
        members = train.of_class(label)
        atoms = solve_barycenter(
            features_ND[members], config.ipc, config.barycenters, seed=label, where=str(label)
        ).atoms_KD
        chosen.append(members[nearest_images(atoms, features_ND[members])])
    return np.asarray(train.images_NHWC[np.concatenate(chosen)])


def synthetic_rows(step: float, shared: int, num_views: int = _SYNTHETIC_VIEWS) -> list[Row]:
    """Return the bytes of labels of 1000 classes at 10 images a class and 300 epochs, from a sample of the views.

    The logits are not a network's: normal, with a peak for the view's class and up to as high a one for its partner's.
    """
    from wmdd_ray.config import ViewConfig
    from wmdd_ray.core.soft_labels import compress
    from wmdd_ray.core.views import draw_block

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
    stepped = replace(top, precision="int8", step=step)
    options = [
        *_options(full, (step,), (), 1)[:4],
        Option("top 10, fp16", top, "fkd"),
        Option(f"top 10, int8, steps of {step:g}", stepped, "coarse"),
        Option(
            f"top 10, int8, steps of {step:g}, 1/{shared} of the epochs",
            stepped,
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
