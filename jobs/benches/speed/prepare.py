"""Peak memory of jobs/prepare.py when the data grows: flat, or something gathers."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from wmdd_ray.units.splitting import PrepareConfig

from ...prepare import Job
from ...prepare import prepare as run_job
from ..reporting import Row, report
from ..scale.processes import in_a_process, local_ray, watched

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
    sizes = (shard_images, times * shard_images)
    rows = in_a_process(compared, shards, shard_mb, sizes)
    report(rows, {"shards": shards, "shard_mb": shard_mb}, out)


def compared(num_shards: int, shard_mb: int, sizes: Sequence[int]) -> list[Row]:
    """Watch the job at every size; once before unwatched, so that imports do not count. Runs in its own process."""
    with local_ray(num_cpus=2):
        return [watch_job(num_shards, shard_mb, size) for size in (sizes[0], *sizes)][1:]


def watch_job(num_shards: int, shard_mb: int, shard_images: int) -> Row:
    """Return the peaks of the job on so many images, with the MiB that were written and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data, made = Path(folder) / "data", Path(folder) / "out"
        write_shards(data, num_shards, shard_images)
        job = Job(source=str(data), out=str(made), config=PrepareConfig(shard_mb=shard_mb))
        started = time.perf_counter()
        with watched() as peaks:
            run_job(job)
        seconds = time.perf_counter() - started
        stored = sum(file.stat().st_size for file in made.glob("data/*.parquet"))
    images = num_shards * shard_images
    return {"images": images, **asdict(peaks), "mib": stored / 2**20, "seconds": seconds}


def write_shards(folder: Path, num_shards: int, shard_images: int, side: int = 128) -> None:
    """Write WebDataset shards of JPEGs that mix all classes; a few different pictures, over and over."""
    folder.mkdir()
    (folder / "classes.txt").write_text(
        "".join(f"class {label}\n" for label in range(_NUM_CLASSES))
    )
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(_PICTURES):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(encoded, "JPEG")
        pictures.append(encoded.getvalue())
    for shard in range(num_shards):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for i in range(shard_images):
                members = {"jpg": pictures[i % _PICTURES], "cls": str(i % _NUM_CLASSES).encode()}
                for kind, content in members.items():
                    member = tarfile.TarInfo(f"{shard:05d}-{i:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
