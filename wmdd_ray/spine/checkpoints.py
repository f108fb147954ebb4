"""The state of a long unit in storage, so that a killed worker loses seconds and not hours."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from wmdd_ray.core.optimizer import State
from wmdd_ray.errors import ArtifactError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store import codecs

logger = logging.getLogger(__name__)

_SLOTS = 2
_NUMBER = "checkpoint_number"
_SECONDS = "checkpoint_seconds"


class Checkpoints:
    """Two objects that take turns, so that one of them is always whole; gone when the unit is finished.

    A state is serialized when it is taken and put in the background, while the work goes on. States lie under `partial/<unit>/`
    of the stage's room, `every_s` seconds apart at least.
    """

    def __init__(self, room: Room, unit: str, every_s: float) -> None:
        self._store = room.store
        self._folder = room.place("partial", unit)
        self._every_s = every_s
        self._number = 0
        self._began = self._last = time.monotonic()
        self._before_s = 0.0
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    @property
    def seconds(self) -> float:
        """The time since this object was made, and what it took earlier attempts to reach the state that was loaded."""
        return self._before_s + time.monotonic() - self._began

    def load(self) -> State | None:
        """Return the newest state that is whole, or None."""
        states: list[State] = []
        for slot in range(_SLOTS):
            with contextlib.suppress(FileNotFoundError):
                try:
                    states.append(codecs.decode_state(self._store.get(self._key(slot))))
                except ArtifactError as error:
                    logger.warning("%s is left aside: %s", self._store.url(self._key(slot)), error)
        if not states:
            return None
        newest = max(states, key=lambda state: int(state[_NUMBER]))
        self._number = int(newest.pop(_NUMBER))
        self._before_s = float(newest.pop(_SECONDS, 0.0))
        return newest

    def maybe(self, get_state: Callable[[], State]) -> None:
        """Store the state that `get_state` returns, unless the last one is too young or still on its way."""
        if time.monotonic() - self._last < self._every_s:
            return
        if self._pending is not None:
            if not self._pending.done():
                return
            self._pending.result()
        self._number += 1
        own = {_NUMBER: np.array(self._number), _SECONDS: np.array(self.seconds)}
        content = codecs.encode_state({**get_state(), **own})
        self._pending = self._pool.submit(
            self._store.put, self._key(self._number % _SLOTS), content
        )
        self._last = time.monotonic()

    def clear(self) -> None:
        """Remove what is stored; called when the unit is committed."""
        if self._pending is not None:
            # What failed on its way does not matter any more.
            with contextlib.suppress(ArtifactError):
                self._pending.result()
        self._pool.shutdown()
        self._store.delete(self._folder)

    def _key(self, slot: int) -> str:
        return f"{self._folder}/state-{slot}.safetensors"
