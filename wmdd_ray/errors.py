"""The errors that a user can meet. Each says what was expected, what came, where, and what to do.

All of them cross process boundaries inside Ray, so they are plain exceptions with one message argument: an
exception with extra constructor arguments cannot be unpickled and would reach the user as a stack of Ray frames.
"""

from __future__ import annotations

from wmdd_ray.redaction import plain


class WmddError(Exception):
    """Base of every deliberate error. `exit_code` is what the job returns to the shell.

    Messages quote names from data and what clients say: they are made printable, and no URI in them has a secret.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(plain(message))


class ConfigError(WmddError, ValueError):
    """An option is wrong, or options contradict each other or an earlier run."""

    exit_code = 2


class LostRaceError(WmddError):
    """Another driver committed different content at the same place."""

    exit_code = 3


class DataError(WmddError, ValueError):
    """The input (images, labels, teacher) cannot be used as it is."""

    exit_code = 4


class BadImageError(DataError):
    """One image cannot be decoded or is refused; it is counted, named and skipped."""


class ArtifactError(WmddError):
    """Bytes at rest are missing, cut, changed, or cannot be reached."""

    exit_code = 5
