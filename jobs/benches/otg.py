"""Images of a diffusion model with OT guidance against the same model without, against WMDD: distance and students, by seeds."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.benches.accuracy.definitions import Group, Options, Row, TeacherRecipe, variants
from jobs.benches.accuracy.units import ImagesUnit, Labels, Speed, StudentUnit, Unit
from jobs.train_diffusion import Training, train_unet
from wmdd_ray.config import DiffusionConfig, DistillConfig
from wmdd_ray.errors import WmddError
from wmdd_ray.provenance import hardware, versions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from jobs.benches.accuracy.splits import Labeled, Workplace
    from wmdd_ray.core.optimizer import State
    from wmdd_ray.diffusion import DiffusionModel

LABELS: tuple[Labels, ...] = ("soft", "hard")
# Real images of a class that samples are led by, as the pipeline's.
_POOL = 300
_STATE_EVERY_S = 30.0
# A step of the small UNet costs this many times a teacher's, for the plan.
_UNET_COST = 3.0


def otg(
    dataset: Literal["digits", "fashion_mnist"] = "digits",
    data: str | None = None,
    out: str = "runs/otg",
    ipc: int = 10,
    weights: tuple[float, ...] = (0.1, 0.3, 0.6),
    window: tuple[float, float] = (0.1, 0.4),
    steps: int = 25,
    guidance_scale: float = 2.0,
    diversity_weight: float = 0.0,
    seeds: int = 3,
    unet_epochs: int = 40,
    unet_widths: tuple[int, ...] = (16, 32, 64),
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    processes: int = 1,
    result: str | None = None,
    plan: bool = False,
) -> None:
    """W2 to real features and students' accuracy: OTG, the same model sampled plainly, and WMDD. Resumable; needs no Ray.

    Teacher and diffusion model see a part of the training images; beta1 is the weight whose images are nearest to the rest of
    them, by W2 in the teacher's features; only then are students tested, on the data's held-out images.

    Args:
        dataset: The recipe.
        data: Real images; the recipe's by default, and for Fashion-MNIST the folder with the IDX files.
        out: Folder of the units; what is there already is not done again.
        ipc: Images a class.
        weights: Candidates for beta1 (--recover.diffusion.ot-weight).
        window: Part of the denoising that is guided.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance, of both.
        diversity_weight: Of the deviation term, in the guided rows.
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
        if not weights or min(weights) <= 0:
            raise WmddError(f"--weights: expected values above 0, got {weights}")
        uri = data or ("digits" if dataset == "digits" else "fashion-mnist")
        options = Options(epochs=epochs, teacher_epochs=teacher_epochs)
        base = DiffusionConfig(
            model="unit",
            steps=steps,
            guidance_scale=guidance_scale,
            window=window,
        )
        guided = {
            w: replace(base, ot_weight=w, diversity_weight=diversity_weight)
            for w in sorted(set(weights))
        }
        training = Training(epochs=unet_epochs, widths=unet_widths, flip=dataset != "digits")
        path = Path(result or Path(__file__).parent / f"results/otg-{dataset}.json")
        _run(
            _Asked(dataset, uri, ipc, seeds, options, training, base, guided),
            out,
            processes,
            path,
            plan,
        )
    except WmddError as error:
        raise SystemExit(f"otg: {error}") from error


@dataclass(frozen=True)
class _Asked:
    """What the command line says."""

    dataset: str
    uri: str
    ipc: int
    seeds: int
    options: Options
    training: Training
    plain: DiffusionConfig
    guided: dict[float, DiffusionConfig]

    @property
    def recipe(self) -> DistillConfig:
        """The recipe at its best."""
        return variants(self.dataset, self.ipc, self.options)[1]


@dataclass(frozen=True, kw_only=True)
class UnetUnit(Unit):
    """A diffusion model, trained on `train`: the files of a pipeline."""

    room = "diffusion"
    training: Training

    @property
    def label(self) -> str:
        return "unet"

    def seconds(self, place: Workplace, speed: Speed) -> float:
        passes = self.training.epochs * len(place.train.labels_N)
        return _UNET_COST * passes * speed(_any_network(place), False)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        from wmdd_ray.diffusion import save_model
        from wmdd_ray.stages.checkpoints import Checkpoints

        keep = Checkpoints(place.room(self.room), self.id, _STATE_EVERY_S)
        told: dict[str, float] = {}

        def on_epoch(epoch: int, loss: float, get_state: Callable[[], State]) -> None:
            told["loss"] = round(loss, 5)
            keep.maybe(get_state)

        network, scheduler = train_unet(
            self.training,
            place.train.images_NHWC,
            place.train.labels_N,
            num_classes=len(place.class_names),
            device=place.device,
            state=keep.load(),
            on_epoch=on_epoch,
        )
        keep.clear()
        files = save_model(network, scheduler, place.class_names, {"data": self.data})
        return {f"{self.id}/{key}": content for key, content in files.items()}, told


@lru_cache(maxsize=1)
def _model_at(place: Workplace, unit: UnetUnit) -> DiffusionModel:
    from wmdd_ray.diffusion import load_model

    return load_model(f"{place.out}/{unit.room}/{unit.id}", place.device)


def _any_network(place: Workplace) -> Any:
    from wmdd_ray.config import NetworkConfig

    return NetworkConfig(arch="convnet3", width=32)


@dataclass(frozen=True, kw_only=True)
class SampledUnit(ImagesUnit):
    """The images of all classes, sampled as the stage `recover` samples them; `recover.diffusion.model` is that of the unit."""

    unet: UnetUnit
    recipe: str

    def seconds(self, place: Workplace, speed: Speed) -> float:
        passes = self.recover.diffusion.steps * self.ipc * len(place.class_names)
        return passes * speed(_any_network(place), False)

    def do(self, place: Workplace) -> tuple[dict[str, bytes], dict[str, Any]]:
        import time

        import numpy as np
        import torch

        from jobs.benches.accuracy.units import network_at
        from wmdd_ray.core.tiles import tile
        from wmdd_ray.recipes import recipe_of
        from wmdd_ray.run import unit_seed
        from wmdd_ray.stages.checkpoints import Checkpoints
        from wmdd_ray.stages.diffusion import sampled
        from wmdd_ray.store import codecs

        started = time.perf_counter()
        teacher_of = self.features[0].teacher
        teacher = codecs.decode_teacher(teacher_of.file(place))
        keep = Checkpoints(place.room(self.room), self.id, _STATE_EVERY_S)
        num_classes = len(place.class_names)
        made = sampled(
            range(num_classes),
            _model_at(place, self.unet),
            network_at(place, teacher_of),
            teacher,
            lambda label, side: _pool(place, label, side, self.seed),
            replace(recipe_of(self.recipe, self.ipc), recover=self.recover),
            seed=unit_seed(self.seed, "recover", ""),
            device=torch.device(place.device),
            state=keep.load(),
            on_step=lambda _, get_state: keep.maybe(get_state),
        )
        keep.clear()
        tiles, side = self.recover.tiles, place.source.image_size
        weights_N = np.concatenate([c.weights_K for c in made])
        content = codecs.encode_images(
            np.concatenate([tile(c.images_KHWC, tiles, side) for c in made]),
            np.repeat(np.arange(num_classes), self.ipc),
            weights_N.reshape(-1, tiles**2),
            place.class_names,
        )
        transport = float(np.mean([c.losses["ot"] for c in made]))
        seconds = round(time.perf_counter() - started, 3)
        return {f"{self.id}.parquet": content}, {"ot": transport, "seconds": seconds}


def _pool(place: Workplace, label: int, side: int, seed: int) -> np.ndarray:
    """Return the real images of a class that its samples are led by."""
    import numpy as np

    from wmdd_ray.run import unit_seed

    assert side == place.source.image_size, "the model was trained on these images"
    rows_N = place.train.of_class(label)
    rng = np.random.default_rng(unit_seed(seed, "random_real", str(label)))
    chosen = rng.choice(rows_N, min(len(rows_N), _POOL), replace=False)
    return np.asarray(place.train.images_NHWC[chosen])


def _run(asked: _Asked, out: str, processes: int, path: Path, plan: bool) -> None:
    from jobs.benches.accuracy.splits import load_split, make_splits
    from jobs.benches.accuracy.work import bring, print_plan

    held_out = 5000 if asked.dataset == "fashion_mnist" else 0
    place = make_splits(out, asked.uri, asked.recipe.source, held_out, "cpu")
    wmdd = _wmdd(asked, place)
    unet = UnetUnit(data=place.data, training=asked.training)
    of_weight = {
        weight: _students_of(wmdd, unet, asked, config, f"ot{weight:g}", place)
        for weight, config in {0.0: asked.plain, **asked.guided}.items()
    }
    sampled = {w: [s.labeled.images for s in units["soft"]] for w, units in of_weight.items()}
    first = [s.labeled.images for s in wmdd["soft"]]
    teacher = first[0].features[0].teacher
    stages: list[list[Unit]] = [
        [teacher, unet],
        [first[0].features[0]],
        [*first, *(unit for units in sampled.values() for unit in units)],
    ]
    if plan:
        later = [*wmdd.values(), *of_weight[0.0].values(), *of_weight[max(of_weight)].values()]
        students = [unit for units in later for unit in units]
        stages += [list(dict.fromkeys(u.labeled for u in students)), [*students]]
        print_plan(stages, place, processes)
        return
    bring(stages, place, processes)
    distances = {
        weight: [_w2(place, unit, place.val) for unit in units] for weight, units in sampled.items()
    }
    chosen = min(asked.guided, key=lambda weight: statistics.fmean(distances[weight]))
    rows = {
        "wmdd": ("**WMDD `best`**", wmdd, None),
        "plain": ("diffusion model, sampled plainly", of_weight[0.0], 0.0),
        "otg": (f"diffusion model with OTG, beta1 {chosen:g}", of_weight[chosen], chosen),
    }
    students = [s for _, units, _ in rows.values() for kind in LABELS for s in units[kind]]
    bring([list(dict.fromkeys(s.labeled for s in students)), [*students]], place, processes)
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
        "sampling": {
            "steps": asked.plain.steps,
            "eta": asked.plain.eta,
            "guidance_scale": asked.plain.guidance_scale,
            "window": asked.plain.window,
            "regularization": asked.plain.regularization,
        },
        "candidates": [
            {
                "ot_weight": weight,
                "w2_val": _told(distances[weight]),
                "transport": _told([u.marker(place).metrics["ot"] for u in sampled[weight]]),
                "seconds_a_set": _told(
                    [u.marker(place).metrics["seconds"] for u in sampled[weight]]
                ),
            }
            for weight in sampled
        ],
        "chosen": chosen,
        "rows": [
            {
                "row": name,
                "title": title,
                "ot_weight": weight,
                "w2_val": _told([_w2(place, s.labeled.images, place.val) for s in units["soft"]]),
                "w2_test": _told([_w2(place, s.labeled.images, test) for s in units["soft"]]),
                **{kind: _told([_top1(place, s, test) for s in units[kind]]) for kind in LABELS},
            }
            for name, (title, units, weight) in rows.items()
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(markdown(record))
    print(f"written: {path}", file=sys.stderr)


def _wmdd(asked: _Asked, place: Workplace) -> dict[Labels, tuple[StudentUnit, ...]]:
    """Return the students of WMDD's images, which hold all before them: a distilled set and a student a seed."""
    from jobs.benches.accuracy.work import units_of_row

    best = asked.recipe
    row = Row(
        name="best",
        title="WMDD",
        kind="recover",
        barycenters=best.barycenters,
        recover=best.recover,
    )
    group = Group(
        title=f"ipc {asked.ipc}",
        ipc=asked.ipc,
        tiles=best.recover.tiles,
        teachers=(TeacherRecipe(name="convnet3", squeeze=best.squeeze),),
        relabel=best.relabel,
        student=replace(best.evaluate, batch_size=min(best.evaluate.batch_size, 10 * asked.ipc)),
        rows=(row,),
        distill_seeds=asked.seeds,
        student_seeds=1,
    )
    students = units_of_row(group, row, place).students
    # A student of its own for each set: the seeds of sets and students go together.
    return {
        kind: tuple(replace(s, seed=s.labeled.images.seed) for s in students[kind])
        for kind in LABELS
    }


def _students_of(
    wmdd: dict[Labels, tuple[StudentUnit, ...]],
    unet: UnetUnit,
    asked: _Asked,
    config: DiffusionConfig,
    name: str,
    place: Workplace,
) -> dict[Labels, tuple[StudentUnit, ...]]:
    """Return the same students of other images."""
    recover = replace(asked.recipe.recover, method="diffusion", diffusion=config)

    def moved(student: StudentUnit) -> StudentUnit:
        images = student.labeled.images
        sampled = SampledUnit(
            data=place.data,
            name=name,
            kind="sampled",
            ipc=images.ipc,
            seed=images.seed,
            features=images.features,
            barycenters=images.barycenters,
            recover=recover,
            unet=unet,
            recipe=asked.dataset,
        )
        return replace(student, labeled=replace(student.labeled, images=sampled))

    return {kind: tuple(map(moved, wmdd[kind])) for kind in LABELS}


def _w2(place: Workplace, unit: ImagesUnit, real: Labeled) -> float:
    """Return the root of the mean over classes of W2^2 between a set's features, with its weights, and those of real images."""
    import numpy as np

    from jobs.benches.accuracy.units import formed_images, network_at
    from wmdd_ray.core.transport import exact_cost

    network = network_at(place, unit.features[0].teacher)
    found = formed_images(place, unit)
    costs = []
    for label in range(len(place.class_names)):
        own_N = found.classes_N == label
        costs.append(
            exact_cost(
                _features(network, found.images_NHWC[own_N], place),
                found.weights_N[own_N],
                _features(network, real.images_NHWC[real.of_class(label)], place),
            )
        )
    return float(np.sqrt(np.mean(costs)))


def _features(network: torch.nn.Module, images_NHWC: np.ndarray, place: Workplace) -> np.ndarray:
    from wmdd_ray.core.synthesis import features_of
    from wmdd_ray.core.views import to_input

    source = place.source
    pixels = to_input(images_NHWC, source.mean, source.std, place.device)
    return features_of(network, pixels, source.image_size)


def _top1(place: Workplace, student: StudentUnit, test: Labeled) -> float:
    from wmdd_ray.core.batches import eval_batches
    from wmdd_ray.core.training import accuracy

    batches = eval_batches(
        test.images_NHWC,
        test.labels_N,
        mean_C=place.source.mean,
        std_C=place.source.std,
        batch_size=256,
        device=place.device,
    )
    return accuracy(student.network(place), batches)[0]


def _told(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def markdown(record: dict[str, Any]) -> str:
    """Return the tables for the README: the choice of beta1, and what came of it."""

    def text(told: dict[str, Any], scale: float, digits: int) -> str:
        return f"{scale * told['mean']:.{digits}f} ± {scale * told['std']:.{digits}f}"

    lines = [
        "| beta1 | W2 to val | transport (own measure) | seconds a set |",
        "|---:|---:|---:|---:|",
    ]
    for one in record["candidates"]:
        cells = [f"{one['ot_weight']:g}", text(one["w2_val"], 1, 3), text(one["transport"], 1, 3)]
        cells.append(f"{one['seconds_a_set']['mean']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| images | W2 to test | soft labels | hard labels |", "|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = [row["title"], text(row["w2_test"], 1, 3), text(row["soft"], 100, 1)]
        cells.append(text(row["hard"], 100, 1))
        lines.append(f"| {' | '.join(cells)} |")
    count = len(record["rows"][0]["soft"]["values"])
    lines.append(
        f"\n{record['dataset']}, ipc {record['ipc']}: mean ± sample standard deviation of {count} sets, a student each"
    )
    return "\n".join(lines)
