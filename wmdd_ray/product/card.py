"""Text that people read about a distilled set: its card, its table, sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from wmdd_ray import __version__
from wmdd_ray.config import DistillConfig
from wmdd_ray.options import fingerprint_options
from wmdd_ray.redaction import plain, public

ROW_NAMES = {
    "distilled": "(a) distilled set",
    "random_real": "(b) random real images",
    "nearest_real": "(c) real images nearest to the atoms",
    "random_tiles": "(b') random real images, small, as many as tiles",
    "nearest_tiles": "(c') real images nearest to the atoms, small, as many as tiles",
    "all_real": "(d) all real images",
}
_MARKS = re.compile(r"[\\`*_\[\]~|]")
_HTML = re.compile(r"[<>&@]|(?<=[A-Za-z]):(?=//)|(?<=www)\.")
# More classes than this are a page nobody reads: the worst are shown.
_SHOWN_CLASSES = 30
# A class that loses more recall than this against all real images is named.
_LOST_POINTS = 10
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


def results_table(table: list[dict[str, Any]], *, for_page: bool = True) -> str:
    """Return the accuracy table in Markdown, soft and hard labels side by side.

    Args:
        table: a row each of `row` and `labels`, with `num_images`, `epochs`, `top1_mean`, `top1_std`, `num_seeds` (accuracies
            in [0, 1]); `student` as well where there are several.
        for_page: Whether names are escaped, for a page that renders it; a terminal shows them as they are.
    """
    text = escaped if for_page else plain
    kinds = list(dict.fromkeys(row["labels"] for row in table))
    several = "student" in table[0]
    lines = [
        f"| {'student | ' if several else 'student '}trained on | images | passes | "
        f"{' | '.join(f'top-1 %, {text(kind)} labels' for kind in kinds)} | seeds |",
        f"|---|{'---|' if several else ''}---:|---:|{'---:|' * len(kinds)}---:|",
    ]
    for student, name in dict.fromkeys((row.get("student", ""), row["row"]) for row in table):
        found = {
            row["labels"]: row
            for row in table
            if (row.get("student", ""), row["row"]) == (student, name)
        }
        told = " | ".join(
            f"{100 * found[kind]['top1_mean']:.1f} ± {100 * found[kind]['top1_std']:.1f}"
            if kind in found
            else ""
            for kind in kinds
        )
        row = next(iter(found.values()))
        lines.append(
            f"| {f'{text(student)} | ' if several else ''}{ROW_NAMES.get(name) or text(name)} | {row['num_images']} | "
            f"{row['epochs']} | "
            f"{told} | {row['num_seeds']} |"
        )
    return "\n".join([*lines, *(f"\n{text(sentence)}" for sentence in behind_real(table))])


def behind_real(table: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each student and kind of labels by which as many real images are ahead of the distilled ones."""
    sentences = []
    for own in table:
        rivals = [
            row
            for row in table
            if (row.get("student"), row["labels"]) == (own.get("student"), own["labels"])
            and row["row"] not in ("distilled", "all_real")
        ]
        best = max(rivals, key=lambda row: float(row["top1_mean"]), default=own)
        points = 100 * (best["top1_mean"] - own["top1_mean"])
        if own["row"] == "distilled" and points > 0:
            by = f"{own['student']}, {own['labels']}" if "student" in own else own["labels"]
            name = ROW_NAMES.get(best["row"], best["row"]).partition(") ")[2] or best["row"]
            sentences.append(
                f"By {by} labels {name} are {points:.1f} points ahead of the distilled ones."
            )
    return sentences


def classes_text(class_names: Sequence[str], table: list[dict[str, Any]]) -> str:
    """Return, in Markdown, what each class's recall is, and which classes are lost against all real images.

    Args:
        class_names: names of the classes.
        table: accuracy rows with `recall_per_class`, the mean over the seeds, in [0, 1] (evaluations before there was that
            entry have none).
    """
    recalls = {
        (row["labels"], row["row"]): 100 * np.array(row["recall_per_class"])
        for row in table
        if "recall_per_class" in row
    }
    kinds = [kind for kind, row in recalls if row == "distilled"]
    if not kinds:
        return ""
    summary: list[str] = []
    columns: dict[str, np.ndarray] = {}
    worst = np.zeros(len(class_names))
    for kind in kinds:
        own_Y, real_Y = recalls[kind, "distilled"], recalls.get((kind, "all_real"))
        low = int(own_Y.argmin())
        text = (
            f"- {escaped(kind.capitalize())} labels: recall from {own_Y[low]:.1f} % ({escaped(class_names[low])}) to "
            f"{own_Y.max():.1f} %, median {np.median(own_Y):.1f} %"
        )
        kind = escaped(kind)
        columns[f"{kind} labels"] = own_Y
        if real_Y is None:
            worst = np.maximum(worst, 100 - own_Y)
            text += "; students of all real images were not trained, so what is lost against them is not known."
        else:
            lost_Y = real_Y - own_Y
            worst = np.maximum(worst, lost_Y)
            columns[f"all real images, {kind}"] = real_Y
            columns[f"difference, {kind}"] = own_Y - real_Y
            order = np.argsort(-lost_Y, kind="stable").tolist()
            named = [k for k in order if lost_Y[k] > _LOST_POINTS]
            covered = int((own_Y >= real_Y / 2).sum())
            text += (
                f". {len(named)} of {len(class_names)} classes lose more than {_LOST_POINTS} points against students of all real "
                f"images{': ' if named else ''}"
                + ", ".join(f"{escaped(class_names[k])} ({-lost_Y[k]:.1f})" for k in named[:10])
                + (f", and {len(named) - 10} more" if len(named) > 10 else "")
                + f". Coverage: {covered} of {len(class_names)} classes keep at least half of that recall."
            )
        summary.append(text)
    order = list(range(len(class_names)))
    what = "Recall in %, differences in points"
    if len(class_names) > _SHOWN_CLASSES:
        order = np.argsort(-worst, kind="stable")[:_SHOWN_CLASSES].tolist()
        what += f"; the {_SHOWN_CLASSES} worst of {len(class_names)} classes (all are in the results of the evaluation)"
    lines = [
        f"| class | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(
            f"| {escaped(class_names[k])} | "
            + " | ".join(
                f"{values_Y[k]:{'+' if name.startswith('difference') else ''}.1f}"
                for name, values_Y in columns.items()
            )
            + " |"
            for k in order
        ),
    ]
    seeds = max(row["num_seeds"] for row in table)
    return (
        f"The share of each class's held-out images that students recognize, mean over {seeds} students. Look here for what a mean "
        "hides: a distilled set has few images a class, and rare kinds within a class are the first to go.\n\n"
        + "\n".join(summary)
        + f"\n\n{what}:\n\n"
        + "\n".join(lines)
    )


def dataset_card(
    meta: dict[str, Any], config: DistillConfig, table: list[dict[str, Any]] | None
) -> str:
    """Return the README.md of a data set: what it is, where it is from, how to use it, how good it is.

    It is written with the set, when nothing is measured yet, and again from the committed results of an evaluation; the
    manifest does not list it.

    Args:
        meta: the manifest's metadata.
        config: the run's configuration.
        table: accuracy rows, or None before an evaluation.
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
    """Return the README.md of an exported set.

    Args:
        meta: metadata of the manifest of the set.
        table: accuracy rows of the evaluation beside the set, or None.
        layout: `imagefolder`, `webdataset` or `huggingface`.
        labels: `soft` when the teacher's logits on whole images go along.
        teacher_sha256: of the teacher's file.
        license_name: license identifier; None is what the set says.
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
        tags=["dataset-distillation", "synthetic"],
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
    classes = classes_text(meta["class_names"], table) if table else ""
    classes = f"## Classes\n\n{classes}\n\n" if classes else ""
    return f"""{front}

# Distilled {_code(real["uri"])}: {_per_class(meta)}

{meta["num_images"]} synthetic images of {len(meta["class_names"])} classes{given} in place of {real["num_images"]} real images.
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
real images. The images are optimized for one teacher and {meta["image_size"]} pixels: other architectures, other sizes and
other tasks than this classification gain less, and have to be measured. Synthetic images can carry the biases, the label errors
and the personal content of the images that they are made from, and make the rare rarer. Distillation is no anonymization:
images that start from real ones can look like them.

## Citation

The method, and the software that made this set:

{_CITATION}

## Provenance

{_provenance(meta, options, teacher_sha256)}
"""


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


def escaped(name: object) -> str:
    """Return a name of data's as it may stand in Markdown, a table's cell included: one line that is text and nothing else.

    Letters of all scripts stay. What HTML, Markdown or the sites that show it would take for a tag, a mark, a link or a
    person is escaped.
    """
    plain = "".join(c if c.isprintable() else " " for c in str(name))
    plain = _MARKS.sub(r"\\\g<0>", plain)
    return _HTML.sub(lambda found: f"&#{ord(found[0])};", plain)


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
