"""The command `robustness`: its options, and the way from them to a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from jobs.benches.accuracy.definitions import Options
from jobs.benches.robustness.cells import Cell, Method
from wmdd_ray.config import AttackConfig, AttackName, CurvatureForm, SqueezeConfig
from wmdd_ray.errors import WmddError
from wmdd_ray.spine.provenance import hardware, versions


def robustness(
    dataset: Literal["digits", "fashion_mnist"] = "digits",
    data: str | None = None,
    out: str = "runs/robustness",
    ipc: tuple[int, ...] = (1, 10, 50),
    methods: tuple[Method, ...] = ("wmdd", "sre2l"),
    weights: tuple[float, ...] = (1.0,),
    step: float = 1.0,
    form: CurvatureForm = "gradient",
    ipc_power: float = 0.0,
    attacks: tuple[AttackName, ...] = ("pgd", "autoattack"),
    eps: tuple[str, ...] = ("24/255",),
    images: int = 100,
    seeds: int = 2,
    split: Literal["test", "val"] = "test",
    iterations: int = 500,
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    width: int | None = None,
    bf16: bool = False,
    processes: int = 1,
    result: str | None = None,
    plan: bool = False,
    cost: bool = True,
) -> None:
    """Clean and robust accuracy by ipc, GUARD's teacher against a plain one. Resumable; needs no Ray.

    Choose `--weights` with `--split val`, on a part of the training images that nothing is trained on; the same command with
    `--split test` finds teachers, images and students done, and attacks them on held-out images.

    Args:
        dataset: The recipe, and the table.
        data: Real images; the recipe's by default, and for Fashion-MNIST the folder with the IDX files.
        out: Folder of the units; what is there already is not done again.
        ipc: Images a class.
        methods: `wmdd` as the recipe has it; `sre2l` recovers from noise by cross-entropy and global BatchNorm moments.
        weights: Curvature weights; a plain teacher always is.
        step: Curvature step, L2 in normalized input units.
        form: Curvature form.
        ipc_power: How the weight falls with ipc (--squeeze.curvature-ipc-power).
        attacks: Attacks on the students.
        eps: Largest change of a pixel.
        images: Images that are attacked, equally many of each class.
        seeds: Students of each distilled set.
        split: Images that students are tested and attacked on.
        iterations: Recover iterations of `sre2l`.
        epochs: Student epochs and label epochs; the recipe's by default.
        teacher_epochs: Epochs of the teachers; the recipe's by default.
        width: Channels of teachers' and students' ConvNet-3 blocks; the recipe's by default.
        bf16: Train and recover in bfloat16.
        processes: Processes with one computing thread each.
        result: JSON file; in `out` by default.
        plan: Print the units and their estimated seconds, and do nothing.
        cost: Measure what a step of teacher training costs with each form of the term.
    """
    from jobs.benches.accuracy.splits import make_splits
    from jobs.benches.accuracy.work import bring, print_plan
    from jobs.benches.robustness.attacks import attacks_on, images_of, stages_of
    from jobs.benches.robustness.cost import step_cost
    from jobs.benches.robustness.scores import markdown, scored, targets
    from wmdd_ray.recipes import recipe_of
    from wmdd_ray.robustness.attacks import SETTINGS, libraries, require_libraries

    try:
        for option, given in (("ipc", ipc), ("methods", methods)):
            if not given:
                raise WmddError(f"--{option}: expected at least one value, got none")
        asked = AttackConfig(names=attacks, eps=eps, images=images)
        options = Options(epochs=epochs, teacher_epochs=teacher_epochs, width=width, bf16=bf16)
        curved = [
            SqueezeConfig(
                curvature_weight=weight,
                curvature_step=step,
                curvature_form=form,
                curvature_ipc_power=ipc_power if weight else 0.0,
            )
            for weight in dict.fromkeys((0.0, *weights))
        ]
        cells = [
            Cell(dataset, method, one, squeeze, iterations, options, seeds)
            for method in methods
            for one in ipc
            for squeeze in curved
        ]
        uri = data or ("digits" if dataset == "digits" else "fashion-mnist")
        held_out = 5000 if dataset == "fashion_mnist" else 0
        place = make_splits(out, uri, recipe_of(dataset, 1).source, held_out, "cpu")
        require_libraries(asked.names, len(place.class_names))
        students = {cell: cell.students(place) for cell in cells}
        attacks_of = {
            student: attacks_on(student, asked, split, uri)
            for units in students.values()
            for student in units
        }
        stages = stages_of(attacks_of)
        if plan:
            print_plan(stages, place, processes)
            return
        bring(stages, place, processes)
        labeled = images_of(place, split, uri)
        rows = scored(students, attacks_of, asked.eps, labeled, place)
        record: dict[str, Any] = {
            "dataset": dataset,
            "split": split,
            "hardware": hardware(),
            **versions(),
            "libraries": libraries(),
            "attacks": {name: SETTINGS[name] for name in asked.names},
            "images": len(labeled.labels_N),
            "attacked": min(asked.images, len(labeled.labels_N)),
            "seeds": seeds,
            "iterations_of_sre2l": iterations,
            "recipes": {str(cell.ipc): cell.about for cell in cells},
            "rows": rows,
            "targets": targets(rows),
        }
        if cost:
            record["cost"] = step_cost(cells[-1].squeeze, place)
    except WmddError as error:
        raise SystemExit(f"robustness: {error}") from error
    path = Path(result or Path(out) / f"robustness-{dataset}-{split}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(markdown(record))
    print(f"written: {path}", file=sys.stderr)
