"""The study `robustness`: clean and robust accuracy by ipc, GUARD's teacher against a plain one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wmdd_ray.config import AttackConfig, AttackName, CurvatureForm, DistillConfig, SqueezeConfig
from wmdd_ray.errors import WmddError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.provenance import hardware, versions

from ..reporting import mean_and_std
from .definitions import Options, Table, TeacherRecipe, variants
from .rows import group_of, recovered

if TYPE_CHECKING:
    from .engine import Job, Study
    from .splits import Labeled

Method = Literal["wmdd", "sre2l"]
METHODS: dict[Method, str] = {"wmdd": "WMDD", "sre2l": "cross-entropy + global BN (SRe2L)"}


@dataclass(frozen=True)
class Cell:
    """A row of the table: a method at an ipc by one teacher."""

    dataset: str
    method: Method
    ipc: int
    curved: SqueezeConfig
    iterations: int
    options: Options
    seeds: int

    @property
    def recipes(self) -> tuple[DistillConfig, DistillConfig]:
        """The recipe as published and as it is best."""
        return variants(self.dataset, self.ipc, self.options)

    @property
    def squeeze(self) -> SqueezeConfig:
        """How the teacher is trained."""
        _, best = self.recipes
        if self.curved.curvature_weight == 0:
            return best.squeeze
        names = ("weight", "step", "form", "ipc_power")
        curvature = {
            f"curvature_{name}": getattr(self.curved, f"curvature_{name}") for name in names
        }
        return replace(best.squeeze, **curvature).at_ipc(self.ipc)

    @property
    def about(self) -> dict[str, Any]:
        """What of the recipe the numbers depend on most, for the record."""
        _, best = self.recipes
        squeeze, student = best.squeeze, best.evaluate
        return {
            "network": student.network.arch,
            "width": student.network.width,
            "teacher_epochs": squeeze.epochs,
            "student_epochs": student.epochs,
            "tiles": best.recover.tiles,
            "bf16": squeeze.mixed_precision,
        }

    def students(self, table: Table, study: Study) -> Job:
        """Return the job of the students, by soft labels."""
        from .work import jobs_of_row

        paper, best = self.recipes
        recover = best.recover
        if self.method == "sre2l":
            matched: dict[str, Any] = {"feature_term": "cross_entropy", "moments": "global"}
            recover = replace(paper.recover, iterations=self.iterations, **matched)
        row = recovered(self.method, METHODS[self.method], replace(best, recover=recover))
        # All teachers have one seed: plain and curved ones start from the same weights.
        teacher = TeacherRecipe(name="convnet3", squeeze=self.squeeze)
        options = replace(self.options, distill_seeds=1, student_seeds=self.seeds)
        group = group_of(f"ipc {self.ipc}", self.ipc, best, (row,), options, teacher)
        return jobs_of_row(table, group, row, study).students["soft"][0]


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
        out: Folder of the jobs; what is there already is not done again.
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
        plan: Print the jobs of each stage, and do nothing.
        cost: Measure what a step of teacher training costs with each form of the term.
    """
    from wmdd_ray.robustness.attacks import SETTINGS, libraries, require_libraries
    from wmdd_ray.robustness.units import budgets

    from .curvature_cost import step_cost
    from .engine import Job, Study, print_plan
    from .splits import load_split, make_place

    try:
        for option, given in (("ipc", ipc), ("methods", methods)):
            if not given:
                raise WmddError(f"--{option}: expected at least one value, got none")
        wanted = AttackConfig(names=attacks, eps=eps, images=images)
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
        source = recipe_of(dataset, 1).source
        table = Table(name="main", dataset=dataset, source=source, held_out=held_out, groups=())
        place = make_place(out, uri, source, held_out)
        study = Study(replace(place, judged_uri=uri if split == "test" else None))
        require_libraries(wanted.names, len(place.class_names))
        students = {cell: cell.students(table, study) for cell in cells}
        attacked: dict[Job, dict[tuple[AttackName, Fraction | None], Job]] = {}
        for job in students.values():
            sample = Job(f"sample:{images}", replace(job.config, seed=0))
            attacked[job] = {
                (name, budget): Job(f"attack:{name}:{budget or ''}", job.config, (job, sample))
                for name in wanted.names
                for budget in budgets(name, wanted)
            }
        jobs = [job for of_students in attacked.values() for job in of_students.values()]
        if plan:
            print_plan(jobs, study)
            return
        study.bring(jobs, processes)
        labeled = load_split(uri, source, "val", place.class_names) if split == "test" else None
        labeled = labeled or place.load("val")
        rows = scored(students, attacked, wanted, labeled, study)
        record: dict[str, Any] = {
            "dataset": dataset,
            "split": split,
            "hardware": hardware(),
            **versions(),
            "libraries": libraries(),
            "attacks": {name: SETTINGS[name] for name in wanted.names},
            "images": len(labeled.labels_N),
            "attacked": min(images, len(labeled.labels_N)),
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


def scored(
    students: dict[Cell, Job],
    attacked: dict[Job, dict[tuple[AttackName, Fraction | None], Job]],
    wanted: AttackConfig,
    labeled: Labeled,
    study: Study,
) -> list[dict[str, Any]]:
    """Return a row a cell: accuracies on the images, and on the attacked ones of them before and after every attack."""
    from wmdd_ray.robustness.attacks import contradictions
    from wmdd_ray.units.teacher import UNIT

    from .scores import top1_of_students
    from .work import units_of

    rows = []
    for cell, job in students.items():
        robust: dict[str, list[float]] = {}
        before: list[float] = []
        wrong: list[dict[str, Any]] = []
        for number, unit in enumerate(units_of(job)):
            right_N, after = _outcome(attacked[job], unit, wanted, study)
            before.append(float(right_N.mean()))
            for (name, text), robust_N in after.items():
                robust.setdefault(f"{name} {text}", []).append(float(robust_N.mean()))
            flags = {
                (name, float(Fraction(text))): flag_N for (name, text), flag_N in after.items()
            }
            wrong += [{"student": number, **c} for c in contradictions(right_N, flags)]
        teacher = study.done(job.inputs[0]).units[UNIT]
        rows.append(
            {
                "method": cell.method,
                "ipc": cell.ipc,
                "curvature_weight": cell.squeeze.curvature_weight,
                "curvature_step": cell.squeeze.curvature_step,
                "curvature_form": cell.squeeze.curvature_form,
                "teacher_top1_val": teacher.metrics["top1"],
                "clean": mean_and_std(list(top1_of_students(study.place, job, labeled).values())),
                "clean_attacked": mean_and_std(before),
                "robust": {name: mean_and_std(values) for name, values in robust.items()},
                "contradictions": wrong,
            }
        )
    return rows


def _outcome(
    attacks: dict[tuple[AttackName, Fraction | None], Job],
    unit: str,
    wanted: AttackConfig,
    study: Study,
) -> tuple[np.ndarray, dict[tuple[AttackName, str], np.ndarray]]:
    """Return which attacked images a student is right on, and (attack, eps) -> on which it still is."""
    from wmdd_ray.robustness.attacks import robust_to_cw
    from wmdd_ray.robustness.units import read_attacked, slices_of

    floats = study.place.source.image_size**2 * study.place.source.channels
    right_N = np.zeros(0, dtype=bool)
    after: dict[tuple[AttackName, str], np.ndarray] = {}
    texts = {Fraction(text): text for text in wanted.eps}
    for (name, budget), job in attacks.items():
        count = len(slices_of(study.done(job).metrics["images"], job.config))
        flags = read_attacked(study.room(job), unit, count)
        right_N = flags.clean_N
        if budget is None:
            after |= {
                (name, text): robust_to_cw(flags, float(e), floats) for e, text in texts.items()
            }
        else:
            after[name, texts[budget]] = flags.robust_N
    return right_N, after


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each row with the term, its gain under each attack and its clean cost against the plain row."""
    plain = {(r["method"], r["ipc"]): r for r in rows if r["curvature_weight"] == 0}
    gains = []
    for row in rows:
        if row["curvature_weight"] == 0:
            continue
        other = plain[row["method"], row["ipc"]]
        factors = {}
        for name, values in row["robust"].items():
            before = other["robust"][name]["mean"]
            factors[name] = values["mean"] / before if before > 0 else None
        about = {k: row[k] for k in ("method", "ipc", "curvature_weight")}
        clean_cost = other["clean"]["mean"] - row["clean"]["mean"]
        gains.append(about | {"clean_cost": clean_cost, "times_as_robust": factors})
    return gains


def markdown(record: dict[str, Any]) -> str:
    """Return the tables of the study."""
    head = ["trained on", "ipc", "curvature weight", "teacher (val)", "clean"]
    columns = [*head, "clean, attacked images", *record["rows"][0]["robust"]]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in record["rows"]:
        cells = [METHODS[row["method"]], str(row["ipc"]), f"{row['curvature_weight']:.3g}"]
        cells.append(f"{100 * row['teacher_top1_val']:.1f}")
        for value in (row["clean"], row["clean_attacked"], *row["robust"].values()):
            cells.append(f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    count = sum(len(row["contradictions"]) for row in record["rows"])
    text = "\n".join(lines) + (
        f"\n\n{record['dataset']}, {record['split']}: {record['attacked']} of {record['images']} images were attacked; "
        f"{count} contradictions"
    )
    if "cost" in record:
        costs = (
            f"{c['form']} {1000 * c['cpu_seconds_a_step']['median']:.1f} ms ({c['times_plain']:g} x)"
            for c in record["cost"]
        )
        text += f"\ntime of a processor for a step of the teacher: {', '.join(costs)}"
    return text
