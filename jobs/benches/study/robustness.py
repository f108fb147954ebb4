"""The study `robustness`: clean and robust accuracy by ipc, GUARD's teacher against a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, Literal

from wmdd_ray.config import AttackConfig, AttackName, DistillConfig, SqueezeConfig
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.robustness.attacks import SETTINGS, Attacked, libraries, require_libraries
from wmdd_ray.robustness.results import student_result
from wmdd_ray.robustness.units import budgets, read_attacked, slices_of
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.units.teacher import UNIT

from ..reporting import mean_and_std, save
from .definitions import Options, Table, TeacherRecipe, variants
from .engine import Job, Study, one_thread
from .rows import group_of, recovered
from .scores import top1_of_students
from .splits import Labeled, held_out_of, load_split, make_place, uri_of
from .summary import line_of, percent
from .work import jobs_of_row, units_of

Method = Literal["wmdd", "sre2l"]
Attacks = dict[tuple[AttackName, Fraction | None], "Job"]
"""The job of each attack and budget on some students; CW has no budget."""
METHODS: dict[Method, str] = {"wmdd": "WMDD", "sre2l": "cross-entropy + global BN (SRe2L)"}
# Of GUARD's teachers: the step is an L2 length in normalized input units.
_CURVED: dict[str, Any] = {"curvature_step": 1.0, "curvature_form": "gradient"}
_SRE2L: dict[str, Any] = {"feature_term": "cross_entropy", "moments": "global"}


@dataclass(frozen=True)
class Cell:
    """A row of the table: a method at an ipc by one teacher."""

    method: Method
    ipc: int
    squeeze: SqueezeConfig


def robustness(
    dataset: Literal["digits", "fashion_mnist"] = "digits",
    data: str | None = None,
    out: str = "runs/robustness",
    ipc: tuple[int, ...] = (1, 10, 50),
    methods: tuple[Method, ...] = ("wmdd", "sre2l"),
    weights: tuple[float, ...] = (1.0,),
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
) -> None:
    """Clean and robust accuracy by ipc, GUARD's teacher against a plain one. Resumable; needs no Ray.

    Choose `--weights` with `--split val`, on a part of the training images that nothing is trained on; the same command with
    `--split test` finds teachers, images and students done, and attacks them on held-out images.

    Args:
        dataset: The recipe, and the table.
        data: Real images; the recipe's by default, and for Fashion-MNIST the folder with the IDX files.
        out: Folder of the jobs; what is there already is not done again.
        ipc: Images a class.
        methods: `wmdd` as the recipe has it; `sre2l` recovers from noise by cross-entropy and global BatchNorm moments.
        weights: Curvature weights; a plain teacher always is.
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
    """
    for option, given in (("ipc", ipc), ("methods", methods)):
        if not given:
            raise ConfigError(f"--{option}: expected at least one value, got none")
    wanted = AttackConfig(names=attacks, eps=eps, images=images)
    options = Options(epochs=epochs, teacher_epochs=teacher_epochs, width=width, bf16=bf16)
    options = replace(options, distill_seeds=1, student_seeds=seeds)
    uri, source = uri_of(dataset, data), recipe_of(dataset, 1).source
    place = make_place(out, uri, source, held_out_of(dataset))
    study = Study(replace(place, judged_uri=uri if split == "test" else None))
    require_libraries(wanted.names, len(place.class_names))
    recipes = {one: variants(dataset, one, options) for one in ipc}
    students = {
        cell: students_of(cell, dataset, recipes[cell.ipc], options, iterations, study)
        for cell in cells_of(recipes, methods, weights)
    }
    attacked = {job: attacks_on(job, wanted) for job in students.values()}
    jobs = [job for of_students in attacked.values() for job in of_students.values()]
    study.bring(jobs, processes)
    labeled = load_split(uri, source, "val", place.class_names) if split == "test" else None
    labeled = labeled or place.load("val")
    record: dict[str, Any] = {
        "dataset": dataset,
        "split": split,
        **{"hardware": hardware(), **versions(), "libraries": libraries()},
        "attacks": {name: SETTINGS[name] for name in wanted.names},
        "images": len(labeled.labels_N),
        "attacked": study.done(jobs[0].inputs[1]).metrics["images"],
        "seeds": seeds,
        "iterations_of_sre2l": iterations,
        "recipes": {str(one): asdict(best) for one, (_, best) in recipes.items()},
        "rows": scored(students, attacked, wanted, labeled, study),
    }
    print(markdown(record))
    save(record, Path(result or Path(out) / f"robustness-{dataset}-{split}.json"))


def cells_of(
    recipes: dict[int, tuple[DistillConfig, DistillConfig]],
    methods: Sequence[Method],
    weights: Sequence[float],
) -> list[Cell]:
    """Return the rows of the table: of each method and ipc a plain teacher, then one a curvature weight."""
    cells = []
    for method, (ipc, (_, best)) in product(methods, recipes.items()):
        cells.append(Cell(method, ipc, best.squeeze))
        for weight in dict.fromkeys(weights):
            curved = replace(best.squeeze, curvature_weight=weight, **_CURVED)
            cells.append(Cell(method, ipc, curved))
    return cells


def students_of(
    cell: Cell,
    dataset: str,
    recipes: tuple[DistillConfig, DistillConfig],
    options: Options,
    iterations: int,
    study: Study,
) -> Job:
    """Return the job of a row's students, by soft labels."""
    paper, best = recipes
    if cell.method == "sre2l":
        best = replace(best, recover=replace(paper.recover, iterations=iterations, **_SRE2L))
    row = recovered(cell.method, METHODS[cell.method], best)
    # All teachers have one seed: plain and curved ones start from the same weights.
    teacher = TeacherRecipe(name="convnet3", squeeze=cell.squeeze)
    group = group_of(f"ipc {cell.ipc}", cell.ipc, recipes[1], (row,), options, teacher)
    table = Table(name="main", dataset=dataset, source=best.source, held_out=0, groups=(group,))
    return jobs_of_row(table, group, row, study).students["soft"][0]


def attacks_on(students: Job, wanted: AttackConfig) -> Attacks:
    """Return the job of every attack and budget on students."""
    sample = Job(f"sample:{wanted.images}", replace(students.config, seed=0))
    return {
        (name, budget): Job(f"attack:{name}:{budget or ''}", students.config, (students, sample))
        for name in wanted.names
        for budget in budgets(name, wanted)
    }


def scored(
    students: dict[Cell, Job],
    attacked: dict[Job, Attacks],
    wanted: AttackConfig,
    labeled: Labeled,
    study: Study,
) -> list[dict[str, Any]]:
    """Return a row a cell: accuracies on the images, and on the attacked ones of them before and after every attack."""
    rows = []
    texts = sorted({Fraction(text): text for text in wanted.eps}.values(), key=Fraction)
    columns = list(product(wanted.names, texts))
    floats = study.place.source.image_size**2 * study.place.source.channels
    for cell, job in students.items():
        robust: dict[tuple[str, str], list[float]] = {key: [] for key in columns}
        before: list[float] = []
        wrong: list[dict[str, Any]] = []
        for number, unit in enumerate(units_of(job)):
            measured, against = student_result(_read(attacked[job], unit, study), wanted, floats)
            before.append(measured["clean"])
            for name, text in robust:
                robust[name, text].append(measured["eps"][text][name])
            wrong += [{"student": number, **c} for c in against]
        teacher = study.done(job.inputs[0]).units[UNIT]
        with one_thread():
            clean = list(top1_of_students(study.place, job, labeled).values())
        rows.append(
            {
                "method": cell.method,
                "ipc": cell.ipc,
                "curvature_weight": cell.squeeze.curvature_weight,
                "curvature_step": cell.squeeze.curvature_step,
                "curvature_form": cell.squeeze.curvature_form,
                "teacher_top1_val": teacher.metrics["top1"],
                "teacher_seconds": teacher.seconds,
                "clean": mean_and_std(clean),
                "clean_attacked": mean_and_std(before),
                "robust": {" ".join(key): mean_and_std(values) for key, values in robust.items()},
                "contradictions": wrong,
            }
        )
    return rows


def _read(
    attacks: Attacks, unit: str, study: Study
) -> dict[tuple[AttackName, Fraction | None], Attacked]:
    """Return what each attack and budget did to a student."""
    attacked = {}
    for key, job in attacks.items():
        count = len(slices_of(study.done(job).metrics["images"], job.config))
        attacked[key] = read_attacked(study.room(job), unit, count)
    return attacked


def markdown(record: dict[str, Any]) -> str:
    """Return the tables of the study."""
    head = ["trained on", "ipc", "curvature weight", "teacher (val)", "clean"]
    columns = [*head, "clean, attacked images", *record["rows"][0]["robust"]]
    lines = [line_of(*columns), f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in record["rows"]:
        cells = [METHODS[row["method"]], str(row["ipc"]), f"{row['curvature_weight']:.3g}"]
        cells.append(f"{100 * row['teacher_top1_val']:.1f}")
        cells += map(percent, (row["clean"], row["clean_attacked"], *row["robust"].values()))
        lines.append(line_of(*cells))
    count = sum(len(row["contradictions"]) for row in record["rows"])
    return "\n".join(lines) + (
        f"\n\n{record['dataset']}, {record['split']}: {record['attacked']} of {record['images']} images were attacked; "
        f"{count} contradictions"
    )
