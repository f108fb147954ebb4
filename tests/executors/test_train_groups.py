"""Groups of Ray Train workers, without Ray: a queue in this process stands in for its actor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from wmdd_ray.errors import DataError
from wmdd_ray.executors import data_parallel, train_groups, workers
from wmdd_ray.executors.queue import UnitQueue
from wmdd_ray.spine.run import DoUnit, StageRun


def test_an_error_while_a_worker_opens_its_data_is_told_to_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unfit(device: torch.device) -> DoUnit:
        raise DataError("no class 7")

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 2)
    monkeypatch.setattr(workers.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(workers, "RemoteQueue", lambda queue: queue)
    queue = UnitQueue(["a", "b"])
    config: dict[str, Any] = {
        "open_worker": unfit,
        "cpus": torch.get_num_threads(),
        "gpus": 0,
        "queue": queue,
    }
    workers._worker_loop(config)
    assert isinstance(queue.error(), DataError)
    assert queue.take(0) is None


def of_a_task() -> Exception:
    """Return an error as a task hands it on: of our class and of Ray's, with a traceback for its text."""
    inner = DataError("no class 7")
    return cast(Exception, RayTaskError("decode", "Traceback", inner).as_instanceof_cause())


def assert_in_our_words(error: BaseException | None) -> None:
    assert type(error) is DataError and str(error) == "no class 7"


def trained(monkeypatch: pytest.MonkeyPatch, queue: UnitQueue, rank: int, error: Exception) -> None:
    """Be a rank of a group that trains a teacher, until `error` comes."""

    def train_teacher(*_: Any, **__: Any) -> None:
        raise error

    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2)
    monkeypatch.setattr(data_parallel.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(train_groups, "RemoteQueue", lambda queue: queue)
    monkeypatch.setattr(data_parallel, "train_teacher", train_teacher)
    monkeypatch.setattr(data_parallel, "device_of_worker", lambda gpus: torch.device("cpu"))
    training = SimpleNamespace(unit="teacher", room=SimpleNamespace(finished=set), train=())
    data_parallel._worker_loop({"training": training, "queue": queue, "gpus": 0})


def test_an_error_of_a_task_that_decodes_is_told_in_our_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = UnitQueue(["teacher"])
    with pytest.raises(DataError) as caught:
        trained(monkeypatch, queue, 1, of_a_task())
    assert_in_our_words(caught.value)
    assert_in_our_words(queue.error())


def test_an_error_of_one_rank_ends_those_that_wait_for_it_and_the_next_group_at_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = UnitQueue(["teacher"])
    error = DataError("no class 7")
    with pytest.raises(DataError, match="no class 7"):
        trained(monkeypatch, queue, 1, error)
    for rank in (0, 1):
        trained(monkeypatch, queue, rank, AssertionError("trained again"))
    assert queue.error() is error


def test_an_error_of_a_task_that_counts_is_told_in_our_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get(refs: Any) -> Any:
        raise of_a_task()

    task = SimpleNamespace(remote=lambda shard: shard)
    fake = SimpleNamespace(put=lambda held: held, remote=lambda count: task, get=get)
    monkeypatch.setattr(data_parallel, "ray", fake)
    source: Any = SimpleNamespace(shards=lambda num_images: ["a"])
    with pytest.raises(DataError) as caught:
        data_parallel.count_images(source)
    assert_in_our_words(caught.value)


@pytest.mark.parametrize(
    "failure", [None, WorkerGroupError("one rank", {1: of_a_task()}), RuntimeError("lost")]
)
def test_an_error_of_a_group_ends_it_in_our_words(
    failure: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = 0

    def fit(run_config: Any) -> None:
        nonlocal fitted
        fitted += 1
        if failure is not None:
            raise failure

    monkeypatch.setattr(train_groups, "_train_run_config", lambda stage, queue: None)
    monkeypatch.setattr(train_groups.ray, "get", lambda ref: ref)
    error, progress = (SimpleNamespace(remote=told) for told in (of_a_task, lambda: (0.0, "")))
    queue: Any = SimpleNamespace(error=error, progress=progress)
    store = SimpleNamespace(delete=lambda key: None)
    stage: Any = SimpleNamespace(run=SimpleNamespace(store=store, token="t"))
    with pytest.raises(DataError) as caught:
        train_groups.fit_until_done(cast(StageRun, stage), queue, fit)
    assert_in_our_words(caught.value)
    assert fitted == 1
