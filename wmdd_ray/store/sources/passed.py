"""What is seen and not read: counted by reason, ending and folder, with an example of each, so that nothing vanishes.

files seen = files read + files passed over, and what is read = images + bad images + what is passed over inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wmdd_ray.store.sources.classes import one_line
from wmdd_ray.store.sources.endings import ending_of

SYSTEM = "hidden or a system's"
OTHER_SPLIT = "of another split"
LABELS = "read for labels"
NO_IMAGE = "no image"
NO_CLASS = "an image of no class"
UNLABELED = "unlabeled"
NOT_NAMED = "not named for this split"

# Names that somebody made up must not fill the memory, or the line.
_MAX_GROUPS = 1000
# What lies beside images and is none, whatever it says.
_TEXT_ENDINGS = frozenset({
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".md", ".rst", ".yaml", ".yml", ".mat",
})  # fmt: skip
_SHOWN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedOver:
    """Files, or members of an archive, that are not read as images, alike in why and where."""

    reason: str
    ending: str  # with its dot, lower case; empty where names have none
    folder: str  # the first of the path; empty at the root
    count: int
    example: str

    @property
    def told(self) -> str:
        """Say it in a few words."""
        kind = self.ending or "without ending"
        where = f" in {one_line(self.folder)}/" if self.folder else ""
        return f"{self.count:,} x {one_line(kind)}{where} ({self.reason}: {one_line(self.example)})"


class Tally:
    """Counts what is passed over."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str], tuple[int, str]] = {}

    def add(self, reason: str, name: str) -> None:
        folder, slash, _ = name.partition("/")
        self._add((reason, ending_of(name), folder if slash else ""), 1, name)

    def add_all(self, groups: Iterable[Mapping[str, object] | PassedOver]) -> None:
        """Count groups, as they are or as JSON."""
        for group in groups:
            one = group if isinstance(group, PassedOver) else PassedOver(**group)  # type: ignore[arg-type]
            self._add((one.reason, one.ending, one.folder), one.count, one.example)

    def _add(self, key: tuple[str, str, str], count: int, example: str) -> None:
        if key not in self._groups and len(self._groups) >= _MAX_GROUPS:
            key = (key[0], "others", "")
        before, first = self._groups.get(key, (0, example))
        self._groups[key] = before + count, first

    def groups(self) -> tuple[PassedOver, ...]:
        """Return the groups, the largest first."""
        passed = [
            PassedOver(reason=reason, ending=ending, folder=folder, count=count, example=example)
            for (reason, ending, folder), (count, example) in self._groups.items()
        ]
        return tuple(sorted(passed, key=lambda one: (-one.count, one.reason, one.example)))


def total(groups: Iterable[PassedOver]) -> int:
    """Return how many files or members the groups hold."""
    return sum(group.count for group in groups)


def lost(groups: Iterable[PassedOver]) -> tuple[PassedOver, ...]:
    """Return the groups that leave a doubt whether images were lost: of no class, or of no kind that is known as text."""
    return tuple(
        group
        for group in groups
        if group.reason == NO_CLASS
        or (group.reason == NO_IMAGE and group.ending not in _TEXT_ENDINGS)
    )


def left_out(groups: Iterable[PassedOver]) -> str:
    """Say what of a split is not read, before anything is; nothing where all is read or of another split."""
    own = [group for group in groups if group.reason not in (OTHER_SPLIT, SYSTEM, LABELS)]
    return f"{total(own):,} files passed over{shown_groups(own)}" if own else ""


def shown_groups(groups: Sequence[PassedOver]) -> str:
    """Return the largest groups in brackets; nothing when there is none."""
    if not groups:
        return ""
    more = f", and {len(groups) - _SHOWN} kinds more" if len(groups) > _SHOWN else ""
    return f" [{', '.join(group.told for group in groups[:_SHOWN])}{more}]"
