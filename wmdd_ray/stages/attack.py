"""Attacks on the students of `jobs/evaluate.py`: a room for the images that are attacked, and one for each attack and eps.

A student, an attack, an eps and a slice of the images are a unit, so a run that is killed goes on with the next slice, and
another attack or eps leaves what is there alone.

Legend: N images, H W pixels, C channels.
"""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from wmdd_ray.attacks import (
    NAMES,
    SETTINGS,
    SUSPECT_SHARE,
    Attacked,
    Key,
    attack,
    contradictions,
    libraries,
    robust_to_cw,
    worst_case,
)
from wmdd_ray.config import Arch, AttackConfig, AttackName, DistillConfig
from wmdd_ray.options import fingerprint_options
from wmdd_ray.provenance import hardware, versions
from wmdd_ray.rooms import Room
from wmdd_ray.run import Run, Stage, StageRun, Work, unit_seed
from wmdd_ray.stages import evaluate
from wmdd_ray.stages.held_out import Listed
from wmdd_ray.stages.real_images import draw_of_classes
from wmdd_ray.stages.workers import DoUnit, Report, do_units
from wmdd_ray.store import documents

SAMPLE = "attacked"
_SAMPLE_UNIT, _SAMPLE_KEY = "images", "images.safetensors"
# Images of one unit: as many at 32 pixels, and fewer of larger ones, but not so few that a processor idles.
_SLICE_IMAGES, _SLICE_PIXELS, _SLICE_LEAST = 250, 250 * 32 * 32, 25


def stages(config: DistillConfig, student: Arch, asked: AttackConfig) -> tuple[Stage, ...]:
    """Return a stage an attack and eps on the students of an architecture; `sample_stage` comes before them.

    Args:
        config: the students' configuration, of this architecture.
        student: its room.
        asked: attacks, budgets, and how many images.
    """
    return tuple(
        _attack_stage(config, student, name, eps)
        for name in asked.names
        for eps in budgets(name, asked)
    )


def budgets(name: AttackName, asked: AttackConfig) -> tuple[Fraction | None, ...]:
    """Return the budgets that an attack is run with, ascending; CW has none."""
    return (None,) if name == "cw" else tuple(sorted(map(Fraction, asked.eps)))


def room_of(student: str, name: AttackName, eps: Fraction | None) -> str:
    """Return the room of an attack."""
    told = "" if eps is None else f"-{eps.numerator}of{eps.denominator}"
    return f"{student}-{name}{told}"


# The images that are attacked ------------------------------------------------------------------


def sample_stage(config: DistillConfig, asked: AttackConfig) -> Stage:
    """Return the stage that draws the held-out images which all students are attacked on."""

    def options(_: DistillConfig) -> dict[str, Any]:
        source = fingerprint_options(config.source)
        return {"images": asked.images, "seed": config.seed, "source": source}

    def work(stage: StageRun) -> dict[str, Any]:
        if _SAMPLE_UNIT not in stage.room.finished():
            started = time.perf_counter()
            stage.progress.start(1, 0)
            attempt = stage.room.begin_unit(_SAMPLE_UNIT)
            assert attempt is not None, "the driver alone draws"
            val = Listed.of(stage.run.source("val"), config.source)
            images_NHWC, labels_N = draw_sample(val, asked.images, seed=config.seed)
            content = safetensors.numpy.save({"images_NHWC": images_NHWC, "labels_N": labels_N})
            stage.room.commit_unit(
                _SAMPLE_UNIT,
                {_SAMPLE_KEY: content},
                metrics={"images": len(labels_N), "classes": len(set(labels_N.tolist()))},
                attempt=attempt,
                seconds=time.perf_counter() - started,
            )
        stage.progress.update(1)
        return dict(stage.room.read_unit(_SAMPLE_UNIT).metrics)

    return Stage(
        name=SAMPLE,
        room=SAMPLE,
        version=1,
        inputs=(),
        reads_data=True,
        options=options,
        plan=lambda _: Work(
            units=(_SAMPLE_UNIT,),
            estimated_bytes=asked.images * config.source.image_size**2 * config.source.channels,
        ),
        work=work,
    )


def draw_sample(val: Listed, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` held-out images, uint8 (N, H, W, C), and their classes, int64: equally many of each class, or one more.

    Which classes have one more (or any, where there are more classes than images) is drawn. A class that has fewer gives all it
    has, so there can be fewer than `count`. Classes take turns, so that every slice has of each.
    """
    num_classes = len(val.source.class_names)
    order = np.random.default_rng(unit_seed(seed, "attack", "classes")).permutation(num_classes)
    wanted = Counter(dict.fromkeys(range(num_classes), count // num_classes))
    wanted.update(order[: count % num_classes].tolist())
    chosen = draw_of_classes(val, +wanted, seed=unit_seed(seed, "attack", "images"))
    turns = sorted((i, label) for label, images in chosen.items() for i in range(len(images)))
    images_NHWC = np.stack([chosen[label][i] for i, label in turns])
    return images_NHWC, np.array([label for _, label in turns], dtype=np.int64)


def _read_sample(room: Room) -> tuple[np.ndarray, np.ndarray]:
    arrays = safetensors.numpy.load(room.read(room.committed().file(_SAMPLE_KEY)))
    return arrays["images_NHWC"], arrays["labels_N"]


# Attacks ---------------------------------------------------------------------------------------


def _slices(num_images: int, config: DistillConfig) -> list[slice]:
    side = config.source.image_size
    step = max(_SLICE_LEAST, min(_SLICE_IMAGES, _SLICE_PIXELS // side**2))
    return [slice(first, first + step) for first in range(0, num_images, step)]


def _attack_stage(
    config: DistillConfig, student: Arch, name: AttackName, eps: Fraction | None
) -> Stage:
    def options(_: DistillConfig) -> dict[str, Any]:
        told = None if eps is None else str(eps)
        return {"attack": name, "eps": told, "settings": SETTINGS[name], "seed": config.seed}

    def work(stage: StageRun) -> dict[str, Any]:
        students = evaluate.unit_ids(config)
        num_images = stage.inputs[SAMPLE].metrics["images"]
        count = len(_slices(num_images, config))
        units = [f"{trained}-{number:03d}" for trained in students for number in range(count)]
        do_units(
            stage,
            units,
            partial(
                _open_worker,
                room=stage.room,
                students=stage.run.room(student),
                sample=stage.run.room(SAMPLE),
                name=name,
                eps=eps,
                config=config,
                num_classes=len(stage.run.source("train").class_names),
            ),
        )
        markers = stage.room.read_units(units)
        return {
            "images": num_images,
            "seconds_in_core": round(
                sum(m.metrics["seconds_in_core"] for m in markers.values()), 3
            ),
            "hardware": hardware(),
            **versions(),
            "libraries": libraries(),
        }

    room = room_of(student, name, eps)
    return Stage(
        name=room,
        room=room,
        version=1,
        inputs=(student, SAMPLE),
        reads_data=False,
        options=options,
        plan=lambda _: Work(units=None, estimated_bytes=0),
        work=work,
    )


def _open_worker(
    device: torch.device,
    *,
    room: Room,
    students: Room,
    sample: Room,
    name: AttackName,
    eps: Fraction | None,
    config: DistillConfig,
    num_classes: int,
) -> DoUnit:
    """Read the images, and return the function that attacks one student on a slice of them."""
    images_NHWC, labels_N = _read_sample(sample)
    slices = _slices(len(labels_N), config)

    def do_unit(unit: str, report: Report) -> None:
        started = time.perf_counter()
        attempt = room.begin_unit(unit)
        if attempt is None:
            return
        trained, _, number = unit.rpartition("-")
        report(0.0, f"{trained}, images {int(number) + 1}/{len(slices)}")
        network = evaluate.read_student(students, trained, config, num_classes, device)
        part = slices[int(number)]
        in_core = time.perf_counter()
        found = attack(
            name,
            network,
            images_NHWC[part],
            labels_N[part],
            eps=0.0 if eps is None else float(eps),
            mean_C=config.source.mean,
            std_C=config.source.std,
            # The images of a slice share a search; students of one seed are attacked from the same start.
            seed=unit_seed(config.seed, "attack", f"{name}-{eps}-{number}"),
        )
        in_core = time.perf_counter() - in_core
        room.commit_unit(
            unit,
            {_flags_key(unit): documents.dump_json(_told(found))},
            metrics={
                "clean": float(found.clean_N.mean()),
                "robust": float(found.robust_N.mean()),
                "seconds_in_core": round(in_core, 4),
            },
            attempt=attempt,
            seconds=time.perf_counter() - started,
        )

    return do_unit


def _flags_key(unit: str) -> str:
    return f"images/{unit}.json"


def _told(found: Attacked) -> dict[str, Any]:
    return {
        "clean": found.clean_N.astype(int).tolist(),
        "robust": found.robust_N.astype(int).tolist(),
        "l2_change": found.change_N.round(6).tolist(),
        "notes": list(found.notes),
    }


def _read(room: Room, trained: str, count: int) -> Attacked:
    """Return what an attack did to a student, all slices together."""
    commit = room.committed()
    parts = []
    for number in range(count):
        key = _flags_key(f"{trained}-{number:03d}")
        parts.append(documents.load_json(room.read(commit.file(key)), key))
    return Attacked(
        clean_N=np.array([v for part in parts for v in part["clean"]], dtype=bool),
        robust_N=np.array([v for part in parts for v in part["robust"]], dtype=bool),
        change_N=np.array([v for part in parts for v in part["l2_change"]]),
        notes=tuple(dict.fromkeys(note for part in parts for note in part["notes"])),
    )


# Results ---------------------------------------------------------------------------------------


def results(run: Run, configs: dict[Arch, DistillConfig], asked: AttackConfig) -> dict[str, Any]:
    """Return the table of all attacks, and what in it contradicts itself.

    Args:
        run: a run whose attack rooms are committed.
        configs: student architecture -> its configuration.
        asked: attacks, budgets, and how many images.
    """
    sample = run.room(SAMPLE).committed()
    table: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    for student, config in configs.items():
        rooms = {
            (name, eps): run.room(room_of(student, name, eps))
            for name in asked.names
            for eps in budgets(name, asked)
        }
        count = len(_slices(sample.metrics["images"], config))
        floats = config.source.image_size**2 * config.source.channels
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for unit in evaluate.unit_ids(config):
            row, kind, number = evaluate.parts_of(unit)
            attacked = {key: _read(room, unit, count) for key, room in rooms.items()}
            for (name, _), one in attacked.items():
                for note in one.notes:
                    notes.setdefault(note, []).append(f"{student} {unit} {name}")
            told, against = _student_told(attacked, asked, floats)
            about: dict[str, Any] = {"student": student, "row": row, "labels": kind, "seed": number}
            wrong += [about | item for item in against]
            found.setdefault((row, kind), []).append(told)
        for (row, labels), seeds in found.items():
            about = {"student": student, "row": row, "labels": labels}
            table += _rows(about, seeds)
    return {
        "images": sample.metrics["images"],
        "images_asked": asked.images,
        "seed": next(iter(configs.values())).seed,
        "settings": {name: SETTINGS[name] for name in asked.names},
        "libraries": libraries(),
        "table": table,
        "contradictions": sorted(wrong, key=lambda item: -item["share"]),
        "library_notes": notes,
    }


def _student_told(
    attacked: dict[tuple[AttackName, Fraction | None], Attacked],
    asked: AttackConfig,
    floats: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a student's accuracies by eps and attack, and their contradictions."""
    clean_N = next(iter(attacked.values())).clean_N
    robust: dict[Key, np.ndarray] = {}
    of_eps = {float(Fraction(text)): text for text in asked.eps}
    for (name, budget), one in attacked.items():
        for eps in of_eps if budget is None else (float(budget),):
            robust[name, eps] = robust_to_cw(one, eps, floats) if name == "cw" else one.robust_N
    accuracies: dict[str, dict[str, float]] = {}
    for eps, text in sorted(of_eps.items()):
        here: dict[str, float] = {n: float(r.mean()) for (n, e), r in robust.items() if e == eps}
        if here.keys() - {"cw"}:
            here["worst"] = float(worst_case(robust, eps).mean())
        accuracies[text] = here
    told: dict[str, Any] = {"clean": float(clean_N.mean()), "eps": accuracies}
    cw = [one for (name, _), one in attacked.items() if name == "cw"]
    if cw:
        fallen_N = cw[0].clean_N & ~cw[0].robust_N
        told["cw_l2_median"] = (
            float(np.median(cw[0].change_N[fallen_N])) if fallen_N.any() else None
        )
    against = contradictions(clean_N, robust)
    for item in against:
        item |= {"eps": of_eps[item["eps"]], "suspect": item["share"] > SUSPECT_SHARE}
    return told, against


def _rows(about: dict[str, Any], seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row an eps: every accuracy as mean, standard deviation and values over the seeds."""

    def spread(values: list[float]) -> dict[str, Any]:
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return {"mean": float(np.mean(values)), "std": std, "values": values}

    rows = []
    for eps in seeds[0]["eps"]:
        row = about | {"eps": eps, "num_seeds": len(seeds)}
        row["clean"] = spread([told["clean"] for told in seeds])
        for name in seeds[0]["eps"][eps]:
            row[name] = spread([told["eps"][eps][name] for told in seeds])
        if "cw_l2_median" in seeds[0]:
            row["cw_l2_median"] = [told["cw_l2_median"] for told in seeds]
        rows.append(row)
    return rows


def markdown(found: dict[str, Any], row_names: dict[str, str]) -> str:
    """Return the table of `results` in Markdown; a `!` marks the accuracies that more than 1 % of the images contradict."""
    present = {name for row in found["table"] for name in row}
    titles_of = {str(name): title for name, title in NAMES.items()} | {"worst": "worst case"}
    columns = [name for name in titles_of if name in present]
    titles = [titles_of[name] for name in columns]
    suspects = {
        (w["student"], w["row"], w["labels"], w["eps"], w["what"].partition(" ")[0])
        for w in found["contradictions"]
        if w["suspect"]
    }
    lines = [
        f"| student | trained on | labels | eps | clean | {' | '.join(titles)} |",
        f"|---|---|---|---:|---:|{'---:|' * len(titles)}",
    ]
    for row in found["table"]:
        cells = []
        for name in ("clean", *columns):
            told = row.get(name)
            key = (row["student"], row["row"], row["labels"], row["eps"])
            mark = " !" if (*key, titles_of.get(name, "-").partition(" ")[0]) in suspects else ""
            cells.append(
                f"{100 * told['mean']:.1f} ± {100 * told['std']:.1f}{mark}" if told else ""
            )
        lines.append(
            f"| {row['student']} | {row_names.get(row['row'], row['row'])} | {row['labels']} | {row['eps']} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines)
