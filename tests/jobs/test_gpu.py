"""The script for a GPU that is at hand for minutes, rehearsed on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import forecast
from jobs.benches.gpu.command import Record, gpu
from tests.conftest import ROOT

# What such a machine may lack: it is told in the file, and the rest is done.
MISSING = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None
from jobs import bench
"""
STAGES_ALONE = """
from jobs.benches.gpu import checks, speeds
checks.all_checks, speeds.MADE = lambda *_: {}, {}
"""


def run_without(missing: str, change: str, options: list[str], folder: Path) -> None:
    script = f"{MISSING}{change}bench.main(sys.argv[2:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, missing, *options]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def rows_of(path: Path, part: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in json.loads(path.read_text())["rows"] if row["part"] == part}


@pytest.mark.slow
def test_core_and_speeds_need_neither_ray_nor_pot_nor_arrow(tmp_path: Path) -> None:
    options = ["gpu", "--device", "cpu", "--quick", "--data", "none"]
    run_without("ray ot pyarrow tyro jsonschema", "", options, tmp_path)
    file = tmp_path / "gpu.json"
    core, speed = rows_of(file, "core"), rows_of(file, "speed")
    assert len(core) == 7 and all(row["ok"] for row in core.values()), core
    kinds = ("features", "recover", "relabel", "students")
    assert not any("error" in row for row in speed.values()), speed
    for kind in kinds:
        assert speed[kind]["images_per_s"]["median"] > 0
        assert f"{kind}: the bare network compiled" in speed
    forward = speed["features"]["gflops_per_image"]
    assert forward == speed["relabel"]["gflops_per_image"]
    assert forward * 1.5 < speed["recover"]["gflops_per_image"] < forward * 3
    assert "pyarrow" in rows_of(file, "tiny_imagenet")["opened"]["error"]
    document = json.loads(file.read_text())
    assert (document["state"], document["chip"], document["peak_bf16_tflops"]) == (
        "complete", "cpu", "unknown",
    )  # fmt: skip
    assert set(document["unit_times"]) == {f"{kind}_images_per_s" for kind in kinds}
    # A rehearsal is no measurement.
    assert forecast.unit_times(file) is forecast.ASSUMED


@pytest.mark.slow
def test_what_fits_of_a_data_set_is_packed_and_distilled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(3):
            folder = tmp_path / "images" / split / f"n{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 60, (20, 20, 3)) + 60 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    most = 2.5 * sum(f.stat().st_size for f in (tmp_path / "images").rglob("*0/*.png")) / 2**20
    gpu(pack=str(tmp_path / "images"), data=str(tmp_path / "pack"), pack_mib=most)
    assert "2 of 3 classes" in capsys.readouterr().out
    out = tmp_path / "gpu.json"
    options = [
        "gpu",
        "--device",
        "cpu",
        "--quick",
        "--data",
        str(tmp_path / "pack"),
        "--out",
        str(out),
    ]
    run_without("ray tyro sklearn", STAGES_ALONE, options, tmp_path)
    stages = rows_of(out, "tiny_imagenet")
    assert not any("error" in row for row in stages.values()), stages
    assert list(stages) == [
        "opened", "squeeze", "features", "barycenters", "recover", "relabel", "assemble", "evaluate",
    ]  # fmt: skip
    assert stages["opened"]["num_classes"] == 2
    assert {"distilled, soft labels, top1", "random_real, soft labels, top1"} <= set(
        stages["evaluate"]
    )


def test_the_file_is_whole_after_every_measurement(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"

    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    record = Record(path, torch.device("cpu"), quick=True, seconds=60)
    record.row("core", "one", lambda: {"ok": True})
    record.row("core", "two", fail)
    found = json.loads(path.read_text())
    assert found["state"] == "partial"
    assert [row.get("ok", row.get("error")) for row in found["rows"]] == [
        True,
        "RuntimeError: out of memory",
    ]
    late = Record(path, torch.device("cpu"), quick=True, seconds=-1)
    late.row("core", "three", fail)
    late.end()
    found = json.loads(path.read_text())
    assert found["state"] == "complete" and "skipped" in found["rows"][0]
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]
