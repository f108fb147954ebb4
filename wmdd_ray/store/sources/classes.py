"""Class names: matching one set of images to another by name."""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Sequence

from wmdd_ray.errors import DataError

logger = logging.getLogger(__name__)

# Soft labels name classes by uint16.
MAX_CLASSES = 65536
SHOWN = 5
_MAX_LINE = 200


def first_difference(names: Sequence[str], others: Sequence[str]) -> int:
    """Return the first class that is not called alike; where one list begins the other, the first that it has not."""
    pairs = enumerate(zip(names, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(names), len(others)))


def match_classes(
    names: Sequence[str], wanted: Sequence[str], where: str, *, held_out: bool = True
) -> tuple[int, ...] | None:
    """Return, for each found class, its place among the wanted names; None when both are equal.

    `held_out` images are matched to the training classes, others to classes that somebody gives (a list, a teacher, another set).

    Raises:
        DataError: A found name is not wanted, or a wanted name is there twice.
    """
    names, wanted = tuple(map(plain, names)), tuple(map(plain, wanted))
    if names == wanted:
        return None
    kind, whose = ("held-out ", "training classes") if held_out else ("", "given classes")
    place = {name: label for label, name in enumerate(wanted)}
    if len(place) < len(wanted):
        raise DataError(f"{where}: two {whose} have one name, so these cannot be matched by name")
    unknown = [name for name in names if name not in place]
    there = set(names)
    missing = [name for name in wanted if name not in there]
    if unknown:
        raise DataError(
            f"{where}: expected the {len(wanted)} {whose}, found {len(unknown)} others: "
            + exact(unknown)
            + (f"; absent: {exact(missing)}" if missing else "")
            + f"; pass {kind}images with the same class names"
        )
    if missing:
        logger.warning("%s: no images of %d %s: %s", where, len(missing), whose, shown(missing))
    return tuple(place[name] for name in names)


def plain(name: str) -> str:
    """Return a class name as names are compared: composed (NFC), without spaces at its ends."""
    return unicodedata.normalize("NFC", name).strip()


def is_one_line(name: str) -> bool:
    """Return whether a name can be written on a line: without control characters, halves of characters and ends of lines."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)


def check_class_names(names: Sequence[str], where: str) -> None:
    """Refuse names that cannot be told apart, or that cannot be written on a line.

    Raises:
        DataError: Two names look the same (equal but for spaces at the ends or the way accents are composed), or one is empty
            or holds control characters.
    """
    seen: dict[str, str] = {}
    for name in names:
        same = plain(name)
        if not same or not is_one_line(name):
            raise DataError(
                f"{where}: expected class names of one line each, found {name!r}; rename the class"
            )
        if same in seen:
            raise DataError(
                f"{where}: two classes have names that look the same: {ascii(seen[same])} and {ascii(name)}; rename or join them"
            )
        seen[same] = name


@functools.cache  # the longest has 65,536 names, and every opening asks for it
def integer_names(count: int) -> tuple[str, ...]:
    """Return the names of classes of which only the labels are known."""
    return tuple(str(label) for label in range(min(count, MAX_CLASSES + 1)))


def shown(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    return _listed([repr(name) for name in names[:SHOWN]], len(names))


def exact(names: Sequence[str]) -> str:
    """Return the first few names so that no two of them look the same: beyond ASCII with their code points."""
    texts = [repr(n) if n.isascii() else f"{n!r} ({ascii(n)[1:-1]})" for n in names[:SHOWN]]
    return _listed(texts, len(names))


def _listed(texts: Sequence[str], count: int) -> str:
    return ", ".join(texts) + (f", and {count - SHOWN} more" if count > SHOWN else "")


def one_line(name: str) -> str:
    """Return a name that came with the data as it may stand in a message: printable, and not longer than a line."""
    if len(name) > _MAX_LINE:
        name = f"{name[: _MAX_LINE // 2]}...{name[-_MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def by_number(names: Sequence[str]) -> tuple[str, ...]:
    """Return names in the order of the numbers in them (`2_cat`, `10_dog`), where these are 0, 1, ... or 1, 2, ...; others as is.

    Folders come in the order of their names as text: 0, 1, 10, 11, 2.
    """
    numbers = sorted(_numbers(names))
    counted = numbers in ([*range(len(names))], [*range(1, len(names) + 1)])
    return by_any_number(names) if counted else tuple(names)


def by_any_number(names: Sequence[str]) -> tuple[str, ...]:
    """Return names in the order of the numbers in them, where each has its own, whatever these count; others as is."""
    numbers = _numbers(names)
    if len({*numbers}) < len(names):
        return tuple(names)
    return tuple(name for _, name in sorted(zip(numbers, names, strict=True)))


def _numbers(names: Sequence[str]) -> list[int]:
    """Return the first number in each name that has one."""
    return [int(number[0]) for name in names if (number := re.search("[0-9]{1,9}", name))]
