"""Which failures of an object store pass by themselves, and how long they are waited for.

The only layer that retries. Clients that retry inside each other multiply: botocore's 5 attempts in s3fs's 5 in another
5 around a read kept a hanging server for half an hour. And each alone leaves something out: s3fs gives up at the first
500, 503 and refused connection, botocore at a body that breaks off and at the 409 of two conditional writes at once.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAITS_S = (0.2, 1.0, 4.0)
"""Pauses between the attempts, each shortened by up to half so that workers which failed together come back apart."""

# Read timeout, conflict of conditional writes, too many requests. 501 says that it will never work.
_PASSING = {408, 409, 429}
_LASTING = {501}


def retried(do: Callable[[], T]) -> T:
    """Return what `do` returns, called again after a failure that may pass. `do` must be safe to repeat."""
    for wait_s in WAITS_S:
        try:
            return do()
        except Exception as error:
            if not _passes(error):
                raise
            time.sleep(wait_s * random.uniform(0.5, 1.0))
    return do()


def client_errors() -> tuple[type[Exception], ...]:
    """Return what S3 clients raise that is no OSError; empty when they are not loaded."""
    return (*_of("botocore.exceptions", "BotoCoreError", "ClientError"), *_connection_errors())


def _passes(error: Exception) -> bool:
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status in _PASSING or (status >= 500 and status not in _LASTING)
    return isinstance(error, (TimeoutError, *_connection_errors()))


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return what says that a connection failed or carried other bytes than were sent."""
    names = ("ConnectionError", "HTTPClientError", "IncompleteReadError", "FlexibleChecksumError")
    return (*_of("botocore.exceptions", *names), *_of("aiohttp", "ClientError"))


def _of(module: str, *names: str) -> tuple[type[Exception], ...]:
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded else ()
