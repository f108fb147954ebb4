"""Accuracies of attacked students, what the curvature term gains and costs them, and their table."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from jobs.benches.accuracy.scores import top1
from jobs.benches.accuracy.splits import Labeled, Workplace
from jobs.benches.accuracy.units import StudentUnit
from jobs.benches.reporting import mean_and_std
from jobs.benches.robustness.attacks import AttackUnit
from jobs.benches.robustness.cells import METHODS, Cell
from wmdd_ray.config import AttackName
from wmdd_ray.robustness.attacks import contradictions, robust_to_cw


def scored(
    students: dict[Cell, tuple[StudentUnit, ...]],
    attacks: dict[StudentUnit, list[AttackUnit]],
    eps: tuple[str, ...],
    labeled: Labeled,
    place: Workplace,
) -> list[dict[str, Any]]:
    """Return a row a cell: accuracies on the images, and on the attacked ones of them before and after every attack."""
    rows = []
    for cell, units in students.items():
        robust: dict[str, list[float]] = {}
        attacked: list[float] = []
        wrong: list[dict[str, Any]] = []
        for number, student in enumerate(units):
            right_N, after = _outcome(attacks[student], eps, place)
            attacked.append(float(right_N.mean()))
            for (name, text), robust_N in after.items():
                robust.setdefault(f"{name} {text}", []).append(float(robust_N.mean()))
            flags = {
                (name, float(Fraction(text))): after_N for (name, text), after_N in after.items()
            }
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
                "clean": mean_and_std(
                    [top1(student.network(place), labeled, place) for student in units]
                ),
                "clean_attacked": mean_and_std(attacked),
                "robust": {name: mean_and_std(values) for name, values in robust.items()},
                "contradictions": wrong,
            }
        )
    return rows


def _outcome(
    attacks: list[AttackUnit], eps: tuple[str, ...], place: Workplace
) -> tuple[np.ndarray, dict[tuple[AttackName, str], np.ndarray]]:
    """Return which attacked images a student is right on, and (attack, eps) -> on which it still is."""
    floats = place.source.image_size**2 * place.source.channels
    right_N = np.zeros(0, dtype=bool)
    after: dict[tuple[AttackName, str], np.ndarray] = {}
    for unit in attacks:
        found = unit.found(place)
        right_N = found.clean_N
        if unit.attack == "cw":
            after |= {
                ("cw", text): robust_to_cw(found, float(Fraction(text)), floats) for text in eps
            }
        else:
            after[unit.attack, unit.eps] = found.robust_N
    return right_N, after


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
    """Return the tables of the bench."""
    names = list(record["rows"][0]["robust"])
    head = [
        "trained on",
        "ipc",
        "curvature weight",
        "teacher (val)",
        "clean",
        "clean, attacked images",
    ]
    columns = [*head, *names]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in record["rows"]:
        cells = [METHODS[row["method"]], str(row["ipc"]), f"{row['curvature_weight']:.3g}"]
        cells.append(f"{100 * row['teacher_top1_val']:.1f}")
        for told in (row["clean"], row["clean_attacked"], *row["robust"].values()):
            cells.append(f"{100 * told['mean']:.1f} ± {100 * told['std']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    count = sum(len(row["contradictions"]) for row in record["rows"])
    text += (
        f"\n\n{record['dataset']}, {record['split']}: {record['attacked']} of {record['images']} images were attacked; "
        f"{count} contradictions"
    )
    if "cost" in record:
        told = (
            f"{c['form']} {1000 * c['cpu_seconds_a_step']['median']:.1f} ms ({c['times_plain']:g} x)"
            for c in record["cost"]
        )
        text += f"\ntime of a processor for a step of the teacher: {', '.join(told)}"
    return text
