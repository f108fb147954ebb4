"""Patterns: `{000..012}` in URIs, and layouts such as `train/{class}` in --source.layout."""

from __future__ import annotations

import itertools
import re

from wmdd_ray.errors import ConfigError, DataError

_MAX_EXPANDED = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_HOLES = re.compile(r"(\{class\}|\{split\}|\{number\}|\*)")


def expand_braces(pattern: str, whole: str = "") -> list[str]:
    """Return the names that `{000..012}` and `{a,b}` stand for, in order.

    Numbers are as wide as the first end of their range. Messages show `whole`, of which `pattern` is the end.

    Raises:
        DataError: An unclosed or empty brace, a falling range, or more than 100,000 names.
    """
    parts = _BRACES.split(pattern)
    if any(c in part for part in parts[::2] for c in "{}"):
        raise DataError(
            f"{whole or pattern}: expected closed braces without nesting, such as {{000..012}} or {{a,b}}"
        )
    choices = [
        _choices(part, whole or pattern) if i % 2 else [part] for i, part in enumerate(parts)
    ]
    count = 1
    for options in choices:
        count *= len(options)
    if not 1 <= count <= _MAX_EXPANDED:
        raise DataError(
            f"{whole or pattern}: expected 1 to {_MAX_EXPANDED} files, the pattern stands for {count}"
        )
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(body: str, pattern: str) -> list[str]:
    match = _RANGE.fullmatch(body)
    if match is None:
        return body.split(",")
    first, last = int(match[1]), int(match[2])
    if last - first >= _MAX_EXPANDED:
        raise DataError(f"{pattern}: the range {body} stands for more than {_MAX_EXPANDED} files")
    return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]


def layout_pattern(layout: str, *, longest: bool = False) -> re.Pattern[str]:
    """Return what matches the paths that a --source.layout describes, with groups `class` and `split` where it names them.

    `*` stands for what is between two slashes, or a part of it, `{number}` for digits; what ends in a whole folder takes all that
    lies below it. Of several readings of a path the class is the shortest, or the `longest`.

    Raises:
        ConfigError: It is no such path.
    """
    parts = _HOLES.split(layout)
    groups = {
        "{class}": f"(?P<class>[^/]+{'' if longest else '?'})",
        "{split}": "(?P<split>[^/]+?)",
        "{number}": "(?<![0-9])[0-9]+(?![0-9])",
        "*": f"[^/]*{'?' if longest else ''}",
    }
    if (
        layout.startswith("/")
        or set("{}") & set("".join(parts[::2]))
        or any(parts.count(group) > 1 for group in ("{class}", "{split}"))
        or ".." in layout.split("/")
    ):
        raise ConfigError(
            f"--source.layout: expected a path below --data with {{class}}, {{split}}, {{number}} and * in it, such as "
            f"'train/{{class}}', got {layout!r}"
        )
    pattern = "".join(groups.get(part, re.escape(part)) for part in parts)
    last = layout.rpartition("/")[2]
    return re.compile(pattern if "*" in last else pattern.rstrip("/") + "/.+", re.DOTALL)
