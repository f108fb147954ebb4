"""Groups of Ray Train workers, without Ray: a queue in this process stands in for its actor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wmdd_ray.errors import DataError
from wmdd_ray.executors import workers
from wmdd_ray.executors.queue import UnitQueue
from wmdd_ray.spine.run import DoUnit


def test_an_error_while_a_worker_opens_its_data_is_told_to_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unfit(device: torch.device) -> DoUnit:
        raise DataError("no class 7")

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 2)
    monkeypatch.setattr(workers.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(workers, "RemoteQueue", lambda queue: queue)
    queue = UnitQueue(["a", "b"])
    config: dict[str, Any] = {"open_worker": unfit, "cpus": torch.get_num_threads(), "queue": queue}
    workers._worker_loop(config)
    assert isinstance(queue.error(), DataError)
    assert queue.take(0) is None
