"""Students trained from scratch, tested on held-out images after the last epoch: a (row, labels, seed) is a unit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from wmdd_ray.config import DistillConfig, LabelKind
from wmdd_ray.core.networks import build_network, empty_network, load_weights, weights_of
from wmdd_ray.core.optimizer import State
from wmdd_ray.core.soft_labels import label_statistics
from wmdd_ray.core.training import accuracy, train_student
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import DoUnit, Report, unit_seed
from wmdd_ray.store import codecs, documents
from wmdd_ray.units.held_out import HeldOut, Listed
from wmdd_ray.units.training_sets import TILED, Input, OpenSets, TrainingSet

_STATE_EVERY_S = 20.0
# Label epochs that are looked at to say how much labels tell.
_MEASURED_EPOCHS = 10


def rows(config: DistillConfig) -> tuple[str, ...]:
    """Return the rows of the table: the distilled set first."""
    tiled = config.recover.tiles > 1
    return (
        "distilled",
        *(row for row in config.evaluate.baselines if tiled or row not in TILED),
    )


def unit_ids(config: DistillConfig, of: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return one unit a (row, labels, seed) of the rows, as the table has them; of all rows by default."""
    return tuple(
        f"{row}-{labels}-s{seed:03d}"
        for row in of or rows(config)
        for labels in config.evaluate.labels
        for seed in range(config.evaluate.num_seeds)
    )


def parts_of(unit: str) -> tuple[str, LabelKind, int]:
    """Return (row, labels, seed) of a unit."""
    row, labels, seed = unit.rsplit("-", 2)
    return row, "soft" if labels == "soft" else "hard", int(seed[1:])


def longest_first(units: Sequence[str]) -> list[str]:
    """Return the units as workers take them: all real images, then what is labeled while its student trains, then the rest."""

    def rank(unit: str) -> tuple[bool, bool]:
        row, labels, _ = parts_of(unit)
        return row != "all_real", row == "distilled" or labels == "hard"

    return sorted(units, key=rank)


def student_key(unit: str) -> str:
    """Return the key of a student's weights, where they are kept."""
    return f"students/{unit}.safetensors"


def open_student_trainer(
    device: torch.device,
    *,
    room: Room,
    sets: OpenSets,
    val: Listed,
    config: DistillConfig,
    kept: bool,
) -> DoUnit:
    """Open the data set and the held-out images, and return the function that trains one student."""
    opened = sets(device)
    shown = opened.input
    held_out = HeldOut(val, shown.mean_C, shown.std_C, device)

    def do_unit(unit: str, report: Report) -> None:
        attempt = room.begin(unit)
        if attempt is None:
            return
        row, labels, number = parts_of(unit)
        chosen = opened.get(row, labels)
        in_core = time.perf_counter()
        keep = Checkpoints(room, unit, _STATE_EVERY_S)
        network = _trained(unit, chosen, shown, config, device, keep, report)
        top1, top5, recall_Y = accuracy(network, held_out)
        in_core = time.perf_counter() - in_core
        result = {
            "row": row,
            "arch": config.evaluate.for_labels(labels).network.arch,
            "seed": number,
            "top1": top1,
            "top5": top5,
            "epochs": chosen.epochs,
            "num_images": len(chosen.images),
            "seconds": round(in_core, 3),
            "labels": labels,
            "hardware": hardware(),
            "versions": versions()["versions"],
            "recall_per_class": [round(float(r), 4) for r in recall_Y],
        }
        of_labels = _label_statistics(row, labels, chosen)
        payloads = {f"results/{unit}.json": documents.dump_json(result | of_labels)}
        if kept:
            payloads[student_key(unit)] = codecs.encode_state(weights_of(network))
        metrics = {"top1": top1, **of_labels, "seconds_in_core": round(in_core, 4)}
        attempt.commit(payloads, metrics)
        keep.clear()

    return do_unit


def _trained(
    unit: str,
    chosen: TrainingSet,
    shown: Input,
    config: DistillConfig,
    device: torch.device,
    keep: Checkpoints,
    report: Report,
) -> torch.nn.Module:
    """Return a student after its last epoch; its training goes on from what `keep` has."""
    row, labels, number = parts_of(unit)
    # The seed is of the student alone: student 0 of every row starts from the same weights.
    seed = unit_seed(config.seed, "student", f"{number:03d}")
    torch.manual_seed(seed)
    student = config.evaluate.for_labels(labels)
    network = build_network(
        student.network,
        num_classes=shown.num_classes,
        channels=shown.channels,
        image_size=shown.image_size,
    ).to(device)

    def on_epoch(epoch: int, loss: float, get_state: Callable[[], State]) -> None:
        keep.maybe(get_state)
        report(
            (epoch + 1) / (chosen.epochs + 1),
            f"{row}, {labels} labels, seed {number}, epoch {epoch + 1}/{chosen.epochs}",
            epoch=epoch + 1,
            loss=loss,
        )

    train_student(
        network,
        chosen.images,
        chosen.label_epoch,
        chosen.weights_N,
        student,
        epochs=chosen.epochs,
        image_size=shown.image_size,
        seed=seed,
        classes_N=chosen.classes_N,
        labels=labels,
        pixels=chosen.pixels,
        state=keep.load(),
        on_epoch=on_epoch,
    )
    return network


def read_student(
    room: Room, unit: str, config: DistillConfig, num_classes: int, device: torch.device
) -> torch.nn.Module:
    """Return a student of a committed room that keeps them, in evaluation mode."""
    student, shape = config.evaluate.for_labels(parts_of(unit)[1]), config.source.shape
    network = empty_network(student.network, num_classes=num_classes, **shape, device=device)
    state = codecs.decode_state(room.read(room.committed().file(student_key(unit))))
    load_weights(network, {k: torch.tensor(v) for k, v in state.items()}, f"student {unit}")
    return network.eval()


def _label_statistics(row: str, labels: LabelKind, chosen: TrainingSet) -> dict[str, float]:
    """Return how much the soft labels of a stored set tell (`label_statistics`); nothing of others."""
    if labels != "soft" or row == "all_real":
        return {}
    epochs = map(chosen.label_epoch, range(min(_MEASURED_EPOCHS, chosen.epochs)))
    statistics = label_statistics(epochs, len(chosen.images))
    return {name: round(value, 4) for name, value in statistics.items()}
