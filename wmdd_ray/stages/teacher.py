"""The committed teacher, as the later stages read it."""

from __future__ import annotations

from wmdd_ray.records import Teacher
from wmdd_ray.run import Room
from wmdd_ray.store import codecs

TEACHER_KEY = "teacher.safetensors"


def read_teacher(room: Room) -> Teacher:
    """Return the teacher of a committed room, verified."""
    return codecs.decode_teacher(room.read(room.committed().file(TEACHER_KEY)))
