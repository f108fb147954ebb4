"""Results of several runs and evaluations as one table, read from what is sealed on disk alone; what in it cannot be compared.

Two lines are compared where they have the data, ipc and kind of labels in common. The first line of these is what the others are
held against: another student, training, number of views or held-out images makes a difference that is not the method's.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.product.pages.facts import config_of
from wmdd_ray.product.tables import ROW_NAMES, escaped
from wmdd_ray.spine.claims import fingerprint
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.taken import runs_in
from wmdd_ray.store.documents import read_manifest, read_sealed
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.schemas import check

ALL = "all"
SOFT_ALONE = ("loss", "temperature", "ce_weight", "sinkhorn_weight", "sinkhorn_regularization", "sinkhorn_iterations")  # fmt: skip
"""Options of the loss to soft labels."""
# What a score is made of -> what students are trained on, and by which labels.
_PARTS = {
    "full_hard": ("all_real", "hard"),
    "hard": ("distilled", "hard"),
    "soft": ("distilled", "soft"),
    "random_soft": ("random_real", "soft"),
}
_OTHERS = ("network", "hard", "epochs", "all_real_epochs", "num_seeds", "labels", "baselines")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A line: students of one kind, trained on one thing by one kind of labels. Accuracies are fractions."""

    method: str
    recipe: str
    trained_on: str
    data: str
    ipc: int | str
    student: str
    labels: str
    top1: tuple[float, ...]
    teacher_top1: float | None
    num_bytes: int | None
    held_out: str
    network: str
    training: str
    views: int
    source: str
    lrs: float | None = None
    lrs_ddranking: float | None = None
    differs: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float:
        """Standard deviation of a sample; 0 of one value."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0


def label_robust_score(
    *, full_hard: float, hard: float, soft: float, random_soft: float
) -> dict[str, float]:
    """Return LRS of DD-Ranking with its parts; all accuracies are fractions.

    HLR = full_hard - hard is what the images lose against all real ones where labels do not help; IOR = soft -
    random_soft is what they gain over random real images with the same labels. alpha = (IOR - HLR) / 2 and
    LRS = (e^alpha - e^-1) / (e - e^-1), in [0, 1]. (The package's code takes percents into the exponential:
    `ddranking_scores`.)

    References:
        Li et al. 2024, DD-Ranking, with weight w = 1/2.
    """
    hlr, ior = full_hard - hard, soft - random_soft
    return {"hlr": hlr, "ior": ior, "lrs": _lrs(0.5 * ior - 0.5 * hlr)}


def ddranking_scores(
    *,
    full_hard: Sequence[float],
    hard: Sequence[float],
    soft: Sequence[float],
    random_soft: Sequence[float],
) -> list[dict[str, float]]:
    """Return what DD-Ranking's package (0.2.0) writes of an evaluation, a row a seed, under its names and in its unit, percents.

    Its `lrs` has alpha in percentage points: beyond [0, 1], and e-fold for two points of accuracy.

    Args:
        full_hard: accuracies of students of all real images by hard labels, a fraction a seed.
        hard: of the distilled images by hard labels.
        soft: of the distilled images by soft labels.
        random_soft: of random real images by soft labels.
    """
    rows = []
    for parts in zip(full_hard, hard, soft, random_soft, strict=False):
        full, own, own_soft, random = (100 * part for part in parts)
        hlr, ior = full - own, own_soft - random
        lrs = _lrs(0.5 * ior - 0.5 * hlr)
        rows.append({"hard_label_recovery": hlr, "improvement_over_random": ior, "lrs": lrs})
    return rows


def _lrs(alpha: float) -> float:
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def results_of(uri: str, name: str = "") -> list[Result]:
    """Return the results of a run, of several in one folder, or of an evaluation; `name` is what the method is to be called.

    `uri` is --out of `jobs/distill.py` or `jobs/evaluate.py`, or the `dataset/` of a run.

    Raises:
        ConfigError: There are none.
        ArtifactError: They were changed, or are of another version.
    """
    store = Store(uri)
    try:
        if inside := runs_in(store):
            whole = [run for run in inside if Room(run, "evaluation").read_commit() is not None]
            lines = [result for run in whole for result in results_of(run.uri, name)]
        else:
            evaluated = _of_evaluation(store, name)
            lines = _of_run(store, name) if evaluated is None else evaluated
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ArtifactError | ConfigError):
            raise
        raise ArtifactError(
            f"{uri}: expected results as this version of wmdd_ray writes them, found others ({type(error).__name__}: {error}); "
            "run evaluate again with it"
        ) from error
    if not lines:
        raise ConfigError(
            f"{uri}: expected a run whose evaluation is finished, or the --out of jobs/evaluate.py with results.json, found none"
        )
    return lines


def _of_run(store: Store, name: str) -> list[Result]:
    if store.uri.endswith("/dataset"):
        store = Store(store.uri.removesuffix("/dataset"))
    commit, own = (Room(store, room).read_commit() for room in ("evaluation", "dataset"))
    if commit is None or own is None:
        return []
    if commit.inputs["dataset"] != own.fingerprint:
        raise ArtifactError(
            f"{store.uri}: its evaluation/ is of another dataset/ than the one that is there; run evaluate again"
        )
    meta, _ = read_manifest(store.child("dataset"))
    about = _About(
        method=name or method_of(meta),
        recipe=meta["provenance"]["recipe"],
        data=_last(meta["source"]["uri"]),
        ipc=meta["ipc"],
        teacher_top1=commit.metrics["teacher_top1"],
        image_bytes=meta["image_bytes"],
        label_bytes=meta["label_bytes"],
        held_out=commit.inputs["val_data"],
        source=store.uri,
    )
    return _scored(_rows(about, commit.metrics["table"], commit.metrics["student"]))


def _of_evaluation(store: Store, name: str) -> list[Result] | None:
    try:
        document = read_sealed(store, "results.json")
    except (FileNotFoundError, NotADirectoryError):
        return None
    given, teacher = document["set"], document["teacher"]
    stored = given.get("stored", {})
    about = _About(
        method=name or stored.get("method") or "/".join(given["uri"].rstrip("/").split("/")[-2:]),
        recipe=stored.get("recipe", ""),
        data=_last(document["held_out"]["uri"]),
        ipc=stored.get("ipc", ""),
        teacher_top1=teacher["top1"] if teacher else None,
        image_bytes=stored.get("image_bytes"),
        label_bytes=stored.get("label_bytes", 0),
        held_out=document["held_out"]["fingerprint"],
        source=store.uri,
    )
    results = []
    for student, recorded in document["students"].items():
        table = [row for row in document["table"] if row["student"] == student]
        results += _scored(_rows(about, table, recorded["student"]))
    return results


@dataclass(frozen=True, kw_only=True)
class _About:
    method: str
    recipe: str
    data: str
    ipc: int | str
    teacher_top1: float | None
    image_bytes: int | None
    label_bytes: int
    held_out: str
    source: str


def method_of(meta: dict[str, Any]) -> str:
    """Return what a set of ours was made by, of its manifest."""
    options = meta["provenance"].get("options") or {}
    by = options.get("recover", {}).get("method", "inversion")
    return f"WMDD {options.get('variant', 'best')}" if by == "inversion" else f"{by} images"


def _rows(about: _About, table: list[dict[str, Any]], student: dict[str, Any]) -> Iterator[Result]:
    check(table, "a table of accuracies", about.source)
    recipe = config_of({"evaluate": student}, about.source).evaluate
    for row in table:
        own = asdict(recipe.for_labels(row["labels"]))
        network, hard = own["network"], own["hard"]["views"]
        if network["arch"].startswith("convnet"):
            del network["small_stem"]  # which they do not have
        else:
            del network["width"]
        training = {k: v for k, v in own.items() if k not in _OTHERS}
        if row["labels"] == "hard":
            training = {k: v for k, v in training.items() if k not in SOFT_ALONE} | {"views": hard}
        distilled, whole = row["row"] == "distilled", row["row"] == "all_real"
        extra = about.label_bytes if row["labels"] == "soft" else 0
        of_width = f"-{network['width']}" if "width" in network else ""
        yield Result(
            method=about.method if distilled else ROW_NAMES[row["row"]].partition(") ")[2],
            recipe=about.recipe if distilled else "",
            trained_on=row["row"],
            data=about.data,
            ipc=ALL if whole else about.ipc,
            student=f"{network['arch']}{of_width}{', instance norm' if network['norm'] != 'batch' else ''}",
            labels=row["labels"],
            top1=tuple(row["top1"]),
            teacher_top1=about.teacher_top1,
            num_bytes=None
            if about.image_bytes is None or not distilled
            else about.image_bytes + extra,
            held_out=about.held_out,
            network=fingerprint(network),
            training=fingerprint(training),
            views=row["epochs"] * row["num_images"],
            source=about.source,
        )


def _scored(results: Iterator[Result]) -> list[Result]:
    """Return the results of one student with the scores of its distilled set, where all four parts are there."""
    listed = list(results)
    top1 = {(r.trained_on, r.labels): r.top1 for r in listed}
    if not top1.keys() >= {*_PARTS.values()}:
        return listed
    parts = {part: top1[key] for part, key in _PARTS.items()}
    ours = label_robust_score(**{part: statistics.fmean(of) for part, of in parts.items()})["lrs"]
    theirs = statistics.fmean(row["lrs"] for row in ddranking_scores(**parts))
    return [
        replace(r, lrs=ours, lrs_ddranking=theirs) if r.trained_on == "distilled" else r
        for r in listed
    ]


def compared(results: Sequence[Result]) -> list[Result]:
    """Return each result once, those that can be compared one after the other, with what makes others not comparable."""
    once: dict[Any, Result] = {}
    for result in results:
        # Baselines of several runs are the same students.
        own = replace(result, source="") if result.trained_on != "distilled" else result
        once.setdefault(own, result)
    groups: dict[Any, list[Result]] = {}
    for result in once.values():
        groups.setdefault((result.data, result.ipc, result.labels), []).append(result)
    words = {
        "held-out images": "held_out",
        "student": "network",
        "training": "training",
        "budget": "views",
    }
    marked = []
    for _, group in sorted(groups.items(), key=lambda item: _order(item[0])):
        for result in group:
            other = [
                word
                for word, entry in words.items()
                if getattr(result, entry) != getattr(group[0], entry)
            ]
            marked.append(replace(result, differs=", ".join(other)))
    return marked


def _order(key: tuple[str, int | str, str]) -> tuple[str, float, str]:
    data, ipc, labels = key
    return data, ipc if isinstance(ipc, int) else math.inf, "" if labels == "soft" else labels


def _last(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


_COLUMNS: dict[str, Callable[[Result], str]] = {
    "method": lambda r: r.method,
    "recipe": lambda r: r.recipe,
    "data": lambda r: r.data,
    "ipc": lambda r: str(r.ipc),
    "student": lambda r: r.student,
    "labels": lambda r: r.labels,
    "top-1 %": lambda r: f"{100 * r.mean:.1f} ± {100 * r.std:.1f}",
    "n": lambda r: str(len(r.top1)),
    "teacher %": lambda r: "" if r.teacher_top1 is None else f"{100 * r.teacher_top1:.1f}",
    "bytes": lambda r: "" if r.num_bytes is None else str(r.num_bytes),
    "LRS": lambda r: "" if r.lrs is None else f"{r.lrs:.3f}",
    "LRS, DD-Ranking's": lambda r: "" if r.lrs_ddranking is None else f"{r.lrs_ddranking:.4g}",
    "not comparable": lambda r: r.differs,
}


def written(results: Sequence[Result], ending: str) -> str:
    """Return results as a table: `csv` (with the exact numbers, and where they are from), `md` or `tex`."""
    if ending == "csv":
        return _csv(results)
    rows = [[cell(result) for cell in _COLUMNS.values()] for result in results]
    used = [i for i, column in enumerate(zip(*rows, strict=True)) if any(column)]
    head = [list(_COLUMNS)[i] for i in used]
    rows = [[row[i] for i in used] for row in rows]
    if ending == "md":
        lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    body = "".join(f"{' & '.join(map(_tex, row))} \\\\\n" for row in rows)
    return (
        f"\\begin{{tabular}}{{{'l' * len(head)}}}\n\\toprule\n{' & '.join(map(_tex, head))} \\\\\n\\midrule\n{body}\\bottomrule\n"
        "\\end{tabular}\n"
    )


def _csv(results: Sequence[Result]) -> str:
    text = io.StringIO()
    rows = [
        {
            **{k: v for k, v in asdict(r).items() if k != "top1"},
            **{"top1_mean": r.mean, "top1_std": r.std, "n": len(r.top1)},
            "top1": " ".join(map(str, r.top1)),
        }
        for r in results
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _tex(cell: str) -> str:
    plain = re.sub(r"[\\{}]", "", cell)
    plain = re.sub(r"[&%$#_]", r"\\\g<0>", plain)
    return (
        plain.replace("~", r"\textasciitilde{}")
        .replace("^", r"\textasciicircum{}")
        .replace("±", r"$\pm$")
    )


def ddranking_csv(results: Sequence[Result]) -> str:
    """Return the scores of a distilled set as DD-Ranking's package writes them, a row a seed.

    Raises:
        ConfigError: The results are of no or of several students or sets, or lack a part.
    """
    top1: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for r in results:
        top1.setdefault((r.trained_on, r.labels), []).append(r.top1)
    wrong = [" by ".join(key) for key in _PARTS.values() if len(top1.get(key, ())) != 1]
    if wrong:
        raise ConfigError(
            f"--ddranking: expected one set with students of each part of the score, found none or several of {', '.join(wrong)} "
            "labels; name one run or evaluation with soft and hard labels, random_real and all_real"
        )
    rows = ddranking_scores(**{part: top1[key][0] for part, key in _PARTS.items()})
    return "".join(
        [",".join(rows[0]) + "\n", *(",".join(map(repr, row.values())) + "\n" for row in rows)]
    )
