"""The command `otg`: images of a diffusion model, led by transport or influence or not at all, against WMDD, by seeds."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.benches.accuracy.definitions import Options, variants
from jobs.benches.accuracy.rows import group_of, recovered
from jobs.benches.reporting import mean_and_std
from jobs.train_diffusion import Training
from wmdd_ray.config import DiffusionConfig, DistillConfig
from wmdd_ray.errors import WmddError
from wmdd_ray.spine.provenance import hardware, versions

if TYPE_CHECKING:
    from jobs.benches.accuracy.splits import Workplace
    from jobs.benches.accuracy.units import Labels, StudentUnit, Unit
    from jobs.benches.otg.units import SampledUnit, SurrogateUnit, UnetUnit

Guidance = Literal["nothing", "otg", "igd"]
Students = dict["Labels", tuple["StudentUnit", ...]]
_LABELS: tuple[Labels, ...] = ("soft", "hard")
_TITLES: dict[Guidance, str] = {
    "nothing": "diffusion model, sampled plainly",
    "otg": "diffusion model, led by transport (OTG, beta1 {weight:g})",
    "igd": "diffusion model, led by influence (IGD, weight {weight:g})",
}


def otg(
    dataset: Literal["digits", "fashion_mnist"] = "digits",
    data: str | None = None,
    out: str = "runs/otg",
    ipc: int = 10,
    weights: tuple[float, ...] = (0.1, 0.3, 0.6),
    influence_weights: tuple[float, ...] = (0.03, 0.1, 0.3),
    diversity_weight: float = 0.1,
    influence_epochs: tuple[int, ...] = (0, 5, 18, 52),
    influence_latents: int = 200,
    window: tuple[float, float] = (0.1, 0.4),
    steps: int = 25,
    guidance_scale: float = 2.0,
    seeds: int = 3,
    unet_epochs: int = 40,
    unet_widths: tuple[int, ...] = (16, 32, 64),
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    processes: int = 1,
    result: str | None = None,
    plan: bool = False,
) -> None:
    """W2 to real features and students' accuracy: a diffusion model led by OTG, by IGD and by nothing, and WMDD. Resumable.

    Teacher, diffusion model and surrogate see a part of the training images; of each guidance the weight is chosen whose images
    are nearest to the rest of them, by W2 in the teacher's features. Then the data's held-out images are read, for what was chosen.
    Needs no Ray.

    Args:
        dataset: The recipe.
        data: Real images; the recipe's by default, and for Fashion-MNIST the folder with the IDX files.
        out: Folder of the units; what is there already is not done again.
        ipc: Images a class.
        weights: Candidates for OTG's beta1 (--recover.diffusion.ot-weight).
        influence_weights: Candidates for IGD's influence term (--recover.diffusion.influence-weight).
        diversity_weight: Of IGD's deviation term, beside each of them.
        influence_epochs: Epochs of the surrogate at which influence is measured.
        influence_latents: Real latents of a class that it is trained on and measured by.
        window: Part of the denoising that is guided.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance, of all.
        seeds: Distilled sets of each row, with a student each for soft and hard labels.
        unet_epochs: Passes over the images in training the diffusion model.
        unet_widths: Channels of its resolutions.
        epochs: Student epochs and label epochs; the recipe's by default.
        teacher_epochs: Epochs of the teacher; the recipe's by default.
        processes: Processes with one computing thread each.
        result: JSON file; jobs/benches/results/otg-DATASET.json by default.
        plan: Print the units and their estimated seconds, and do nothing.
    """
    try:
        for option, given in (("weights", weights), ("influence-weights", influence_weights)):
            if not given or min(given) <= 0:
                raise WmddError(f"--{option}: expected values above 0, got {given}")
        plain = DiffusionConfig(
            model="unit",
            steps=steps,
            guidance_scale=guidance_scale,
            window=window,
            influence_epochs=influence_epochs,
            influence_latents=influence_latents,
        )
        candidates = [_Candidate("nothing", 0.0, plain)]
        for weight in sorted(set(weights)):
            candidates.append(_Candidate("otg", weight, replace(plain, ot_weight=weight)))
        for weight in sorted(set(influence_weights)):
            led = replace(plain, influence_weight=weight, diversity_weight=diversity_weight)
            candidates.append(_Candidate("igd", weight, led))
        asked = _Asked(
            dataset=dataset,
            uri=data or ("digits" if dataset == "digits" else "fashion-mnist"),
            ipc=ipc,
            seeds=seeds,
            options=Options(epochs=epochs, teacher_epochs=teacher_epochs),
            training=Training(epochs=unet_epochs, widths=unet_widths, flip=dataset != "digits"),
            candidates=tuple(candidates),
        )
        path = Path(result or Path(__file__).parents[1] / f"results/otg-{dataset}.json")
        _run(asked, out, processes, path, plan)
    except WmddError as error:
        raise SystemExit(f"otg: {error}") from error


@dataclass(frozen=True)
class _Candidate:
    """A way to sample the model."""

    led_by: Guidance
    weight: float
    config: DiffusionConfig


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the command line says; the first candidate is led by nothing."""

    dataset: str
    uri: str
    ipc: int
    seeds: int
    options: Options
    training: Training
    candidates: tuple[_Candidate, ...]

    @property
    def recipe(self) -> DistillConfig:
        """The recipe at its best."""
        return variants(self.dataset, self.ipc, self.options)[1]


def _run(asked: _Asked, out: str, processes: int, path: Path, plan: bool) -> None:
    from jobs.benches.accuracy.scores import top1
    from jobs.benches.accuracy.splits import load_split, make_splits
    from jobs.benches.accuracy.work import bring, print_plan
    from jobs.benches.otg.scores import markdown, mean_influence, w2
    from jobs.benches.otg.units import SurrogateUnit, UnetUnit

    held_out = 5000 if asked.dataset == "fashion_mnist" else 0
    place = make_splits(out, asked.uri, asked.recipe.source, held_out, "cpu")
    wmdd = _wmdd(asked, place)
    unet = UnetUnit(data=place.data, training=asked.training)
    plain = asked.candidates[0].config
    surrogate = SurrogateUnit(
        data=place.data,
        unet=unet,
        epochs=plain.influence_epochs,
        latents=plain.influence_latents,
    )
    students = {one: _led(wmdd, unet, surrogate, one, asked) for one in asked.candidates}
    stages = _stages([wmdd, *students.values()], unet, surrogate)
    if plan:
        print_plan(stages, place, processes)
        return
    bring(stages, place, processes)

    def sets(of: Students) -> list[SampledUnit]:
        return [student.labeled.images for student in of["soft"]]  # type: ignore[misc]

    distances = {
        one: [w2(place, unit, place.val) for unit in sets(of)] for one, of in students.items()
    }
    chosen: dict[Guidance, _Candidate] = {}
    for one in sorted(asked.candidates, key=lambda one: statistics.fmean(distances[one])):
        chosen.setdefault(one.led_by, one)
    candidates = []
    for one, of in students.items():
        metrics = [unit.marker(place).metrics for unit in sets(of)]
        influences = [mean_influence(place, unit, surrogate) for unit in sets(of)]
        candidates.append(
            {
                "led_by": one.led_by,
                "weight": one.weight,
                "w2_val": mean_and_std(distances[one]),
                "transport": mean_and_std([found["ot"] for found in metrics]),
                "influence": mean_and_std(influences),
                **{
                    f"{k}_val": mean_and_std(
                        [top1(s.network(place), place.val, place) for s in of[k]]
                    )
                    for k in _LABELS
                },
                "seconds_a_set": mean_and_std([found["seconds"] for found in metrics]),
            }
        )
    compared: list[tuple[str, str, float | None, Students]] = [
        ("wmdd", "**WMDD `best`**", None, wmdd)
    ]
    for led_by, title in _TITLES.items():
        one = chosen[led_by]
        compared.append((led_by, title.format(weight=one.weight), one.weight, students[one]))
    teacher = wmdd["soft"][0].labeled.teachers[0]
    test = load_split(asked.uri, place.source, "val", place.class_names)
    record: dict[str, Any] = {
        "dataset": asked.dataset,
        "ipc": asked.ipc,
        "hardware": hardware(),
        **versions(),
        "teacher_top1_val": teacher.marker(place).metrics["top1_val"],
        "teacher_epochs": asked.recipe.squeeze.epochs,
        "student_epochs": asked.recipe.evaluate.epochs,
        "unet": {
            "training": {"epochs": asked.training.epochs, "widths": asked.training.widths},
            **unet.marker(place).metrics,
        },
        "surrogate": {
            "epochs": surrogate.epochs,
            "latents": surrogate.latents,
            **surrogate.marker(place).metrics,
        },
        "sampling": {
            "steps": plain.steps,
            "eta": plain.eta,
            "guidance_scale": plain.guidance_scale,
            "window": plain.window,
            "regularization": plain.regularization,
            "diversity_weight_of_igd": chosen["igd"].config.diversity_weight,
        },
        "candidates": candidates,
        "chosen": {led_by: one.weight for led_by, one in chosen.items()},
        "rows": [
            {
                "row": name,
                "title": title,
                "weight": weight,
                "w2_val": mean_and_std([w2(place, unit, place.val) for unit in sets(of)]),
                "w2_test": mean_and_std([w2(place, unit, test) for unit in sets(of)]),
                **{
                    kind: mean_and_std([top1(s.network(place), test, place) for s in of[kind]])
                    for kind in _LABELS
                },
            }
            for name, title, weight, of in compared
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(markdown(record))
    print(f"written: {path}", file=sys.stderr)


def _stages(students: list[Students], unet: UnetUnit, surrogate: SurrogateUnit) -> list[list[Unit]]:
    """Return all units, each once, in stages that need only what is before them."""
    trained = [student for of in students for kind in _LABELS for student in of[kind]]
    labeled = [student.labeled for student in trained]
    images = [labels.images for labels in labeled]
    features = [each for unit in images for each in unit.features]
    stages: list[list[Unit]] = [[unet, *(each.teacher for each in features)]]
    stages += [[surrogate, *features], [*images], [*labeled], [*trained]]
    return [list(dict.fromkeys(stage)) for stage in stages]


def _wmdd(asked: _Asked, place: Workplace) -> Students:
    """Return the students of WMDD's images, which hold all before them: a distilled set and a student a seed."""
    from jobs.benches.accuracy.work import units_of_row

    best = asked.recipe
    row = recovered("best", "WMDD", best)
    options = replace(asked.options, distill_seeds=asked.seeds, student_seeds=1)
    group = group_of(f"ipc {asked.ipc}", asked.ipc, best, (row,), options)
    return units_of_row(group, row, place).students


def _led(
    wmdd: Students, unet: UnetUnit, surrogate: SurrogateUnit, one: _Candidate, asked: _Asked
) -> Students:
    """Return the same students of images that a candidate samples."""
    from jobs.benches.otg.units import SampledUnit

    recover = replace(asked.recipe.recover, method="diffusion", diffusion=one.config)

    def moved(student: StudentUnit) -> StudentUnit:
        images = student.labeled.images
        sampled = SampledUnit(
            data=images.data,
            name=f"{one.led_by}{one.weight:g}",
            kind="sampled",
            ipc=images.ipc,
            seed=images.seed,
            features=images.features,
            barycenters=images.barycenters,
            recover=recover,
            unet=unet,
            surrogate=surrogate if one.led_by == "igd" else None,
            recipe=asked.dataset,
        )
        return replace(student, labeled=replace(student.labeled, images=sampled))

    return {kind: tuple(map(moved, wmdd[kind])) for kind in _LABELS}
