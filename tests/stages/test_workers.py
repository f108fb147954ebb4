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
from wmdd_ray.errors import DataError, WmddError
from wmdd_ray.stages import recover
from wmdd_ray.stages.workers import MAX_ATTEMPTS, DoUnit, Report, UnitQueue

needs_ray = pytest.mark.usefixtures("ray_local")
slow = pytest.mark.slow
chaos = pytest.mark.chaos


# The queue ---------------------------------------------------------------------------------------


def test_every_unit_is_handed_out_once_in_the_order_given() -> None:
    queue = UnitQueue(["b", "a", "c"])
    taken = []
    while (unit := queue.take(rank=len(taken) % 2)) is not None:
        taken.append(unit)
        queue.report(unit, 1.0, "")
    assert taken == ["b", "a", "c"]
    assert queue.progress() == (3, "")
    assert queue.error() is None


def test_a_rank_that_enters_again_frees_what_it_had_taken() -> None:
    queue = UnitQueue(["a", "b", "c"])
    assert [queue.take(0), queue.take(1)] == ["a", "b"]
    queue.join(1, world=2)
    assert queue.take(1) == "b"
    assert queue.take(0) == "c"


def test_a_smaller_group_frees_what_ranks_beyond_it_had_taken() -> None:
    queue = UnitQueue(["a", "b", "c", "d"])
    assert [queue.take(rank) for rank in range(3)] == ["a", "b", "c"]
    queue.report("b", 1.0, "")
    queue.join(0, world=1)
    left = [queue.take(0) for _ in range(4)]
    assert sorted(filter(None, left)) == ["a", "c", "d"]
    assert left[-1] is None


def test_a_unit_that_keeps_ending_its_worker_is_given_up_by_name() -> None:
    queue = UnitQueue(["deadly", "fine"])
    for _ in range(MAX_ATTEMPTS):
        queue.join(0, world=1)
        assert queue.take(0) == "deadly"
    queue.join(0, world=1)
    assert queue.take(0) is None
    with pytest.raises(WmddError, match="unit deadly ended its worker 3 times"):
        raise_error(queue)
    assert queue.take(0) is None


def test_a_deliberate_error_stops_handing_out_and_the_first_one_counts() -> None:
    queue = UnitQueue(["a", "b", "c"])
    assert [queue.take(0), queue.take(1)] == ["a", "b"]
    queue.fail("a", DataError("first"))
    queue.fail("b", DataError("second"))
    assert queue.take(0) is None
    with pytest.raises(DataError, match="first"):
        raise_error(queue)


def raise_error(queue: UnitQueue) -> None:
    error = queue.error()
    assert error is not None
    raise error


def test_progress_counts_the_fractions_of_units_under_way_and_forgets_those_of_a_lost_worker() -> (
    None
):
    shown: list[tuple[float, str]] = []
    queue = UnitQueue(["a", "b"], lambda done, note: shown.append((done, note)))
    queue.take(0)
    queue.take(1)
    queue.report("a", 0.5, "step 1")
    queue.report("b", 0.25, "")
    queue.report("a", 1.0, "")
    queue.join(1, world=2)
    assert shown == [(0.5, "step 1"), (0.75, "step 1"), (1.25, "step 1")]
    assert queue.progress() == (1, "step 1")


# Ray Train workers -------------------------------------------------------------------------------


@needs_ray
@slow
def test_one_worker_recovers_the_same_bytes_as_the_driver(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *tiny.ROOMS[:3])
    assert tiny.job(out, "--until", "recover", "--num-workers", "1") == 0
    tiny.assert_same_payloads(out, finished_run.payloads, "images")


@needs_ray
@slow
def test_three_workers_write_the_same_labels_as_the_driver(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *tiny.ROOMS[:4])
    assert tiny.job(out, "--until", "relabel", "--num-workers", "3") == 0
    tiny.assert_same_payloads(out, finished_run.payloads, "labels")


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


@needs_ray
@slow
@chaos
def test_two_workers_of_which_one_is_killed_redo_only_unfinished_units_with_the_same_bytes(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *tiny.ROOMS[:3])
    worker = partial(dying_worker, folder=str(tmp_path), inner=recover.open_worker)
    monkeypatch.setattr(recover, "open_worker", worker)
    assert tiny.job(out, "--until", "recover", "--num-workers", "2") == 0
    died = (tmp_path / "died").stat().st_mtime_ns
    done = tiny.markers(out, "images")
    for unit in json.loads((tmp_path / "died").read_text()):
        _, changed = done[f"images/units/{unit}.json"]
        assert max(changed) < died
    tiny.assert_same_payloads(out, finished_run.payloads, "images")
