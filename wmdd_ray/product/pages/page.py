"""The page itself: one HTML file that needs no network, made of a run's facts.

Tables and sentences are written here and need no script; charts are plotly's. Of its JavaScript the Python package ships
only the full bundle (4.8 MB; the basic one of 1.2 MB is on npm alone), so it lies in the page as gzip, 2.0 MB in base64, and
the browser unpacks it. The policy in the head lets the browser load nothing from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import json
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from wmdd_ray.product.card import ROW_NAMES, size
from wmdd_ray.product.pages.facts import RunFacts, accuracy, classes
from wmdd_ray.product.pages.timeline import Axis, lanes
from wmdd_ray.spine.run import flatten
from wmdd_ray.telling.progress import duration

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
_SECTIONS = {
    "accuracy": "Accuracy",
    "pictures": "Pictures",
    "class": "One class",
    "costs": "All classes",
    "bytes": "Bytes",
    "time": "Time",
    "options": "Options and versions",
}


def render(facts: RunFacts, shown: list[dict[str, Any]], missing: list[str]) -> bytes:
    """Return the page.

    Args:
        facts: the run.
        shown: what `jobs.pages.classes.shown_classes` found of the classes that are shown in full.
        missing: sentences on what could not be shown.
    """
    table = [{**row, "name": ROW_NAMES.get(row["row"], row["row"])} for row in accuracy(facts)]
    found = classes(facts)
    axis = Axis(facts.timeline)
    data = {
        "classes": found,
        "shown": shown,
        "accuracy": table,
        "teacher_top1": facts.metrics("squeeze").get("top1"),
        "bytes": _bytes(facts),
        "time": _time(facts, axis),
        "real_caption": "real image nearest to its atom"
        + (", its start" if _starts_nearest(facts) else ""),
    }
    sections = {
        "accuracy": _accuracy(facts, table),
        "pictures": _pictures(facts, shown, len(found)),
        "class": _one_class(facts, shown),
        "costs": _costs(found),
        "bytes": _bytes_table(facts),
        "time": _time_tables(facts, axis),
        "options": _options(facts),
    }
    body = "\n".join(
        f'<section id="{key}"><h2>{_SECTIONS[key]}</h2>\n{content}</section>'
        for key, content in sections.items()
    )
    title = f"{facts.config.recipe}, {_count(facts.config.ipc, 'image')} a class"
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in _SECTIONS.items())
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}: distilled</title>
<link rel="icon" href="data:,">
<style>
{_text("page.css")}</style>
</head>
<body>
<header>
<div class="title"><div><h1>Distilled: {escape(title)}</h1>
<p class="lead">{escape(_lead(facts))} <code>{escape(facts.uri)}</code></p></div>
<button id="theme" type="button" title="light or dark">◐</button></div>
<dl class="tiles">{_tiles(facts, table, axis)}</dl>
{_missing(facts, missing)}
<p id="charts-failed" class="absent" hidden>This browser cannot unpack the charts (it needs DecompressionStream:
Chrome 80, Firefox 113, Safari 16.4, or newer). Tables and pictures are complete without them.</p>
</header>
<nav><div>{links}</div></nav>
<main>
{body}
</main>
<footer>Made {now} by <code>jobs/report.py</code> of wmdd_ray. Loads nothing from the network.</footer>
<dialog id="zoom"><div id="zoom-body"></div><button id="zoom-close" type="button">Close</button></dialog>
<script type="application/json" id="facts">{_json(data)}</script>
<script type="text/plain" id="plotly">{_plotly()}</script>
<script>
{_text("page.js")}</script>
</body>
</html>
"""
    return page.encode()


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """Return JSON that ends no script element, whatever the class names are."""
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return packed.replace("<", "\\u003c")


def _plotly() -> str:
    # Imported here: a run that writes no page needs it not.
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number:,} {what if number == 1 else plural}"


def _starts_nearest(facts: RunFacts) -> bool:
    recover = facts.config.recover
    inverted = recover.method == "inversion"
    return inverted and recover.start == "nearest" and recover.tiles == 1


def _absent(facts: RunFacts, stage: str) -> str:
    """Return the words in place of what an unfinished stage would have given."""
    found = facts.stages[stage]
    done = f" ({_count(len(found.units), 'unit')} done)" if found.units else ""
    return (
        f'<p class="absent">Nothing to show yet: the stage <code>{stage}</code> is {found.state}{done}. The command of the '
        "run goes on with it.</p>"
    )


def _lead(facts: RunFacts) -> str:
    names, config = facts.class_names, facts.config
    what = f"{_count(len(names), 'class')} of {config.data}" if names else config.data
    finished = [name for name, stage in facts.stages.items() if stage.commit]
    if len(finished) == len(facts.stages):
        return f"{what}; all {len(finished)} stages finished."
    left = [name for name in facts.stages if name not in finished]
    return f"{what}; {len(finished)} of {len(facts.stages)} stages finished, not {', '.join(left)}."


def _tiles(facts: RunFacts, table: list[dict[str, Any]], axis: Axis) -> str:
    tiles: list[tuple[str, str, str]] = []
    for row in table:
        if row["row"] != "distilled":
            continue
        rest = [r for r in table if r["row"] == "random_real" and r["labels"] == row["labels"]]
        beside = f"random real images {_percent(rest[0])}" if rest else "no baseline"
        tiles.append((f"top-1 %, {row['labels']} labels", _percent(row), beside))
    made = facts.metrics("assemble")
    if made:
        total = made["image_bytes"] + made["label_bytes"] + made["teacher_bytes"]
        real = made["source"]
        tiles.insert(
            0,
            (
                "images",
                f"{made['num_images']:,}",
                f"for {_count(real['num_images'], 'real image')}",
            ),
        )
        tiles.append(("size with labels", size(total), f"real set {size(real['stored_bytes'])}"))
    runs = len(facts.timeline.sessions)
    if axis.active_s:
        tiles.append(("time", duration(axis.active_s), f"in {_count(runs, 'run')}"))
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )


def _percent(row: dict[str, Any]) -> str:
    spread = f" ± {100 * row['top1_std']:.1f}" if row["num_seeds"] > 1 else ""
    return f"{100 * row['top1_mean']:.1f}{spread}"


def _missing(facts: RunFacts, missing: list[str]) -> str:
    told = [*facts.missing, *missing]
    if not told:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in told)
    return (
        f'<div class="missing"><strong>Missing, or not of one piece</strong><ul>{lines}</ul></div>'
    )


def _table(head: list[str], rows: list[list[str]], kind: str = "scroll") -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="{kind}"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        if head
        else f'<div class="{kind}"><table class="plain"><tbody>{lines}</tbody></table></div>'
    )


def _accuracy(facts: RunFacts, table: list[dict[str, Any]]) -> str:
    if not table:
        return _absent(facts, "evaluate")
    student = facts.config.evaluate
    stage = facts.stages["evaluate"]
    partial = (
        ""
        if stage.commit
        else f" <strong>Unfinished: {_count(len(stage.units), 'student')} so far.</strong>"
    )
    rows = [
        [
            row["name"],
            f"{row['labels']} labels",
            f"{row['num_images']:,}" if "num_images" in row else "–",
            f"{row['epochs']:,}" if "epochs" in row else "–",
            _percent(row),
            str(row["num_seeds"]),
        ]
        for row in table
    ]
    head = ["student trained on", "labels", "images", "passes", "top-1 %", "n"]
    return f"""<p>Students ({escape(student.network.arch)}, from scratch, one recipe for all rows) tested once, after their
last epoch, on held-out real images. Mean and standard deviation over seeds; faint dots are single students.{partial}</p>
<div class="chart" id="chart-accuracy"></div>
<details><summary>Table</summary>{_table(head, rows)}</details>
"""


def _pictures(facts: RunFacts, shown: list[dict[str, Any]], num_classes: int) -> str:
    if not any(one["images"] for one in shown):
        return _absent(facts, "recover" if facts.stages["barycenters"].commit else "barycenters")
    which = (
        f"{len(shown)} of {num_classes} classes, evenly spread (<code>jobs/report.py RUN --classes 3 17</code> shows others)."
        if len(shown) < num_classes
        else "All classes."
    )
    distilled = any("distilled" in image for one in shown for image in one["images"])
    what = "Distilled images" if distilled else "Real images nearest to the atoms"
    return f"""<p>{what}, heaviest atom first. {which} Choose a row to see that class in full.</p>
<div class="sheet" id="sheet"></div>
"""


def _one_class(facts: RunFacts, shown: list[dict[str, Any]]) -> str:
    if not shown:
        return _absent(facts, "barycenters")
    recover = facts.config.recover
    made = "Image j was made to meet atom j."
    start = {
        "nearest": "Each image began as the real image nearest to its atom"
        + (", made small." if recover.tiles > 1 else "."),
        "random": "Each image began as a real image drawn at random.",
        "mosaic": "Each image began as a mosaic of crops that the teacher finds easy.",
        "noise": "Each image began as noise.",
    }[recover.start]
    if recover.method == "diffusion":
        made, start = (
            "The images were sampled from a diffusion model, one after another, and meet no atom.",
            "",
        )
    return f"""<p>An atom is a weighted point of the class's Wasserstein barycenter in the teacher's feature space.
{made} {start} Choose a picture to enlarge it.</p>
<div class="bar"><label>Class <select id="picker"></select></label>
<button id="before" type="button">‹ previous</button><button id="after" type="button">next ›</button>
<label>Size <input id="size" type="range" min="32" max="224" value="72"></label><span class="note" id="wall-note"></span></div>
<div class="wall" id="wall"></div>
<div class="two" style="margin-top:1.75rem">
<div><h3>Features</h3>
<p class="note">Principal components (PCA) of the class's real features, up to 400 of them shown. A line joins an atom
and the image that was made for it.
<span class="wide">Drag to zoom, double-click to go back.</span></p>
<p class="absent" id="projection-absent" hidden>The features of this class are not there (yet).</p>
<div class="chart" id="chart-projection"></div></div>
<div><h3>Losses</h3>
<p class="note">Up to 200 of the iterations. Terms as they are, the total with their coefficients; every step sees other crops.
Dotted: mean of the classes shown.</p>
<p class="absent" id="curves-absent" hidden>No curves: these images were not recovered by this version, or in 0 iterations.</p>
<div class="chart" id="chart-curves"></div>
<h3>Weights</h3><p class="note">Dotted: all equal.</p><div class="chart" id="chart-weights" style="min-height:13rem"></div></div>
</div>
"""


def _costs(found: list[dict[str, Any]]) -> str:
    if not any(one["cost"] is not None for one in found):
        return '<p class="absent">No barycenters yet: the stage <code>barycenters</code> makes them.</p>'
    terms = list(dict.fromkeys(term for one in found for term in one["losses"]))
    rows_of = list(dict.fromkeys(row for one in found for row in one["recall"]))
    head = ["class", "real images", "W2² cost", "solver steps"]
    head += [f"{term} loss" for term in terms]
    head += [f"top-1 %, {row.replace('_', ' ')}" for row in rows_of]
    rows = []
    for one in found:
        steps = "–" if one["num_iters"] is None else str(one["num_iters"])
        rows.append(
            [
                one["name"],
                _number(one["num_images"]),
                _number(one["cost"]),
                steps + (" (not converged)" if one["converged"] is False else ""),
                *(_number(one["losses"].get(term)) for term in terms),
                *(
                    f"{100 * one['recall'][row]:.1f}" if row in one["recall"] else "–"
                    for row in rows_of
                ),
            ]
        )
    return f"""<p>W<sub>2</sub>² between a class's features and its atoms (exact transport, squared feature units): what so
few points cannot say of the class. Choose a bar to see that class above.</p>
<div class="chart" id="chart-cost"></div>
<details><summary>Table of {_count(len(found), "class")}</summary>{_table(head, rows, "tall")}</details>
"""


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _bytes(facts: RunFacts) -> list[dict[str, Any]]:
    made = facts.metrics("assemble")
    if not made:
        return []
    parts = [
        ("real images", "real set", made["source"]["stored_bytes"]),
        ("distilled images", "distilled set", made["image_bytes"]),
        ("labels", "distilled set", made["label_bytes"]),
        ("teacher", "distilled set", made["teacher_bytes"]),
    ]
    return [
        {"name": name, "bar": bar, "bytes": num_bytes, "told": size(num_bytes)}
        for name, bar, num_bytes in parts
    ]


def _bytes_table(facts: RunFacts) -> str:
    parts = _bytes(facts)
    if not parts:
        return _absent(facts, "assemble")
    real = parts[0]["bytes"]
    total = sum(part["bytes"] for part in parts[1:])
    rows = [[part["name"], part["told"], _share(part["bytes"], real)] for part in parts]
    rows.append(["distilled set, whole", size(total), _share(total, real)])
    return f"""<p>As stored: the real set as it lies at its source, the distilled one in <code>dataset/</code>.</p>
<div class="chart" id="chart-bytes" style="min-height:13rem"></div>
{_table(["", "bytes", "of the real set"], rows)}
"""


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


def _time_tables(facts: RunFacts, axis: Axis) -> str:
    rows = []
    for name, stage in facts.stages.items():
        markers = stage.units.values()
        commit = stage.commit
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
    head = ["stage", "state", "units", "last run of it", "inside core", "longest unit", "retried"]
    chart = (
        '<div class="chart" id="chart-time"></div>'
        if facts.timeline.bars
        else '<p class="absent">No unit has begun.</p>'
    )
    left = ", ".join(f"{count:,} of {stage}" for stage, count in facts.timeline.left_out.items())
    note = (
        f'<p class="note">Left out for brevity, short units without trouble: {left}.</p>'
        if left
        else ""
    )
    return f"""<p>A bar is one attempt at a unit of work, beside others that ran at the same time; pauses between runs are cut
out. A straggler took more than twice the middle one of its kind. {_sessions_told(facts)}
<span class="wide">Drag to zoom, double-click to go back.</span></p>
{chart}{note}
{_table(head, rows)}
"""


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


def _options(facts: RunFacts) -> str:
    record = facts.record
    about = [
        ["revision", str(record.get("git_revision") or "–")],
        ["hardware of the driver", str(record.get("hardware", "–"))],
        ["last run began", str(record.get("started", "–"))],
        *([name, str(value)] for name, value in record.get("versions", {}).items()),
    ]
    options = [
        [name, str(value)]
        for part in ("config", "resources")
        for name, value in flatten(record.get(part, {})).items()
    ]
    if not options:
        options = [
            [f"{name}: {option}", str(value)]
            for name, stage in facts.stages.items()
            if stage.commit
            for option, value in flatten(stage.commit.options).items()
        ]
    return f"""{_table([], about)}
<details><summary>All {len(options)} options</summary>{_table([], options, "tall")}</details>
"""
