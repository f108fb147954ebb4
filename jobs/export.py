"""Export a distilled set for other libraries: `python jobs/export.py runs/digits-ipc10/dataset --out digits --format imagefolder`.

Writes image folders (torchvision), WebDataset tar shards, or a Hugging Face data set, with the PNG files as they are, weights,
class names, provenance and a card. The same command again finds its work done; a folder with anything else in it is refused.
`--push-to-hub USER/NAME` then publishes the folder on the Hugging Face hub, and with `--dry-run` says what it would.
Exit codes: 0 done, 2 an option is wrong or the output holds something else, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.export", run_name="__main__", alter_sys=True)

import tyro

from wmdd_ray.config import LabelKind, refuse_secrets
from wmdd_ray.options import require
from wmdd_ray.product import hub
from wmdd_ray.product.export import Export, Format, export
from wmdd_ray.product.tables import size

from . import command_line, endings


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the job."""

    uri: Annotated[str, tyro.conf.Positional]
    """`dataset/` folder of a finished run: a path, `s3://`, or any URI that fsspec knows."""
    out: str
    """Where to write, likewise; an empty place, or one that the same command wrote."""
    layout: Annotated[Format, tyro.conf.arg(name="format")]
    """`imagefolder`: CLASS/*.png, metadata.jsonl. `webdataset`: train-*.tar of KEY.png, KEY.cls, KEY.json. `huggingface`: Parquet
    files that `datasets.load_dataset` opens with class names."""
    labels: LabelKind = "hard"
    """`hard` is the class alone; `soft` adds the teacher's logits on every whole image."""
    license: str | None = None
    """License identifier for the card as Hugging Face lists them; absent: what the set says, else `other`."""

    push_to_hub: str | None = None
    """Upload what lies in --out, a folder, to this repository of data sets (NAME or USER/NAME) of the Hugging Face hub. It is made
    where there is none; the token is that of HF_TOKEN or `hf auth login`."""
    private: bool = False
    """Keep a repository that --push-to-hub makes to its owner."""
    dry_run: bool = False
    """Write --out, and only say what --push-to-hub would upload where."""

    def __post_init__(self) -> None:
        refuse_secrets("uri", self.uri)
        refuse_secrets("out", self.out)
        if self.push_to_hub is not None:
            hub.check_target(self.push_to_hub, self.out)
        expected = "off without --push-to-hub USER/NAME; give that too, or leave it out"
        for option in ("private", "dry_run"):
            ok = self.push_to_hub is not None or not getattr(self, option)
            require(ok, option.replace("_", "-"), expected, True)


_SHOWN_FILES = 20
_OPENED_BY = {
    "imagefolder": 'torchvision.datasets.ImageFolder("{uri}")',
    "webdataset": 'webdataset.WebDataset("{uri}/{shards}", shardshuffle=False).decode("pil")',
    "huggingface": 'datasets.load_dataset("{uri}", split="train")',
}


def main(arguments: list[str]) -> int:
    """Run the job and return its exit code."""
    parse = partial(command_line.parse, Job, description=__doc__)
    return endings.exit_code_of(arguments, parse, write)


def write(job: Job) -> int:
    """Write the export, and publish it where that is asked for."""
    done = export(job.uri, job.out, job.layout, labels=job.labels, license_name=job.license)
    show(job, done)
    if job.push_to_hub is not None:
        publish(job, done, job.push_to_hub)
    return 0


def show(job: Job, done: Export) -> None:
    """Print what lies where, and how it is opened."""
    total = sum(entry.size_bytes for entry in done.files)
    print(f"{'found exported' if done.found else 'exported':<16}{done.uri}")
    print(
        f"{'images':<16}{done.num_images} of {done.num_classes} classes, {done.side} x {done.side} px; {len(done.files)} files, "
        f"{size(total)}"
    )
    if done.tiles > 1:
        print(
            f"{'tiles':<16}{done.tiles} x {done.tiles} images of each stored one, cut apart as students see them"
        )
    shards = sorted(entry.key for entry in done.files if entry.key.endswith(".tar"))
    names = shards[0] if len(shards) == 1 else ""
    if len(shards) > 1:
        names = f"train-{{{shards[0][6:-4]}..{shards[-1][6:-4]}}}.tar"
    print(f"{'opened by':<16}{_OPENED_BY[job.layout].format(uri=done.uri, shards=names)}")


def publish(job: Job, done: Export, name: str) -> None:
    """Upload an export, or print what would be."""
    files, private = hub.files_of(done), " (private)" if job.private else ""
    where = hub.address(name) if job.dry_run else hub.push(done, name, private=job.private)
    print(
        f"{'would upload' if job.dry_run else 'uploaded':<16}{len(files)} files, {size(sum(files.values()))}, to {where}{private}"
    )
    for key in sorted(files)[: _SHOWN_FILES if job.dry_run else 0]:
        print(f"{'':<16}{key}  {size(files[key])}")
    if job.dry_run and len(files) > _SHOWN_FILES:
        print(f"{'':<16}and {len(files) - _SHOWN_FILES} more")


if __name__ == "__main__":
    command_line.run(main)
