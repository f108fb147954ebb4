"""Streams of Ray Data, as they are built; nothing runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.data import DataContext

from wmdd_ray.executors import streams


def test_the_shuffle_by_class_shows_no_bar_and_is_ended_when_it_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = DataContext()
    context.enable_progress_bars = True
    block_bytes = context.target_max_block_size
    built: list[tuple[Any, ...]] = []

    class Stream:
        """A stream without rows."""

        def __getattr__(self, name: str) -> Any:
            seen = (context.enable_progress_bars, context.execution_no_progress_timeout_s)
            built.append((*seen, context.target_max_block_size))
            return lambda *_, **__: self

        def iter_rows(self) -> list[Any]:
            return []

    monkeypatch.setattr(DataContext, "get_current", lambda: context)
    monkeypatch.setattr(streams.ray.data, "from_items", Stream().from_items)
    built.clear()
    run = SimpleNamespace(source=lambda split: SimpleNamespace(class_names=("a", "b")))
    progress = SimpleNamespace(update=lambda *_: None)
    stage: Any = SimpleNamespace(room=None, run=run, progress=progress)
    streams.regroup_by_class(stage, ["chunk"])
    assert set(built) == {(False, 900, block_bytes)}
