"""A driver that is joined by a worker beside it: both do units, and either may fail."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.executors.test_actors import stage_at
from wmdd_ray.errors import DataError
from wmdd_ray.executors import beside
from wmdd_ray.spine.events import read_events
from wmdd_ray.spine.run import DoUnit, Report
from wmdd_ray.store.filesystem import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


def opened(device: torch.device, *, folder: Path, driver: int) -> DoUnit:
    """Return a worker that writes who did a unit. The driver's first unit waits for one that began elsewhere."""

    def do_unit(unit: str, report: Report) -> None:
        report(0.5, unit)
        is_driver = os.getpid() == driver
        if not is_driver:
            (folder / "begun").touch()
        if unit == "deadly" and not is_driver:
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == "wrong" and not is_driver:
            raise DataError("class 7 is empty")
        deadline = time.monotonic() + 120
        while not (folder / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.7)
            report(0.9, unit)  # an estimate needs a part that is done
        (folder / unit).write_text("driver" if is_driver else "beside")

    return do_unit


def done_beside(tmp_path: Path, *units: str) -> dict[str, str]:
    folder = tmp_path / "done"
    folder.mkdir()
    worker = partial(opened, folder=folder, driver=os.getpid())
    beside.do_units(stage_at(tmp_path / "run"), units, worker, 0)
    return {unit: (folder / unit).read_text() for unit in units}


@pytest.fixture(autouse=True)
def _always_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_WORTH_S", 0.0)
    monkeypatch.setattr(beside, "most_beside", lambda resources: 1)


def test_a_worker_joins_the_driver_while_it_is_at_its_first_unit(tmp_path: Path) -> None:
    assert done_beside(tmp_path, "a", "b")["b"] == "beside"
    ends = [e for e in read_events(Store(str(tmp_path / "run"))) if e["event"] == "unit_done"]
    assert sorted(e["unit"] for e in ends) == ["a", "b"]


@pytest.mark.chaos
def test_the_driver_does_what_a_lost_worker_leaves(tmp_path: Path) -> None:
    assert done_beside(tmp_path, "a", "deadly") == {"a": "driver", "deadly": "driver"}
    events = read_events(Store(str(tmp_path / "run")))
    assert [e["event"] for e in events if e["unit"] == "deadly"] == [
        "unit_started",
        "unit_retried",
        "unit_started",
        "unit_done",
    ]


def test_an_error_beside_the_driver_ends_the_stage_by_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class 7 is empty"):
        done_beside(tmp_path, "a", "wrong")
    events = read_events(Store(str(tmp_path / "run")))
    assert [e["event"] for e in events if e["unit"] == "wrong"] == ["unit_started", "unit_failed"]


def test_a_short_stage_stays_in_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_WORTH_S", 1e6)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "begun").touch()
    worker = partial(opened, folder=tmp_path / "done", driver=os.getpid())
    beside.do_units(stage_at(tmp_path / "run"), ("a", "b"), worker, 0)
    assert (tmp_path / "done" / "b").read_text() == "driver"
