"""What lies at the bottom of an error that came through others."""

from __future__ import annotations

import re

from wmdd_ray import errors
from wmdd_ray.errors import WmddError


def root_cause(error: BaseException) -> BaseException:
    """Return the deliberate error inside what Ray wrapped around it, or `error` itself when there is none."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        inner = pending.pop()
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, WmddError) and type(inner).__module__ == "wmdd_ray.errors":
            # Ray Data writes lines of its own behind ours, on how to have a function repeated.
            inner.args = (str(inner).partition("\nFailed to apply UDF")[0],)
            return inner
        pending += [inner.__cause__, inner.__context__, getattr(inner, "cause", None)]
        pending += list(getattr(inner, "worker_failures", {}).values())
    # Ray Data hands on what a worker raised as text only.
    quoted = re.findall(r"wmdd_ray\.errors\.(\w+): (.+)", str(error))
    return getattr(errors, quoted[-1][0])(quoted[-1][1]) if quoted else error


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, which is what Ray's long ones come down to."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else repr(error)
