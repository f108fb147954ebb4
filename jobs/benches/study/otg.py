"""The study `otg`: images of a diffusion model, led by transport or influence or not at all, against WMDD.

Legend: N images, K images of one class.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wmdd_ray.config import DiffusionConfig, DistillConfig, LabelKind
from wmdd_ray.diffusion.training import Training
from wmdd_ray.errors import WmddError
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.spine.run import fingerprint

from ..reporting import mean_and_std
from .definitions import Options, variants

if TYPE_CHECKING:
    from .engine import Job, Study
    from .splits import Labeled, Place

Guidance = Literal["nothing", "otg", "igd"]
_LABELS: tuple[LabelKind, ...] = ("soft", "hard")
_TITLES: dict[Guidance, str] = {
    "nothing": "diffusion model, sampled plainly",
    "otg": "diffusion model, led by transport (OTG, beta1 {weight:g})",
    "igd": "diffusion model, led by influence (IGD, weight {weight:g})",
}


@dataclass(frozen=True)
class Candidate:
    """A way to sample the model."""

    led_by: Guidance
    weight: float
    config: DiffusionConfig


@dataclass(frozen=True)
class Sets:
    """The sets of a row: a chain of jobs a seed, and a student each by either kind of labels."""

    chains: tuple[dict[str, Job], ...]
    students: tuple[Job, ...]


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
        out: Folder of the jobs; what is there already is not done again.
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
        plan: Print the jobs of each stage, and do nothing but train the model.
    """
    from .engine import Study, print_plan
    from .splits import load_split, make_place

    try:
        for option, given in (("weights", weights), ("influence-weights", influence_weights)):
            if not given or min(given) <= 0:
                raise WmddError(f"--{option}: expected values above 0, got {given}")
        best = variants(dataset, ipc, Options(epochs=epochs, teacher_epochs=teacher_epochs))[1]
        uri = data or ("digits" if dataset == "digits" else "fashion-mnist")
        held_out = 5000 if dataset == "fashion_mnist" else 0
        study = Study(make_place(out, uri, best.source, held_out))
        training = Training(epochs=unet_epochs, widths=unet_widths, flip=dataset != "digits")
        model, unet = train_model(training, study.place)
        plain = DiffusionConfig(
            model=model,
            steps=steps,
            guidance_scale=guidance_scale,
            window=window,
            influence_epochs=influence_epochs,
            influence_latents=influence_latents,
        )
        candidates = [Candidate("nothing", 0.0, plain)]
        for weight in sorted(set(weights)):
            candidates.append(Candidate("otg", weight, replace(plain, ot_weight=weight)))
        for weight in sorted(set(influence_weights)):
            led = replace(plain, influence_weight=weight, diversity_weight=diversity_weight)
            candidates.append(Candidate("igd", weight, led))
        wmdd = sets_of(best, seeds)
        sampled = {
            one: sets_of(
                replace(
                    best, recover=replace(best.recover, method="diffusion", diffusion=one.config)
                ),
                seeds,
            )
            for one in candidates
        }
        jobs = [job for sets in (wmdd, *sampled.values()) for job in sets.students]
        if plan:
            print_plan(jobs, study)
            return
        study.bring(jobs, processes)
        test = load_split(uri, best.source, "val", study.place.class_names)
        record = scored(best, wmdd, sampled, unet, study, test)
    except WmddError as error:
        raise SystemExit(f"otg: {error}") from error
    path = Path(result or Path(__file__).parents[1] / f"results/otg-{dataset}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"dataset": dataset}, indent=2) + "\n")
    print(markdown(record | {"dataset": dataset}))
    print(f"written: {path}", file=sys.stderr)


def train_model(training: Training, place: Place) -> tuple[str, dict[str, Any]]:
    """Train the diffusion model on `train`, unless it is there; return where it is, and how it was trained."""
    import torch

    from wmdd_ray.diffusion.card import INDEX_KEY
    from wmdd_ray.diffusion.model import save_model
    from wmdd_ray.diffusion.training import train_unet
    from wmdd_ray.executors.here import device_here
    from wmdd_ray.spine.checkpoints import Checkpoints
    from wmdd_ray.spine.rooms import Room

    data = place.source_of("train").fingerprint()
    about = {"data": data, "training": asdict(training)}
    store = place.store.child("diffusion").child(fingerprint(about))
    if not store.exists(INDEX_KEY):
        torch.set_num_threads(1)
        keep, train = Checkpoints(Room(store, ""), "training", 30.0), place.load("train")
        network, scheduler = train_unet(
            training,
            train.images_NHWC,
            train.labels_N,
            num_classes=len(place.class_names),
            device=device_here(),
            state=keep.load(),
            on_epoch=lambda epoch, loss, get_state: keep.maybe(get_state),
        )
        keep.clear()
        for key, content in save_model(network, scheduler, place.class_names, about).items():
            store.put(key, content)
    return store.uri, {"training": {"epochs": training.epochs, "widths": training.widths}}


def sets_of(config: DistillConfig, seeds: int) -> Sets:
    """Return sets with a student each, of one teacher."""
    from wmdd_ray.config import RecoverConfig

    from .engine import Job, chain, students

    teacher = Job("squeeze", replace(config, recover=RecoverConfig()))
    evaluate = replace(config.evaluate, num_seeds=1, labels=_LABELS, baselines=())
    configs = [replace(config, seed=seed, evaluate=evaluate) for seed in range(seeds)]
    chains = tuple(chain(one, teacher=teacher) for one in configs)
    return Sets(
        chains, tuple(students(one, jobs) for one, jobs in zip(configs, chains, strict=True))
    )


def scored(
    best: DistillConfig,
    wmdd: Sets,
    sampled: dict[Candidate, Sets],
    unet: dict[str, Any],
    study: Study,
    test: Labeled,
) -> dict[str, Any]:
    """Return the record of the study: every candidate on `val`, and what was chosen on the test images."""
    val = study.place.load("val")
    distances = {one: w2(study, sets, val) for one, sets in sampled.items()}
    chosen: dict[Guidance, Candidate] = {}
    for one in sorted(sampled, key=lambda one: statistics.fmean(distances[one])):
        chosen.setdefault(one.led_by, one)
    plain = next(iter(sampled)).config
    rows: list[tuple[str, str, float | None, Sets]]
    rows = [("wmdd", "**WMDD `best`**", None, wmdd)]
    rows += [
        (led_by, title.format(weight=chosen[led_by].weight), chosen[led_by].weight, sampled[chosen[led_by]])
        for led_by, title in _TITLES.items()
    ]  # fmt: skip
    surrogate = sampled[chosen["igd"]].chains[0]["recover"]
    return {
        "ipc": best.ipc,
        "hardware": hardware(),
        **versions(),
        "teacher_top1_val": study.done(wmdd.chains[0]["squeeze"]).metrics["top1"],
        "teacher_epochs": best.squeeze.epochs,
        "student_epochs": best.evaluate.epochs,
        "unet": unet,
        "surrogate": {"epochs": plain.influence_epochs, "latents": plain.influence_latents},
        "sampling": {
            **{name: getattr(plain, name) for name in ("steps", "eta", "guidance_scale", "window")},
            "regularization": plain.regularization,
            "diversity_weight_of_igd": chosen["igd"].config.diversity_weight,
        },
        "candidates": [
            {
                "led_by": one.led_by,
                "weight": one.weight,
                "w2_val": mean_and_std(distances[one]),
                "transport": mean_and_std(
                    [study.done(c["recover"]).metrics["losses"]["ot"] for c in sets.chains]
                ),
                "influence": mean_and_std(
                    [mean_influence(study, c, surrogate) for c in sets.chains]
                ),
                **{
                    f"{kind}_val": values for kind, values in top1_by_kind(sets, val, study).items()
                },
                "seconds_a_set": mean_and_std(
                    [study.done(c["recover"]).metrics["seconds_in_core"] for c in sets.chains]
                ),
            }
            for one, sets in sampled.items()
        ],
        "chosen": {led_by: one.weight for led_by, one in chosen.items()},
        "rows": [
            {
                "row": name,
                "title": title,
                "weight": weight,
                "w2_val": mean_and_std(w2(study, sets, val)),
                "w2_test": mean_and_std(w2(study, sets, test)),
                **top1_by_kind(sets, test, study),
            }
            for name, title, weight, sets in rows
        ],
    }


def top1_by_kind(sets: Sets, images: Labeled, study: Study) -> dict[str, dict[str, Any]]:
    """Return the accuracies of the students by either kind of labels."""
    from .scores import top1_of_students

    reached = [top1_of_students(study.place, job, images) for job in sets.students]
    return {
        kind: mean_and_std(
            [v for of_set in reached for (_, unit), v in of_set.items() if f"-{kind}-" in unit]
        )
        for kind in _LABELS
    }


def w2(study: Study, sets: Sets, real: Labeled) -> list[float]:
    """Return of each set the root of the mean over classes of W2^2 between its features, with its weights, and the real ones'."""
    from wmdd_ray.core.networks import network_of
    from wmdd_ray.core.synthesis import features_of
    from wmdd_ray.core.transport import exact_cost
    from wmdd_ray.core.views import to_input
    from wmdd_ray.units.teacher import read_teacher

    source, num_classes = study.place.source, len(study.place.class_names)
    network = network_of(read_teacher(study.room(sets.chains[0]["squeeze"])))

    def features(images_NHWC: np.ndarray) -> np.ndarray:
        pixels = to_input(np.ascontiguousarray(images_NHWC), source.mean, source.std)
        return features_of(network, pixels, source.image_size)

    real_by_class = [
        features(real.images_NHWC[real.labels_N == label]) for label in range(num_classes)
    ]
    distances = []
    for jobs in sets.chains:
        costs = [
            exact_cost(features(record.images_KHWC), record.weights_K, real_by_class[record.label])
            for record in _classes(study, jobs)
        ]
        distances.append(float(np.sqrt(np.mean(costs))))
    return distances


def mean_influence(study: Study, jobs: dict[str, Job], surrogate: Job) -> float:
    """Return the mean over a set's images of their influence on their class, in [-1, 1]: what IGD's term raises.

    Args:
        study: The study.
        jobs: The set.
        surrogate: The job of images led by influence whose surrogate measures all sets.
    """
    from wmdd_ray.diffusion import surrogate as surrogates
    from wmdd_ray.diffusion.influence import class_influence, influence
    from wmdd_ray.diffusion.model import load_model
    from wmdd_ray.executors.here import device_here

    config, place, device = surrogate.config, study.place, device_here()
    model = load_model(config.recover.diffusion.model, device)
    num_classes = len(place.class_names)
    networks = surrogates.read(
        study.room(surrogate), model, config, num_classes=num_classes, device=device
    )
    train, values = place.load("train"), []
    for record in _classes(study, jobs):
        real = train.images_NHWC[train.labels_N == record.label]
        latents = model.encode(np.asarray(real[: config.recover.diffusion.influence_latents]))
        of_class = class_influence(networks, latents, record.label)
        for latent_CHW in model.encode(record.images_KHWC):
            values.append(influence(latent_CHW.flatten(), of_class).item())
    return statistics.fmean(values)


def _classes(study: Study, jobs: dict[str, Job]) -> Sequence[Any]:
    from wmdd_ray.units.images import read_images

    return read_images(study.room(jobs["recover"]), range(len(study.place.class_names)))


def markdown(record: dict[str, Any]) -> str:
    """Return the tables of the study: the choice of the weights, and what came of it."""

    def text(values: dict[str, Any], scale: float = 1, digits: int = 2) -> str:
        return f"{scale * values['mean']:.{digits}f} ± {scale * values['std']:.{digits}f}"

    lines = [
        "| led by | weight | W2 to val | transport | influence | soft labels, val | hard labels, val | seconds a set |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in record["candidates"]:
        cells = [one["led_by"], f"{one['weight']:g}", text(one["w2_val"]), text(one["transport"])]
        cells += [text(one["influence"], 1, 3), text(one["soft_val"], 100, 1)]
        cells += [text(one["hard_val"], 100, 1), f"{min(one['seconds_a_set']['values']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| images | W2 to test | soft labels | hard labels |", "|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = [row["title"], text(row["w2_test"]), text(row["soft"], 100, 1)]
        cells.append(text(row["hard"], 100, 1))
        lines.append(f"| {' | '.join(cells)} |")
    count = len(record["rows"][0]["soft"]["values"])
    lines.append(
        f"\n{record['dataset']}, ipc {record['ipc']}: mean ± sample standard deviation of {count} sets, a student each"
    )
    return "\n".join(lines)
