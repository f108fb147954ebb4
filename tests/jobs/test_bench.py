import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import bench
from jobs.benches.scale.forecast import Forecast, unit_seconds
from jobs.benches.scale.simulation import Cluster, Units, random_lives, simulate

ROOT = Path(__file__).resolve().parents[2]
FOREVER = math.inf
# Nodes that are there at once and cost nothing but their time.
PLAIN = Cluster(
    num_workers=1, group_size=1, arrival_s=0, boot_s=0, start_s=5, detect_s=10, replacement_s=30
)


def cluster(num_workers: int, group_size: int, **options: float) -> Cluster:
    return dataclasses.replace(PLAIN, num_workers=num_workers, group_size=group_size, **options)


# Simulation: known answers


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("num_units", [1, 4, 10, 16])
def test_equal_units_without_losses_take_the_rounds_and_one_start(
    num_units: int, group_size: int
) -> None:
    units = Units(seconds=[7.0] * num_units, overhead_s=1.0)
    found = simulate(units, cluster(4, group_size), itertools.repeat(FOREVER))
    assert found.makespan_s == math.ceil(num_units / 4) * 8 + 5
    assert found.most_attempts == 1


def test_efficiency_is_the_work_over_what_all_nodes_were_paid_for() -> None:
    # One group holds its four nodes until the third round is done: 3 x 7 + 5 seconds each, and a boot of 2.
    found = simulate(Units(seconds=[7.0] * 10), cluster(4, 4, boot_s=2), itertools.repeat(FOREVER))
    assert found.paid_s == 4 * (26 + 2)
    assert found.efficiency == pytest.approx(70 / 112)
    expected = {"boot": 8 / 112, "start": 20 / 112, "overhead": 0, "redone": 0, "idle": 14 / 112}
    assert found.shares == pytest.approx(expected)


def test_isolated_workers_let_their_nodes_go_after_the_idle_timeout() -> None:
    # Two workers do the third round; the other two are paid 3 seconds longer than they worked.
    found = simulate(Units(seconds=[7.0] * 10), cluster(4, 1, idle_s=3), itertools.repeat(FOREVER))
    assert found.paid_s == 2 * 26 + 2 * (19 + 3)


@pytest.mark.parametrize(
    ("checkpoint_s", "redone_s"), [(0.0, 45.0), (10.0, 5.0), (50.0, 45.0), (15.0, 0.0)]
)
def test_a_lost_isolated_worker_costs_its_work_since_the_checkpoint_and_the_wait(
    checkpoint_s: float, redone_s: float
) -> None:
    # Lost at 50, after 45 seconds of work; another node is there at 80 and works from 85.
    units = Units(seconds=[100.0], checkpoint_s=checkpoint_s)
    found = simulate(units, cluster(1, 1), iter([50.0, FOREVER]))
    assert found.makespan_s == 85 + 55 + redone_s
    assert found.num_losses == 1
    assert found.shares["redone"] * found.paid_s == pytest.approx(redone_s)
    assert found.paid_s == 50 + 5 + 55 + redone_s


def test_a_checkpoint_that_is_not_written_yet_does_not_count() -> None:
    units = Units(seconds=[100.0], checkpoint_s=15.0, write_s=2.0)
    found = simulate(units, cluster(1, 1), iter([50.0, FOREVER]))
    assert found.makespan_s == 85 + 55 + 15


def test_a_loss_restarts_the_whole_group_and_its_replacement_once_more() -> None:
    # 50: one is lost after 45 s (40 kept). 60: the other is stopped after 55 s (50 kept). 65: it goes on with its own,
    # until 115, then with the lost one's, which the group's growing at 120 stops after 5 s (0 kept). 125: 60 s are left.
    units = Units(seconds=[100.0, 100.0], checkpoint_s=10.0)
    found = simulate(units, cluster(2, 2, grow_s=60), iter([50.0, FOREVER, FOREVER]))
    assert found.makespan_s == 125 + 60
    assert found.num_starts == 3
    assert found.shares["redone"] * found.paid_s == pytest.approx(5 + 5 + 5)


# Simulation: laws


@given(
    seconds=st.lists(st.floats(1, 60), min_size=1, max_size=30),
    num_workers=st.integers(1, 6),
    group_size=st.integers(1, 6),
    losses_per_hour=st.sampled_from([0.0, 1.0, 10.0]),
    checkpoint_s=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 5),
)
def test_every_paid_second_is_useful_or_has_a_name(
    seconds: list[float],
    num_workers: int,
    group_size: int,
    losses_per_hour: float,
    checkpoint_s: float,
    seed: int,
) -> None:
    units = Units(seconds=seconds, overhead_s=1.0, checkpoint_s=checkpoint_s, stall_s=0.5)
    where = cluster(num_workers, group_size, boot_s=3, arrival_s=20)
    found = simulate(units, where, random_lives(losses_per_hour, seed))
    assert found == simulate(units, where, random_lives(losses_per_hour, seed))
    assert found.efficiency * found.paid_s == pytest.approx(sum(seconds))
    assert found.efficiency + sum(found.shares.values()) == pytest.approx(1)
    assert min(found.shares.values()) >= -1e-9
    assert found.makespan_s >= sum(seconds) / num_workers


def test_at_64_workers_isolated_ones_keep_95_percent_and_one_group_does_not() -> None:
    forecast = Forecast(seeds=1)
    isolated, group = (
        forecast.row("imagenet1k", 100, 64, design) for design in ("actors", "one_group")
    )
    assert isolated["recover"] > 95 > group["recover"]
    assert isolated["with_boot"] > 95 > group["with_boot"]


def test_students_that_label_while_they_train_take_longer_and_begin_first() -> None:
    rates = {"recover": 500, "label": 900, "student": 500}
    students = unit_seconds("imagenet1k", 10, rates)["evaluate"]
    passes = 1000 * 10 * 300
    alone, labeling = passes / 500, passes / 500 + passes / 900
    # Three of each: distilled, random and nearest images, by soft and by hard labels.
    assert students == pytest.approx([labeling] * 6 + [alone] * 12)


# Command line


def test_a_simulation_is_written_with_all_that_it_depends_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scale.json"
    options = ("--sets", "imagenet1k", "--ipc", "50", "--workers", "8", "--seeds", "1")
    bench.main(["scale", "simulation", *options, "--losses-per-hour", "0", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["hardware"] and found["versions"]["numpy"]
    assert found["settings"]["losses_per_hour"] == 0
    assert [row["design"] for row in found["rows"]] == ["one_group", "groups_of_8", "actors"]
    assert all(row["losses"] == 0 for row in found["rows"])
    assert "gpu_hours" in capsys.readouterr().out


def test_barycenter_and_recover_run_without_ray(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "from jobs import bench\n"
        "bench.main('barycenter --ipc 2 --solvers lloyd --repeats 1 --no-reference --out b.json'.split())\n"
        "bench.main('recover --archs convnet3 --width 4 --num-images 4 --iterations 2 --out r.json'.split())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    barycenter, recover = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "br")
    assert [row["solver"] for row in barycenter["rows"]] == ["lloyd"]
    assert [row["ipc"] for row in recover["rows"]] == [1, 4]
