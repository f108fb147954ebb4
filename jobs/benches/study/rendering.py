"""Tables of the pages for readers, out of committed results."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from wmdd_ray.errors import ArtifactError

from .checks import read_result
from .judge import before_text
from .scores import different, spread
from .summary import line_of, percent, published_numbers, summary_lines

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "jobs" / "benches" / "results"
README = ROOT / "README.md"

LABELS = ("soft", "hard")
_PARTS = ("Recipe", "By soft labels", "By hard labels")
_BUDGET, _REST = "Budget", "Rest"
_HALF = "bfloat16"
_Recipe = dict[str, dict[str, str]]
"""Part -> setting -> what is done, in words."""
_PUBLISHED = "published"
_SUMMARY = "summary"


def committed(results: Path = RESULTS) -> dict[str, Path]:
    """Return the committed results by name: a table's, and after a hyphen which part of it was run apart (`main-ipc50`)."""
    paths = results.glob("accuracy-*.json")
    return dict(sorted((path.stem.removeprefix("accuracy-"), path) for path in paths))


def rendered(content: bytes, where: str) -> str:
    """Return the Markdown of a result, from its sealed bytes."""
    result = read_result(content, where)
    counts, opened = result["num_images"], result["opened"][:10]
    versions = result["versions"]
    groups = result["groups"]
    rows = [row for group in groups for row in group["rows"]]
    repeats = any(len(different(row[k])) < len(row[k]["top1"]) for row in rows for k in LABELS)
    before = before_text(result.get("opened_before", []))
    opening = (
        f"the {counts['test']:,} test images were opened once, after the last student, on {opened}"
    )
    spreads = "mean ± standard deviation over all students"
    one = "sets of the same images had the same students, which count once"
    shared = _shared([_recipe(group) for group in groups])
    recipe = [
        f"{part}: {', '.join(options.values())}." for part, options in shared.items() if options
    ]
    lines = [
        f"Teachers, students and every choice saw {counts['train']:,} training images ({counts['val']:,} more held out for "
        f"choices); {'; '.join(filter(None, (opening, before)))}. Last epoch, "
        f"{'; '.join((spreads, one) if repeats else (spreads,))}.",
        *[_teacher_line(name, teacher) for name, teacher in result["teachers"].items()],
        *_precision_lines(rows),
        *([" ".join(recipe)] if recipe else []),
        f"({result['hardware']}; torch {versions['torch']}, Python {versions['python']}, revision {result['git_revision']}.)",
    ]
    for run in _runs(groups):
        lines += ["", *_run_lines(run, shared)]
    return "\n".join(lines) + "\n"


def _teacher_line(name: str, teacher: dict[str, Any]) -> str:
    origin = "given" if teacher["given"] else f"{teacher['squeeze']['epochs']} epochs"
    if teacher["squeeze"]["mixed_precision"] and not teacher["given"]:
        origin += f", {_HALF}"
    return f"Teacher {name} ({origin}): top-1 {100 * teacher['top1']:.1f} %."


def _precision_lines(rows: list[dict[str, Any]]) -> list[str]:
    recovered = [row for row in rows if row["kind"] == "recover"]
    titles = [row["title"] for row in recovered if row["recover"]["mixed_precision"]]
    if not titles:
        return []
    which = "" if len(titles) == len(recovered) else f" ({', '.join(dict.fromkeys(titles))})"
    return [f"Images that are optimized{which}: in {_HALF}."]


def _recipe(group: dict[str, Any]) -> _Recipe:
    """Return in words what students of a group do: all of them, and those by each kind of labels."""
    student, network, hard = group["student"], group["student"]["network"], group["student"]["hard"]
    convolutional = network["arch"] == "convnet3"
    every = {
        "network": f"student {network['arch']}" + f" of width {network['width']}" * convolutional,
        "batch_size": f"batch {student['batch_size']}",
        "schedule": f"{student.get('schedule', 'cosine').replace('_', ' ')} schedule",
        "weight_decay": f"weight decay {student['weight_decay']:g}",
    }
    if student.get("ema_decay"):
        every["ema_decay"] = f"ema_decay {student['ema_decay']:g}"
    if student.get("weighted_loss"):
        every["weighted_loss"] = "weighted loss"
    if student["mixed_precision"]:
        every["mixed_precision"] = _HALF
    kl = student.get("loss", "kl") == "kl"
    soft = {
        "optimizer": f"{student['optimizer']} at {student['learning_rate']:g}",
        "norm": f"{network['norm']} norm",
        "views": _views_text(group["relabel"]["views"]),
        "loss": f"KL at T {student['temperature']:g}" if kl else "MSE to logits",
    }
    if student.get("ce_weight"):
        soft["ce_weight"] = f"ce_weight {student['ce_weight']:g}"
    if student.get("sinkhorn_weight"):
        soft["sinkhorn_weight"] = f"Sinkhorn distance {student['sinkhorn_weight']:g}"
    if group["relabel"].get("batch_statistics"):
        soft["batch_statistics"] = "labels by the batch's statistics"
    by_class = {
        "optimizer": f"{hard['optimizer']} at {hard['learning_rate']:g}",
        "norm": f"{hard['norm']} norm",
        "views": _views_text(hard["views"]),
        "loss": "cross-entropy",
    }
    if not convolutional:  # which has the one choice of norms
        del soft["norm"], by_class["norm"]
    return dict(zip(_PARTS, (every, soft, by_class), strict=True))


def _views_text(views: dict[str, Any]) -> str:
    mix = {"cutmix": "CutMix", "none": "no mixing"}[views["mix"]]
    flips = ", flips" if views["flip"] else ""
    return f"crops from {100 * views['crop_scale_min']:g} % of the area{flips}, {mix}"


def _shared(recipes: list[_Recipe]) -> _Recipe:
    """Return what is the same in all groups, which is said once."""
    usual = _usual(recipes)
    return {
        part: {
            name: text
            for name, text in options.items()
            if all(recipe[part].get(name) == text for recipe in recipes)
        }
        for part, options in usual.items()
    }


def _usual(recipes: list[_Recipe]) -> _Recipe:
    """Return what most groups do, setting by setting: the first's where as many do another thing."""
    usual: _Recipe = {}
    for part in recipes[0]:
        names = dict.fromkeys(name for recipe in recipes for name in recipe[part])
        counts = {name: Counter(recipe[part].get(name) for recipe in recipes) for name in names}
        most = {name: count.most_common(1)[0][0] for name, count in counts.items()}
        usual[part] = {name: text for name, text in most.items() if text is not None}
    return usual


def _without(recipe: _Recipe, said: _Recipe) -> _Recipe:
    """Return what of a recipe is not said yet, and of what is said what the recipe has not."""
    return {
        part: {
            **{
                name: text for name, text in options.items() if said.get(part, {}).get(name) != text
            },
            **{
                name: f"no {text}"
                for name, text in said.get(part, {}).items()
                if name not in options
            },
        }
        for part, options in recipe.items()
    }


def _told(group: dict[str, Any]) -> _Recipe:
    """Return a group's recipe between its budget and its labels and seeds."""
    others = len(group.get("labelers", [])) - 1
    labelers = group["labeled_by"] + (f" and {others} more" if others > 0 else "")
    sets = group["distill_seeds"]
    seeds = f"{sets} {'set' if sets == 1 else 'sets'} x {group['student_seeds']} students"
    budget = {"views": f"{group['rows'][0]['soft']['views']:,} views"}
    rest = {"labelers": f"labels by {labelers}", "seeds": seeds}
    return {_BUDGET: budget, **_recipe(group), _REST: rest}


def _text(recipe: _Recipe) -> str:
    every = ", ".join([*recipe[_BUDGET].values(), *recipe[_PARTS[0]].values()])
    kinds = [
        f"{part.lower()}: {', '.join(options.values())}"
        for part in _PARTS[1:]
        if (options := recipe[part])
    ]
    return "; ".join(filter(None, (every, *kinds, *recipe[_REST].values())))


def _runs(groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return neighbors of one ipc and the same rows together: they differ in labels and student, and share a table."""

    def rows_of(group: dict[str, Any]) -> tuple[Any, ...]:
        return group["ipc"], *(row["title"] for row in group["rows"])

    return [list(run) for _, run in groupby(groups, rows_of)]


def _run_lines(groups: list[dict[str, Any]], shared: _Recipe) -> list[str]:
    """Return one table of groups with the same rows; what one does unlike the most stands beside its rows."""
    alone = len(groups) == 1
    texts = [_told(group) for group in groups]
    usual = _usual(texts)
    ending = f", ipc {groups[0]['ipc']}"
    title = groups[0]["title"] if alone else ending.removeprefix(", ")
    exceptions = "" if alone else "; except where said"
    head = f"**{title}**: {_text(_without(usual, shared))}{exceptions}."
    columns = "trained on|soft labels|hard labels|students|images|labels|seconds to distil, fastest"
    titles = columns.split("|")
    if has_scores := any("lrs" in row for group in groups for row in group["rows"]):
        titles.append("LRS (HLR, IOR)")
    rule = "|---" + "|---:" * (len(titles) - 1) + "|"
    lines = [line_of(*titles if alone else ["labels and student", *titles])]
    lines += [rule if alone else f"|---{rule}"]
    for group, recipe in zip(groups, texts, strict=True):
        own = _text(_without(recipe, usual))
        name = group["title"].removesuffix(ending) + (f" ({own})" if own else "")
        for row in group["rows"]:
            cells = _row_cells(row, has_scores)
            lines.append(line_of(*cells if alone else [name, *cells]))
            name = ""
    return [head, "", *lines]


def _row_cells(row: dict[str, Any], has_scores: bool) -> list[str]:
    top1 = [different(row[kind]) for kind in LABELS]
    soft, hard = (percent(measured) for measured in map(spread, top1))
    students = " and ".join(dict.fromkeys(str(len(values)) for values in top1))
    images, labels = (size_text(statistics.fmean(row[k])) for k in ("image_bytes", "label_bytes"))
    # Other work on the machine only adds to these.
    fastest = min(row["distill_seconds"])
    seconds = f"{fastest:.1f}" if fastest < 10 else f"{fastest:.0f}"
    cells = [row["title"], soft, hard, students, images, labels, seconds]
    if has_scores:
        parts = row.get("lrs")
        cells.append(
            f"{parts['lrs']:.3f} ({parts['hlr']:+.3f}, {parts['ior']:+.3f})" if parts else "–"
        )
    return cells


def size_text(size_bytes: float) -> str:
    """Return bytes in words, with decimal units."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} KB"


def published_lines(dataset: str) -> list[str]:
    """Return the published numbers of a data set with label kind and source; those that store more floats apart."""
    anchors = published_numbers()[dataset]
    parts = (
        ("same_budget", "Published, images of the same number (ConvNet-3 of width 128 except where said)"),
        ("more_floats", "Published, methods that store more floats or decode more images of the stored ones (as `best` at ipc 1)"),
    )  # fmt: skip
    lines = []
    for key, title in parts:
        lines += [f"| {title} | labels | {' | '.join(anchors['columns'])} | source |"]
        lines += ["|---|---|---:|---:|---:|---|"]
        lines += [
            f"| {name} | {labels} | {' | '.join(values)} | {source} |"
            for name, labels, values, source in anchors[key]
        ]
        lines += [""]
    return lines[:-1]


def render(readme: Path = README, results: Path = RESULTS) -> list[str]:
    """Write all tables into the README of `results` and their summary into the root README; return the names of the results.

    Raises:
        ArtifactError: A result may not be shown, or a page has no place for it.
    """
    contents = {name: path.read_bytes() for name, path in committed(results).items()}
    tables = {name: rendered(content, name) for name, content in contents.items()}
    others = {
        f"{_PUBLISHED}-{dataset}": "\n".join(published_lines(dataset)) + "\n"
        for dataset in published_numbers()
    }
    _fill(results / "README.md", tables | others)
    summary = summary_lines(read_result(content, name) for name, content in contents.items())
    _fill(readme, {_SUMMARY: "\n".join(summary) + "\n"})
    return list(tables)


def _fill(page: Path, tables: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = markers(name)
        if begin not in text or end not in text:
            raise ArtifactError(f"{page}: expected the lines {begin} and {end} around the table")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table}{end}{after}"
    page.write_text(text, encoding="utf-8")


def markers(name: str) -> tuple[str, str]:
    """Return the lines around a table in its page."""
    return f"<!-- accuracy:{name} -->", f"<!-- /accuracy:{name} -->"
