"""Tables of the README out of committed results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from jobs.benches.accuracy.checks import read_result
from jobs.benches.accuracy.judge import before_text
from jobs.benches.accuracy.scores import different, spread
from wmdd_ray.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "jobs" / "benches" / "results"
README = ROOT / "README.md"

LABELS = ("soft", "hard")
_PUBLISHED = "published"


def committed(results: Path = RESULTS) -> dict[str, Path]:
    """Return the committed results by name: a table's, and after a hyphen which part of it was run apart (`main-ipc50`)."""
    paths = results.glob("accuracy-*.json")
    return dict(sorted((path.stem.removeprefix("accuracy-"), path) for path in paths))


def rendered(content: bytes, where: str) -> str:
    """Return the Markdown of a result, from its sealed bytes."""
    result = read_result(content, where)
    counts, opened = result["num_images"], result["opened"][:10]
    versions = result["versions"]
    rows = [row for group in result["groups"] for row in group["rows"]]
    before = before_text(result.get("opened_before", []))
    repeats = any(len(different(row[k])) < len(row[k]["top1"]) for row in rows for k in LABELS)
    lines = [
        f"Teachers, students and every choice saw {counts['train']:,} training images ({counts['val']:,} more held out for "
        f"choices); the {counts['test']:,} test images were opened once, after the last student, on {opened}"
        + f"; {before}"
        * bool(before)
        + ". Last epoch, "
        "mean ± standard deviation over all students"
        + repeats * "; sets of the same images had the same students, which count once"
        + ".",
        *[_teacher_line(name, found) for name, found in result["teachers"].items()],
        f"({result['hardware']}; torch {versions['torch']}, Python {versions['python']}, revision {result['git_revision']}.)",
    ]
    for group in result["groups"]:
        lines += ["", *_group_lines(group)]
    return "\n".join(lines) + "\n"


def _teacher_line(name: str, found: dict[str, Any]) -> str:
    origin = "given" if found["given"] else f"{found['squeeze']['epochs']} epochs"
    return f"Teacher {name} ({origin}): top-1 {100 * found['top1']:.1f} %."


def _group_lines(group: dict[str, Any]) -> list[str]:
    student, network = group["student"], group["student"]["network"]
    arch = network["arch"] + (f" of width {network['width']}" * (network["arch"] == "convnet3"))
    settings = [
        f"batch {student['batch_size']}",
        f"{student['optimizer']} at {student['learning_rate']:g}",
        student.get("schedule", "cosine").replace("_", " "),
    ]
    loss = student.get("loss", "kl")
    settings.append(f"KL at T {student['temperature']:g}" if loss == "kl" else "MSE to logits")
    for name in ("ce_weight", "ema_decay"):
        if student.get(name):
            settings.append(f"{name} {student[name]:g}")
    if student.get("sinkhorn_weight"):
        settings.append(f"Sinkhorn distance {student['sinkhorn_weight']:g}")
    if student.get("weighted_loss"):
        settings.append("weighted loss")
    views = group["rows"][0]["soft"]["views"]
    others = len(group.get("labelers", [])) - 1
    labelers = group["labeled_by"] + (f" and {others} more" if others > 0 else "")
    sets = group["distill_seeds"]
    seeds = f"{sets} {'set' if sets == 1 else 'sets'} x {group['student_seeds']} students"
    head = (
        f"**{group['title']}**: student {arch}, {views:,} views, {', '.join(settings)}; labels by {labelers}; "
        f"{seeds}."
    )
    columns = "trained on|soft labels|hard labels|students|images|labels|seconds to distil, fastest"
    titles = columns.split("|")
    if has_scores := any("lrs" in row for row in group["rows"]):
        titles.append("LRS (HLR, IOR)")
    table = [_line(titles), "|---" + "|---:" * (len(titles) - 1) + "|"]
    return [head, "", *table, *[_row_line(row, has_scores) for row in group["rows"]]]


def _row_line(row: dict[str, Any], has_scores: bool) -> str:
    top1 = [different(row[kind]) for kind in LABELS]
    soft, hard = (
        f"{100 * told['mean']:.1f} ± {100 * told['std']:.1f}" for told in map(spread, top1)
    )
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
    return _line(cells)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def size_text(size_bytes: float) -> str:
    """Return bytes in words, with decimal units."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} KB"


def published_lines() -> list[str]:
    """Return the published numbers with label kind and source; those that store more floats apart."""
    found = json.loads((Path(__file__).parent / "published.json").read_text())
    parts = (
        ("same_budget", "Published, images of the same number (ConvNet-3 of width 128 except where said)"),
        ("more_floats", "Published, methods that store more floats than the images, or decode more images from them"),
    )  # fmt: skip
    lines = []
    for key, title in parts:
        lines += [f"| {title} | labels | {' | '.join(found['columns'])} | source |"]
        lines += ["|---|---|---:|---:|---:|---|"]
        lines += [
            f"| {name} | {labels} | {' | '.join(values)} | {source} |"
            for name, labels, values, source in found[key]
        ]
        lines += [""]
    return lines[:-1]


def render(readme: Path = README, results: Path = RESULTS) -> list[str]:
    """Write the tables of all committed results, and the published numbers, between their markers in the README.

    Returns:
        The names of the results.

    Raises:
        ArtifactError: A result may not be shown, or the README has no place for it.
    """
    text, paths = readme.read_text(encoding="utf-8"), committed(results)
    tables = {name: rendered(path.read_bytes(), str(path)) for name, path in paths.items()}
    for name, table in {**tables, _PUBLISHED: "\n".join(published_lines()) + "\n"}.items():
        begin, end = markers(name)
        if begin not in text or end not in text:
            raise ArtifactError(f"{readme}: expected the lines {begin} and {end} around the table")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table}{end}{after}"
    readme.write_text(text, encoding="utf-8")
    return list(tables)


def markers(name: str) -> tuple[str, str]:
    """Return the lines around a table in the README."""
    return f"<!-- accuracy:{name} -->", f"<!-- /accuracy:{name} -->"
