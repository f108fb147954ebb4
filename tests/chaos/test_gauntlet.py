"""Whatever is killed, whenever: the same command again ends with the same bytes, and nothing finished is done again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.gauntlet import Gauntlet, tell
from tests.chaos.killer import WEIGHTS
from tests.chaos.two_nodes import TwoNodes, two_nodes
from tests.conftest import S3Uri
from tests.stages import tiny
from tests.stages.tiny import STAGES, FinishedRun

SEED = int(os.environ.get("WMDD_CHAOS_SEED", "20261121"))
KILLS = int(os.environ.get("WMDD_CHAOS_KILLS", "200"))
PER_STAGE = 4


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[TwoNodes]:
    with two_nodes() as found:
        yield found


@pytest.mark.slow
def test_two_nodes_refuse_an_output_folder_of_one_of_them(
    cluster: TwoNodes, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    refused = tiny.forked(out, ray_address=cluster.address, log=log)
    assert refused.exitcode == 2, log.read_text()
    expected = f"error: --out {out}: expected a URI that all 2 nodes of the cluster see"
    assert expected in log.read_text()
    assert not (out / "teacher/stage.json").exists()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_survives_the_loss_of_a_worker_an_actor_of_rays_a_node_and_the_head(
    cluster: TwoNodes, finished_run: FinishedRun, tmp_path: Path
) -> None:
    gauntlet = Gauntlet(cluster, tmp_path, finished_run.payloads, seed=SEED)
    # What takes a cluster: the driver is killed in test_kill_and_resume.py, in every stage, and terminated there and in
    # test_resources.py. The test below kills all of them in all stages.
    plan = {
        "features": ["worker", "keeper"],
        "barycenters": ["node"],
        "recover": ["head"],
        "relabel": ["worker"],
    }
    tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher")
    # A URI, because two nodes want a place that both see; here they share the disk.
    gauntlet.run(f"file://{tmp_path}/run", "actors", plan, until="relabel")
    tell(gauntlet.summary())
    assert {kill.victim for kill in gauntlet.kills} == set(WEIGHTS) - {"driver", "terminate"}


@pytest.mark.chaos_long
@pytest.mark.timeout(4 * 3600)
def test_hundreds_of_kills_lose_no_unit_and_change_no_byte(
    cluster: TwoNodes, s3_server: S3Uri, finished_run: FinishedRun, tmp_path: Path
) -> None:
    print(f"\nseed {SEED}, {KILLS} kills; WMDD_CHAOS_SEED and WMDD_CHAOS_KILLS set others")
    gauntlet = Gauntlet(cluster, tmp_path, finished_run.payloads, seed=SEED)
    modes = ("actors", "group", "driver")
    while len(gauntlet.kills) < KILLS:
        uri = s3_server() if gauntlet.runs % 2 else f"file://{tmp_path}/run-{gauntlet.runs}"
        gauntlet.run(uri, modes[gauntlet.runs % len(modes)], gauntlet.plan(PER_STAGE))
    tell(gauntlet.summary())
    assert {kill.victim for kill in gauntlet.kills} == set(WEIGHTS)
    assert {kill.stage for kill in gauntlet.kills} == set(STAGES)
