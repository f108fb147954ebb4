"""What every benchmark ends with: spreads of numbers, a table, and a JSON file with all that they depend on."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wmdd_ray.spine.provenance import hardware, versions

Row = dict[str, Any]
Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Return n, min, median and max."""
    summary = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {"n": len(values), **{name: float(f"{value:.5g}") for name, value in summary.items()}}


def mean_and_std(values: Sequence[float]) -> dict[str, Any]:
    """Return mean and standard deviation (of a sample; 0 of one value), and the values."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def report(rows: list[Row], settings: dict[str, Any], out: str | None) -> None:
    """Print the rows (a spread as `median (min-max)`) and write them to `out` with all that they depend on."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['median']:.4g} ({value['min']:.4g}-{value['max']:.4g})"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, *([text(row.get(name, "-")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"{hardware()}; {settings}")
    if out is not None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"date": date, "hardware": hardware(), **versions()}
        save({**about, "settings": settings, "rows": rows}, Path(out))


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record as a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written: {path}", file=sys.stderr)
