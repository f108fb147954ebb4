"""The page itself: one HTML file that needs no network, made of a run's facts.

What a run says is anybody's text. Tables and sentences are a template that escapes all of it (page.html), charts are plotly's, and
page.js escapes what it gives to them. The policy in the head runs the two scripts whose hashes it names, and loads nothing from
anywhere. Of plotly's JavaScript the Python package ships only the full bundle (4.8 MB; the basic one of 1.2 MB is on npm
alone), so it lies in the page as gzip, 2.0 MB in base64, and the browser unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from wmdd_ray.product.card import training_lines
from wmdd_ray.product.pages.facts import RunFacts, accuracy, classes, command_of, options_of
from wmdd_ray.product.pages.timeline import Axis, lanes
from wmdd_ray.product.tables import ROW_NAMES, behind_real, size
from wmdd_ray.telling.progress import duration

_HERE = Path(__file__).parent
_SECTIONS = {
    "accuracy": "Accuracy",
    "pictures": "Pictures",
    "use": "Use it",
    "class": "One class",
    "costs": "All classes",
    "bytes": "Bytes",
    "time": "Time",
    "options": "Options and versions",
}


def render(
    facts: RunFacts, shown: list[dict[str, Any]], missing: list[str], card: str | None = None
) -> bytes:
    """Return the page of a run.

    `shown` is what `classes.shown_classes` found of the classes that are shown in full, `missing` are sentences on what could not
    be shown. `card` is where the set's card lies, seen from the page; None for no link.
    """
    # Imported here: a run that writes no page needs it not.
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    plotly, script, style = get_plotlyjs().encode(), _read("page.js"), _read("page.css")
    rows = [{**row, "name": ROW_NAMES.get(row["row"], row["row"])} for row in accuracy(facts)]
    every_class, axis, recover = classes(facts), Axis(facts.timeline), facts.config.recover
    starts_nearest = recover.start == "nearest" and recover.tiles == 1
    data = {
        "classes": every_class,
        "shown": shown,
        "accuracy": rows,
        "teacher_top1": facts.metrics("squeeze").get("top1"),
        "bytes": _bytes(facts),
        "time": _time(facts, axis),
        "real_caption": "real image nearest to its atom"
        + (", its start" if recover.method == "inversion" and starts_nearest else ""),
    }
    templates = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html").render(
        policy=_policy([script.encode(), plotly], style.encode()),
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(base64.b64encode(gzip.compress(plotly, mtime=0)).decode()),
        data=_json(data),
        sections=_SECTIONS,
        stages=facts.stages,
        count=_count,
        title=f"{facts.config.recipe}, {_count(facts.config.ipc, 'image')} a class",
        lead=_lead(facts),
        uri=facts.uri,
        tiles=_tiles(facts, rows, axis),
        missing=[*facts.missing, *missing],
        accuracy=_accuracy(facts, rows),
        pictures=_pictures(shown),
        num_shown=len(shown),
        num_classes=len(every_class),
        card=card,
        snippet=training_lines(json.dumps(f"{facts.uri}/dataset", ensure_ascii=False)),
        command=command_of(facts),
        made=_made(facts),
        costs=_costs(every_class),
        bytes_rows=_bytes_rows(facts),
        time=_time_table(facts),
        about=_about(facts),
        options=[[name, str(value)] for name, value in options_of(facts).items()],
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return page.encode(errors="backslashreplace")


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _policy(scripts: list[bytes], style: bytes) -> str:
    """Return a policy that runs and applies these texts, and nothing else that stands in the page or comes from elsewhere."""

    def hashes(*texts: bytes) -> str:
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts
        )

    # plotly makes an empty style sheet and fills it by its rules.
    return (
        f"default-src 'none'; img-src data: blob:; style-src {hashes(style, b'')}; style-src-attr 'unsafe-inline'; "
        f"script-src {hashes(*scripts)}; base-uri 'none'; form-action 'none'"
    )


def _json(data: Any) -> Markup:
    """Return JSON that ends no script element, whatever the class names are."""
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(packed.replace("<", "\\u003c"))


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number:,} {what if number == 1 else plural}"


def _lead(facts: RunFacts) -> str:
    names, config = facts.class_names, facts.config
    what = f"{_count(len(names), 'class')} of {config.data}" if names else config.data
    finished = [name for name, stage in facts.stages.items() if stage.commit]
    if len(finished) == len(facts.stages):
        return f"{what}; all {len(finished)} stages finished."
    left = [name for name in facts.stages if name not in finished]
    return f"{what}; {len(finished)} of {len(facts.stages)} stages finished, not {', '.join(left)}."


def _tiles(facts: RunFacts, table: list[dict[str, Any]], axis: Axis) -> list[tuple[str, str, str]]:
    """Return (what, value, note) of the numbers at the top."""
    tiles: list[tuple[str, str, str]] = []
    made = facts.metrics("assemble")
    if made:
        real, parts = made["source"], _bytes(facts)[1:]
        images = f"{made['num_images']:,}"
        tiles.append(("images", images, f"for {_count(real['num_images'], 'real image')}"))
    for row in table:
        if row["row"] != "distilled":
            continue
        rest = [r for r in table if r["row"] == "random_real" and r["labels"] == row["labels"]]
        beside = f"random real images {_percent(rest[0])}" if rest else "no baseline"
        tiles.append((f"top-1 %, {row['labels']} labels", _percent(row), beside))
    if made:
        total = size(sum(part["bytes"] for part in parts))
        summands = " + ".join(f"{part['told']} {part['short']}" for part in parts if part["bytes"])
        note = f"{summands}; real set {size(real['stored_bytes'])}"
        tiles.append(("size, all in all", total, note))
    if axis.active_s:
        runs = _count(len(facts.timeline.sessions), "run")
        tiles.append(("time", duration(axis.active_s), f"in {runs}"))
    return tiles


def _percent(row: dict[str, Any]) -> str:
    spread = f" ± {100 * row['top1_std']:.1f}" if row["num_seeds"] > 1 else ""
    return f"{100 * row['top1_mean']:.1f}{spread}"


def _accuracy(facts: RunFacts, table: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "student": facts.config.evaluate.network.arch,
        "behind": behind_real(table),
        "head": [
            *("student trained on", "labels", "images", "passes", "top-1 %", "n"),
            *("label entropy, nats", "label diversity, nats"),
        ],
        "rows": [
            [
                row["name"],
                f"{row['labels']} labels",
                _number(row.get("num_images")),
                _number(row.get("epochs")),
                _percent(row),
                str(row["num_seeds"]),
                *(_number(row.get(name)) for name in ("label_entropy", "label_diversity")),
            ]
            for row in table
        ],
    }


def _pictures(shown: list[dict[str, Any]]) -> str:
    """Return what the sheet of pictures shows; nothing when there are none."""
    images = [image for one in shown for image in one["images"]]
    if any("distilled" in image for image in images):
        return "Distilled images"
    return "Real images nearest to the atoms" if images else ""


def _made(facts: RunFacts) -> str:
    """Return how the images of this run were made."""
    recover = facts.config.recover
    if recover.method == "diffusion":
        return (
            "The images were sampled from a diffusion model, one after another, and meet no atom."
        )
    start = {
        "nearest": "as the real image nearest to its atom"
        + (", made small" if recover.tiles > 1 else ""),
        "random": "as a real image drawn at random",
        "mosaic": "as a mosaic of crops that the teacher finds easy",
        "noise": "as noise",
    }[recover.start]
    return f"Image j was made to meet atom j. Each image began {start}."


def _costs(every_class: list[dict[str, Any]]) -> dict[str, Any]:
    if not any(one["cost"] is not None for one in every_class):
        return {"rows": []}
    terms = list(dict.fromkeys(term for one in every_class for term in one["losses"]))
    rows_of = list(dict.fromkeys(row for one in every_class for row in one["recall"]))
    head = ["class", "real images", "W2² cost", "solver steps"]
    head += [f"{term} loss" for term in terms]
    head += [f"top-1 %, {row.replace('_', ' ')}" for row in rows_of]
    rows = [
        [
            one["name"],
            _number(one["num_images"]),
            _number(one["cost"]),
            _number(one["num_iters"]) + (" (not converged)" if one["converged"] is False else ""),
            *(_number(one["losses"].get(term)) for term in terms),
            *(
                f"{100 * one['recall'][row]:.1f}" if row in one["recall"] else "–"
                for row in rows_of
            ),
        ]
        for one in every_class
    ]
    return {"head": head, "rows": rows}


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _bytes(facts: RunFacts) -> list[dict[str, Any]]:
    """Return the real set's bytes, then those of the distilled set's parts."""
    made = facts.metrics("assemble")
    if not made:
        return []
    parts = [
        ("real images", "real", "real set", made["source"]["stored_bytes"]),
        ("distilled images", "images", "distilled set", made["image_bytes"]),
        ("labels", "labels", "distilled set", made["label_bytes"]),
        ("teacher", "teacher", "distilled set", made["teacher_bytes"]),
    ]
    return [
        {"name": name, "short": short, "bar": bar, "bytes": num_bytes, "told": size(num_bytes)}
        for name, short, bar, num_bytes in parts
    ]


def _bytes_rows(facts: RunFacts) -> list[list[str]]:
    parts = _bytes(facts)
    if not parts:
        return []
    real, total = parts[0]["bytes"], sum(part["bytes"] for part in parts[1:])
    rows = [[part["name"], part["told"], _share(part["bytes"], real)] for part in parts]
    return [*rows, ["distilled set, whole", size(total), _share(total, real)]]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "–"


def _time(facts: RunFacts, axis: Axis) -> dict[str, Any]:
    """Return bars and rows for the chart; seconds on the axis."""
    bars = facts.timeline.bars
    rows, blocks = lanes(bars)
    return {
        "bars": [
            {
                "stage": bar.stage,
                "unit": bar.unit,
                "node": bar.node,
                "attempt": bar.attempt,
                "state": bar.state,
                "reason": bar.reason[:300],
                "lane": row,
                "begin": round(axis(bar.begin), 3),
                "seconds": round(bar.end - bar.begin, 3),
                "told": duration(bar.end - bar.begin),
                "at": datetime.fromtimestamp(bar.begin, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            }
            for bar, row in zip(bars, rows, strict=True)
        ],
        "stages": [{"name": name, "first": first, "lanes": count} for name, first, count in blocks],
        "length": round(axis.length, 3),
        "num_lanes": sum(count for _, _, count in blocks),
        "sessions": [{"begin": round(axis(s.begin), 3)} for s in facts.timeline.sessions],
    }


def _time_table(facts: RunFacts) -> dict[str, Any]:
    rows = []
    for name, stage in facts.stages.items():
        markers, commit = stage.units.values(), stage.commit
        core = commit.metrics.get("seconds_in_core") if commit else None
        longest = max(markers, key=lambda m: m.seconds, default=None)
        rows.append(
            [
                name,
                stage.state,
                f"{len(stage.units):,}",
                duration(commit.seconds) if commit else "–",
                duration(core) if core is not None else "–",
                f"{duration(longest.seconds)} ({longest.unit})" if longest else "–",
                str(sum(m.attempt > 1 for m in markers)),
            ]
        )
    left_out = facts.timeline.left_out.items()
    return {
        "head": [
            "stage",
            "state",
            "units",
            "last run of it",
            "inside core",
            "longest unit",
            "retried",
        ],
        "rows": rows,
        "bars": len(facts.timeline.bars),
        "left_out": ", ".join(f"{count:,} of {stage}" for stage, count in left_out),
        "sessions": _sessions_told(facts),
    }


def _sessions_told(facts: RunFacts) -> str:
    """Return the runs in a sentence: how many, and how each of them ended."""
    sessions = facts.timeline.sessions
    if not sessions:
        return (
            "The run's event log is empty: what is shown comes from the markers of finished units."
        )
    if len(sessions) == 1 and sessions[0].ended:
        return f"One run, which ended with exit code {sessions[0].exit_code}."
    ends = [
        f"exit code {session.exit_code}"
        if session.ended
        else "no end in its log (killed, or still at work)"
        for session in sessions
    ]
    return f"{_count(len(sessions), 'run')}: {'; '.join(ends)}. Dashed lines: restarts."


def _about(facts: RunFacts) -> list[list[str]]:
    record = facts.record
    return [
        ["revision", str(record.get("git_revision") or "–")],
        ["hardware of the driver", str(record.get("hardware", "–"))],
        ["last run began", str(record.get("started", "–"))],
        *([name, str(value)] for name, value in record.get("versions", {}).items()),
    ]
