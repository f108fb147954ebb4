"""Units of work on Ray Train workers: any number of them, and any of them may die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.executors import dispatch
from wmdd_ray.spine.events import read_events
from wmdd_ray.spine.run import DoUnit, Report
from wmdd_ray.stages import recover
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units import students

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


@pytest.mark.chaos_long  # two do below, of which one is killed
def test_one_worker_recovers_the_same_bytes_as_the_driver(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *tiny.ROOMS[:3])
    assert tiny.job(out, "--until", "recover", "--num-workers", "1") == 0
    tiny.assert_same_payloads(out, finished_run.payloads, "images")


def test_three_workers_write_the_same_labels_as_the_driver(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *tiny.ROOMS[:4])
    assert tiny.job(out, "--until", "relabel", "--num-workers", "3", "--executor", "auto") == 0
    tiny.assert_same_payloads(out, finished_run.payloads, "labels")


def test_a_laptop_s_driver_embeds_and_solves_few_images_by_itself(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("streams.embedded", "actors.fan_out"):
        monkeypatch.setattr(f"wmdd_ray.executors.{name}", lambda *_, **__: pytest.fail("on Ray"))
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher")
    assert tiny.job(out, "--until", "barycenters", "--executor", "auto") == 0
    tiny.assert_same_payloads(out, finished_run.payloads, "features", "barycenters")
    out = tiny.copy_rooms(finished_run.out, tmp_path / "other", "teacher")
    monkeypatch.setattr(dispatch, "_SMALL_IMAGES", 1000)
    with pytest.raises(pytest.fail.Exception, match="on Ray"):
        tiny.job(out, "--until", "features", "--executor", "auto")


def dying_worker(
    device: torch.device, *, folder: str, inner: Callable[..., DoUnit], **options: Any
) -> DoUnit:
    """Return a worker that is killed in the middle of the third group, once."""
    do_unit = inner(device, **options)
    room = options["room"]

    def do_or_die(unit: str, report: Report) -> None:
        def deadly_report(fraction: float, note: str = "") -> None:
            if unit == "g00002" and fraction >= 0.5:
                finished = json.dumps(sorted(room.finished()))
                with contextlib.suppress(FileExistsError), open(f"{folder}/died", "x") as file:
                    file.write(finished)
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            report(fraction, note)

        do_unit(unit, deadly_report)

    return do_or_die


@pytest.mark.chaos
@pytest.mark.parametrize("executor", ["train", "actors"])
def test_two_workers_of_which_one_is_killed_redo_only_unfinished_units_with_the_same_bytes(
    executor: str, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *tiny.ROOMS[:3])
    worker = partial(dying_worker, folder=str(tmp_path), inner=recover.open_image_maker)
    monkeypatch.setattr(recover, "open_image_maker", worker)
    options = ("--until", "recover", "--num-workers", "2", "--executor", executor)
    assert tiny.job(out, *options) == 0
    died = (tmp_path / "died").stat().st_mtime_ns
    done = tiny.markers(out, "images")
    for unit in json.loads((tmp_path / "died").read_text()):
        _, changed = done[f"images/units/{unit}.json"]
        assert max(changed) < died
    tiny.assert_same_payloads(out, finished_run.payloads, "images")
    events = [e for e in read_events(Store(str(out))) if e.get("unit") == "g00002"]
    told = [(e["event"], e["attempt"]) for e in events]
    assert told == [
        ("unit_started", 1),
        ("unit_retried", 1),
        ("unit_started", 2),
        ("unit_done", 2),
    ]


def test_students_that_take_longest_are_the_first_and_none_is_lost() -> None:
    rows = ("distilled", "random_real", "all_real")
    units = [
        f"{row}-{labels}-s{seed:03d}"
        for row in rows
        for labels in ("soft", "hard")
        for seed in (0, 1)
    ]
    ordered = students.longest_first(units)
    assert ordered == [
        *("all_real-soft-s000", "all_real-soft-s001", "all_real-hard-s000", "all_real-hard-s001"),
        *("random_real-soft-s000", "random_real-soft-s001"),
        *(
            "distilled-soft-s000",
            "distilled-soft-s001",
            "distilled-hard-s000",
            "distilled-hard-s001",
        ),
        *("random_real-hard-s000", "random_real-hard-s001"),
    ]
