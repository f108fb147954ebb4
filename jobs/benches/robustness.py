"""Robust accuracy of students by a teacher with GUARD's curvature term against those by a plain one, and what the term costs."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.benches.accuracy.definitions import Group, Options, Row, TeacherRecipe, variants
from jobs.benches.accuracy.units import Speed, StudentUnit, Unit
from jobs.benches.reporting import mean_and_std, spread
from wmdd_ray.config import AttackConfig, AttackName, CurvatureForm, DistillConfig, SqueezeConfig
from wmdd_ray.errors import WmddError
from wmdd_ray.provenance import hardware, versions

if TYPE_CHECKING:
    import numpy as np

    from jobs.benches.accuracy.splits import Labeled, Workplace

Method = Literal["wmdd", "sre2l"]
METHODS: dict[Method, str] = {"wmdd": "WMDD", "sre2l": "cross-entropy + global BN (SRe2L)"}
# Passes of a network forth and back that an image takes which no attack makes fall, for the plan: a query is a third of one.
_PASSES: dict[AttackName, int] = {
    "pgd": 100, "mim": 20, "cw": 700, "square": 600, "autoattack": 1500,
}  # fmt: skip
_COST_STEPS = 12


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
    try:
        asked = AttackConfig(names=attacks, eps=eps, images=images)
        options = Options(epochs=epochs, teacher_epochs=teacher_epochs, width=width, bf16=bf16)
        curved = [
            SqueezeConfig(
                curvature_weight=weight,
                curvature_step=step,
                curvature_form=form,
                curvature_ipc_power=ipc_power,
            )
            for weight in dict.fromkeys((0.0, *weights))
        ]
        cells = [
            _Cell(dataset, method, one, number, squeeze, iterations, options, seeds)
            for method in methods
            for one in ipc
            for number, squeeze in enumerate(curved)
        ]
        path = Path(result or Path(out) / f"robustness-{dataset}-{split}.json")
        uri = data or ("digits" if dataset == "digits" else "fashion-mnist")
        _run(cells, asked, uri, out, split, processes, path, plan, cost)
    except WmddError as error:
        raise SystemExit(f"robustness: {error}") from error


@dataclass(frozen=True)
class _Cell:
    """A row of the table: a method at an ipc by one teacher."""

    dataset: str
    method: Method
    ipc: int
    number: int
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
        return replace(
            best.squeeze,
            **{
                name: getattr(self.curved, name)
                for name in (
                    "curvature_weight", "curvature_step", "curvature_form", "curvature_ipc_power",
                )
            },
        ).at_ipc(self.ipc)  # fmt: skip

    def students(self, place: Workplace) -> tuple[StudentUnit, ...]:
        """Return the units of the students, which hold all before them."""
        from jobs.benches.accuracy.work import units_of_row

        paper, best = self.recipes
        recover = best.recover
        if self.method == "sre2l":
            recover = replace(
                paper.recover,
                feature_term="cross_entropy",
                moments="global",
                iterations=self.iterations,
            )
        row = Row(
            name=self.method,
            title=METHODS[self.method],
            kind="recover",
            barycenters=best.barycenters,
            recover=recover,
        )
        batch_size = min(best.evaluate.batch_size, 10 * self.ipc)
        group = Group(
            title=f"ipc {self.ipc}",
            ipc=self.ipc,
            tiles=best.recover.tiles,
            # The seed is of the name: plain and curved teachers start from the same weights.
            teachers=(TeacherRecipe(name="convnet3", squeeze=self.squeeze),),
            relabel=best.relabel,
            student=replace(best.evaluate, batch_size=batch_size),
            rows=(row,),
            distill_seeds=1,
            student_seeds=self.seeds,
        )
        return units_of_row(group, row, place).students["soft"]


@dataclass(frozen=True, kw_only=True)
class AttackUnit(Unit):
    """An attack on a finished student: which of the chosen images it is right on, before and after."""

    room = "attacks"
    student: StudentUnit
    attack: AttackName
    eps: str
    images: int
    split: str
    uri: str

    @property
    def label(self) -> str:
        """The student's, with the attack."""
        return f"{self.student.label}-{self.attack}"

    def seconds(self, place: Workplace, speed: Speed) -> float:
        student = self.student.student
        return self.images * _PASSES[self.attack] * speed(student.network, False)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        from fractions import Fraction

        from wmdd_ray.attacks import attack
        from wmdd_ray.run import unit_seed

        labeled = _images_of(place, self.split, self.uri)
        rows_N = sample_rows(labeled.labels_N, self.images)
        eps = 0.0 if self.attack == "cw" else float(Fraction(self.eps))
        found = attack(
            self.attack,
            self.student.network(place),
            labeled.images_NHWC[rows_N],
            labeled.labels_N[rows_N],
            eps=eps,
            mean_C=place.source.mean,
            std_C=place.source.std,
            seed=unit_seed(0, "attack", f"{self.attack}-{self.eps}"),
        )
        told = {
            "clean": found.clean_N.astype(int).tolist(),
            "robust": found.robust_N.astype(int).tolist(),
            "l2_change": found.change_N.round(6).tolist(),
            "notes": list(found.notes),
        }
        return {f"{self.id}.json": json.dumps(told).encode()}, {"eps": self.eps}


def sample_rows(labels_N: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return up to `count` rows, ascending: classes take turns in giving their images, which come in random order."""
    import numpy as np

    rng = np.random.default_rng(seed)
    turns = [
        (turn, int(row))
        for label in np.unique(labels_N)
        for turn, row in enumerate(rng.permutation(np.flatnonzero(labels_N == label)))
    ]
    # Of the last turn some classes give an image and some do not.
    order = rng.permutation(len(turns))
    chosen = sorted(order.tolist(), key=lambda i: turns[i][0])[:count]
    return np.sort([turns[i][1] for i in chosen])


def _images_of(place: Workplace, split: str, uri: str) -> Labeled:
    from jobs.benches.accuracy.splits import load_split

    if split == "val":
        return place.val
    return load_split(uri, place.source, "val", place.class_names)


def _run(
    cells: list[_Cell],
    asked: AttackConfig,
    uri: str,
    out: str,
    split: str,
    processes: int,
    path: Path,
    plan: bool,
    cost: bool,
) -> None:
    from jobs.benches.accuracy.splits import make_splits
    from jobs.benches.accuracy.work import bring, print_plan
    from wmdd_ray.attacks import require_libraries
    from wmdd_ray.recipes import recipe_of

    dataset = cells[0].dataset
    held_out = 5000 if dataset == "fashion_mnist" else 0
    place = make_splits(out, uri, recipe_of(dataset, 1).source, held_out, "cpu")
    require_libraries(asked.names, len(place.class_names))
    students = {cell: cell.students(place) for cell in cells}
    attacks = {
        student: {
            (name, eps): AttackUnit(
                data=place.data,
                student=student,
                attack=name,
                eps=eps,
                images=asked.images,
                split=split,
                uri=uri,
            )
            for name in asked.names
            for eps in (asked.eps if name != "cw" else ("none",))
        }
        for units in students.values()
        for student in units
    }
    stages = _stages(students, [u for units in attacks.values() for u in units.values()])
    if plan:
        print_plan(stages, place, processes)
        return
    bring(stages, place, processes)
    rows = _scored(students, attacks, asked, place, split, uri)
    record: dict[str, Any] = {
        "dataset": dataset,
        "split": split,
        "hardware": hardware(),
        **versions(),
        "attacked": min(asked.images, len(_images_of(place, split, uri).labels_N)),
        "rows": rows,
        "targets": _targets(rows),
    }
    if cost:
        record["cost"] = _cost(cells[-1].squeeze, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(markdown(record))
    print(f"written: {path}", file=sys.stderr)


def _stages(
    students: dict[_Cell, tuple[StudentUnit, ...]], attacks: list[AttackUnit]
) -> list[list[Unit]]:
    """Return all units, each once, in stages that need only what is before them."""
    trained = [unit for units in students.values() for unit in units]
    labeled = [unit.labeled for unit in trained]
    images = [unit.images for unit in labeled]
    features = [f for unit in images for f in unit.features]
    teachers = [f.teacher for f in features]
    return [list(dict.fromkeys(s)) for s in (teachers, features, images, labeled, trained, attacks)]


def _scored(
    students: dict[_Cell, tuple[StudentUnit, ...]],
    attacks: dict[StudentUnit, dict[tuple[AttackName, str], AttackUnit]],
    asked: AttackConfig,
    place: Workplace,
    split: str,
    uri: str,
) -> list[dict[str, Any]]:
    """Return a row a cell: accuracies on the split, and on the attacked images after every attack."""
    from fractions import Fraction

    import numpy as np

    from wmdd_ray.attacks import Attacked, contradictions, robust_to_cw
    from wmdd_ray.core.batches import eval_batches
    from wmdd_ray.core.training import accuracy

    labeled = _images_of(place, split, uri)
    source = place.source
    rows = []
    for cell, units in students.items():
        clean = []
        robust: dict[str, list[float]] = {}
        wrong: list[dict[str, Any]] = []
        for number, student in enumerate(units):
            batches = eval_batches(
                labeled.images_NHWC, labeled.labels_N, mean_C=source.mean, std_C=source.std,
                batch_size=256, device=place.device,
            )  # fmt: skip
            clean.append(accuracy(student.network(place), batches)[0])
            flags = {}
            right_N = np.zeros(0, dtype=bool)
            for (name, eps), unit in attacks[student].items():
                told = json.loads(unit.file(place))
                one = Attacked(
                    clean_N=np.array(told["clean"], dtype=bool),
                    robust_N=np.array(told["robust"], dtype=bool),
                    change_N=np.array(told["l2_change"]),
                    notes=tuple(told["notes"]),
                )
                right_N = one.clean_N
                floats = source.image_size**2 * source.channels
                for text in asked.eps if name == "cw" else (eps,):
                    size = float(Fraction(text))
                    after_N = robust_to_cw(one, size, floats) if name == "cw" else one.robust_N
                    flags[name, size] = after_N
                    robust.setdefault(f"{name} {text}", []).append(float(after_N.mean()))
            wrong += [{"student": number, **c} for c in contradictions(right_N, flags)]
        squeeze = cell.squeeze
        rows.append(
            {
                "method": cell.method,
                "ipc": cell.ipc,
                "curvature_weight": squeeze.curvature_weight,
                "curvature_step": squeeze.curvature_step,
                "curvature_form": squeeze.curvature_form,
                "teacher_top1_val": units[0].labeled.teachers[0].marker(place).metrics["top1_val"],
                "clean": mean_and_std(clean),
                "robust": {name: mean_and_std(values) for name, values in robust.items()},
                "contradictions": wrong,
            }
        )
    return rows


def _targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each row with the term, its gain under each attack and its clean cost against the plain row."""
    plain = {(r["method"], r["ipc"]): r for r in rows if r["curvature_weight"] == 0}
    found = []
    for row in rows:
        if row["curvature_weight"] == 0:
            continue
        other = plain[row["method"], row["ipc"]]
        factors = {}
        for name, told in row["robust"].items():
            before = other["robust"][name]["mean"]
            factors[name] = told["mean"] / before if before > 0 else None
        about = {k: row[k] for k in ("method", "ipc", "curvature_weight")}
        clean_cost = other["clean"]["mean"] - row["clean"]["mean"]
        found.append(about | {"clean_cost": clean_cost, "times_as_robust": factors})
    return found


def _cost(curved: SqueezeConfig, place: Workplace) -> list[dict[str, Any]]:
    """Return the seconds of a step of teacher training: plain and with either form, taking turns, processor time."""
    import torch

    from jobs.benches.accuracy.units import new_network
    from jobs.benches.accuracy.work import one_thread
    from wmdd_ray.core.batches import in_memory_batches
    from wmdd_ray.core.optimizer import make_optimizer
    from wmdd_ray.core.training import train_classifier

    forms: dict[str, SqueezeConfig] = {"plain": replace(curved, curvature_weight=0.0)}
    for form in ("loss", "gradient"):
        forms[form] = replace(curved, curvature_weight=0.1, curvature_form=form)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    train = place.train
    with one_thread():
        for turn in range(_COST_STEPS + 1):
            for name, config in forms.items():
                torch.manual_seed(0)
                network = new_network(config.network, place).to(memory_format=torch.channels_last)
                optimizer = make_optimizer(network, "sgd", learning_rate=1e-3, weight_decay=0.0)
                batch = next(
                    iter(
                        in_memory_batches(
                            train.images_NHWC, train.labels_N, batch_size=config.batch_size, seed=0,
                            epoch=turn,
                        )
                    )
                )  # fmt: skip
                started = time.process_time()
                train_classifier(
                    network,
                    optimizer,
                    partial(_same, [batch] * 3),
                    replace(config, epochs=1),
                    steps_per_epoch=3,
                    mean_C=place.source.mean,
                    std_C=place.source.std,
                    seed=0,
                )
                if turn > 0:  # the first warms up
                    seconds[name].append((time.process_time() - started) / 3)
    plain = statistics.median(seconds["plain"])
    return [
        {
            "form": name,
            "batch_size": curved.batch_size,
            "cpu_seconds_a_step": spread(values),
            "times_plain": round(statistics.median(values) / plain, 2),
        }
        for name, values in seconds.items()
    ]


def _same(batches: list[Any], _: int) -> list[Any]:
    return batches


def markdown(record: dict[str, Any]) -> str:
    """Return the tables for the README."""
    names = list(record["rows"][0]["robust"])
    head = ["trained on", "ipc", "curvature weight", "teacher (val)", "clean"]
    lines = [
        f"| {' | '.join([*head, *names])} |",
        f"|---|---:|---:|---:|---:|{'---:|' * len(names)}",
    ]
    for row in record["rows"]:
        cells = [METHODS[row["method"]], str(row["ipc"]), f"{row['curvature_weight']:.3g}"]
        cells.append(f"{100 * row['teacher_top1_val']:.1f}")
        for told in (row["clean"], *row["robust"].values()):
            cells.append(f"{100 * told['mean']:.1f} ± {100 * told['std']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    count = sum(len(row["contradictions"]) for row in record["rows"])
    text += f"\n\n{record['dataset']}, {record['split']}: attacked {record['attacked']} images; {count} contradictions"
    if "cost" in record:
        told = (
            f"{c['form']} {1000 * c['cpu_seconds_a_step']['median']:.1f} ms ({c['times_plain']:g} x)"
            for c in record["cost"]
        )
        text += f"\nseconds of a processor for a step of the teacher: {', '.join(told)}"
    return text
