"""The table of attacked students: accuracies by attack and budget, and what in it contradicts itself."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from wmdd_ray.config import Arch, AttackConfig, AttackName, DistillConfig
from wmdd_ray.robustness.attacks import (
    NAMES,
    SETTINGS,
    SUSPECT_SHARE,
    Attacked,
    Key,
    contradictions,
    libraries,
    robust_to_cw,
    worst_case,
)
from wmdd_ray.robustness.units import SAMPLE, budgets, read_attacked, room_of, slices_of
from wmdd_ray.spine.run import Run
from wmdd_ray.units.students import parts_of, unit_ids


def results(run: Run, configs: dict[Arch, DistillConfig], attack: AttackConfig) -> dict[str, Any]:
    """Return the table of all attacks on each student of a run whose attack rooms are committed, and its contradictions."""
    sample = run.room(SAMPLE).committed()
    table: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    for student, config in configs.items():
        rooms = {
            (name, eps): run.room(room_of(student, name, eps))
            for name in attack.names
            for eps in budgets(name, attack)
        }
        count = len(slices_of(sample.metrics["images"], config))
        floats = config.source.image_size**2 * config.source.channels
        by_row: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for unit in unit_ids(config):
            row, kind, number = parts_of(unit)
            attacked = {key: read_attacked(room, unit, count) for key, room in rooms.items()}
            for (name, _), one in attacked.items():
                for note in one.notes:
                    notes.setdefault(note, []).append(f"{student} {unit} {name}")
            measured, against = student_result(attacked, attack, floats)
            about: dict[str, Any] = {"student": student, "row": row, "labels": kind, "seed": number}
            wrong += [about | item for item in against]
            by_row.setdefault((row, kind), []).append(measured)
        for (row, labels), seeds in by_row.items():
            about = {"student": student, "row": row, "labels": labels}
            table += _rows(about, seeds)
    return {
        "images": sample.metrics["images"],
        "images_asked": attack.images,
        "seed": next(iter(configs.values())).seed,
        "settings": {name: SETTINGS[name] for name in attack.names},
        "libraries": libraries(),
        "table": table,
        "contradictions": sorted(wrong, key=lambda item: -item["share"]),
        "library_notes": notes,
    }


def student_result(
    attacked: dict[tuple[AttackName, Fraction | None], Attacked],
    config: AttackConfig,
    floats: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a student's accuracies by eps and attack, and their contradictions."""
    clean_N = next(iter(attacked.values())).clean_N
    robust: dict[Key, np.ndarray] = {}
    of_eps = {float(Fraction(text)): text for text in config.eps}
    for (name, budget), one in attacked.items():
        for eps in of_eps if budget is None else (float(budget),):
            robust[name, eps] = robust_to_cw(one, eps, floats) if name == "cw" else one.robust_N
    accuracies: dict[str, dict[str, float]] = {}
    for eps, text in sorted(of_eps.items()):
        here: dict[str, float] = {n: float(r.mean()) for (n, e), r in robust.items() if e == eps}
        if here.keys() - {"cw"}:
            here["worst"] = float(worst_case(robust, eps).mean())
        accuracies[text] = here
    student: dict[str, Any] = {"clean": float(clean_N.mean()), "eps": accuracies}
    cw = [one for (name, _), one in attacked.items() if name == "cw"]
    if cw:
        fallen_N = cw[0].clean_N & ~cw[0].robust_N
        student["cw_l2_median"] = (
            float(np.median(cw[0].change_N[fallen_N])) if fallen_N.any() else None
        )
    against = contradictions(clean_N, robust)
    for item in against:
        item |= {"eps": of_eps[item["eps"]], "suspect": item["share"] > SUSPECT_SHARE}
    return student, against


def _rows(about: dict[str, Any], seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row an eps: every accuracy as mean, standard deviation and values over the seeds."""

    def spread(values: list[float]) -> dict[str, Any]:
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return {"mean": float(np.mean(values)), "std": std, "values": values}

    rows = []
    for eps in seeds[0]["eps"]:
        row = about | {"eps": eps, "num_seeds": len(seeds)}
        row["clean"] = spread([student["clean"] for student in seeds])
        for name in seeds[0]["eps"][eps]:
            row[name] = spread([student["eps"][eps][name] for student in seeds])
        if "cw_l2_median" in seeds[0]:
            row["cw_l2_median"] = [student["cw_l2_median"] for student in seeds]
        rows.append(row)
    return rows


def markdown(result: dict[str, Any], row_names: dict[str, str]) -> str:
    """Return the table of `results` in Markdown; a `!` marks the accuracies that more than 1 % of the images contradict."""
    present = {name for row in result["table"] for name in row}
    titles_of = {str(name): title for name, title in NAMES.items()} | {"worst": "worst case"}
    columns = [name for name in titles_of if name in present]
    titles = [titles_of[name] for name in columns]
    suspects = {
        (w["student"], w["row"], w["labels"], w["eps"], w["what"].partition(" ")[0])
        for w in result["contradictions"]
        if w["suspect"]
    }
    lines = [
        f"| student | trained on | labels | eps | clean | {' | '.join(titles)} |",
        f"|---|---|---|---:|---:|{'---:|' * len(titles)}",
    ]
    for row in result["table"]:
        cells = []
        for name in ("clean", *columns):
            value = row.get(name)
            key = (row["student"], row["row"], row["labels"], row["eps"])
            mark = " !" if (*key, titles_of.get(name, "-").partition(" ")[0]) in suspects else ""
            cells.append(
                f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}{mark}" if value else ""
            )
        lines.append(
            f"| {row['student']} | {row_names.get(row['row'], row['row'])} | {row['labels']} | {row['eps']} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines)
