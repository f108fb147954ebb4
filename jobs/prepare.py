"""Turn any labelled images into class-contiguous Parquet shards: `python jobs/prepare.py SOURCE_URI --out URI`.

SOURCE_URI holds class folders, WebDataset tar shards, Parquet files, IDX files, CIFAR's, or a CSV of paths and labels; local,
s3://, or any fsspec URI. --out gets data/train-*.parquet and data/validation-*.parquet, which `jobs/distill.py --data` and Hugging
Face `datasets` read with their class names; prepared.json, written last, with counts, mean and std, and checksums; and
bad_images.jsonl, which names every image that was left out. Run the same command again after any interruption: finished
parts and files are kept. While it works, --out holds the kept images twice.
Exit codes: 0 done, 1 workers lost, 2 configuration, 3 lost a race for --out, 4 input, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.prepare", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import DistillConfig, Resources, refuse_secrets
from wmdd_ray.errors import ArtifactError, ConfigError, DataError, LostRaceError
from wmdd_ray.product.tables import size
from wmdd_ray.spine.claims import is_of, read_claim
from wmdd_ray.spine.provenance import as_typed, versions
from wmdd_ray.spine.run import Run, expected_plan, run_pipeline
from wmdd_ray.store.documents import FileEntry, encode_manifest, entries_of, read_sealed
from wmdd_ray.store.filesystem import Store, file_at
from wmdd_ray.store.sources import Source, open_source
from wmdd_ray.store.sources.classes import check_class_names, shown
from wmdd_ray.store.sources.listing import NoSuchSplitError
from wmdd_ray.store.sources.opening import PREPARED_KEY
from wmdd_ray.store.sources.webdataset_index import parse_class_names
from wmdd_ray.store.uris import local_path
from wmdd_ray.telling.progress import StageLine, duration
from wmdd_ray.units.splitting import SPLITS, PrepareConfig

from . import command_line, endings
from .checks.report import many
from .distill import tracked_run

_FIRST = "out val-data val-fraction max-side classes format teacher overwrite"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the job."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE_URI")]
    """Real images: a folder, a file, a pattern such as `s3://b/train-{000..012}.tar`, or `digits`."""
    out: str
    """Where the shards go: an empty or new folder, or a URI that all nodes see."""
    teacher: str | None = None
    """Check that this teacher numbers the classes as the data does, by its accuracy on a sample, before anything is written: a
    committed teacher (a run or its teacher/ folder), `torchvision:WEIGHTS`, `timm:MODEL`, or a checkpoint file."""
    recipe: str = "imagenet1k"
    """Recipe of jobs/distill.py whose network and input a --teacher that is a checkpoint file was trained with."""
    overwrite: bool = False
    """Replace what --out holds when it was made with other options or from other images."""
    allow_unsafe_commits: bool = False
    """Work on a store that ignores conditional writes; two runs with one --out can then overwrite each other unnoticed."""
    verbose: bool = False
    """Show Ray's and the workers' log lines, and whole tracebacks."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)

    def __post_init__(self) -> None:
        refuse_secrets("out", self.out)
        endings.refuse_lost_folder(self.out)
        refuse_secrets("source", self.source)
        here, out = (_place(uri) for uri in (self.source, self.out))
        if self.source != "digits" and (out + "/").startswith(here + "/"):
            raise ConfigError(
                f"--out {self.out}: expected a place outside of the images' folder {self.source}, which would hold them twice; "
                "pass another folder"
            )


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    return endings.exit_code_of(
        arguments,
        lambda words: command_line.parse(Job, words, description=__doc__, first=_FIRST),
        prepare,
        reworded=lambda text: _in_our_words(text, "--classes" in arguments),
    )


def prepare(job: Job) -> int:
    """Bring --out up to date and print what a person wants to know."""
    started = time.monotonic()
    run = open_run(job)
    # Imported here: Ray, which a wrong option should not have to wait for.
    from wmdd_ray.executors.dispatch import watch_of
    from wmdd_ray.stages.prepare import PARTS_ROOM, SCAN, WRITE

    plans = {"scan": expected_plan(run, SCAN, {})}
    plans["write"] = expected_plan(run, WRITE, {SCAN.room: plans["scan"]["fingerprint"]})
    manifest = _found(run, plans, overwrite=job.overwrite)
    if job.teacher is not None:
        from .checks.order import probe_class_order

        images = run.source("train")
        top1 = probe_class_order(job.teacher, images, job.recipe)
        print(
            f"class order     as the teacher's: its top-1 is {100 * top1:.1f} % on a sample "
            f"(chance {100 / len(images.class_names):.1f} %)"
        )
    if manifest is None:
        run.watch = watch_of(run, tracked_run(run))
        with endings.ended(run):
            commits = run_pipeline(run, (SCAN, WRITE), overwrite=job.overwrite)
        made = commits[WRITE.room]
        files = [
            replace(entry, key=f"{WRITE.room}/{entry.key}")
            for unit in sorted(made.units)
            for entry in made.units[unit].files
        ]
        manifest = _publish(run, plans, made.metrics, commits[SCAN.room].metrics, files)
    else:
        print("found whole     nothing to do")
    run.store.delete(PARTS_ROOM)  # the files have made the parts superfluous
    print_summary(run.store, manifest, time.monotonic() - started)
    return 0


def open_run(job: Job) -> Run:
    """Return the run of a job: its source opened, its output looked at, nothing written."""
    config, reading = job.config, job.config.source
    names = None if config.classes is None else _read_names(config.classes)

    def opened(split: str) -> Any:
        if split == "train":
            return open_source(job.source, reading, split="train", class_names=names)
        return _open_held_out(job, run.source("train"))

    run = Run(
        store=Store(job.out),
        # The spine hands the options on and reads none of them.
        config=cast(DistillConfig, config),
        resources=Resources(),
        open_source=opened,
        progress=StageLine,
        connect=lambda: endings.join_cluster(job.out, run.resources, verbose=job.verbose),
        unsafe_commits=job.allow_unsafe_commits,
    )
    return run


def _open_held_out(job: Job, train: Source) -> Any:
    from wmdd_ray.stages.prepare import NoHeldOut

    config = job.config
    if config.val_fraction is not None:
        return NoHeldOut()
    try:
        return open_source(
            config.val_data or job.source,
            config.source,
            split="val",
            class_names=train.class_names,
            dedicated=config.val_data is not None,
        )
    except NoSuchSplitError:
        if config.val_data is not None:
            raise
        return NoHeldOut()


def _read_names(uri: str) -> tuple[str, ...]:
    """Return the class names in a file, in label order."""
    store, name = file_at(uri)
    try:
        names = parse_class_names(store.get(name).decode("utf-8-sig"), name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(
            f"--classes {uri}: expected a file with class names, found none"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"--classes {uri}: expected one name a line, or (.json) a list or an object from label to name, found otherwise "
            f"({error})"
        ) from error
    check_class_names(names, f"--classes {uri}")
    return names


def _found(run: Run, plans: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest that --out holds when it is what this run would make; None when there is work to do.

    Raises:
        ConfigError: --out holds something else, and `overwrite` is off.
        ArtifactError: --out is not whole any more, and `overwrite` is off.
    """
    from wmdd_ray.stages.prepare import BAD_KEY, DATA_ROOM, PARTS_ROOM

    store = run.store
    listed = store.list()
    begun = {f"{PARTS_ROOM}/plan.json", f"{DATA_ROOM}/plan.json"} & listed.keys()
    ours = (f"{PARTS_ROOM}/", "events/", "probe-", BAD_KEY, *([f"{DATA_ROOM}/"] if begun else []))
    manifest = read_claim(store, PREPARED_KEY, "one of this job", ours)
    if manifest is None:
        return None
    made = manifest["plans"]
    same = all(is_of(store.uri, made[n], plans[n], overwrite=overwrite) for n in plans)
    broken = [
        entry.key
        for entry in entries_of(manifest["files"], store.url(PREPARED_KEY))
        if listed.get(entry.key) != entry.size_bytes
    ]
    if same and not broken:
        return manifest
    if not overwrite:
        raise ArtifactError(
            f"{store.uri}: expected the {len(manifest['files'])} files of {PREPARED_KEY}, found {len(broken)} missing or of "
            f"another size: {shown(broken)}; pass --overwrite to make them again"
        )
    run.begin_writing()
    run.connect()
    store.delete(PREPARED_KEY)
    run.room(DATA_ROOM).clear()
    return None


def _publish(
    run: Run,
    plans: dict[str, Any],
    written: dict[str, Any],
    scanned: dict[str, Any],
    files: list[FileEntry],
) -> dict[str, Any]:
    """Write the manifest, which says that all is there."""
    source: Source = run.source("train")
    meta = {
        "kind": "prepared images",
        "format_version": 1,  # of these; that of distilled sets is another
        "class_names": list(source.class_names),
        **written,
        "bad_images": scanned["bad_images"],
        "files_seen": scanned["files_seen"],
        "options": asdict(cast(Any, run.config)),
        "source": {
            "root": source.root,
            "format": source.format,
            "stored_bytes": source.total_bytes,
        },
        "plans": plans,
        "provenance": versions(),
    }
    content = encode_manifest(meta, files)
    if not run.store.create(PREPARED_KEY, content):
        manifest = read_sealed(run.store, PREPARED_KEY)
        if manifest["plans"] != plans:
            raise LostRaceError(
                f"{run.store.uri} holds other images by now; give each run its own --out"
            )
        return manifest
    return read_sealed(run.store, PREPARED_KEY)


def print_summary(store: Store, manifest: dict[str, Any], seconds: float) -> None:
    """Print what there is, what to look at, and what to type next."""
    names = manifest["class_names"]
    print(f"\nprepared        {store.uri}")
    for split in SPLITS:
        part = manifest[split]
        counts = part["class_counts"]
        files = many(part["num_files"], "file")
        each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        print(
            f"{split:<16}{part['num_images']} images, {each} a class, {size(part['size_bytes'])} in {files}"
        )
    print(f"classes         {len(names)}: {shown(names)}")
    for split, account in manifest.get("files_seen", {}).items():
        print(f"{split:<16}{account}")
    if manifest["bad_images"]:
        print(
            f"left out        {many(manifest['bad_images'], 'bad image')}: {store.url('bad_images.jsonl')}"
        )
    for text in _warnings(names, manifest):
        print(f"look at         {text}")
    options = "" if manifest["validation"]["num_images"] else " --val-data HELD_OUT_URI"
    print(
        f"distill it by   {as_typed('python jobs/distill.py')} --data {shlex.quote(store.uri)} --ipc 10{options}"
    )
    print(f"this run took {duration(seconds)}")


def _warnings(names: Sequence[str], manifest: dict[str, Any]) -> list[str]:
    train, held = (manifest[split]["class_counts"] for split in SPLITS)
    few = [name for name, n, m in zip(names, train, held, strict=True) if n + m == 1]
    empty = [name for name, n, m in zip(names, train, held, strict=True) if n + m == 0]
    unseen = [name for name, n, m in zip(names, train, held, strict=True) if n and not m]
    only_held = [name for name, n, m in zip(names, train, held, strict=True) if m and not n]
    texts = []
    if empty:
        texts.append(
            f"{_classes(empty)} without an image: {shown(empty)}; distilling needs ipc images of each class"
        )
    if only_held:
        texts.append(f"{_classes(only_held)} with held-out images only: {shown(only_held)}")
    if few:
        texts.append(f"{_classes(few)} with one image: {shown(few)}")
    if unseen and sum(held):
        texts.append(f"{_classes(unseen)} without a held-out image: {shown(unseen)}")
    return texts


def _classes(names: Sequence[str]) -> str:
    return "1 class" if len(names) == 1 else f"{len(names)} classes"


def _place(uri: str) -> str:
    path = local_path(uri)
    return (str(path.resolve()) if path is not None else uri).rstrip("/")


def _in_our_words(text: str, named: bool) -> str:
    """Return a message of the sources with this job's names for their options; `named` says that --classes was given."""
    if "there is no such option" in text:  # what was typed stays as it was typed
        return text
    if named:
        text = re.sub(r" (training|given) classes, found", " classes of --classes, found", text)
        text = re.sub(
            "pass (held-out )?images with the same class names",
            "let the file name every class of the images, in label order",
            text,
        )
    for theirs, ours in (
        ("check --data and --val-data", "check SOURCE_URI and --val-data"),
        (
            "check --data, --val-data and --source.format",
            "check SOURCE_URI, --val-data and --format",
        ),
        ("as --data", "as SOURCE_URI"),
        ("go on as it is by --squeeze.no-check-class-order", "leave --teacher out"),
        ("--data ", "SOURCE_URI "),
        ("--source.", "--"),
    ):
        text = text.replace(theirs, ours)
    return text


if __name__ == "__main__":
    command_line.run(main)
