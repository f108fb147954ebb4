"""Where the time of a whole run goes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from wmdd_ray.stages.pipeline import PIPELINE

from ..reporting import report

ROOT = Path(__file__).resolve().parents[3]
ROOMS = tuple(stage.room for stage in PIPELINE)


def orchestration(ipc: int = 10, out: str | None = None) -> None:
    """Where the time of the embedded digits run goes: wall-clock, inside core functions, and the difference.

    Args:
        ipc: Images per class.
        out: JSON file to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        total = distill(folder, "--recipe", "digits", "--ipc", str(ipc))
        stages = [read_stage(folder, room) for room in ROOMS]
    times = [(s["stage"], s["seconds"], s["metrics"].get("seconds_in_core", 0.0)) for s in stages]
    times.append(("start, end", total - sum(wall for _, wall, _ in times), 0.0))
    times.append(("total", total, sum(core for _, _, core in times)))
    rows = [
        {"stage": stage, "wall_s": wall, "core_s": core, "difference_s": wall - core}
        for stage, wall, core in times
    ]
    report(rows, {"recipe": "digits", "ipc": ipc, "n": 1}, out)


def distill(out: str, *options: str) -> float:
    """Run jobs/distill.py into `out` and return its wall-clock seconds."""
    started = time.monotonic()
    job = str(ROOT / "jobs" / "distill.py")
    subprocess.run([sys.executable, job, "--out", out, *options], check=True, stdout=sys.stderr)
    return time.monotonic() - started


def read_stage(out: str, room: str) -> Any:
    """Return what the stage.json of a room says."""
    return json.loads((Path(out) / room / "stage.json").read_text())
