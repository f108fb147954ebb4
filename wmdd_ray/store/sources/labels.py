"""What a label means: a number counts classes, a text names one, and neither is taken for the other.

One rule for all formats. A text is the class of that name. A number is a place in the class names that come with its own
file (a ClassLabel, `classes.txt` beside it), from 0. Where its file brings no names it is its own name: `7` is the class called 7,
so that labels from 1, or with gaps, need no guess. When the classes have other names (folders `ant`, `bee`, ...) nobody says
which number is which, and the label is refused; `--source.numbers` settles it. -1 and nothing at all are no label.

In text (a table, `.cls`) a number with leading zeros, `007`, is a number too where its file or the training classes have names.
Where not, its own name is what stands there: all of 001, ..., 100 are names as they are written, and 01 beside 1 is refused.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence

from wmdd_ray.config import Numbers
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.classes import (
    exact,
    integer_names,
    is_one_line,
    match_classes,
    one_line,
    plain,
    shown,
)

logger = logging.getLogger(__name__)

Label = int | str
"""A place among the class names of its file, or a class name."""


class Padded(str):
    """A number with leading zeros, as it is written."""

    __slots__ = ()


Places = tuple[int, ...] | Mapping[int, int] | None
"""Class of each number: by position, by value, or None where number k is class k. Without entries no number means anything."""

_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?")
_PADDED = re.compile(r"0[0-9]{1,17}")
_DIGITS = re.compile(r"[0-9]{1,18}")
_MAX_NAME_CHARS = 1000


def label_of(value: object, numbers: Numbers, *, is_text: bool = False) -> Label | None:
    """Return the label in a field, or None when there is none: nothing, -1 (unlabeled), or a value of another kind.

    Args:
        value: What the format holds: a number, a truth value (the classes `True` and `False`), text, or bytes of UTF-8.
        numbers: What the user says of numbers.
        is_text: The format knows text only (a cell of a table, `.cls`), so that digits are a number.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    if isinstance(value, str):
        value = value.strip()
        as_number = _NUMBER.fullmatch(value)
        if as_number and (is_text or numbers != "auto") and numbers != "name":
            if numbers == "auto" and _PADDED.fullmatch(value):
                return Padded(value)
            value = int(as_number[1])
        elif not is_one_line(value) or len(value) > _MAX_NAME_CHARS or value in ("", "-1"):
            return None
    if not isinstance(value, int | str) or value == -1:
        return None
    if isinstance(value, str):
        return value
    return str(value) if numbers == "name" else value - (numbers == "index-from-1")


def no_label(value: object) -> str:
    """Say of a value that is no label that there is none, or of a text that it cannot be taken for one."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return "no label"
    if not isinstance(value, str) or value.strip() in ("", "-1"):
        return "no label"
    return f"its label {one_line(repr(value))} is no name of one line of at most {_MAX_NAME_CHARS} characters"


def found_classes(
    examples: Mapping[Label, str], numbers: Numbers, where: str
) -> tuple[tuple[str, ...], Places]:
    """Return the classes of images whose files name none, by the labels that are there, and the class of each number.

    Numbers are in the order of their values, names in that of their code points. `examples` has an image or file of each label,
    for messages as `where` is.

    Raises:
        DataError: There is no label, numbers stand beside names, or a number is below 0.
    """
    written = sorted((label for label in examples if isinstance(label, int | Padded)), key=str)
    written.sort(key=int)
    values = [label for label in written if isinstance(label, int)]
    texts = sorted(label for label in examples if not isinstance(label, int | Padded))
    if not examples:
        raise DataError(
            f"{where}: expected images with labels, found no label; pass --source.label-column if they have another name"
        )
    if written and texts:
        raise DataError(
            f"{where}: expected numbers or names as labels, found both, such as {written[0]} ({examples[written[0]]}) and "
            f"{texts[0]!r} ({examples[texts[0]]}); pass --source.numbers name if the numbers are names of classes too, "
            "or correct the labels"
        )
    if texts:
        names = {plain(text): text for text in reversed(texts)}
        order = sorted(names, key=int if all(map(_DIGITS.fullmatch, names)) else str)
        return tuple(names[name] for name in order), {}
    first = int(numbers == "index-from-1")
    if int(written[0]) < 0:
        raise DataError(
            f"{where}: expected labels from {first}, found {int(written[0]) + first} ({examples[written[0]]}); correct the labels "
            "(-1 alone marks an image without one)"
        )
    if len(values) < len(written):
        return _padded_names(written, examples, where)
    if values == list(range(len(values))) or numbers.startswith("index"):
        return integer_names(values[-1] + 1), None
    logger.warning(
        "%s: labels are %d to %d, of which %d are there; each is the name of its class",
        where, values[0], values[-1], len(values),
    )  # fmt: skip
    return tuple(map(str, values)), {value: label for label, value in enumerate(values)}


def _padded_names(
    values: Sequence[Label], examples: Mapping[Label, str], where: str
) -> tuple[tuple[str, ...], Places]:
    """Return numbers as they are written, some with leading zeros, as the names of their classes."""
    for one, other in itertools.pairwise(values):
        if int(one) == int(other):
            raise DataError(
                f"{where}: expected numbers that differ by more than leading zeros, found {one} ({examples[one]}) and {other} "
                f"({examples[other]}); pass --source.numbers name if these are two classes, --source.numbers index if both are "
                f"the number {int(one)}, or correct the labels"
            )
    places = {value: label for label, value in enumerate(values) if isinstance(value, int)}
    return tuple(map(str, values)), places


def number_places(names: Sequence[str], numbers: Numbers) -> Places:
    """Return the class of each number in files that name no classes, where the classes have these names already."""
    if numbers.startswith("index"):
        return None
    values = [int(name) for name in names if _DIGITS.fullmatch(name)]
    if len(set(values)) < len(names):
        return {}
    if values == list(range(len(names))):
        return None
    return {value: label for label, value in enumerate(values)}


def beside_classes(
    own: tuple[str, ...] | None, wanted: tuple[str, ...] | None, numbers: Numbers, where: str
) -> tuple[tuple[str, ...] | None, Places]:
    """Return the classes, and the class of each number, of files that say labels as text or JSON.

    `own` are the names in label order that lie beside the files, if any, `wanted` the training classes, for held-out images. With
    neither of both the labels themselves have to tell.

    Raises:
        DataError: `own` are others than `wanted`, or are numbers in another order, so that 3 could be either.
    """
    if own is None:
        return wanted, None if wanted is None else number_places(wanted, numbers)
    if numbers == "auto" and number_places(own, numbers):
        raise DataError(
            f"{where}: the class names beside the files are numbers, {shown(own)}, so a number could be a name or a place in "
            "their order; pass --source.numbers name or --source.numbers index"
        )
    return wanted or own, None if wanted is None else match_classes(own, wanted, where)


def class_of(
    label: Label,
    places: Places,
    names: Sequence[str],
    by_name: Mapping[str, int],
    where: str,
    numbers: Numbers,
) -> int:
    """Return the class of a label as its file has it, by the class of each number and of each plain name.

    Raises:
        DataError: It is none of the classes, or a number where nobody says what numbers mean.
    """
    if isinstance(label, str):
        if (place := by_name.get(plain(label))) is not None:
            return place
        if not isinstance(label, Padded):
            raise DataError(
                f"{where} has label {exact([label])}, expected one of the {len(names)} classes {exact(names)}; correct the "
                "label or the class names"
            )
        label = int(label)
    if isinstance(places, Mapping):
        if label in places:
            return places[label]
        if not places:
            raise DataError(
                f"{where} has label {label}, a number, and nothing says which of the {len(names)} classes {exact(names)} it "
                "means; put classes.txt with the names in label order beside the files, or pass --source.numbers index if "
                "numbers count the training classes in this order (index-from-1: from 1)"
            )
        raise DataError(
            f"{where} has label {label}, expected one of the {len(names)} classes {exact(names)}, which are called by numbers; "
            "correct the label"
        )
    count = len(names if places is None else places)
    if 0 <= label < count:
        return label if places is None else places[label]
    first = int(numbers == "index-from-1")
    raise DataError(
        f"{where} has label {label + first}, expected {first} to {count - 1 + first} ({count} classes); correct the labels or the "
        "class names"
        + ("" if first else ", or pass --source.numbers index-from-1 if they count from 1")
    )
