"""How an option is declared: its default, the values that it may have, and when it has no part in a fingerprint.

Declarations stand in the metadata of dataclass fields; `check` and `fingerprint_options` are what reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from wmdd_ray.errors import ConfigError
from wmdd_ray.redaction import uri_fault

T = TypeVar("T")
_NEVER = object()


def option(
    default: T,
    *,
    ge: float = -math.inf,
    gt: float = -math.inf,
    le: float = math.inf,
    lt: float = math.inf,
    absent_at: object = _NEVER,
    only_with: str | None = None,
    in_fingerprint: bool = True,
) -> T:
    """Return a dataclass field.

    Args:
        default: Its default value.
        ge: Least value; of a tuple, of each number in it.
        gt: What values are above.
        le: Largest value.
        lt: What values are below.
        absent_at: Value at which the option leaves the fingerprint, as if there were no such option.
        only_with: Option of the same dataclass that has an `absent_at`: where that one is absent, this one is too.
        in_fingerprint: Whether results depend on the option at all.
    """
    metadata: dict[str, Any] = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata |= {"only_with": only_with, "in_fingerprint": in_fingerprint}
    metadata |= {} if absent_at is _NEVER else {"absent_at": absent_at}
    return field(default=default, metadata=metadata)


def require(ok: bool, option: str, expected: str, got: object) -> None:
    """Raise a ConfigError unless `ok`; `option` is as it is typed, without its dashes."""
    if not ok:
        raise ConfigError(f"--{option}: expected {expected}, got {got!r}")


def refuse_secrets(option: str, uri: str | None) -> None:
    """Refuse a URI with a password or a query: plans, logs, messages and the list of processes would show it."""
    fault = uri_fault(uri or "")
    if fault is not None:
        raise ConfigError(f"--{option}: {fault}")


def check(config: Any, prefix: str = "") -> None:
    """Refuse numbers that are out of their option's bounds or not finite, and names that its type does not list.

    Args:
        config: A dataclass; those in it are checked too.
        prefix: What its options begin with on the command line, `recover.` say.

    Raises:
        ConfigError: The first such option, what was expected and what came.
    """
    for name, (names, metadata) in _declarations(config.__class__).items():
        value, typed = getattr(config, name), prefix + name.replace("_", "-")
        if is_dataclass(value):
            check(value, f"{typed}.")
        for one in value if isinstance(value, tuple) else (value,):
            if names and one is not None:
                ok, expected = one in names, f"one of {', '.join(map(str, names))}"
            elif isinstance(one, int | float) and not isinstance(one, bool):
                ok, expected = _within_bounds(one, metadata)
            else:
                continue
            require(ok, typed, expected, value)


def fingerprint_options(config: Any, *, with_absent: bool = False) -> dict[str, Any]:
    """Return the options of a dataclass that results depend on, those of dataclasses in it as dicts.

    What is absent is left out unless `with_absent`, so that results from before there was such an option are the same.
    """
    metadata = {declared.name: declared.metadata for declared in fields(config)}

    def is_absent(name: str) -> bool:
        return bool(getattr(config, name) == metadata[name].get("absent_at", _NEVER))

    options = {}
    for name, about in metadata.items():
        absent = not with_absent and is_absent(about.get("only_with") or name)
        if about.get("in_fingerprint", True) and not absent:
            value = getattr(config, name)
            options[name] = (
                fingerprint_options(value, with_absent=with_absent)
                if is_dataclass(value)
                else value
            )
    return options


@cache
def _declarations(config_type: type) -> dict[str, tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Return field -> (the names that its type lists, if any; its metadata)."""
    hints = get_type_hints(config_type)
    return {f.name: (_names(hints[f.name]), f.metadata) for f in fields(config_type)}


def _names(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(name for part in get_args(hint) for name in _names(part))


def _within_bounds(number: float, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether a number is finite and within the bounds of its option, and what is expected of it."""
    ge, gt = metadata.get("ge", -math.inf), metadata.get("gt", -math.inf)
    le, lt = metadata.get("le", math.inf), metadata.get("lt", math.inf)
    low, high = max(ge, gt), min(le, lt)
    expected = "a finite number"
    if high < math.inf:
        expected = f"in {'[' if ge == low else '('}{low}, {high}{']' if le == high else ')'}"
    elif low > -math.inf:
        finite = "" if math.isfinite(number) else f"{expected} "
        expected = f"{finite}{'>=' if ge == low else '>'} {low}"
    return math.isfinite(number) and ge <= number <= le and gt < number < lt, expected
