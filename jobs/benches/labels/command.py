"""The command `labels`: its options, and the way from them to a table."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from itertools import product
from typing import Any, Literal

from jobs.benches.labels.options import Option, Trained, learned_from, options_of
from jobs.benches.reporting import Row, report, write
from wmdd_ray.recipes import recipe_of


def labels(
    teacher: str,
    data: str,
    split: Literal["val", "test"] = "val",
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
    from jobs.benches.labels.files import synthetic_rows
    from jobs.benches.labels.students import Comparison
    from wmdd_ray.spine.rooms import Room
    from wmdd_ray.store.filesystem import Store
    from wmdd_ray.units.teacher import read_teacher

    torch.set_num_threads(1)
    for name, given in (("ipc", ipc), ("steps", steps), ("shared", shared)):
        if not given:
            raise SystemExit(f"labels: --{name}: expected at least one value, got none")
    if len(ipc) != len(seeds) or epochs < max(*shared, alone):
        raise SystemExit(
            f"labels: expected a number of seeds for every ipc, got {seeds} for {ipc}; and at least {max(*shared, alone)} epochs "
            f"(--shared, --alone), got {epochs}"
        )
    labeler = read_teacher(Room(Store(teacher), "teacher", "bench"))
    place = make_splits(folder, data, recipe_of("fashion_mnist", 1).source, held_out, "cpu")
    settings: dict[str, Any] = {
        "split": split,
        "held_out": len(place.val.labels_N),
        "teacher_top1": labeler.top1,
        "epochs": epochs,
        "images": images or "nearest real",
        "seeds": dict(zip(ipc, seeds, strict=True)),
    }
    # Each with its students, seed by seed: what is compared takes turns.
    comparisons: list[tuple[Comparison, list[tuple[int, Option]]]] = []
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
        options = options_of(stored, steps, shared, alone)
        turns = list(product(range(num_seeds), learned_from(options, trained)))
        comparisons.append((Comparison(config, labeler, images, options, place), turns))
    num_images = {
        comparison.unit(option, seed): comparison.num_images
        for comparison, turns in comparisons
        for seed, option in turns
    }
    missing = num_images.keys() - place.room("students").finished()
    views = epochs * sum(num_images[unit] for unit in missing)
    each = speed_on(place)(comparisons[0][0].student.network, mixed_precision) if views else 0.0
    told = f"{len(missing)} students to train, about {duration(views * each)} on one thread"
    print(told, file=sys.stderr, flush=True)
    if plan:
        return
    scored = (
        place.val if split == "val" else load_split(data, place.source, "val", place.class_names)
    )
    rows: list[Row] = synthetic_rows(steps[0], shared[0])
    for comparison, turns in comparisons:
        before = rows
        comparison.label()
        rows = before + comparison.rows()
        for seed, option in turns:
            comparison.score(option, seed, scored)
            rows = before + comparison.rows()
            if out is not None:
                write(rows, settings, out)
    report(rows, settings, out)
