"""Tables that people read: accuracies, recalls of classes, sizes, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from wmdd_ray.redaction import plain

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
        by_kind = {
            row["labels"]: row
            for row in table
            if (row.get("student", ""), row["row"]) == (student, name)
        }
        cells = " | ".join(
            f"{100 * by_kind[kind]['top1_mean']:.1f} ± {100 * by_kind[kind]['top1_std']:.1f}"
            if kind in by_kind
            else ""
            for kind in kinds
        )
        row = next(iter(by_kind.values()))
        lines.append(
            f"| {f'{text(student)} | ' if several else ''}{ROW_NAMES.get(name) or text(name)} | {row['num_images']} | "
            f"{row['epochs']} | "
            f"{cells} | {row['num_seeds']} |"
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
            lead = f"{points:.1f} points ahead of" if points >= 0.05 else "as good as"
            sentences.append(f"By {by} labels {name} are {lead} the distilled ones.")
    return sentences


def classes_text(class_names: Sequence[str], table: list[dict[str, Any]]) -> str:
    """Return, in Markdown, what each class's recall is, and which classes are lost against all real images.

    `table` has accuracy rows with `recall_per_class`, the mean over the seeds, in [0, 1] (evaluations before there was that entry
    have none).
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


def escaped(name: object) -> str:
    """Return a name of data's as it may stand in Markdown, a table's cell included: one line that is text and nothing else.

    Letters of all scripts stay. What HTML, Markdown or the sites that show it would take for a tag, a mark, a link or a
    person is escaped.
    """
    plain = "".join(c if c.isprintable() else " " for c in str(name))
    plain = _MARKS.sub(r"\\\g<0>", plain)
    return _HTML.sub(lambda match: f"&#{ord(match[0])};", plain)
