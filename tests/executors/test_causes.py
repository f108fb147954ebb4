"""The deliberate error inside what Ray makes of it."""

from __future__ import annotations

import pytest

from wmdd_ray.errors import DataError
from wmdd_ray.executors.causes import root_cause

OURS = "train-1.parquet#23 has label 7, expected 0 to 2"
RAYS = "\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, ..."


def wrapped(error: BaseException) -> BaseException:
    """Return an error as Ray wraps it: by `cause`, and by text."""
    outer = RuntimeError("UDF failed to process a data block.")
    outer.cause = error  # type: ignore[attr-defined]
    return outer


@pytest.mark.parametrize(
    "error",
    [
        DataError(OURS),
        wrapped(DataError(OURS + RAYS)),
        RuntimeError(f"Traceback ...\nwmdd_ray.errors.DataError: {OURS}{RAYS}\n"),
    ],
    ids=["itself", "wrapped", "as text"],
)
def test_our_error_is_told_in_our_words_alone(error: BaseException) -> None:
    cause = root_cause(error)
    assert isinstance(cause, DataError) and str(cause) == OURS


def test_an_error_of_others_is_left_as_it_is() -> None:
    error = wrapped(KeyError("x"))
    assert root_cause(error) is error
