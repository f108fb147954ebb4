"""Peak memory of jobs/prepare.py when the data grows: flat, or something gathers."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from ..reporting import Row, report
from ..scale.memory import compare
from ..scale.processes import Peaks, watched

_NUM_CLASSES = 10
_PICTURES = 20


def prepare(
    times: int = 8,
    shards: int = 2,
    shard_images: int = 8000,
    shard_mb: int = 64,
    out: str | None = None,
) -> None:
    """Peak memory of driver and workers of jobs/prepare.py at 1 and at `times` times the images, and images a second.

    Args:
        times: How much more data.
        shards: Tar shards, at both sizes: what grows is each of them.
        shard_images: Images of a shard at 1, JPEGs of 128 x 128 noise, 10 KB each, of which a class is a tenth. They fill
            more than one Parquet file, or the peak at 1 would be that of a smaller one.
        shard_mb: Size of the Parquet files, MiB; 64 is the job's default.
        out: JSON file to write.
    """
    rows: list[Row] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as driver:
        case = partial(prepare_peaks, shards, shard_mb)
        sizes = (shard_images, times * shard_images)
        for images, peaks in zip(sizes, driver.submit(compare, case, sizes).result(), strict=True):
            rows.append({"images": shards * images, **asdict(peaks)})
    settings = {
        "shards": shards,
        "shard_mb": shard_mb,
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    report(rows, settings, out)


@dataclass
class Watched(Peaks):
    """Peaks, with the MiB that were written and the seconds that it took."""

    mib: float = 0.0
    seconds: float = 0.0


def prepare_peaks(num_shards: int, shard_mb: int, shard_images: int) -> Watched:
    """Watch the job on so many images."""
    from wmdd_ray.units.splitting import PrepareConfig

    from ...prepare import Job
    from ...prepare import prepare as run_job

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data, made = Path(folder) / "data", Path(folder) / "out"
        write_shards(data, num_shards, shard_images)
        config = PrepareConfig(shard_mb=shard_mb)
        started = time.perf_counter()
        with watched() as peaks:
            run_job(Job(source=str(data), out=str(made), config=config))
        seconds = time.perf_counter() - started
        stored = sum(file.stat().st_size for file in made.glob("data/*.parquet"))
    return Watched(**asdict(peaks), mib=stored / 2**20, seconds=seconds)


def write_shards(folder: Path, num_shards: int, shard_images: int) -> None:
    """Write WebDataset shards of JPEGs that mix all classes; a few different pictures, over and over."""
    folder.mkdir()
    (folder / "classes.txt").write_text(
        "".join(f"class {label}\n" for label in range(_NUM_CLASSES))
    )
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(_PICTURES):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(encoded, "JPEG")
        pictures.append(encoded.getvalue())
    for shard in range(num_shards):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for i in range(shard_images):
                members = {"jpg": pictures[i % _PICTURES], "cls": str(i % _NUM_CLASSES).encode()}
                for kind, content in members.items():
                    member = tarfile.TarInfo(f"{shard:05d}-{i:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
