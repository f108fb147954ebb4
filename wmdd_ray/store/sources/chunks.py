"""From shards to arrays: chunks that no bad image can shift, and whole small sets in memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import BadImageError, DataError
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources.base import RawImage, Shard, Source
from wmdd_ray.store.sources.classes import SHOWN, one_line
from wmdd_ray.store.sources.files import read_ahead
from wmdd_ray.store.sources.passed import PassedOver

# Shard size of a whole-set read: only bounds what is decoded at once.
_LOAD_CHUNK_IMAGES = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedChunk:
    """The good images among consecutive records of a shard; "key: reason" of the `bad` ones.

    The last one of an archive tells which of its members are `passed` over.
    """

    shard_id: str
    chunk: int
    last: bool
    keys: tuple[str, ...]
    labels_N: np.ndarray  # int64
    images_NHWC: np.ndarray  # uint8
    bad: tuple[str, ...]
    passed: tuple[PassedOver, ...] = ()


def decoded_shards(
    source: Source, config: SourceConfig, chunk_images: int, shards: Sequence[Shard]
) -> Iterator[DecodedChunk]:
    """Yield the chunks of shards, one shard after another."""
    for shard in shards:
        yield from decoded_chunks(source, shard, config, chunk_images)


def decoded_chunks(
    source: Source,
    shard: Shard,
    config: SourceConfig,
    chunk_images: int,
    skip: frozenset[int] = frozenset(),
    *,
    by_threads: bool = False,
) -> Iterator[DecodedChunk]:
    """Read a shard and decode it chunk by chunk, where nothing else wants the processors `by_threads`.

    A record belongs to chunk `position // chunk_images`, where bad records count too. The chunk
    that holds the last record is `last`, also when it is full; an empty shard is one empty last
    chunk. Those to `skip` are read past, neither decoded nor yielded (so the last may be missing).

    Raises:
        DataError: A label outside the classes, a malformed shard, or more bad images in one chunk
        than a run may have.
        ArtifactError: The storage fails.
    """
    assert chunk_images >= 1, chunk_images
    records = source.read_shard(shard)
    ahead = next(records, None)
    for chunk in itertools.count():
        keys: list[str] = []
        labels: list[int] = []
        images: list[np.ndarray] = []
        bad: list[str] = []
        head = () if ahead is None else (ahead,)
        part = itertools.chain(head, itertools.islice(records, chunk_images - 1))
        if chunk in skip:
            deque(part, maxlen=0)
        for record, image in (read_ahead if by_threads else map)(partial(_decode, config), part):
            if isinstance(image, BadImageError):
                bad.append(str(image))
                refuse_too_many_bad(bad, config, source.root)
            else:
                images.append(image)
                keys.append(record.key)
                labels.append(record.label)
        ahead = next(records, None)
        if chunk not in skip:
            shape = (len(images), config.image_size, config.image_size, config.channels)
            yield DecodedChunk(
                shard_id=shard.id,
                chunk=chunk,
                last=ahead is None,
                keys=tuple(keys),
                labels_N=np.array(labels, dtype=np.int64),
                images_NHWC=np.stack(images) if images else np.empty(shape, dtype=np.uint8),
                bad=tuple(bad),
                passed=source.passed_inside if ahead is None else (),
            )
        if ahead is None:
            return


def _decode(config: SourceConfig, record: RawImage) -> tuple[RawImage, np.ndarray | BadImageError]:
    """Return a record with its pixels, or with why there are none."""
    where = one_line(record.key)
    if record.problem:
        return record, BadImageError(f"{where}: {record.problem}")
    try:
        return record, decode_image(record.content, config, where)
    except BadImageError as error:
        return record, error


def refuse_too_many_bad(bad: Sequence[str], config: SourceConfig, where: str) -> None:
    """Stop a run with more bad images, "key: reason" each, than it allows.

    Raises:
        DataError: More than `max_bad_images`; names the first few.
    """
    if len(bad) > config.max_bad_images:
        raise DataError(
            f"{where}: {len(bad)} images cannot be used, --source.max-bad-images allows "
            f"{config.max_bad_images}; repair or remove them, or raise the limit. The first: "
            f"{'; '.join(bad[:SHOWN])}"
        )


def load_images(
    source: Source,
    config: SourceConfig,
    limit_bytes: int,
    shards: Sequence[Shard] | None = None,
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """Decode a whole source into memory, in the order of its shards.

    Args:
        source: Fresh from `open_source`, where no shards are given.
        config: Size, channels, and how many bad images may be left out.
        limit_bytes: Most bytes of pixels.
        shards: Its shards, listed by the driver.

    Returns:
        (keys, labels_N int64, images_NHWC uint8, bad), or None when the pixels would be more than
        `limit_bytes`.

    Raises:
        DataError: As `decoded_chunks`, with the limit on bad images over the whole source.
        ArtifactError: The storage fails.
    """
    image_bytes = config.image_size**2 * config.channels
    if shards is None:
        if source.num_images is not None and source.num_images * image_bytes > limit_bytes:
            return None
        shards = source.shards(_LOAD_CHUNK_IMAGES)
    if sum(shard.num_images or 0 for shard in shards) * image_bytes > limit_bytes:
        return None
    keys: list[str] = []
    labels: list[np.ndarray] = []
    parts: deque[np.ndarray] = deque()
    bad: list[str] = []
    for shard in shards:
        for chunk in decoded_chunks(source, shard, config, _LOAD_CHUNK_IMAGES):
            keys += chunk.keys
            labels.append(chunk.labels_N)
            parts.append(chunk.images_NHWC)
            bad += chunk.bad
            refuse_too_many_bad(bad, config, source.root)
            if len(keys) * image_bytes > limit_bytes:
                return None
    images_NHWC = np.empty(
        (len(keys), config.image_size, config.image_size, config.channels), dtype=np.uint8
    )
    start = 0
    while parts:
        # Each part is freed as it is copied, so that the set is not held twice.
        part = parts.popleft()
        images_NHWC[start : start + len(part)] = part
        start += len(part)
    labels_N = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
    return tuple(keys), labels_N, images_NHWC, tuple(bad)
