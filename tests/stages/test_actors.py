"""A pool of actors of which any may die. Imports little, because every actor imports this module."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray

from wmdd_ray.errors import DataError, WmddError
from wmdd_ray.stages.actors import fan_out

pytestmark = pytest.mark.usefixtures("ray_local")


class Worker:
    """Its process ends in the unit `deadly`, and in `once` the first time."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def ready(self) -> None:
        """Return once the actor can work."""

    def work(self, unit: str) -> str:
        if unit == "wrong":
            raise DataError("class 7 is empty")
        if unit == "deadly" or (unit == "once" and self._first_time(unit)):
            os.kill(os.getpid(), signal.SIGKILL)
        return unit.upper()

    def _first_time(self, unit: str) -> bool:
        try:
            (Path(self._folder) / unit).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def fanned(tmp_path: Path, *units: str) -> dict[str, str]:
    done: dict[str, str] = {}
    actor = ray.remote(num_cpus=1)(Worker)
    fan_out(actor, (str(tmp_path),), units, max_actors=2, on_done=done.__setitem__)
    return done


@pytest.mark.chaos
def test_a_unit_whose_actor_was_killed_is_done_by_another(tmp_path: Path) -> None:
    assert fanned(tmp_path, "a", "once", "b") == {"a": "A", "once": "ONCE", "b": "B"}


@pytest.mark.chaos
def test_a_unit_that_keeps_ending_its_actor_is_named(tmp_path: Path) -> None:
    with pytest.raises(WmddError, match="unit deadly ended its actor 3 times"):
        fanned(tmp_path, "a", "deadly")


def test_an_error_in_an_actor_arrives_as_it_was_raised(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fanned(tmp_path, "a", "wrong", "b")
    assert type(caught.value) is DataError
    assert str(caught.value) == "class 7 is empty"
