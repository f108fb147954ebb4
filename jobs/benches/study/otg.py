"""The study `otg`: images of a diffusion model, led by transport or influence or not at all, against WMDD.

Legend: N images, K images of one class.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wmdd_ray.config import DiffusionConfig, DistillConfig, LabelKind, RecoverConfig
from wmdd_ray.core.device import device_for
from wmdd_ray.core.networks import network_of
from wmdd_ray.core.synthesis import features_of
from wmdd_ray.core.transport import exact_cost
from wmdd_ray.core.views import to_input
from wmdd_ray.diffusion import surrogate as surrogates
from wmdd_ray.diffusion.card import INDEX_KEY
from wmdd_ray.diffusion.denoising import train_unet
from wmdd_ray.diffusion.influence import class_influence, influence
from wmdd_ray.diffusion.model import load_model, save_model
from wmdd_ray.diffusion.training import Training
from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.claims import fingerprint
from wmdd_ray.spine.provenance import hardware, versions
from wmdd_ray.spine.rooms import Room
from wmdd_ray.units.images import ClassImagesReader, Inputs
from wmdd_ray.units.teacher import read_teacher

from ..reporting import mean_and_std, save
from .definitions import Options, variants
from .engine import Job, Study, chain, one_thread, students
from .scores import top1_of_students
from .splits import Labeled, Place, held_out_of, load_split, make_place, uri_of
from .summary import line_of

Guidance = Literal["nothing", "otg", "igd"]
Sets = tuple[dict[str, "Job"], ...]
"""The jobs of a row by stage, a chain with its students for each seed."""
_LABELS: tuple[LabelKind, ...] = ("soft", "hard")
_TITLES: dict[Guidance, str] = {
    "nothing": "diffusion model, sampled plainly",
    "otg": "diffusion model, led by transport (OTG, beta1 {weight:g})",
    "igd": "diffusion model, led by influence (IGD, weight {weight:g})",
}
# Of all candidates: classifier-free guidance, the part of the denoising that is led, and IGD's deviation term.
_GUIDANCE_SCALE, _WINDOW, _DIVERSITY_WEIGHT = 2.0, (0.1, 0.4), 0.1


@dataclass(frozen=True)
class Candidate:
    """A way to sample the model."""

    led_by: Guidance
    weight: float
    config: DiffusionConfig


def otg(
    dataset: Literal["digits", "fashion_mnist"] = "digits",
    data: str | None = None,
    out: str = "runs/otg",
    ipc: int = 10,
    weights: tuple[float, ...] = (0.1, 0.3, 0.6),
    influence_weights: tuple[float, ...] = (0.03, 0.1, 0.3),
    influence_epochs: tuple[int, ...] = (0, 5, 18, 52),
    influence_latents: int = 200,
    steps: int = 25,
    seeds: int = 3,
    unet_epochs: int = 40,
    unet_widths: tuple[int, ...] = (16, 32, 64),
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    processes: int = 1,
    result: str | None = None,
) -> None:
    """W2 to real features and students' accuracy: a diffusion model led by OTG, by IGD and by nothing, and WMDD. Resumable.

    Teacher, diffusion model and surrogates see a part of the training images; of each guidance the weight is chosen whose images
    are nearest to the rest of them, by W2 in the teacher's features. Then the data's held-out images are read, for what was
    chosen. Needs no Ray.

    Args:
        dataset: The recipe.
        data: Real images; the recipe's by default, and for Fashion-MNIST the folder with the IDX files.
        out: Folder of the jobs; what is there already is not done again.
        ipc: Images a class.
        weights: Candidates for OTG's beta1 (--recover.diffusion.ot-weight).
        influence_weights: Candidates for IGD's influence term (--recover.diffusion.influence-weight).
        influence_epochs: Epochs of the surrogate at which influence is measured.
        influence_latents: Real latents of a class that it is trained on and measured by.
        steps: Denoising steps.
        seeds: Distilled sets of each row, with a student each for soft and hard labels.
        unet_epochs: Passes over the images in training the diffusion model.
        unet_widths: Channels of its resolutions.
        epochs: Student epochs and label epochs; the recipe's by default.
        teacher_epochs: Epochs of the teacher; the recipe's by default.
        processes: Processes with one computing thread each.
        result: JSON file; jobs/benches/results/otg-DATASET.json by default.
    """
    for option, given in (("weights", weights), ("influence-weights", influence_weights)):
        if not given or min(given) <= 0:
            raise ConfigError(f"--{option}: expected values above 0, got {given}")
    best = variants(dataset, ipc, Options(epochs=epochs, teacher_epochs=teacher_epochs))[1]
    uri = uri_of(dataset, data)
    study = Study(make_place(out, uri, best.source, held_out_of(dataset)))
    training = Training(epochs=unet_epochs, widths=unet_widths, flip=dataset != "digits")
    with one_thread():
        model = train_model(training, study.place)
    plain = DiffusionConfig(
        model=model,
        steps=steps,
        guidance_scale=_GUIDANCE_SCALE,
        window=_WINDOW,
        influence_epochs=influence_epochs,
        influence_latents=influence_latents,
    )
    candidates = [Candidate("nothing", 0.0, plain)]
    for weight in sorted(set(weights)):
        candidates.append(Candidate("otg", weight, replace(plain, ot_weight=weight)))
    for weight in sorted(set(influence_weights)):
        led = replace(plain, influence_weight=weight, diversity_weight=_DIVERSITY_WEIGHT)
        candidates.append(Candidate("igd", weight, led))
    wmdd, sampled = sets_of(best, seeds), {}
    for one in candidates:
        recover = replace(best.recover, method="diffusion", diffusion=one.config)
        sampled[one] = sets_of(replace(best, recover=recover), seeds)
    study.bring(
        [jobs["students"] for sets in (wmdd, *sampled.values()) for jobs in sets], processes
    )
    test = load_split(uri, best.source, "val", study.place.class_names)
    with one_thread():
        record = scored(best, wmdd, sampled, study, test)
    record |= {"dataset": dataset, "unet": {"epochs": unet_epochs, "widths": unet_widths}}
    print(markdown(record))
    save(record, Path(result or Path(__file__).parents[1] / f"results/otg-{dataset}.json"))


def train_model(training: Training, place: Place) -> str:
    """Train the diffusion model on `train`, unless it is there, and return where it is."""
    about = {"data": place.source_of("train").fingerprint(), "training": asdict(training)}
    store = place.store.child("diffusion").child(fingerprint(about))
    if not store.exists(INDEX_KEY):
        keep, train = Checkpoints(Room(store, ""), "training", 30.0), place.load("train")
        network, scheduler = train_unet(
            training,
            train.images_NHWC,
            train.labels_N,
            num_classes=len(place.class_names),
            device=device_for(-1),
            state=keep.load(),
            on_epoch=lambda epoch, loss, get_state: keep.maybe(get_state),
        )
        keep.clear()
        for key, content in save_model(network, scheduler, place.class_names, about).items():
            store.put(key, content)
    return store.uri


def sets_of(config: DistillConfig, seeds: int) -> Sets:
    """Return the jobs of sets with a student each by either kind of labels, of one teacher."""
    teacher = Job("squeeze", replace(config, recover=RecoverConfig()))
    evaluate = replace(config.evaluate, num_seeds=1, labels=_LABELS, baselines=())
    sets = []
    for seed in range(seeds):
        one = replace(config, seed=seed, evaluate=evaluate)
        jobs = chain(one, teacher=teacher)
        sets.append({**jobs, "students": students(one, jobs)})
    return tuple(sets)


def scored(
    best: DistillConfig, wmdd: Sets, sampled: dict[Candidate, Sets], study: Study, test: Labeled
) -> dict[str, Any]:
    """Return the record of the study: every candidate on `val`, and what was chosen on the test images."""
    val = study.place.load("val")
    distances = {one: w2(study, sets, val) for one, sets in sampled.items()}
    chosen: dict[Guidance, Candidate] = {}
    for one in sorted(sampled, key=lambda one: statistics.fmean(distances[one])):
        chosen.setdefault(one.led_by, one)
    surrogate = sampled[chosen["igd"]][0]["recover"]
    candidates = []
    for one, sets in sampled.items():
        metrics = [study.done(jobs["recover"]).metrics for jobs in sets]
        top1 = top1_by_kind(sets, val, study)
        measured = {
            "w2_val": distances[one],
            "transport": [made["losses"]["ot"] for made in metrics],
            "influence": [mean_influence(study, jobs, surrogate) for jobs in sets],
            **{f"{kind}_val": values for kind, values in top1.items()},
            "seconds_a_set": [made["seconds_in_core"] for made in metrics],
        }
        candidates.append({"led_by": one.led_by, "weight": one.weight, **_means(measured)})
    titled: list[tuple[str, str, float | None, Sets]] = [("wmdd", "**WMDD `best`**", None, wmdd)]
    for led_by, title in _TITLES.items():
        one = chosen[led_by]
        titled.append((led_by, title.format(weight=one.weight), one.weight, sampled[one]))
    rows = []
    for name, title, weight, sets in titled:
        measured = {"w2_val": w2(study, sets, val), "w2_test": w2(study, sets, test)}
        measured |= top1_by_kind(sets, test, study)
        rows.append({"row": name, "title": title, "weight": weight, **_means(measured)})
    return {
        "ipc": best.ipc,
        "hardware": hardware(),
        **versions(),
        "teacher_top1_val": study.done(wmdd[0]["squeeze"]).metrics["top1"],
        "teacher_epochs": best.squeeze.epochs,
        "student_epochs": best.evaluate.epochs,
        "sampling": asdict(chosen["igd"].config),
        "candidates": candidates,
        "chosen": {led_by: one.weight for led_by, one in chosen.items()},
        "rows": rows,
    }


def _means(measured: dict[str, list[float]]) -> dict[str, Any]:
    return {name: mean_and_std(values) for name, values in measured.items()}


def top1_by_kind(sets: Sets, images: Labeled, study: Study) -> dict[str, list[float]]:
    """Return the accuracies of the students by either kind of labels."""
    reached = [top1_of_students(study.place, jobs["students"], images) for jobs in sets]
    return {
        kind: [v for of_set in reached for (_, unit), v in of_set.items() if f"-{kind}-" in unit]
        for kind in _LABELS
    }


def w2(study: Study, sets: Sets, real: Labeled) -> list[float]:
    """Return of each set the root of the mean over classes of W2^2 between its features, with its weights, and the real ones'."""
    source, num_classes = study.place.source, len(study.place.class_names)
    network = network_of(read_teacher(study.room(sets[0]["squeeze"])))

    def features(images_NHWC: np.ndarray) -> np.ndarray:
        pixels = to_input(np.ascontiguousarray(images_NHWC), source.mean, source.std)
        return features_of(network, pixels, source.image_size)

    real_by_class = [
        features(real.images_NHWC[real.labels_N == label]) for label in range(num_classes)
    ]
    distances = []
    for jobs in sets:
        costs = [
            exact_cost(features(record.images_KHWC), record.weights_K, real_by_class[record.label])
            for record in ClassImagesReader(study.room(jobs["recover"])).read(range(num_classes))
        ]
        distances.append(float(np.sqrt(np.mean(costs))))
    return distances


def mean_influence(study: Study, jobs: dict[str, Job], surrogate: Job) -> float:
    """Return the mean over a set's images of their influence on their class, in [-1, 1]: what IGD's term raises.

    The surrogate of the job `surrogate` measures all sets, on the real images that it has seen.
    """
    config, place, device = surrogate.config, study.place, device_for(-1)
    model, num_classes = load_model(config.recover.diffusion.model, device), len(place.class_names)
    networks = surrogates.read(
        study.room(surrogate), model, config, num_classes=num_classes, device=device
    )
    teacher, features, solved = map(study.room, surrogate.inputs)
    inputs = Inputs(teacher, features, solved, place.source_of("train"), config, device)
    most, values = config.recover.diffusion.influence_latents, []
    for record in ClassImagesReader(study.room(jobs["recover"])).read(range(num_classes)):
        latents = model.encode(inputs.real_at(record.label, config, most))
        of_class = class_influence(networks, latents, record.label)
        for latent_CHW in model.encode(record.images_KHWC):
            values.append(influence(latent_CHW.flatten(), of_class).item())
    return statistics.fmean(values)


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
        lines.append(line_of(*cells))
    lines += ["", "| images | W2 to test | soft labels | hard labels |", "|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = [row["title"], text(row["w2_test"])]
        cells += [text(row[kind], 100, 1) for kind in _LABELS]
        lines.append(line_of(*cells))
    count = len(record["rows"][0]["soft"]["values"])
    lines.append(
        f"\n{record['dataset']}, ipc {record['ipc']}: mean ± sample standard deviation of {count} sets, a student each"
    )
    return "\n".join(lines)
