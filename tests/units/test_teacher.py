from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from wmdd_ray.recipes import recipe_of
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
