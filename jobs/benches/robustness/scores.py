"""Accuracies of attacked students, what the curvature term gains and costs them, and their table."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np

from jobs.benches.accuracy.splits import Workplace
from jobs.benches.accuracy.units import StudentUnit
from jobs.benches.reporting import mean_and_std
from jobs.benches.robustness.attacks import AttackUnit, images_of
from jobs.benches.robustness.cells import METHODS, Cell
from wmdd_ray.attacks import Attacked, contradictions, robust_to_cw
from wmdd_ray.config import AttackConfig, AttackName
from wmdd_ray.core.batches import eval_batches
from wmdd_ray.core.training import accuracy


def scored(
    students: dict[Cell, tuple[StudentUnit, ...]],
    attacks: dict[StudentUnit, dict[tuple[AttackName, str], AttackUnit]],
    asked: AttackConfig,
    place: Workplace,
    split: str,
    uri: str,
) -> list[dict[str, Any]]:
    """Return a row a cell: accuracies on the split, and on the attacked images after every attack."""
    labeled = images_of(place, split, uri)
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


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
