from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units import teacher


def test_training_tells_of_its_steps_long_before_an_epoch_ends() -> None:
    config = recipe_of("digits", 1)
    squeeze = replace(config.squeeze, epochs=3, batch_size=10)
    config = replace(config, squeeze=squeeze)
    training: Any = SimpleNamespace(unit="teacher-1", config=config, num_images=20)
    course: Any = teacher._Course.__new__(teacher._Course)
    course.losses, course.curvatures = [], []
    heard: list[Any] = []

    def batches(epoch: int, part: int) -> Any:
        return iter("ab")

    told: Any = teacher._told(batches, training, course, lambda *words: heard.append(words))
    assert [*told(0, 0)] == ["a", "b"]
    course.losses.append(0.5)
    assert [*told(2, 0)] == ["a", "b"]
    assert heard == [
        (0, "teacher-1, epoch 1/3, step 0/2"),
        (0.125, "teacher-1, epoch 1/3, step 1/2"),
        (0.5, "teacher-1, epoch 3/3, step 0/2, loss 0.500"),
        (0.625, "teacher-1, epoch 3/3, step 1/2, loss 0.500"),
    ]


def test_a_teacher_that_an_earlier_attempt_finished_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(Store(str(tmp_path)), "teacher", "run")
    for _ in range(2):  # the first ended before it could say that it was done
        attempt = room.begin("teacher")
    assert attempt is not None
    attempt.commit({"teacher.safetensors": b"kept"}, {"top1": 0.9})
    monkeypatch.setattr(teacher, "train_classifier", lambda *_, **__: pytest.fail("trained again"))
    nothing: Any = None
    training = teacher.Training(
        unit="teacher",
        room=room,
        config=recipe_of("digits", 1),
        class_names=tuple("0123456789"),
        num_images=20,
        train=nothing,
        val=nothing,
    )
    teacher.train_teacher(training, nothing, device=torch.device("cpu"))
    assert (tmp_path / "teacher" / "teacher.safetensors").read_bytes() == b"kept"
