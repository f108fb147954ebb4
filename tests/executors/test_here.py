"""Units in this process: the pipeline where there is no Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.core.device import device_for
from wmdd_ray.errors import ConfigError
from wmdd_ray.executors.workers import device_of_worker

# Neither can be imported, as where they are not installed: Ray, and POT's arrays of torch.
WITHOUT = """
import os, sys
sys.modules["ray"] = None
os.environ["POT_BACKEND_DISABLE_PYTORCH"] = "1"
from jobs import distill
sys.exit(distill.main(sys.argv[1:]))
"""


def run_without_ray(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *tiny.OPTIONS, "--out", str(out), *options]
    return subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_run_without_ray_makes_the_same_bytes_and_tells_its_units(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    ended = run_without_ray(tmp_path / "run", "--executor", "here")
    assert ended.returncode == 0, ended.stderr
    tiny.assert_same_payloads(tmp_path / "run", finished_run.payloads)
    assert set(tiny.markers(tmp_path / "run")) == set(tiny.markers(finished_run.out))
    for stage, num_units in tiny.UNITS.items():
        assert any(line.startswith(stage) for line in ended.stderr.splitlines()), num_units


def test_what_a_worker_was_given_decides_on_its_device_and_not_what_it_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert device_for(0) == device_of_worker(0) == torch.device("cpu")
    assert device_for(0.5) == device_for(-1) == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("built", "remedy"),
    [("13.2", "update its driver to one for CUDA 13.2"), (None, "install a torch with CUDA")],
)
def test_a_gpu_that_torch_cannot_use_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, built: str | None, remedy: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", built)
    told = f"--gpus-per-worker 1: .*torch.version.cuda is {built}.; {remedy}, or pass"
    for device in (device_for, device_of_worker):
        with pytest.raises(ConfigError, match=told):
            device(1.0)
    assert device_for(-1) == torch.device("cpu")


def test_units_are_imported_without_ray_and_load_no_pot() -> None:
    units = (path.stem for path in (tiny.ROOT / "wmdd_ray" / "units").glob("[a-z]*.py"))
    imports = "; ".join(f"import wmdd_ray.units.{name}" for name in sorted(units))
    code = f"import sys; sys.modules['ray'] = None; {imports}; assert 'ot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, check=True)
