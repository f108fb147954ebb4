"""WebDataset's grouping: consecutive members of one stem are a sample."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from wmdd_ray.store.sources.classes import SHOWN
from wmdd_ray.store.sources.tar import Readable, tar_members

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_LABEL_ENDINGS = ("cls", "json")
_MAX_LABEL_BYTES = 1 << 20
# WebDataset's rule: the stem ends at the first dot of the base name.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclass(slots=True)
class Sample:
    """Members that share a stem; `problem` says why they are no sample."""

    stem: str
    endings: dict[str, None] = field(default_factory=dict)  # in order
    offset: int = 0
    size_bytes: int = 0
    content: bytes | None = None
    label: int | None = None
    problem: str = ""

    @property
    def shown_endings(self) -> str:
        """Its first few endings, for messages."""
        return ", ".join(itertools.islice(self.endings, SHOWN))


def samples(stream: Readable, where: str, max_content_bytes: int) -> Iterator[Sample]:
    """Group members into samples; a stem with neither image nor label (a license) is none.

    A stem that comes again is a bad sample: shards that were joined or packed twice count their images twice.
    """
    seen: set[int] = set()  # hashes: a name can have a mebibyte

    def wanted(name: str, size_bytes: int) -> bool:
        ending = _split_name(name)[1]
        if ending in IMAGE_ENDINGS:
            return size_bytes <= max_content_bytes
        return ending in _LABEL_ENDINGS and size_bytes <= _MAX_LABEL_BYTES

    members = tar_members(stream, where, wanted)
    named = ((_split_name(member.name), member) for member in members)
    for stem, group in itertools.groupby(named, key=lambda pair: pair[0][0]):
        if not stem:
            # groupby needs its group consumed before it goes on, and does so by itself.
            continue
        sample = Sample(stem)
        for (_, ending), member in group:
            if ending in sample.endings:
                sample.problem = f"the archive holds {ending} of this key more than once"
                continue
            sample.endings[ending] = None
            if ending in IMAGE_ENDINGS and not sample.size_bytes:
                sample.offset, sample.size_bytes, sample.content = (
                    member.offset,
                    member.size_bytes,
                    member.content,
                )
            elif (
                ending in _LABEL_ENDINGS
                and member.content is not None
                and (ending == "cls" or sample.label is None)
            ):
                sample.label = _parse_label(member.content, ending)
        if any(ending in (*IMAGE_ENDINGS, *_LABEL_ENDINGS) for ending in sample.endings):
            if hash(stem) in seen:
                sample.problem = "the archive holds this key more than once"
            seen.add(hash(stem))
            yield sample


def _split_name(name: str) -> tuple[str, str]:
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def _parse_label(content: bytes, ending: str) -> int | None:
    try:
        if ending == "cls":
            return int(content)
        label = json.loads(content)["label"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return label if type(label) is int else None
