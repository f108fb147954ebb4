"""The pool of actors, without Ray: references are what they hold, an answer or an error."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import OutOfMemoryError

from wmdd_ray.errors import WmddError
from wmdd_ray.executors import actors
from wmdd_ray.executors.actors import Pool
from wmdd_ray.spine.rooms import MAX_ATTEMPTS
from wmdd_ray.spine.run import StageRun


class Ref:
    """A call that has ended."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class FakeRay:
    """Ray with one actor at a time, whose calls of `work` end by the answers given."""

    def __init__(self, *answers: Any) -> None:
        self._answers = deque(answers)
        self.started = 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def wait(self, refs: list[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        return refs[:1], refs[1:]

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def kill(self, actor: Any) -> None:
        pass

    def remote(self) -> Any:
        self.started += 1
        work = SimpleNamespace(remote=lambda unit: Ref(self._answers.popleft()))
        ready = SimpleNamespace(remote=lambda: Ref("node"))
        return Actor(ready, work)


class Actor:
    """A handle."""

    def __init__(self, ready: Any, work: Any) -> None:
        self.ready, self.work = ready, work


def worked(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> tuple[list[str], FakeRay]:
    """Return the units of a stage of one unit that are done when its attempts end by `answers`, and who did them."""
    ray = FakeRay(*answers)
    monkeypatch.setattr(actors, "ray", ray)
    stage: Any = SimpleNamespace(event=lambda *_, **__: None, stage=SimpleNamespace(name="recover"))
    done: list[str] = []
    pool = Pool(cast(StageRun, stage), cast(Any, ray), (), deque(["u"]), 1, 1, done.append)
    while pool.waiting or pool.working:
        pool.grow()
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
