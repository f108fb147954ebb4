"""All seven stages on many classes of small synthetic images: time, the driver's memory, and the objects that are written."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from ..gpu.tiny import write_parquet
from ..reporting import Row, report
from ..speed.orchestration import ROOMS, ROOT, read_stage

_QUICK = (
    "--recipe cifar10 --squeeze.network.width 8 --evaluate.network.width 8 --squeeze.epochs 1 --squeeze.warmup-epochs 0 "
    "--squeeze.min-top1 0.0000001 --recover.tiles 1 --recover.iterations 1 --relabel.epochs 1 --evaluate.epochs 1 "
    "--evaluate.num-seeds 1 --evaluate.labels soft --evaluate.baselines random_real"
)


def scale(
    part: tyro.conf.Positional[Literal["pipeline"]] = "pipeline",
    num_classes: int = 1000,
    num_images: int = 12,
    image_size: int = 12,
    ipc: int = 1,
    executor: str = "auto",
    out: str | None = None,
) -> None:
    """All seven stages with quick options on synthetic classes: seconds, the driver's peak, the objects and the report.

    Args:
        part: What to measure: there is one.
        num_classes: Classes.
        num_images: Real images of a class, one of which is held out.
        image_size: Their side, pixels.
        ipc: Images of a class.
        executor: As of jobs/distill.py.
        out: JSON file to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, made = Path(folder) / "data", Path(folder) / "out"
        write_images(data, num_classes, num_images, image_size)
        options = f"{_QUICK} --source.image-size {image_size} --source.resize {image_size} --ipc {ipc} --executor {executor}"
        job = [sys.executable, str(ROOT / "jobs" / "distill.py"), *options.split()]
        command = [*job, "--data", str(data), "--out", str(made)]
        started, peak = time.monotonic(), 0.0
        with subprocess.Popen(command, stdout=sys.stderr) as driver:
            while driver.poll() is None:
                peak = max(peak, memory_mib(driver.pid, "VmHWM"))
                time.sleep(0.2)
        seconds = time.monotonic() - started
        if driver.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {driver.returncode}")
        stages = [read_stage(str(made), room) for room in ROOMS]
        sizes = {path: path.stat().st_size for path in made.rglob("*") if path.is_file()}
        report_bytes = sizes[made / "report.html"]
    largest = max(sizes, key=lambda path: sizes[path])
    row: Row = {f"{stage['stage']}_s": stage["seconds"] for stage in stages}
    row |= {"whole_s": seconds, "driver_peak_mib": peak, "objects": len(sizes)}
    row |= {"all_mib": sum(sizes.values()) / 2**20, "largest_mib": sizes[largest] / 2**20}
    row |= {"largest": str(largest.relative_to(made)), "report_mib": report_bytes / 2**20}
    rows = [{"what": what, "value": value} for what, value in row.items()]
    load = [round(load, 1) for load in os.getloadavg()]
    settings = {"num_classes": num_classes, "num_images": num_images, "image_size": image_size}
    report(rows, {**settings, "ipc": ipc, "executor": executor, "load_average": load}, out)


def memory_mib(pid: int, which: str = "RssAnon") -> float:
    """Return the memory of a process that is neither a file's nor shared, or its peak with all (VmHWM); 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def write_images(folder: Path, num_classes: int, num_images: int, side: int) -> None:
    """Write Parquet files of JPEGs, noise on a color a class; the last image of each class is held out."""
    rng = np.random.default_rng(0)
    colors = rng.integers(40, 216, (num_classes, 1, 1, 3))
    names = [f"class {label:05d}" for label in range(num_classes)]
    for split, count in (("train", num_images - 1), ("val", 1)):
        rows: list[tuple[int, str, bytes]] = []
        for label in np.repeat(np.arange(num_classes), count).tolist():
            noise = rng.integers(-40, 40, (side, side, 3)) + colors[label]
            encoded = io.BytesIO()
            Image.fromarray(noise.astype(np.uint8)).save(encoded, "JPEG")
            rows.append((label, f"{split}-{len(rows):07d}.jpg", encoded.getvalue()))
        write_parquet(folder, split, rows, names)
