"""What Ray Train writes beside the rooms, and what is removed of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wmdd_ray.executors.dispatch import NOTES_FOLDER, sweep_notes
from wmdd_ray.store.filesystem import Store


@pytest.mark.parametrize("others", [{}, {"train/cat/0.png": b"a cat"}])
def test_notes_of_killed_drivers_are_removed_and_images_in_a_folder_train_are_not(
    others: dict[str, bytes], tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    for key, content in {f"{NOTES_FOLDER}/{'0a' * 16}/state.json": b"{}", **others}.items():
        store.put(key, content)
    run: Any = SimpleNamespace(store=store)
    for _ in range(2):
        sweep_notes(run)
        assert {key: store.get(key) for key in store.list()} == others
    assert (tmp_path / NOTES_FOLDER).exists() == bool(others)
