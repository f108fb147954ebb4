"""The queue of units, without Ray."""

from __future__ import annotations

import pytest

from wmdd_ray.errors import DataError, WmddError
from wmdd_ray.executors.queue import UnitQueue
from wmdd_ray.spine.rooms import MAX_ATTEMPTS


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
        queue.lose({0: "SIGKILL"})
    queue.join(0, world=1)
    assert queue.take(0) is None
    with pytest.raises(WmddError, match="unit deadly ended its worker 3 times .*by SIGKILL"):
        raise_error(queue)
    assert queue.take(0) is None


def test_a_unit_that_comes_further_each_time_is_not_given_up() -> None:
    queue = UnitQueue(["long"])
    for attempt in range(3 * MAX_ATTEMPTS):
        queue.join(0, world=1)
        assert queue.take(0) == "long"
        queue.report("long", (attempt + 1) / 10, "")
        queue.lose({0: "its node died"})
    assert queue.error() is None
    for _ in range(MAX_ATTEMPTS - 1):
        queue.join(0, world=1)
        queue.take(0)
        queue.lose({0: "its node died"})
    assert queue.error() is not None


def test_a_unit_whose_group_is_started_again_because_of_others_is_never_given_up() -> None:
    queue = UnitQueue(["long", *(f"u{i}" for i in range(8 * MAX_ATTEMPTS))])
    for _ in range(4 * MAX_ATTEMPTS):
        assert queue.take(0) == "long"
        assert queue.take(1) is not None
        queue.lose({1: "its node died"})
        for rank in (0, 1):
            queue.join(rank, world=2)
        # The unit of the dead rank came back in front; somebody else does it now.
        units = [queue.take(0), queue.take(1)]
        assert "long" in units
        done = next(unit for unit in units if unit != "long")
        assert done is not None
        queue.report(done, 1.0, "")
        queue.join(0, world=2)
        queue.join(1, world=2)
    assert queue.error() is None


def test_events_tell_who_works_on_what_and_how_often() -> None:
    queue = UnitQueue(["a", "b"])
    queue.join(0, world=1, node="n1")
    queue.take(0)
    queue.join(0, world=1, node="n2")
    queue.take(0)
    queue.report("a", 1.0, "")
    queue.take(0)
    queue.fail("b", DataError("no"))
    told = [(e["event"], e["unit"], e["node"], e["attempt"]) for e in queue.drain()]
    assert told == [
        ("unit_started", "a", "n1", 1),
        ("unit_retried", "a", "n1", 1),
        ("unit_started", "a", "n2", 2),
        ("unit_done", "a", "n2", 2),
        ("unit_started", "b", "n2", 1),
        ("unit_failed", "b", "n2", 1),
    ]
    assert queue.drain() == []


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
