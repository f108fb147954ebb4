"""Running moments, which one image of every class meets: units are positions, and readers see whole classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.core.groups import Group, plan_groups
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.spine.rooms import Room
from wmdd_ray.stages.recover import NUMBERS
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units import images
from wmdd_ray.units.images import ClassImagesReader, groups

OPTIONS = ("--recover.moments", "global", "--recover.images-per-group", "10")


@pytest.mark.slow
def test_a_unit_is_a_position_of_every_class_and_the_set_has_all_of_them(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    planned = groups(tiny.config(*OPTIONS), 10)
    assert [(g.labels, g.positions) for g in planned.values()] == [
        (range(10), range(k, k + 1)) for k in range(4)
    ]
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *tiny.ROOMS[:3])
    assert tiny.job(out, *OPTIONS, "--executor", "here", "--until", "assemble") == 0
    room = Room(Store(str(out)), "images")
    commit = room.committed()
    assert sorted(commit.units) == list(planned)
    classes = ClassImagesReader(room).read(range(10))
    assert [record.label for record in classes] == list(range(10))
    assert all(record.images_KHWC.shape == (4, 16, 16, 1) for record in classes)
    stored = DistilledDataset(str(out / "dataset")).images
    made = np.concatenate([record.images_KHWC for record in classes])
    np.testing.assert_array_equal(stored, made)
    # Not what each class would be by itself.
    alone = json.loads((finished_run.out / "images" / "stage.json").read_text())
    assert "matched_by" not in alone["options"]["recover"]
    assert commit.options["recover"]["matched_by"] == "one image of every class"


def test_groups_are_planned_once_for_all_units_that_are_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny.config(*OPTIONS, "--seed", "971")
    units, plans = groups(config, 10), []

    def counted(*arguments: Any) -> tuple[Group, ...]:
        plans.append(arguments)
        return plan_groups(*arguments)

    monkeypatch.setattr(images, "plan_groups", counted)
    features = SimpleNamespace(metrics={"class_counts": [8] * 10})
    stage: Any = SimpleNamespace(config=config, inputs={"features": features})
    told = [NUMBERS.images(stage, SimpleNamespace(unit=unit)) for unit in units]
    assert told == [10] * 4 and len(plans) == 1
