"""The card of a distilled set, as its README.md and as that of an export."""

from __future__ import annotations

import json
import re
from typing import Any

from wmdd_ray import __version__
from wmdd_ray.config import DistillConfig
from wmdd_ray.options import fingerprint_options
from wmdd_ray.product.tables import classes_text, escaped, results_table, size
from wmdd_ray.redaction import public

# The size categories of Hugging Face, by their upper ends.
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))  # fmt: skip
_LOADERS = {
    "imagefolder": """from torchvision.datasets import ImageFolder  # pip install torchvision

dataset = ImageFolder("THIS FOLDER")  # classes are numbered as in classes.json; weights are in metadata.jsonl""",
    "webdataset": """import webdataset  # pip install webdataset

dataset = webdataset.WebDataset("THIS FOLDER/train-{000000..LAST}.tar", shardshuffle=False).decode("pil")
for sample in dataset:
    sample["png"], sample["cls"], sample["json"]["weight"]  # class names are in classes.json""",
    "huggingface": """from datasets import load_dataset  # pip install datasets

dataset = load_dataset("THIS FOLDER OR REPOSITORY", split="train")
dataset.features["label"].names  # the class names""",
}
_CITATION = f"""```bibtex
@inproceedings{{liu2025wmdd,
  title     = {{Dataset Distillation via the Wasserstein Metric}},
  author    = {{Liu, Haoyang and Li, Yijiang and Xing, Tiancheng and Wang, Peiran and Dalal, Vibhu and Li, Luwei and He, Jingrui and
               Wang, Haohan}},
  booktitle = {{IEEE/CVF International Conference on Computer Vision (ICCV)}},
  pages     = {{1205--1215}},
  year      = {{2025}}
}}
@misc{{wmdd_ray,
  title = {{wmdd_ray: Dataset distillation by Wasserstein barycenters on Ray}},
  note  = {{Version {__version__}}},
  year  = {{2026}}
}}
```"""


def dataset_card(
    meta: dict[str, Any], config: DistillConfig, table: list[dict[str, Any]] | None
) -> str:
    """Return the README.md of a data set: what it is, where it is from, how to use it, how good it is.

    It is written with the set, when nothing is measured yet, and again from the committed results of an evaluation; the
    manifest, whose metadata is `meta`, does not list it. `table` has accuracy rows, and is None before an evaluation.
    """
    meta = published(meta)
    parquet = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    use = f"""```bash
pip install .  # in a checkout of wmdd_ray, version {__version__}
```

```python
{training_lines('"THIS FOLDER OR URI"')}
```

`datasets.load_dataset("THIS FOLDER")` opens the images with their class names."""
    if meta["tiles"] > 1:
        use += f"""

Each stored image holds {meta["tiles"]} x {meta["tiles"]} small ones, each with a weight and labels of its own: `DistilledDataset`
cuts them apart."""
    return _card(
        meta,
        front=_front(meta, config.assemble.license, {"configs": parquet}),
        use=use,
        table=table,
        student=config.evaluate.network.arch,
        unmeasured="Not evaluated yet.",
        options=public(fingerprint_options(config, with_absent=True)),
        teacher_sha256=meta["provenance"].get("teacher_sha256"),
    )


def training_lines(uri: str) -> str:
    """Return the Python that trains on a set of ours; `uri` is an expression."""
    return f"""from torch.utils.data import DataLoader
from wmdd_ray import load_dataset

dataset = load_dataset({uri})
loader = DataLoader(dataset, batch_sampler=dataset.batches(25))
for epoch in range(dataset.epochs):  # one pass over the images each, with views and labels of its own
    for view, soft_label, weight in loader:
        ..."""


def export_card(
    meta: dict[str, Any],
    *,
    table: list[dict[str, Any]] | None,
    layout: str,
    labels: str,
    teacher_sha256: str | None,
    license_name: str | None = None,
) -> str:
    """Return the README.md of an exported set, as `dataset_card` that of the set itself.

    By `soft` labels the teacher's logits on whole images go along. A `license_name` of None is what the set says.
    """
    meta = published(meta)
    options = meta["provenance"].get("options") or {}
    known = _entry(options, "assemble", "license") or "other"
    side, tiles = meta["image_size"] // meta["tiles"], meta["tiles"]
    extra: dict[str, Any] = {}
    if layout == "huggingface":
        names = {str(label): name for label, name in enumerate(meta["class_names"])}
        features: list[dict[str, Any]] = [
            {"name": "image", "dtype": "image"},
            {"name": "label", "dtype": {"class_label": {"names": names}}},
            {"name": "weight", "dtype": "float64"},
        ]
        if labels == "soft":
            features.append({"name": "logits", "list": "float32"})
        path = "data/*.parquet"
        extra = {
            "configs": [
                {"config_name": "default", "data_files": [{"split": "train", "path": path}]}
            ],
            "dataset_info": {"features": features},
        }
    use = f"```python\n{_LOADERS[layout]}\n```\n\n"
    use += f"PNG images of {side} x {side} pixels. A weight is the share of its class that an image stands for (sum 1 a class). "
    if tiles > 1:
        use += (
            f"The set stores {tiles} x {tiles} images in one picture of {meta['image_size']} pixels; here they are cut apart, "
            "because students see them so, enlarged to the full size. "
        )
    use += (
        "The logits are the teacher's on the whole image; the labels of random views, which students learn most from, and the "
        "teacher itself are in the set that this was exported from."
        if labels == "soft"
        else "There are no soft labels here: with the classes alone students reach what the table says of hard labels. The labels "
        "of random views and the teacher are in the set that this was exported from."
    )
    return _card(
        meta,
        front=_front(meta, license_name or known, extra),
        use=use,
        table=table,
        student=_entry(options, "evaluate", "network", "arch"),
        unmeasured="No evaluation of this set lies beside it.",
        options=options,
        teacher_sha256=teacher_sha256,
        # Beside class folders a loose picture is an image without a class.
        preview=layout != "imagefolder",
        is_whole=False,
    )


def published(meta: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's metadata without the paths of the machine that the set was made on."""
    source, provenance = dict(meta["source"]), dict(meta["provenance"])
    source["uri"] = public(source["uri"])
    if "options" in provenance:
        provenance["options"] = public(provenance["options"])
    return {**meta, "source": source, "provenance": provenance}


def _front(meta: dict[str, Any], license_name: str, extra: dict[str, Any]) -> str:
    """Return the block that Hugging Face reads."""
    from huggingface_hub import DatasetCardData  # here: who makes no card does not wait for it

    num_images = meta["num_images"] * meta["tiles"] ** 2
    name = meta["source"]["uri"].rstrip("/").rpartition("/")[2]
    data = DatasetCardData(
        pretty_name=f"Distilled {name}, {_per_class(meta)}",
        license=license_name,
        task_categories=["image-classification"],
        size_categories=[next((name for most, name in _SIZES if num_images < most), "n>1T")],
        tags=["dataset-distillation", *([] if _is_real(meta) else ["synthetic"])],
        **extra,
    )
    return f"---\n{data.to_yaml()}\n---"


def _card(
    meta: dict[str, Any],
    *,
    front: str,
    use: str,
    table: list[dict[str, Any]] | None,
    student: str | None,
    unmeasured: str,
    options: dict[str, Any],
    teacher_sha256: str | None,
    preview: bool = True,
    is_whole: bool = True,
) -> str:
    real = meta["source"]
    # Older sets do not say; all of them store their labels.
    is_online = meta.get("labels", {}).get("labels") == "online"
    given = f" with {meta['label_epochs']} epochs of soft labels" if is_whole else ""
    given += ", which the teacher gives while one trains," if is_whole and is_online else ""
    kind, made = "synthetic", "optimized for"
    likeness = "images that start from real ones can look like them"
    if _is_real(meta):
        kind, made = "chosen real", "real ones, chosen by"
        likeness = "these are real images, with the rights and the privacy of those whom they show"
    classes = classes_text(meta["class_names"], table) if table else ""
    classes = f"## Classes\n\n{classes}\n\n" if classes else ""
    return f"""{front}

# Distilled {_code(real["uri"])}: {_per_class(meta)}

{meta["num_images"]} {kind} images of {len(meta["class_names"])} classes{given} in place of {real["num_images"]} real images.
Made by wmdd_ray (dataset distillation by Wasserstein barycenters).

{"![preview](preview.png)" if preview else ""}

## Use

{use}

## Accuracy

{_accuracy(meta, table, student) if table else unmeasured}

{classes}## Sizes

{"" if is_whole else "Of the set that this was exported from:"}

{_sizes(meta)}

## Intended use and limits

For training small image classifiers, and for research on dataset distillation, under the license above, which follows from the
real images. The images are {made} one teacher and {meta["image_size"]} pixels: other architectures, other sizes and
other tasks than this classification gain less, and have to be measured. Distilled images can carry the biases, the label errors
and the personal content of the images that they are made from, and make the rare rarer. Distillation is no anonymization:
{likeness}.

## Citation

The method, and the software that made this set:

{_CITATION}

## Provenance

{_provenance(meta, options, teacher_sha256)}
"""


def _is_real(meta: dict[str, Any]) -> bool:
    """Return whether the set holds chosen real images (`--recover.method real`)."""
    recover = meta["provenance"].get("options", {}).get("recover", {})
    return bool(recover.get("method") == "real")


def _accuracy(meta: dict[str, Any], table: list[dict[str, Any]], student: str | None) -> str:
    """Return how students were trained and tested, and what they reached."""
    return (
        f"Students{f' ({escaped(student)})' if student else ''} are trained from scratch on each row by one recipe and tested "
        "on held-out real images once, after the last epoch; mean and standard deviation over the seeds. Soft labels are the "
        f"teacher's in every row; hard labels are the images' classes. Teacher's top-1: {100 * meta['teacher_top1']:.1f} %.\n\n"
        f"{results_table(table)}"
    )


def _provenance(meta: dict[str, Any], options: dict[str, Any], teacher_sha256: str | None) -> str:
    """Return what the set was made of and by."""
    real, provenance = meta["source"], meta["provenance"]
    variant = f", variant {_code(options['variant'])}" if "variant" in options else ""
    sha = f", SHA-256 of its file {_code(teacher_sha256)}" if teacher_sha256 else ""
    packages = ", ".join(
        f"{escaped(name)} {escaped(v)}" for name, v in provenance["versions"].items()
    )
    every_option = ""
    if options:
        shown = json.dumps(options, indent=2, ensure_ascii=False)
        every_option = (
            f"\n\n<details>\n<summary>All options</summary>\n\n```json\n{shown}\n```\n\n</details>"
        )
    return f"""\
- Source: {_code(real["uri"])}, {real["num_images"]} images, {real["bad_images"]} unreadable ones left out.
- Teacher: top-1 {100 * meta["teacher_top1"]:.1f} % on held-out real images{sha}.{_labelers(meta)}
- Recipe {_code(provenance["recipe"])}{variant}, seed {provenance["seed"]}, wmdd_ray revision {escaped(provenance["git_revision"])}.
- {packages}.{every_option}"""


def _sizes(meta: dict[str, Any]) -> str:
    """Return the table of what is stored, against the real images."""
    real_bytes = meta["source"]["stored_bytes"]
    stored = {
        "images": meta["image_bytes"],
        "soft labels": meta["label_bytes"],
        "teacher": meta["teacher_bytes"],
        "real images as stored": real_bytes,
    }
    lines = (
        f"| {name} | {size(num)} | {_share(num, real_bytes)} |" for name, num in stored.items()
    )
    return "\n".join(["| | bytes | of the real images |", "|---|---:|---:|", *lines])


def _per_class(meta: dict[str, Any]) -> str:
    return f"{meta['ipc']} image{'s' * (meta['ipc'] > 1)} per class"


def _labelers(meta: dict[str, Any]) -> str:
    """Return what is to say of several teachers that label."""
    top1 = meta.get("teachers_top1")
    if not top1:
        return ""
    others = ", ".join(f"{100 * one:.1f}" for one in top1[1:])
    return (
        f" The soft labels are the mean logits of it and {len(top1) - 1} more (top-1 {others} %)."
    )


def _share(num_bytes: float, real_bytes: float) -> str:
    """Return bytes as a share of the real images' bytes."""
    if not real_bytes:
        return ""
    percent = 100 * num_bytes / real_bytes
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def _code(text: object) -> str:
    """Return text of data's as a span of code, with a fence that is longer than any inside."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def _entry(options: Any, *path: str) -> str | None:
    """Return the text at a path into recorded options, which may be any JSON; None where there is none."""
    for name in path:
        options = options.get(name) if isinstance(options, dict) else None
    return options if isinstance(options, str) else None
