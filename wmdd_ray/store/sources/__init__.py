"""Real labelled images at rest, streamed shard by shard.

`open_source` lists a URI once, on the driver, and returns a `Source`: a small picklable object that
travels to the workers with one `Shard` each. Shards are fixed by the data and never by the cluster.
A module a format; `chunks` decodes what they read into arrays.
"""

from wmdd_ray.store.sources.base import RawImage, Shard, Source
from wmdd_ray.store.sources.chunks import (
    DecodedChunk,
    decoded_chunks,
    load_images,
    refuse_too_many_bad,
)
from wmdd_ray.store.sources.opening import open_source

__all__ = [
    "DecodedChunk",
    "RawImage",
    "Shard",
    "Source",
    "decoded_chunks",
    "load_images",
    "open_source",
    "refuse_too_many_bad",
]
