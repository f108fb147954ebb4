import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.benches.scale.classes import Classes, cost_model
from jobs.benches.scale.processes import descendants, own_mib, shares_mib
from jobs.benches.scale.rooms import store_rows
from jobs.benches.scale.workers import losses
from tests.conftest import S3Uri

ROOT = Path(__file__).resolve().parents[2]


def test_a_cluster_takes_the_rounds_of_units_and_one_start_of_actors() -> None:
    def row(what: str, value: float, actors: int = 2) -> dict[str, object]:
        return {"what": what, "actors": actors, "value": value}

    rows = [
        row("an actor's start, processor time", 3.0),
        row("an actor's memory, PSS", 128.0, 8),
        row("a unit in core functions (cores shared)", 900.0),
        row("a unit in core functions (cores shared)", 5000.0, 8),  # eight on two cores
        row("a unit, reading and encoding", 100.0),
        row("driver, processor time a unit", 1.0, 8),
        *(row(f"disk: {step}", 0.5) for step in ("list", "read markers", "commit")),
    ]
    options = Classes(
        num_classes=1000,
        actors=(2, 8),
        stores=("disk",),
        cluster_actors=400,
        cluster_cores=40,
        head_actors_per_s=400,
    )
    model = {r["what"].partition(": ")[2]: r["value"] for r in cost_model(options, rows)}
    assert model["actors ready"] == 3 + 1
    assert model["memory of a node"] == 40 * 128 / 1024
    assert model["all units"] == 3 * 1.0  # 1000 units on 400 actors: three rounds
    assert model["driver's processor time"] == 1.0
    assert model["stage"] == 4 + 3 + 1.5


def test_a_lost_worker_is_read_off_the_diaries() -> None:
    # 1 is killed at 13; the group stops 2 at 15 and works again with 3 and 4 from 20 and 21.
    diary: dict[int, list[dict[str, float]]] = {
        1: [{"began": 10, "ended": 12}, {"began": 12, "beat": 12.9}],
        2: [{"began": 10, "ended": 12}, {"began": 12, "ended": 14}, {"began": 14, "beat": 14.9}],
        3: [{"began": 20, "ended": 22}],
        4: [{"began": 21, "ended": 23}],
    }
    found = losses(diary, 5, 1, 13)
    assert found["start until the first unit, s"] == 5
    assert found["loss until a new worker works, s"] == 7
    assert found["loss until two work again, s"] == 8
    assert found["loss until the other is stopped, s"] == pytest.approx(1.9)
    assert found["work done again, s"] == pytest.approx(1.8)


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_listing_reading_and_committing_a_room_is_timed(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server: S3Uri | None = request.getfixturevalue("s3_server") if store == "s3" else None
    rows = store_rows(server() if server else str(tmp_path), store, 40)
    named = {row["what"]: row["value"] for row in rows}
    assert all(value > 0 for value in named.values())
    assert f"{store}: list" in named and f"{store}: read markers" in named


def test_memory_of_a_process_is_its_own_and_not_its_parents() -> None:
    held = np.ones(1 << 24)  # 128 MiB
    script = "import sys; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE)
    try:
        assert child.pid in descendants(os.getpid())
        assert 0 < own_mib(child.pid) < 100
        shares = shares_mib(child.pid)
        assert 0 < shares["uss"] <= shares["pss"] < 100
    finally:
        child.communicate()
    assert own_mib(child.pid) == 0
    assert own_mib(os.getpid()) > held.nbytes / 2**20


def test_a_peak_that_is_gone_again_is_seen() -> None:
    # In a process of its own: in this one an allocator may hold as much already. The array is held until the watch has seen it,
    # however late on a busy machine: no sampling sees one that is filled and freed between two looks.
    script = (
        "import os, time\n"
        "import numpy as np\n"
        "from jobs.benches.scale.processes import own_mib, watched\n"
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
