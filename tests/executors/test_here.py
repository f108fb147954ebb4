"""Units in this process: the pipeline where there is no Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages import tiny
from tests.stages.tiny import FinishedRun

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


def test_units_are_imported_without_ray_and_load_no_pot() -> None:
    units = (path.stem for path in (tiny.ROOT / "wmdd_ray" / "units").glob("[a-z]*.py"))
    imports = "; ".join(f"import wmdd_ray.units.{name}" for name in sorted(units))
    code = f"import sys; sys.modules['ray'] = None; {imports}; assert 'ot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, check=True)
