"""The held-out real images, as teachers and students are measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wmdd_ray.config import SourceConfig
from wmdd_ray.core.batches import Batch, eval_batches
from wmdd_ray.store.sources import (
    Shard,
    Source,
    decoded_chunks,
    load_images,
    refuse_too_many_bad,
)

_BATCH_IMAGES = 256
_MEMORY_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A source with its shards, as it travels from the driver, which alone lists, to the workers."""

    source: Source
    shards: list[Shard]
    config: SourceConfig

    @classmethod
    def of(cls, source: Source, config: SourceConfig, chunk_images: int = _BATCH_IMAGES) -> Listed:
        """List the shards of a source; in the driver."""
        return cls(source=source, shards=source.shards(chunk_images), config=config)

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (images uint8 NHWC, labels int64) in the source's order."""
        bad: list[str] = []
        for shard in self.shards:
            # A GPU would wait minutes for one thread that decodes ImageNet's.
            chunks = decoded_chunks(self.source, shard, self.config, _BATCH_IMAGES, by_threads=True)
            for chunk in chunks:
                bad += chunk.bad
                refuse_too_many_bad(bad, self.config, self.source.root)
                yield chunk.images_NHWC, chunk.labels_N

    def load(self, limit_bytes: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return all images and labels, or None when the pixels would be more than `limit_bytes`."""
        loaded = load_images(self.source, self.config, limit_bytes, self.shards)
        if loaded is None:
            return None
        _, labels_N, images_NHWC, _ = loaded
        return images_NHWC, labels_N


class HeldOut:
    """Held-out images in batches; kept decoded in memory when they fit, streamed every time when not."""

    def __init__(
        self, listed: Listed, mean_C: Sequence[float], std_C: Sequence[float], device: torch.device
    ) -> None:
        self._listed = listed
        self._mean_C, self._std_C, self._device = mean_C, std_C, device
        self._loaded = listed.load(_MEMORY_BYTES)

    def __iter__(self) -> Iterator[Batch]:
        """Yield normalized images on the device, and their labels."""
        for images_NHWC, labels_N in [self._loaded] if self._loaded else self._listed.chunks():
            yield from eval_batches(
                images_NHWC,
                labels_N,
                mean_C=self._mean_C,
                std_C=self._std_C,
                batch_size=_BATCH_IMAGES,
                device=self._device,
            )
