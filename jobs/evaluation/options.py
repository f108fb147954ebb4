"""What a command line of jobs/evaluate.py asks for: its options, filled in from the set, its recipe and the teacher."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast, get_args

import tyro

from wmdd_ray.config import (
    Arch,
    AttackConfig,
    AttackName,
    DistillConfig,
    EvaluateConfig,
    LabelKind,
    NetworkConfig,
    RecoverConfig,
    RelabelConfig,
    Resources,
    SourceConfig,
    ViewConfig,
    refuse_secrets,
)
from wmdd_ray.core.published import is_published, published
from wmdd_ray.errors import ConfigError, DataError
from wmdd_ray.options import check
from wmdd_ray.recipes import full_table, recipe_of
from wmdd_ray.spine.taken import runs_in
from wmdd_ray.store.documents import real_images_of
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources.listing import NothingThereError, list_files

from .. import command_line, endings
from .own_set import (
    can_be_read,
    committed_teachers,
    recipe_of_ours,
    set_of_ours,
    source_of_ours,
    stored_as,
)

# Larger images have strided stems, in the literature as in torchvision.
_SMALL_PIXELS = 64
_BASELINES = ("random_real", "all_real")
_FIRST = "students seeds labels baselines data teacher attacks eps out overwrite num-workers"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the job."""

    uri: Annotated[str, tyro.conf.Positional]
    """The distilled set: a path or a URI, before all options. `.pt` files of DC, DM, IDC and MTT are read too (`FILE.pt#1`: the
    second set in it), `hub:OWNER/NAME` is one of the Hugging Face hub, `rethinkdc:sre2l-ipc-10` one of rethinkdc's."""
    students: tuple[str, ...] = ("convnet3",)
    """Architectures, with commas or spaces between them: convnetN, resnetap10, vit_tiny, a classifier of torchvision (resnet18,
    mobilenet_v2, swin_t), timm:NAME, or module:function of your own, which is run."""
    seeds: int | None = None
    """Students of each row; short for --evaluate.num-seeds."""
    labels: tuple[str, ...] = ()
    """`soft`, `hard`, or both with a comma; short for --evaluate.labels. Absent: what the set has."""
    baselines: tuple[str, ...] = ()
    """Rows of real training images beside the set's, under the same recipe, views and teacher: `random_real` (as many a class),
    `all_real`. They need --data or --follow-data, but for sets of the embedded digits. --evaluate.baselines is the same, and takes
    only these two."""
    data: str | None = None
    """Real training images, for baselines, and held-out ones where the layout has both (`digits`, IDX, folders train/ and val/).
    Absent: for a set of ours the embedded digits, where it was distilled from these."""
    follow_data: bool = False
    """Without --data, read real images where the set says that they are (a path, s3:// or gs://): say so only of sets that are
    yours. Labels are found there by the run's own options (--source.label-column, image-column, numbers, layout, tar-keys); with
    --data or --val-data those that the run had are to be typed again, or changed."""
    val_data: str | None = None
    """Held-out images, where --data does not bring them."""
    classes: Literal["names", "order"] = "names"
    """How the classes of a foreign set are matched with the held-out images': by name, or class k with class k whatever they are
    called (`new000`, `0_cat`)."""
    teacher: str | None = None
    """Teacher for soft labels of a foreign set: a run or its teacher/ folder (of several teachers all label, as in the run),
    `torchvision:WEIGHTS`, `timm:MODEL`, or a checkpoint file."""
    attacks: tuple[str, ...] = ()
    """Attacks on the trained students: pgd (100 steps), square, autoattack (standard), cw (L2), mim; with commas or spaces. They
    need adversarial-robustness-toolbox and pyautoattack."""
    eps: tuple[str, ...] | None = None
    """Largest change of a pixel (L-infinity) in [0, 1], with commas or spaces. Absent: 1/255,2/255,8/255."""
    attack_images: int | None = None
    """Held-out images that are attacked, equally many of each class, drawn by --seed; all where there are fewer. Absent: 1000."""
    recipe: str | None = None
    """Recipe of jobs/distill.py whose student, views and input are the defaults. Absent: for a set of ours its own; of `auto`
    what the run chose, which run.json beside dataset/ tells."""
    out: str | None = None
    """Where results go: a path, or a URI that all nodes see. Absent: evaluate-NAME beside the runs of jobs/distill.py."""
    overwrite: bool = False
    """Replace results that were made with other options."""
    allow_unsafe_commits: bool = False
    """Work on a store that ignores conditional writes."""
    verbose: bool = False
    """Show Ray's and the workers' log lines, and whole tracebacks."""
    seed: int = 0
    """Seed of everything random."""
    source: SourceConfig = field(default_factory=SourceConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    """How views are drawn for soft labels that are not stored: of a foreign set, and of all real images."""
    teacher_network: NetworkConfig = field(default_factory=NetworkConfig)
    """Architecture of a --teacher that is a checkpoint file."""
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(baselines=()))
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)

    def __post_init__(self) -> None:
        for option in ("uri", "data", "val_data", "teacher", "out"):
            refuse_secrets(option.replace("_", "-"), getattr(self, option))
        endings.refuse_lost_folder(self.out)
        check(self.views, "views.")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A job made complete: the set, the configuration of its students, their architectures, and where results go.

    `place` is where the set lies: of one from the hub on this disk.
    """

    job: Job
    place: str
    own: Any  # given_set.OwnSet, or None for a foreign set
    class_names: tuple[str, ...] | None
    config: DistillConfig
    students: tuple[Arch, ...]
    attack: AttackConfig
    out: str


def parse(arguments: list[str], description: str | None) -> Evaluation:
    """Return what a command line asks for: defaults come from the set, its recipe and the teacher; --help shows `description`."""
    if command_line.asks_for_help(arguments):
        command_line.parse(Job, arguments, description=description, first=_FIRST)
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            "expected the URI of a distilled set before all options, as in: jobs/evaluate.py runs/digits-ipc10 --seeds 3"
        )
    # Imported here: they load torch, which a wrong option should not have to wait for.
    from wmdd_ray.units.given_set import on_this_disk
    from wmdd_ray.units.tensor_set import is_tensor_set

    known = command_line.typed(arguments[1:], "recipe", "teacher", "source.image-size")
    spec, size = known["teacher"], known["source.image-size"]
    refuse_secrets("uri", arguments[0])
    place = on_this_disk(arguments[0])
    own = set_of_ours(place, arguments)
    class_names = None if own is None else own.class_names
    base = recipe_of_ours(own)
    if known["recipe"]:
        base = recipe_of(known["recipe"], 10 if own is None else own.meta["ipc"])
    num_teachers = 1
    base = full_table(base)
    source = base.source
    if own is not None:
        source = source_of_ours(own, source, arguments[1:])
    elif spec and (labelers := committed_teachers(spec)) is not None:
        teacher, num_teachers = labelers
        class_names = teacher.class_names
        from wmdd_ray.units.teacher import source_of

        source = replace(source_of(teacher, source), format="auto")
    elif is_published(spec):
        source = published(spec).source(replace(source, format="auto"))
    else:
        source = replace(source, format="auto")
        if size.isdecimal():
            side = max(8, int(size))
            source = replace(source, image_size=side, resize=max(side, source.resize))
    network = base.evaluate.network
    if base.recipe != "auto":
        network = replace(network, small_stem=source.image_size <= _SMALL_PIXELS)
    default = Job(
        uri=arguments[0],
        students=(network.arch,),
        source=source,
        views=base.relabel.views,
        evaluate=replace(base.evaluate, network=network, baselines=()),
    )
    job = command_line.parse(Job, arguments, description=description, default=default)
    if own is None and not is_tensor_set(place):
        _require_something(job, place)
    return _completed(job, place, own, class_names, source, num_teachers)


def _require_something(job: Job, uri: str) -> None:
    if can_be_read(uri) and (inside := runs_in(Store(uri))):
        raise ConfigError(
            f"{uri} holds a run for each ipc: pass {' or '.join(run.uri for run in inside)}"
        )
    try:
        list_files(uri, job.source)
    except NothingThereError as error:
        raise DataError(
            f"{uri}: expected a distilled set (a run of jobs/distill.py, its dataset/, or images that somebody else distilled), "
            "found nothing there"
        ) from error
    except DataError:
        pass  # what is wrong with it is told where it is opened


def _completed(
    job: Job,
    place: str,
    own: Any,
    class_names: tuple[str, ...] | None,
    source: SourceConfig,
    num_teachers: int,
) -> Evaluation:
    """Return the job with its short options filled in, or a ConfigError that says which of them cannot be."""
    # Imported here: it loads torch, which a wrong option should not have to wait for.
    from wmdd_ray.core.architectures import check_name

    students = _listed(job.students)
    for student in students:
        check_name(student, "--students")
    labels = _among("labels", job.labels, get_args(LabelKind)) if job.labels else ()
    baselines = _among("baselines", (*job.baselines, *job.evaluate.baselines), _BASELINES)
    if own is not None:
        for option in ("image_size", "channels", "mean", "std"):
            if getattr(job.source, option) != getattr(source, option):
                raise ConfigError(
                    f"--source.{option.replace('_', '-')}: expected {getattr(source, option)}, which the images and the teacher of "
                    f"{own.uri} are made for, got {getattr(job.source, option)}"
                )
        if job.teacher is not None:
            raise ConfigError(
                f"--teacher {job.teacher}: expected none, for {own.uri} brings its own teacher and labels; to label its images by "
                "another, export them (jobs/export.py --format imagefolder) and evaluate those"
            )
    elif not labels:
        labels = ("soft", "hard") if job.teacher is not None else ("hard",)
    elif "soft" in labels and job.teacher is None:
        raise ConfigError(
            f"--labels soft: {job.uri} brings images and classes only; pass --teacher (a run, torchvision:WEIGHTS, timm:MODEL, or "
            "a checkpoint file) for soft labels, or --labels hard"
        )
    evaluate = replace(
        job.evaluate,
        labels=cast(tuple[LabelKind, ...], labels or job.evaluate.labels),
        num_seeds=job.evaluate.num_seeds if job.seeds is None else job.seeds,
        baselines=cast(Any, baselines),
    )
    data = job.data or (_named_data(job, own) if own is not None else None)
    if baselines and data is None:
        raise ConfigError(
            f"--baselines {','.join(baselines)}: expected --data with the real training images"
        )
    label_epochs = own.meta["label_epochs"] if own is not None else evaluate.epochs
    config = DistillConfig(
        recipe=job.recipe or (own.meta["provenance"]["recipe"] if own is not None else "none"),
        seed=job.seed,
        data=data or place,
        val_data=job.val_data,
        # The images that the set's teacher was not trained on.
        val_fraction=own.meta["source"].get("val_fraction")
        if own is not None and job.val_data is None
        else None,
        teacher=job.teacher,
        source=job.source,
        squeeze=replace(DistillConfig().squeeze, network=job.teacher_network),
        # No images are made here, so that the teacher's moments do not matter.
        recover=RecoverConfig(moments="none"),
        relabel=RelabelConfig(
            epochs=label_epochs, views=job.views, teachers=num_teachers, **stored_as(own)
        ),
        evaluate=evaluate,
    )
    return Evaluation(
        job=job,
        place=place,
        own=own,
        class_names=class_names,
        config=config,
        students=students,
        attack=_attacks_of(job),
        out=job.out or default_out(own.uri if own is not None else job.uri),
    )


def _named_data(job: Job, own: Any) -> str | None:
    """Return where a set of ours says its real images are; None when none are needed.

    The set may be a stranger's: a path or a host that it names is looked at when the user repeats it, or says so.
    """
    uri = str(own.meta["source"]["uri"])
    if uri == "digits":
        return uri
    if job.follow_data:
        return real_images_of(own.uri, own.meta)
    if job.val_data is not None and not (job.baselines or job.evaluate.baselines):
        return None
    raise ConfigError(
        f"{own.uri} says that its real images are at {uri}, which is not read because a set says so: pass --data {uri}, or "
        "where they are now, or --follow-data if this set is yours"
    )


def _attacks_of(job: Job) -> AttackConfig:
    names = _among("attacks", job.attacks, get_args(AttackName)) if job.attacks else ()
    typed: dict[str, Any] = {}
    if job.eps is not None:
        parts = [part for text in job.eps for part in text.split(",") if part]
        if not parts:
            raise ConfigError(
                f"--eps: expected at least one budget, as 8/255, got {' '.join(job.eps)!r}"
            )
        typed["eps"] = tuple(dict.fromkeys(parts))
    if job.attack_images is not None:
        typed["images"] = job.attack_images
    if typed and not names:
        option = "--eps" if "eps" in typed else "--attack-images"
        raise ConfigError(
            f"{option}: expected --attacks beside it, without which nobody is attacked; add --attacks "
            f"{','.join(get_args(AttackName))} or some of them, or leave it out"
        )
    return AttackConfig(names=cast(tuple[AttackName, ...], names), **typed)


def _listed(given: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for text in given for name in text.split(",") if name))


def _among(option: str, given: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return the names in a list with commas or spaces, each once; a ConfigError lists those there are."""
    names = _listed(given)
    unknown = [name for name in names if name not in known]
    if unknown or (given and not names):
        raise ConfigError(
            f"--{option}: expected names among {', '.join(known)}, with commas between them, got {', '.join(unknown) or given[0]!r}"
        )
    return names


def default_out(uri: str) -> str:
    """Return where results go when --out is absent."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "/".join(uri.rstrip("/").split("/")[-2:])).strip("-.")
    return endings.default_out(f"evaluate-{name.removesuffix('-dataset')}")
