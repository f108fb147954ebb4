import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_barycenter_and_recover_run_without_ray(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "from jobs import bench\n"
        "bench.main('barycenter --ipc 2 --solvers lloyd --repeats 1 --no-reference --out b.json'.split())\n"
        "bench.main('views --sizes 28 --batches 2 --repeats 1 --out v.json'.split())\n"
        "bench.main('recover --archs convnet3 --width 4 --num-images 4 --iterations 2 --seconds 0 --out r.json'.split())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    barycenter, views, recover = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in "bvr"
    )
    assert [row["solver"] for row in barycenter["rows"]] == ["lloyd"]
    assert [row["batch"] for row in views["rows"]] == [2]
    assert [row["ipc"] for row in recover["rows"]] == [1, 4]
