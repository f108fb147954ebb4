"""WebDataset's grouping: consecutive members of one stem are a sample."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources.classes import SHOWN
from wmdd_ray.store.sources.endings import IMAGE_ENDINGS, is_system_name
from wmdd_ray.store.sources.labels import Label, label_of, no_label
from wmdd_ray.store.sources.passed import NO_IMAGE, SYSTEM, Tally
from wmdd_ray.store.sources.tar import Member, Readable, tar_members

_LABEL_ENDINGS = ("cls", "json")
_MAX_LABEL_BYTES = 1 << 20
# WebDataset's rule: the stem ends at the first dot of the base name.
_FIRST_DOT = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_LAST_DOT = re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]+)", re.DOTALL)


@dataclass(slots=True)
class Sample:
    """Members that share a stem; `problem` says why they are no sample."""

    stem: str
    endings: dict[str, None] = field(default_factory=dict)  # in order
    offset: int = 0
    size_bytes: int = 0
    content: bytes | None = None
    label: Label | None = None
    no_label: str = "no label"  # what is told where `label` is None
    problem: str = ""

    @property
    def shown_endings(self) -> str:
        """Its first few endings, for messages."""
        return ", ".join(itertools.islice(self.endings, SHOWN))


def samples(
    stream: Readable,
    where: str,
    max_content_bytes: int,
    config: SourceConfig,
    passed: Tally | None = None,
) -> Iterator[Sample]:
    """Group members into samples; a stem with neither image nor label (a license) is none.

    A stem that comes again is a bad sample: shards that were joined or packed twice count their images twice. So is one with
    several images, unless the user says which. Of images larger than `max_content_bytes` no content is kept; `passed` counts the
    members that are no part of a sample.

    Raises:
        DataError: Stems that end at the last dot would be samples that those that end at the first are not, and `config` does
            not say which are meant.
    """
    pattern = _LAST_DOT if config.tar_keys == "last-dot" else _FIRST_DOT
    passed = Tally() if passed is None else passed
    seen: set[int] = set()  # hashes: a name can have a mebibyte

    def split_name(name: str) -> tuple[str, str]:
        match = pattern.fullmatch(name)
        hidden = any(map(is_system_name, name.split("/")))
        return (match[1], match[2].lower()) if match and not hidden else ("", "")

    def wanted(name: str, size_bytes: int) -> bool:
        ending = split_name(name)[1]
        if _is_image(ending, config):
            return size_bytes <= max_content_bytes
        return ending in _LABEL_ENDINGS and size_bytes <= _MAX_LABEL_BYTES

    members = tar_members(stream, where, wanted)
    named = ((split_name(member.name), member) for member in members)
    for stem, group in itertools.groupby(named, key=lambda pair: pair[0][0]):
        if not stem:
            for _, member in group:
                hidden = any(map(is_system_name, member.name.split("/")))
                passed.add(SYSTEM if hidden else NO_IMAGE, member.name)
            continue
        sample = Sample(stem)
        inner = _InnerStems()
        others = Tally()
        for (_, ending), member in group:
            if _take(sample, ending, member, config):
                continue
            inner.add(ending)
            others.add(NO_IMAGE, member.name)
        if inner.whole and config.tar_keys == "auto":
            raise DataError(
                f"{where}: the keys of its members are in doubt: {stem}.{inner.whole} with its label is a sample if keys "
                f"end at the last dot, and a part of {stem} if they end at the first, as webdataset has it; say which by "
                "--source.tar-keys last-dot or --source.tar-keys first-dot"
            )
        is_sample = any(_is_image(e, config) or e in _LABEL_ENDINGS for e in sample.endings)
        # Images of another key's rule are a bad sample together, and not passed over one by one.
        if is_sample or not inner.images:
            passed.add_all(others.groups())
        if is_sample or inner.images:
            if hash(stem) in seen:
                sample.problem = "the archive holds this key more than once"
            seen.add(hash(stem))
            yield sample


def _take(sample: Sample, ending: str, member: Member, config: SourceConfig) -> bool:
    """Add a member to its sample; return whether it is a part of one: its image, its label, or what makes it a bad one."""
    if ending in sample.endings:
        sample.problem = f"the archive holds {ending} of this key more than once"
        return True
    sample.endings[ending] = None
    if _is_image(ending, config):
        if sample.offset:
            sample.problem = f"several images of this key ({sample.shown_endings}); name one's ending by --source.image-column"
        else:
            sample.offset, sample.size_bytes = member.offset, member.size_bytes
            sample.content = member.content
        return True
    # A key can only stand in JSON.
    is_label = ending == "json" or (ending == "cls" and config.label_column is None)
    if is_label and member.content is not None and (ending == "cls" or sample.label is None):
        value = _label_value(member.content, ending, config)
        sample.label = label_of(value, config.numbers, is_text=ending == "cls")
        if sample.label is None:
            sample.no_label = no_label(value)
    return ending in _LABEL_ENDINGS


def _is_image(ending: str, config: SourceConfig) -> bool:
    if config.image_column:
        return ending == config.image_column.lower()
    return f".{ending}" in IMAGE_ENDINGS


class _InnerStems:
    """What the members of one stem would be if keys ended at the last dot."""

    def __init__(self) -> None:
        self.images: set[str] = set()
        self._labels: set[str] = set()
        self.whole = ""

    def add(self, ending: str) -> None:
        inner, dot, last = ending.rpartition(".")
        if not dot:
            return
        if f".{last}" in IMAGE_ENDINGS:
            self.images.add(inner)
        elif last in _LABEL_ENDINGS:
            self._labels.add(inner)
        if inner in self.images and inner in self._labels:
            self.whole = inner


def _label_value(content: bytes, ending: str, config: SourceConfig) -> object:
    if ending == "cls":
        return content.strip()
    try:
        return json.loads(content)[config.label_column or "label"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
