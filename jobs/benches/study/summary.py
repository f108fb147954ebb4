"""The table of the root README: `best` beside real images and published numbers, out of the results that the full tables show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .definitions import FULL, RANDOM
from .scores import different, spread

TABLES = ("digits", "main", "cifar10")
"""Tables whose rows are summarized; the others change one thing in them."""
_ORDER = ("digits", "fashion_mnist", "cifar10")
_ROWS = ("best", RANDOM, "nearest_real")
_TITLES = ("data, student", "images a class", "WMDD `best`", "random real", "nearest real")
_PUBLISHED_WIDTH = 128
"""Channels of the ConvNet-3 that published numbers are of."""
_NONE = "–"


def summary_lines(results: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each data set, its widest student, and number of images a class: top-1 % by soft / by hard labels."""
    groups = [
        (result["dataset"], group["student"]["network"], group["ipc"], group["rows"])
        for result in results
        if result["table"] in TABLES
        for group in result["groups"]
    ]
    groups.sort(key=lambda each: (_ORDER.index(each[0]), each[2] or float("inf")))
    widest = {
        dataset: max(each[1]["width"] for each in groups if each[0] == dataset)
        for dataset in _ORDER
        if any(each[0] == dataset for each in groups)
    }
    lines = []
    for dataset, network, ipc, rows in groups:
        if network["width"] < widest[dataset]:
            continue
        by_name = {row["name"]: row for row in rows}
        cells = {name: _cell(row) for name, row in by_name.items()}
        if FULL in cells:
            cells = {RANDOM: cells[FULL]}
        published = _NONE
        if "best" in by_name and network["width"] == _PUBLISHED_WIDTH:
            tiled = by_name["best"]["num_read"] > by_name["best"]["num_stored"]
            budgets = ("same_budget", "more_floats") if tiled else ("same_budget",)
            published = _published(dataset, f"ipc {ipc}", budgets)
        student = f"`{dataset}`, {network['arch']} of width {network['width']}"
        kinds = [cells.get(name, _NONE) for name in _ROWS]
        lines.append(line_of(student, str(ipc or "all"), *kinds, published))
    head = line_of(*_TITLES, "best published")
    # The row of all real images stands in every part of a table that was run apart.
    return [head, "|---|" + "---:|" * len(_TITLES), *dict.fromkeys(lines)]


def line_of(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def percent(measured: dict[str, Any]) -> str:
    """Return accuracies in percent: their mean and standard deviation."""
    return f"{100 * measured['mean']:.1f} ± {100 * measured['std']:.1f}"


def _cell(row: dict[str, Any]) -> str:
    return " / ".join(
        f"{100 * spread(different(row[kind]))['mean']:.1f}" for kind in ("soft", "hard")
    )


def published_numbers() -> dict[str, Any]:
    """Return what others published, by data set: rows of (name, kind of labels, values by column, source)."""
    numbers: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
    return numbers


def _published(dataset: str, column: str, budgets: Sequence[str]) -> str:
    """Return the best numbers of distilled images by soft labels and by hard ones, of those whose source was read."""
    published = published_numbers().get(dataset)
    if published is None:
        return _NONE
    index = published["columns"].index(column)
    cells = []
    for kind in ("soft", "hard"):
        values = {
            name: float(values[index].split()[0])
            for budget in budgets
            for name, labels, values, source in published[budget]
            if labels.startswith(kind)
            and "real images" not in name.lower()
            and "not verified" not in source
            if values[index] not in ("", _NONE)
        }
        name = max(values, key=values.__getitem__, default="")
        cells.append(f"{values[name]:.1f} ({name.split()[0].strip(',')})" if name else _NONE)
    return " / ".join(cells)
