"""WebDataset's grouping: consecutive members of one stem are a sample."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from wmdd_ray.config import SourceConfig
from wmdd_ray.store.sources.classes import SHOWN
from wmdd_ray.store.sources.labels import Label, label_of
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
    label: Label | None = None
    problem: str = ""

    @property
    def shown_endings(self) -> str:
        """Its first few endings, for messages."""
        return ", ".join(itertools.islice(self.endings, SHOWN))


def samples(
    stream: Readable, where: str, max_content_bytes: int, config: SourceConfig
) -> Iterator[Sample]:
    """Group members into samples; a stem with neither image nor label (a license) is none.

    A stem that comes again is a bad sample: shards that were joined or packed twice count their images twice. So is one with
    several images, unless the user says which.
    """
    wanted_image = (config.image_column or "").lower()
    image_endings = (wanted_image,) if wanted_image else IMAGE_ENDINGS
    # A key can only stand in JSON.
    label_endings = _LABEL_ENDINGS if config.label_column is None else ("json",)
    seen: set[int] = set()  # hashes: a name can have a mebibyte

    def wanted(name: str, size_bytes: int) -> bool:
        ending = _split_name(name)[1]
        if ending in image_endings:
            return size_bytes <= max_content_bytes
        return ending in label_endings and size_bytes <= _MAX_LABEL_BYTES

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
            if ending in image_endings and sample.offset:
                sample.problem = f"several images of this key ({sample.shown_endings}); name one's ending by --source.image-column"
            elif ending in image_endings:
                sample.offset, sample.size_bytes, sample.content = (
                    member.offset,
                    member.size_bytes,
                    member.content,
                )
            elif (
                ending in label_endings
                and member.content is not None
                and (ending == "cls" or sample.label is None)
            ):
                sample.label = _parse_label(member.content, ending, config)
        if any(ending in (*image_endings, *_LABEL_ENDINGS) for ending in sample.endings):
            if hash(stem) in seen:
                sample.problem = "the archive holds this key more than once"
            seen.add(hash(stem))
            yield sample


def _split_name(name: str) -> tuple[str, str]:
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def _parse_label(content: bytes, ending: str, config: SourceConfig) -> Label | None:
    if ending == "cls":
        return label_of(content, config.numbers, is_text=True)
    try:
        value = json.loads(content)[config.label_column or "label"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return label_of(value, config.numbers)
