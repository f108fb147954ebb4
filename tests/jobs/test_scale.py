import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.benches.scale.pipeline import memory_mib, scale
from tests.stages.processes import descendants

ROOT = Path(__file__).resolve().parents[2]


def test_memory_of_a_process_is_its_own_and_not_its_parents() -> None:
    held = np.ones(1 << 24)  # 128 MiB
    script = "import sys; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE)
    try:
        assert child.pid in descendants(os.getpid())
        assert 0 < memory_mib(child.pid) < 100
        assert memory_mib(child.pid) < memory_mib(child.pid, "VmHWM") < 100
    finally:
        child.communicate()
    assert memory_mib(child.pid) == 0
    assert memory_mib(os.getpid()) > held.nbytes / 2**20


def test_a_peak_that_is_gone_again_is_seen() -> None:
    # In a process of its own: in this one an allocator may hold as much already. The array is held until the watch has seen it,
    # however late on a busy machine: no sampling sees one that is filled and freed between two looks.
    script = (
        "import os, time\n"
        "import numpy as np\n"
        "from tests.stages.processes import own_mib, watched\n"
        "with watched(every_s=0.01) as peaks:\n"
        "    held, until = np.ones(1 << 23), time.monotonic() + 60\n"  # 64 MiB
        "    while peaks.driver < own_mib(os.getpid()) and time.monotonic() < until:\n"
        "        time.sleep(0.01)\n"
        "    del held\n"
        "    left = own_mib(os.getpid())\n"
        "    time.sleep(0.1)\n"
        "print(peaks.driver_grew, peaks.driver - left)\n"
    )
    command = [sys.executable, "-c", script]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    grew, above_what_is_left = map(float, told.stdout.split())
    assert 60 < grew < 100
    assert 60 < above_what_is_left < 100


@pytest.mark.slow
def test_the_pipeline_on_some_classes_tells_its_objects_and_the_drivers_peak(
    tmp_path: Path,
) -> None:
    out = tmp_path / "scale.json"
    scale(num_classes=3, num_images=4, executor="here", out=str(out))
    record = json.loads(out.read_text())
    value = {row["what"]: row["value"] for row in record["rows"]}
    assert (record["settings"]["num_classes"], record["settings"]["executor"]) == (3, "here")
    stages = sum(v for what, v in value.items() if what.endswith("_s") and what != "whole_s")
    assert 0 < stages < value["whole_s"]
    assert value["objects"] > 20 and 200 < value["driver_peak_mib"] < 5000
    assert 0 < value["report_mib"] <= value["largest_mib"] < value["all_mib"]
