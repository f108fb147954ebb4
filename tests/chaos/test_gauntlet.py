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
from tests.stages.tiny import STAGES, FinishedRun

SEED = int(os.environ.get("WMDD_CHAOS_SEED", "20261121"))
KILLS = int(os.environ.get("WMDD_CHAOS_KILLS", "200"))
PER_STAGE = 4


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[TwoNodes]:
    with two_nodes() as found:
        yield found


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_survives_kills_of_every_kind_in_every_stage(
    cluster: TwoNodes, finished_run: FinishedRun, tmp_path: Path
) -> None:
    gauntlet = Gauntlet(cluster, tmp_path, finished_run.payloads, seed=SEED)
    plan = {
        "squeeze": ["terminate", "worker"],
        "features": ["worker", "keeper", "driver"],
        "barycenters": ["node", "worker"],
        "recover": ["head", "terminate"],
        "relabel": ["worker"],
        "assemble": ["driver"],
        "evaluate": ["terminate"],
    }
    # A URI, because two nodes want a place that both see; here they share the disk.
    gauntlet.run(f"file://{tmp_path}/run", "actors", plan)
    tell(gauntlet.summary())
    assert {kill.victim for kill in gauntlet.kills} == set(WEIGHTS)


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
