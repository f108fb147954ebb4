"""The study `labels`: bytes of soft labels against student accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from wmdd_ray.config import DistillConfig, RecoverConfig, RelabelConfig
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of

from ..reporting import Row, report
from .engine import Job, Study, chain, students
from .scores import top1_of_students
from .splits import Labeled, load_split, make_place


@dataclass(frozen=True)
class Option:
    """A way to store labels: what `relabel` is told, the kind of its students, how many epochs of a student share a label epoch."""

    name: str
    relabel: RelabelConfig
    students: Literal["fkd", "fine", "coarse", "shared", "lpld"]
    shared: int = 1

    @property
    def key(self) -> str:
        """Name of the option's students: those of equal labels are the same."""
        step = f"-{self.relabel.step:g}" if self.students in ("coarse", "shared") else ""
        return f"{self.students}{step}" + (f"-{self.shared}" if self.shared > 1 else "")


def options_of(
    full: RelabelConfig, steps: Sequence[float], shared: Sequence[int], alone: int
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
    data: str,
    teacher: str | None = None,
    split: Literal["val", "test"] = "val",
    ipc: tuple[int, ...] = (10, 50),
    seeds: tuple[int, ...] = (3, 3),
    steps: tuple[float, ...] = (1.0,),
    shared: tuple[int, ...] = (5,),
    alone: int = 50,
    held_out: int = 5000,
    epochs: int = 300,
    width: int = 32,
    mixed_precision: bool = True,
    folder: str = "runs/labels",
    processes: int = 1,
    out: str | None = None,
) -> None:
    """Bytes of soft labels against student accuracy on Fashion-MNIST. Resumable.

    Every option stores the labels of the same views of the same images, the real ones nearest to the recipe's atoms; students
    learn from the files, by the recipe of `fashion_mnist`. Views by seed read back to FKD's labels, so they share its students;
    so does `online`, whose labels differ from FKD's by float16's rounding alone.

    Choose `--steps` and `--shared` with `--split val`: students are scored on training images that were held out from what is
    trained and labeled. The same command with `--split test` finds the students and scores them on the test images: pass the
    chosen options only.

    Args:
        data: Folder of IDX files (Fashion-MNIST).
        teacher: A run whose teacher labels; absent, one is trained on what is not held out.
        split: Images that students are scored on.
        ipc: Images a class.
        seeds: Students of every option, for each ipc.
        steps: Steps of int8 logits that are compared.
        shared: Where epochs share labels, they are this many times the label epochs.
        alone: The same, for float16 logits.
        held_out: Training images that become `val`: the last of the file; 0 takes the last tenth of every class.
        epochs: Passes of a student over the images, and FKD's label epochs.
        width: Channels of teacher's and students' ConvNet-3 blocks.
        mixed_precision: Teacher and students compute in bfloat16.
        folder: Folder of the jobs; what is there already is not done again.
        processes: Processes with one computing thread each.
        out: JSON file to write.
    """
    for name, given in (("ipc", ipc), ("steps", steps), ("shared", shared)):
        if not given:
            raise ConfigError(f"--{name}: expected at least one value, got none")
    least = max(*shared, alone)
    if len(ipc) != len(seeds) or epochs < least:
        raise ConfigError(
            f"expected a number of seeds for every ipc, got {seeds} for {ipc}; and at least {least} epochs (--shared, --alone), "
            f"got {epochs}"
        )
    source = recipe_of("fashion_mnist", 1).source
    study = Study(make_place(folder, data, source, held_out))
    stored: dict[int, dict[Option, dict[str, Job]]] = {}
    for one, num_seeds in zip(ipc, seeds, strict=True):
        base = _config(one, num_seeds, epochs, width, mixed_precision, teacher)
        options = options_of(replace(base.relabel, stored_views="rows"), steps, shared, alone)
        stored[one] = {option: _chain(option, base) for option in options}
    learned = {one: _learned(chains) for one, chains in stored.items()}
    wanted = [jobs["assemble"] for of_ipc in stored.values() for jobs in of_ipc.values()]
    wanted += [job for of_ipc in learned.values() for job in of_ipc.values()]
    study.bring(wanted, processes)
    images = study.place.load("val")
    if split == "test":
        images = load_split(data, source, "val", study.place.class_names)
    rows: list[Row] = []
    for one in ipc:
        rows += _rows(one, stored[one], learned[one], epochs, images, study)
    first = next(iter(stored[ipc[0]].values()))
    settings: dict[str, Any] = {
        "split": split,
        "held_out": len(study.place.load("val").labels_N),
        "teacher_top1": study.done(first["squeeze"]).metrics["top1"],
        "epochs": epochs,
        "seeds": dict(zip(ipc, seeds, strict=True)),
        "student": asdict(first["assemble"].config.evaluate),
    }
    report(rows, settings, out)


def _chain(option: Option, base: DistillConfig) -> dict[str, Job]:
    epochs = base.evaluate.epochs // option.shared
    return chain(replace(base, relabel=replace(option.relabel, epochs=epochs)))


def _learned(stored: dict[Option, dict[str, Job]]) -> dict[str, Job]:
    """Return the students by key: of options with equal labels those of the first, and of the finest steps none."""
    learned: dict[str, Job] = {}
    for option, jobs in stored.items():
        if option.students != "fine":
            learned.setdefault(option.key, students(jobs["assemble"].config, jobs))
    return learned


def _config(
    ipc: int, seeds: int, epochs: int, width: int, mixed_precision: bool, teacher: str | None
) -> DistillConfig:
    recipe = recipe_of("fashion_mnist", ipc)
    network = replace(recipe.evaluate.network, width=width)
    student = replace(
        recipe.evaluate,
        network=network,
        epochs=epochs,
        num_seeds=seeds,
        mixed_precision=mixed_precision,
        labels=("soft",),
        baselines=(),
    )
    squeeze = replace(recipe.squeeze, network=network, mixed_precision=mixed_precision)
    real = RecoverConfig(method="real", start="nearest")
    return replace(recipe, teacher=teacher, squeeze=squeeze, recover=real, evaluate=student)


def _rows(
    ipc: int,
    stored: dict[Option, dict[str, Job]],
    learned: dict[str, Job],
    epochs: int,
    images: Labeled,
    study: Study,
) -> list[Row]:
    """Return a row an option: bytes, and the accuracy of the students of equal labels beside FKD's, seed by seed."""
    percent_of = {
        key: [100 * value for value in top1_of_students(study.place, job, images).values()]
        for key, job in learned.items()
    }
    rows: list[Row] = []
    for option, jobs in stored.items():
        made = study.done(jobs["assemble"]).metrics
        size_bytes, label_epochs = made["label_bytes"], epochs // option.shared
        row: Row = {
            "ipc": ipc,
            "images": "nearest real",
            "labels": option.name,
            "label_epochs": label_epochs,
            "bytes": size_bytes,
            "bytes_a_view": round(size_bytes / made["num_images"] / label_epochs, 1),
            "times_smaller": round((rows[0]["bytes"] if rows else size_bytes) / size_bytes, 1),
        }
        if option.relabel.labels == "online":
            row["with_teacher"] = size_bytes + made["teacher_bytes"]
        percent, fkd = percent_of.get(option.key, []), percent_of.get("fkd", [])
        if percent:
            row["top1"] = round(statistics.mean(percent), 2)
            row["std"] = round(statistics.stdev(percent), 2) if len(percent) > 1 else None
            paired = [a - b for a, b in zip(percent, fkd, strict=True)] if fkd else []
            row["difference"] = round(statistics.mean(paired), 2) if paired else None
            row["students"] = [round(value, 2) for value in percent]
        rows.append(row)
    return rows
