"""A GPU that is at hand for minutes: core on CUDA, speeds at 224 pixels, some of Tiny-ImageNet; one file, whole at every moment.

Needs neither Ray nor a network, and only the last part POT, pyarrow and jsonschema: what cannot be imported is told in the file.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from wmdd_ray.spine.provenance import hardware, versions

from ..reporting import Row
from . import checks, speeds

_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "RTX 4090": 165.0, "L4": 121.0}
"""Dense bfloat16 of the tensor cores, by a part of the chip's name: the vendor's data sheets (SXM parts)."""
_PUBLISHED = {"FADRM": 0.47, "SRe2L++": 2.52}
"""Seconds an image of recover on an RTX 4090, both as published with FADRM (2025), with their own iterations: ResNet-18, 224 px."""


def gpu(
    device: Literal["cuda", "cpu"] = "cuda",
    quick: bool = False,
    seconds: float = 420.0,
    data: str | None = None,
    pack: str | None = None,
    pack_mib: float = 48.0,
    out: str = "gpu.json",
) -> None:
    """Check core on a GPU, measure its kinds of work against the bare network, and distill some of Tiny-ImageNet, in minutes.

    The file is written anew after every measurement, `partial` until the last one. What fails is a row with its error, and the
    next goes on. Compiled networks come last: they take the longest to begin.

    Args:
        device: `cpu` is for rehearsals.
        quick: Networks and images so small that a CPU does everything in a minute.
        seconds: Nothing is begun later than this.
        data: Folder that `--pack` wrote; without it that part is left out.
        pack: Folder of Tiny-ImageNet: write as many of its classes as fit into --data, and stop.
        pack_mib: What fits, MiB.
        out: JSON file of the results.
    """
    if pack is not None:
        from .tiny import write_pack

        print(write_pack(pack, Path(data or "tiny-pack"), pack_mib))
        return
    if device == "cpu":
        torch.set_num_threads(1)
    record = Record(Path(out), torch.device(device), quick, seconds)
    for name, check in checks.all_checks(record.device, quick).items():
        record.row("core", name, check)
    for name, make in speeds.MADE.items():
        record.row("speed", name, partial(record.speed, name, make))
    record.row("speed", "JPEGs decoded, one process", partial(speeds.decoding, record.each_s))
    if data is not None:
        _distill(record, data)
    for name, make in speeds.MADE.items():
        measure = partial(speeds.compiled, make, record.shape, record.each_s, quick)
        record.row("speed", f"{name}: the bare network compiled", measure)
    record.end()


def _distill(record: Record, data: str) -> None:
    """Distill what `--pack` wrote: a row a stage."""
    steps: dict[str, Callable[[], Row]] = {}

    def opened() -> Row:
        from .tiny import steps_of

        about, stages = steps_of(data, folder, record.quick)
        steps.update(stages)
        return about

    with tempfile.TemporaryDirectory() as folder:
        record.row("tiny_imagenet", "opened", opened)
        for name, step in steps.items():
            record.row("tiny_imagenet", name, step)


class Record:
    """The results, on disk whenever a row is done."""

    def __init__(self, path: Path, device: torch.device, quick: bool, seconds: float) -> None:
        self._path, self._began, self._seconds = path, time.monotonic(), seconds
        self.device, self.quick, self.each_s = device, quick, 0.01 if quick else 4.0
        self.shape = speeds.Shape.of(device, quick)
        chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._peak = next((peak for part, peak in _PEAK_TFLOPS.items() if part in chip), None)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self._document: dict[str, Any] = {
            "state": "partial",
            **{"date": date, "hardware": hardware(), "chip": chip, **versions()},
            "peak_bf16_tflops": self._peak or "unknown",
            "settings": {"quick": quick, "seconds": seconds},
            "published_recover_s_per_image": _PUBLISHED,
            "unit_times": {},
            "rows": [],
        }

    def row(self, part: str, what: str, measure: Callable[[], Row]) -> None:
        """Measure, and write the file with what came of it: numbers, an error, or that no time was left."""
        started = time.monotonic()
        if started - self._began > self._seconds:
            values: Row = {"skipped": f"{self._seconds:g} s are over"}
        else:
            try:
                values = measure()
            except Exception as error:
                values = {"error": f"{type(error).__name__}: {error}"[:1000]}
        took = round(time.monotonic() - started, 2)
        self._document["rows"].append({"part": part, "what": what, **values, "took_s": took})
        self._write()
        print(f"{part}: {what}: {values}", flush=True)

    def speed(self, name: str, make: speeds.Make) -> Row:
        """Measure a kind of work; what an image of it takes is a unit time of forecasts."""
        values = speeds.measured(make(self.shape), self.each_s, self._peak)
        self._document["unit_times"][f"{name}_images_per_s"] = values["images_per_s"]["median"]
        return values

    def end(self) -> None:
        """Say that nothing is to come."""
        self._document["state"] = "complete"
        self._write()

    def _write(self) -> None:
        scratch = self._path.with_suffix(".new")
        scratch.write_text(json.dumps(self._document, indent=2) + "\n")
        scratch.replace(self._path)
