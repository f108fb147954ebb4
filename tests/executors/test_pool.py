"""The pool of actors, without Ray: references are what they hold, an answer or an error."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import OutOfMemoryError

from wmdd_ray.errors import ConfigError, WmddError
from wmdd_ray.executors import actors
from wmdd_ray.executors.actors import Pool, fan_out
from wmdd_ray.executors.cluster import Width
from wmdd_ray.spine.rooms import MAX_ATTEMPTS
from wmdd_ray.spine.run import StageRun


class Ref:
    """A call that has ended."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class FakeRay:
    """Ray with one actor at a time, whose calls of `work` end by the answers given."""

    def __init__(self, answers: Sequence[Any], fraction: Callable[[], float]) -> None:
        self._answers = deque(answers)
        self.started = 0
        self.fraction = fraction

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def wait(
        self, refs: list[Ref], timeout: float, num_returns: int = 1
    ) -> tuple[list[Ref], list[Ref]]:
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: Ref | list[Ref]) -> Any:
        if isinstance(ref, list):
            return [self.get(one) for one in ref]
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def kill(self, actor: Any) -> None:
        pass

    def remote(self) -> Any:
        self.started += 1
        work = SimpleNamespace(remote=lambda unit: Ref(self._answers.popleft()))
        ready = SimpleNamespace(remote=lambda: Ref("node"))
        progress = SimpleNamespace(remote=lambda: Ref((self.fraction(), "", "u", {})))
        return Handle(ready=ready, work=work, progress=progress)


class Handle(SimpleNamespace):
    """A handle, which is a key."""

    __hash__ = object.__hash__


def stage_of_events() -> StageRun:
    stage: Any = SimpleNamespace(event=lambda *_, **__: None, stage=SimpleNamespace(name="recover"))
    return cast(StageRun, stage)


def worked(
    monkeypatch: pytest.MonkeyPatch, *answers: Any, fraction: Callable[[], float] = lambda: 0.0
) -> tuple[list[str], FakeRay]:
    """Return the units of a stage of one unit that are done when its attempts end by `answers`, and who did them."""
    ray = FakeRay(answers, fraction)
    monkeypatch.setattr(actors, "ray", ray)
    done: list[str] = []
    pool = Pool(stage_of_events(), cast(Any, ray), (), deque(["u"]), 1, 1, done.append)
    while pool.waiting or pool.working:
        pool.grow()
        pool.progress()
        pool.take_next(0.0)
    return done, ray


def test_a_worker_that_rays_memory_monitor_ended_is_replaced_and_its_unit_given_up_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out_of_memory = OutOfMemoryError("Memory on the node was 30.4GB / 32.0GB, above the threshold")
    done, ray = worked(monkeypatch, out_of_memory, None)
    assert done == ["u"] and ray.started == 2
    with pytest.raises(WmddError, match="unit u ended its worker 3 times .*above the threshold"):
        worked(monkeypatch, *MAX_ATTEMPTS * [out_of_memory])


def test_a_unit_that_comes_further_each_time_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = count(1)
    losses = 3 * MAX_ATTEMPTS * [OutOfMemoryError("its node is full")]
    done, _ = worked(monkeypatch, *losses, None, fraction=lambda: next(steps) / 100)
    assert done == ["u"]


def test_when_the_last_node_that_fits_is_lost_another_is_waited_for_and_then_the_stage_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay([OutOfMemoryError("its node is full")], lambda: 0.0)
    monkeypatch.setattr(actors, "ray", ray)

    def await_room(stage: StageRun, wide: Width) -> None:
        if ray.started:
            raise ConfigError("no room")

    monkeypatch.setattr(actors, "await_room", await_room)
    with pytest.raises(ConfigError, match="no room"):
        fan_out(
            stage_of_events(),
            cast(Any, ray),
            (),
            ["u"],
            wide=Width(1, 1, 0.0),
            max_actors=1,
            first_actors=1,
            on_done=lambda unit: None,
        )
    assert ray.started == 1
