"""Text that people read about a distilled set: its card, its table, sizes."""

from __future__ import annotations

import json
from typing import Any

from wmdd_ray.config import DistillConfig

ROW_NAMES = {
    "distilled": "(a) distilled set",
    "random_real": "(b) random real images",
    "nearest_real": "(c) real images nearest to the atoms",
    "random_tiles": "(b') random real images, small, as many as tiles",
    "nearest_tiles": "(c') real images nearest to the atoms, small, as many as tiles",
    "all_real": "(d) all real images",
}


def size(num_bytes: float) -> str:
    """Return bytes as people write them."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return (
                f"{num_bytes:.0f} {unit}"
                if unit == "B" or num_bytes >= 100
                else f"{num_bytes:.1f} {unit}"
            )
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def results_table(table: list[dict[str, Any]]) -> str:
    """Return the accuracy table in Markdown, soft and hard labels side by side.

    Args:
        table: a row each of `row` and `labels`, with `num_images`, `epochs`, `top1_mean`, `top1_std`, `num_seeds` (accuracies
            in [0, 1]).
    """
    kinds = list(dict.fromkeys(row["labels"] for row in table))
    lines = [
        f"| student trained on | images | passes | {' | '.join(f'top-1 %, {kind} labels' for kind in kinds)} | seeds |",
        f"|---|---:|---:|{'---:|' * len(kinds)}---:|",
    ]
    for name in dict.fromkeys(row["row"] for row in table):
        found = {row["labels"]: row for row in table if row["row"] == name}
        told = " | ".join(
            f"{100 * row['top1_mean']:.1f} ± {100 * row['top1_std']:.1f}" for row in found.values()
        )
        row = next(iter(found.values()))
        lines.append(
            f"| {ROW_NAMES.get(name, name)} | {row['num_images']} | {row['epochs']} | {told} | {row['num_seeds']} |"
        )
    return "\n".join(lines)


def dataset_card(
    meta: dict[str, Any], config: DistillConfig, table: list[dict[str, Any]] | None
) -> str:
    """Return the README.md of a data set: what it is, where it is from, how to use it, how good it is.

    Args:
        meta: the manifest's metadata.
        config: the run's configuration.
        table: accuracy rows, or None before an evaluation.
    """
    real, provenance = meta["source"], meta["provenance"]
    head = {
        "license": config.assemble.license,
        "tags": ["dataset-distillation"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
        ],
    }
    packages = ", ".join(f"{name} {v}" for name, v in provenance["versions"].items())
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    results = (
        f"Student: {config.evaluate.network.arch}, trained from scratch on each row by one recipe and tested on held-out real "
        f"images; teacher's top-1: {100 * meta['teacher_top1']:.1f} %.\n\n{results_table(table)}"
        if table
        else "Not evaluated yet."
    )
    return f"""---
{yaml}
---

# Distilled `{real["uri"]}`: {meta["ipc"]} images per class

{meta["num_images"]} synthetic images of {len(meta["class_names"])} classes with {meta["label_epochs"]} epochs of
soft labels, in place of {real["num_images"]} real images. Made by wmdd_ray (dataset distillation by Wasserstein barycenters).

![preview](preview.png)

## Use

```python
from torch.utils.data import DataLoader
from wmdd_ray.dataset import DistilledDataset

for view, soft_label, weight in DataLoader(DistilledDataset("THIS FOLDER OR URI"), batch_size=25, shuffle=True):
    ...  # one pass is the whole training: every label epoch of every image
```

## Accuracy

{results}

## Sizes

| | bytes |
|---|---:|
| images | {size(meta["image_bytes"])} |
| soft labels | {size(meta["label_bytes"])} |
| teacher | {size(meta["teacher_bytes"])} |
| real images as stored | {size(real["stored_bytes"])} |

## Provenance

- Recipe `{provenance["recipe"]}`, seed {provenance["seed"]}, wmdd_ray revision {provenance["git_revision"]}.
- {packages}.
- Source: {real["num_images"]} images, {real["bad_images"]} unreadable ones left out.
- Intended for research on and training of image classifiers; synthetic images can carry the biases and the personal
  content of the images that they are made from.
"""
