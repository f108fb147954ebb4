"""A pool of actors of which any may die. Imports little, because every actor imports this module."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray

from wmdd_ray.errors import DataError, WmddError
from wmdd_ray.executors.actors import fan_out
from wmdd_ray.executors.cluster import Width
from wmdd_ray.spine.events import read_events
from wmdd_ray.spine.run import Progress, StageRun
from wmdd_ray.store.filesystem import Store

pytestmark = pytest.mark.usefixtures("ray_local")


class Worker:
    """Its process ends in the unit `deadly`, and in `once` the first time."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        if (Path(folder) / "unfit").exists():
            with (Path(folder) / "opened").open("a") as file:
                file.write("x")
            raise DataError("no class 7")

    def ready(self) -> str:
        if (Path(self._folder) / "stillborn").exists() and self._first_time("died at birth"):
            os.kill(os.getpid(), signal.SIGKILL)
        return "node"

    def work(self, unit: str) -> None:
        if unit == "wrong":
            raise DataError("class 7 is empty")
        if unit == "deadly" or (unit == "once" and self._first_time(unit)):
            os.kill(os.getpid(), signal.SIGKILL)

    def _first_time(self, unit: str) -> bool:
        try:
            (Path(self._folder) / unit).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def stage_at(folder: Path) -> StageRun:
    from jobs import distill
    from wmdd_ray.stages.pipeline import PIPELINE

    run = distill.open_run(distill.parse(["--out", str(folder), "--max-actors", "2"]))
    return StageRun(run=run, stage=PIPELINE[2], room=run.room("barycenters"), progress=Progress())


def fanned(tmp_path: Path, *units: str) -> list[str]:
    done: list[str] = []
    actor = ray.remote(num_cpus=1)(Worker)
    wide = Width(2, 1, 0.0)
    fan_out(
        stage_at(tmp_path),
        actor,
        (str(tmp_path),),
        units,
        wide=wide,
        max_actors=2,
        on_done=done.append,
    )
    return sorted(done)


@pytest.mark.chaos
def test_a_unit_whose_actor_was_killed_is_done_by_another_and_the_events_say_so(
    tmp_path: Path,
) -> None:
    assert fanned(tmp_path, "a", "once", "b") == ["a", "b", "once"]
    events = read_events(Store(str(tmp_path)))
    told = [(e["event"], e["attempt"]) for e in events if e["unit"] == "once"]
    assert told == [
        ("unit_started", 1),
        ("unit_retried", 1),
        ("unit_started", 2),
        ("unit_done", 2),
    ]
    assert sorted(e["unit"] for e in events if e["event"] == "unit_done") == ["a", "b", "once"]


@pytest.mark.chaos
def test_an_actor_that_dies_while_it_starts_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "stillborn").touch()
    assert fanned(tmp_path, "a", "b") == ["a", "b"]
    assert (tmp_path / "died at birth").exists()


@pytest.mark.chaos
def test_a_unit_that_keeps_ending_its_actor_is_named(tmp_path: Path) -> None:
    with pytest.raises(WmddError, match="unit deadly ended its worker 3 times"):
        fanned(tmp_path, "a", "deadly")
    failed = [e for e in read_events(Store(str(tmp_path))) if e["event"] == "unit_failed"]
    assert [(e["unit"], e["attempt"], e["node"]) for e in failed] == [("deadly", 3, "node")]


def test_an_error_in_an_actor_arrives_as_it_was_raised(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fanned(tmp_path, "a", "wrong", "b")
    assert type(caught.value) is DataError
    assert str(caught.value) == "class 7 is empty"


def test_an_error_while_an_actor_opens_its_data_arrives_at_once(tmp_path: Path) -> None:
    (tmp_path / "unfit").touch()
    with pytest.raises(DataError) as caught:
        fanned(tmp_path, "a", "b", "c")
    assert str(caught.value) == "no class 7"
    assert len((tmp_path / "opened").read_text()) <= 2, "one an actor that was started"
