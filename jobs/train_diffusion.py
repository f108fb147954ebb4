"""Train a small class-conditional diffusion model on labelled images: `python jobs/train_diffusion.py --recipe digits`.

--out gets a pipeline of diffusers (a UNet2DModel on pixels with safetensors weights, and its noise levels), classes.json
with the class names, and preview.png. `jobs/distill.py --recover.method diffusion --recover.diffusion.model OUT` samples it.
One process, on a GPU if there is one. Run the same command again after any interruption: it goes on from its last state.
Exit codes: 0 done, 2 configuration, 4 input, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.train_diffusion", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import SourceConfig, refuse_secrets
from wmdd_ray.diffusion.card import CLASSES_KEY, INDEX_KEY, check_widths
from wmdd_ray.diffusion.training import Training
from wmdd_ray.errors import DataError
from wmdd_ray.options import check, fingerprint_options, option
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.claims import is_of, plan_of, read_claim
from wmdd_ray.spine.provenance import as_typed, hardware, versions
from wmdd_ray.store.documents import seal
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, load_images, open_source
from wmdd_ray.telling.progress import StageLine, duration

from . import command_line, endings

if TYPE_CHECKING:
    import numpy as np

    from wmdd_ray.core.optimizer import State
    from wmdd_ray.diffusion.model import DiffusionModel

_PLAN_KEY = "training/plan.json"
_PREVIEW_IMAGES, _PREVIEW_STEPS = 6, 25
_FIRST = "recipe data out epochs batch-size learning-rate widths seed overwrite"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the job."""

    recipe: str = "digits"
    """Recipe of jobs/distill.py that says how the images are read."""
    data: str = "digits"
    """Training images: `digits` (embedded), a path, or a URI; the recipe's by default."""
    out: str | None = None
    """Folder or URI of the model; runs/diffusion-RECIPE by default."""
    checkpoint_s: float = option(30.0, gt=0)
    """Least seconds between two stored states."""
    memory_limit_gib: float = option(4.0, gt=0)
    """Most of decoded images; they are held in memory."""
    overwrite: bool = False
    """Replace a model that was trained with other options or on other images."""
    verbose: bool = False
    """Show log lines, and whole tracebacks."""
    training: Annotated[Training, tyro.conf.arg(name="")] = field(default_factory=Training)
    source: SourceConfig = field(default_factory=SourceConfig)

    def __post_init__(self) -> None:
        refuse_secrets("out", self.out)
        endings.refuse_lost_folder(self.out)
        refuse_secrets("data", self.data)
        check(self)
        check_widths(self.training.widths, self.source.image_size)


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    return endings.exit_code_of(arguments, parse, train)


def parse(arguments: list[str]) -> Job:
    """Return the job of a command line: a recipe's values, changed by the options given."""
    name = command_line.typed(arguments, "recipe")["recipe"] or "digits"
    recipe = recipe_of(name, 1)
    default = Job(recipe=name, data=recipe.data, source=recipe.source)
    return command_line.parse(Job, arguments, description=__doc__, default=default, first=_FIRST)


def train(job: Job) -> int:
    """Train the model unless it is there, and print where it is."""
    started = time.monotonic()
    store = Store(job.out or endings.default_out(f"diffusion-{job.recipe}"))
    source = open_source(job.data, job.source, split="train")
    plan = _plan(job, source)
    there = read_claim(store, _PLAN_KEY, "a model of this job")
    mine = there is not None and is_of(store.uri, there, plan, overwrite=job.overwrite)
    if mine and store.exists(INDEX_KEY):
        print(f"found whole     {store.uri}")
        return 0
    from wmdd_ray.diffusion.model import save_model

    # Before the folder is claimed: it shall not be of options that never trained.
    _, labels_N, images_NHWC, _ = _loaded(job, source)
    if not mine:
        _claim(store, plan)
    model, losses = _trained(job, images_NHWC, labels_N, source.class_names, store)
    about = {
        "data": job.data,
        "source": asdict(job.source),
        "training": asdict(job.training),
        "loss": losses[-1] if losses else None,
        "hardware": hardware(),
        **versions(),
    }
    files = save_model(
        model.network, model.scheduler, source.class_names, json.loads(json.dumps(about))
    )
    store.put("preview.png", _preview(model, job.training.seed))
    for key, content in files.items():
        store.put(key, content)
    store.delete("partial")
    assert store.exists(INDEX_KEY)
    print(f"model           {store.uri}")
    print(f"preview         {store.uri}/preview.png")
    print(f"weights         {sum(p.numel() for p in model.network.parameters()):,}")
    print(
        f"sample it       {as_typed('python jobs/distill.py')} --recipe {job.recipe} --recover.method diffusion "
        f"--recover.diffusion.model {store.uri}"
    )
    print(f"this run took {duration(time.monotonic() - started)}")
    return 0


def _plan(job: Job, source: Source) -> dict[str, Any]:
    """Return what the weights depend on, in the form of a room's plan."""
    options = {name: fingerprint_options(getattr(job, name)) for name in ("source", "training")}
    return plan_of({"version": 1, "options": options, "inputs": {"data": source.fingerprint()}})


def _claim(store: Store, plan: dict[str, Any]) -> None:
    """Write the plan of a model that is about to be trained, in place of what there is of another."""
    # What is read first, first: nobody shall find half of a model.
    for key in (INDEX_KEY, CLASSES_KEY, "unet", "scheduler", "preview.png", "partial"):
        store.delete(key)
    store.put(_PLAN_KEY, seal(plan))


def _loaded(
    job: Job, source: Source
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return what `load_images` does, or a DataError where it is too large."""
    loaded = load_images(source, job.source, int(job.memory_limit_gib * 2**30))
    if loaded is None:
        raise DataError(
            f"{job.data}: expected images that take at most {job.memory_limit_gib:g} GiB decoded; this job is for small sets: "
            "raise --memory-limit-gib, lower --source.image-size, or take a pretrained model (facebook/DiT-XL-2-256)"
        )
    return loaded


def _trained(
    job: Job,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    class_names: tuple[str, ...],
    store: Store,
) -> tuple[DiffusionModel, list[float]]:
    """Return the trained model, and the losses of the epochs of this run."""
    from wmdd_ray.core.device import device_for
    from wmdd_ray.diffusion.denoising import train_unet
    from wmdd_ray.diffusion.model import DiffusionModel, trained_card
    from wmdd_ray.spine.checkpoints import Checkpoints
    from wmdd_ray.spine.rooms import Room

    device = device_for(-1)
    keep = Checkpoints(Room(store, ""), "training", job.checkpoint_s)
    state = keep.load()
    first = 0 if state is None else int(state["epoch"]) + 1
    line = StageLine("training")
    line.start(job.training.epochs, first)
    losses: list[float] = []

    def on_epoch(epoch: int, loss: float, get_state: Callable[[], State]) -> None:
        losses.append(loss)
        keep.maybe(get_state)
        line.update(epoch + 1, f"loss {loss:.4f}")

    network, scheduler = train_unet(
        job.training,
        images_NHWC,
        labels_N,
        num_classes=len(class_names),
        device=device,
        state=state,
        on_epoch=on_epoch,
    )
    line.finish()
    keep.clear()
    card = trained_card(network, scheduler, class_names, store.uri)
    return DiffusionModel(card, network, None, scheduler), losses


def _preview(model: DiffusionModel, seed: int) -> bytes:
    """Return a PNG with some samples of each class, without guidance by real images."""
    from functools import partial

    from wmdd_ray.config import DiffusionConfig
    from wmdd_ray.diffusion.sampling import SampleTarget, sample_group
    from wmdd_ray.units.pictures import preview

    names = model.card.class_names[:20]
    device = next(model.network.parameters()).device
    config = DiffusionConfig(steps=_PREVIEW_STEPS, guidance_scale=2.0)
    nothing = model.encode(_blank(model))
    targets = [SampleTarget(label=i, class_id=i, real_MCHW=nothing) for i in range(len(names))]
    samples = sample_group(
        partial(model.predict, guidance_scale=config.guidance_scale, mixed_precision=False),
        model.scheduler,
        targets,
        config,
        num_images=_PREVIEW_IMAGES,
        shape_CHW=model.shape_CHW,
        seed=seed,
        device=device,
    )
    return preview([(i, names[i], model.decode(one.latents_KCHW)) for i, one in enumerate(samples)])


def _blank(model: DiffusionModel) -> Any:
    import numpy as np

    side = model.card.image_size
    return np.zeros((1, side, side, model.card.channels), np.uint8)


if __name__ == "__main__":
    command_line.run(main)
