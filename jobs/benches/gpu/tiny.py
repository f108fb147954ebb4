"""Some classes of Tiny-ImageNet in two files that are carried along, and the recipe's stages on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wmdd_ray.config import DistillConfig, NetworkConfig, Resources
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.run import Progress, Run, Stage, run_pipeline
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.packing import image_features
from wmdd_ray.store.sources import RawImage, Source, open_source
from wmdd_ray.units.cut import open_split

from ..reporting import Row

_RECIPE = recipe_of("tiny_imagenet", 10)


def write_pack(folder: str, out: Path, most_mib: float) -> str:
    """Write the first classes of a data set that fit, both splits, as they are encoded, and say how many these are.

    Returns:
        A line: classes and bytes, and how many would fit as pixels.
    """
    train = open_source(folder, _RECIPE.source, split="train")
    val = open_source(folder, _RECIPE.source, split="val", class_names=train.class_names)
    held_out: dict[int, list[RawImage]] = {}
    for shard in val.shards(10_000):
        for raw in val.read_shard(shard):
            held_out.setdefault(raw.label, []).append(raw)
    left, kept = most_mib * 2**20, []
    for shard in train.shards(10_000):
        images = list(train.read_shard(shard))
        both = images, held_out[images[0].label]
        # A path and a label beside every image.
        left -= sum(len(raw.content) + len(raw.key) + 8 for part in both for raw in part)
        if left < 0:
            break
        kept.append(both)
    names = [train.class_names[images[0].label] for images, _ in kept]
    for part, split in enumerate(("train", "val")):
        rows = [(i, raw.key, raw.content) for i, both in enumerate(kept) for raw in both[part]]
        write_parquet(out, split, rows, names)
    size_mib = sum(file.stat().st_size for file in out.glob("*.parquet")) / 2**20
    of_class = sum(map(len, kept[0]))
    pixels = [int(most_mib * 2**20 / (of_class * 3 * side**2)) for side in (64, 32)]
    return (
        f"{len(kept)} of {len(train.class_names)} classes, {size_mib:.1f} MiB, in {out}; as pixels {pixels[0]} would fit at 64 px "
        f"and {pixels[1]} at 32"
    )


def write_parquet(
    folder: Path, split: str, rows: Sequence[tuple[int, str, Any]], class_names: list[str]
) -> None:
    """Write images (label, key, content) as a Parquet file that names its classes."""
    images = [{"bytes": content, "path": key} for _, key, content in rows]
    table = pa.table({"image": images, "label": [label for label, _, _ in rows]})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}-00000-of-00001.parquet"
    # Whoever reads an image reads its row group.
    table = table.replace_schema_metadata(image_features(class_names))
    pq.write_table(table, file, compression="none", row_group_size=500)


def config_of(data: str, quick: bool) -> DistillConfig:
    """Return the recipe with less of everything that takes minutes."""
    config = replace(
        _RECIPE,
        data=data,
        squeeze=replace(_RECIPE.squeeze, epochs=15),
        recover=replace(_RECIPE.recover, iterations=300),
        relabel=replace(_RECIPE.relabel, epochs=100),
        evaluate=replace(_RECIPE.evaluate, epochs=100),
    )
    if not quick:
        return config
    network = NetworkConfig(arch="convnet3", width=4)
    return replace(
        config,
        ipc=1,
        source=replace(config.source, image_size=16, resize=16),
        squeeze=replace(config.squeeze, network=network, epochs=1, warmup_epochs=0, min_top1=1e-9),
        recover=replace(config.recover, iterations=2),
        relabel=replace(config.relabel, epochs=2),
        evaluate=replace(config.evaluate, network=network, epochs=2),
    )


def steps_of(data: str, folder: str, quick: bool) -> tuple[Row, dict[str, Callable[[], Row]]]:
    """Return what is done, and every stage by name, to be called in this order, on this process's device and without Ray."""
    config = config_of(data, quick)

    def opened(split: str) -> Source:
        if split == "train":
            return open_split(config, "train")
        return open_split(config, "val", run.source("train").class_names)

    run = Run(
        store=Store(folder),
        config=config,
        resources=Resources(executor="here"),
        open_source=opened,
        progress=lambda name: Progress(),
        connect=lambda: None,
    )
    about: Row = {"num_classes": len(run.source("train").class_names), "ipc": config.ipc}
    about |= {"teacher_epochs": config.squeeze.epochs, "iterations": config.recover.iterations}
    about |= {"label_epochs": config.relabel.epochs, "student_epochs": config.evaluate.epochs}
    return about, {stage.name: partial(_done, run, stage) for stage in PIPELINE}


def _done(run: Run, stage: Stage) -> Row:
    """Do a stage and tell what it took, and how good the teacher and the students are."""
    commit = run_pipeline(run, PIPELINE, first=stage.name, last=stage.name)[stage.room]
    metrics = commit.metrics
    row: Row = {key: metrics[key] for key in ("top1", "seconds_in_core") if key in metrics}
    row["seconds"] = round(commit.seconds, 2)
    for student in metrics.get("table", ()):
        row[f"{student['row']}, {student['labels']} labels, top1"] = student["top1_mean"]
    return row
