"""Parts: many kept images in one object, sorted by class, of which any run of images can be read by itself.

A part is a row of frames. A frame is the first 16 bytes of the SHA-256 of what follows; a header (length of the key, mean and
mean square of three channels, whether the image is gray), little endian; the key in UTF-8; the image file. The index
beside it is a safetensors file with the label, the size and the rank of every frame.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.shrink import KeptImage

_HEADER = struct.Struct("<I6d?")
_DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PartIndex:
    """Class, bytes and rank of the N frames of a part, in their order.

    The rank is a hash of seed and key: the images of a class with the lowest are held out.
    """

    labels_N: np.ndarray  # int32
    sizes_N: np.ndarray  # int64
    ranks_N: np.ndarray  # uint64


def rank_of(seed: int, key: str) -> int:
    """Return the rank of an image: the same whatever other images there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little")


def encode_frame(key: str, kept: KeptImage) -> bytes:
    """Return an image with its key and what was measured."""
    name = key.encode()
    header = _HEADER.pack(len(name), *kept.mean_C, *kept.mean_square_C, kept.is_gray)
    body = header + name + kept.content
    return hashlib.sha256(body).digest()[:_DIGEST_BYTES] + body


def decode_frame(frame: bytes, where: str) -> tuple[str, KeptImage]:
    """Return (key, image) of a frame; an ArtifactError names `where` when it was changed."""
    body = frame[_DIGEST_BYTES:]
    if (
        len(body) < _HEADER.size
        or hashlib.sha256(body).digest()[:_DIGEST_BYTES] != frame[:_DIGEST_BYTES]
    ):
        raise ArtifactError(
            f"{where}: expected {len(frame)} bytes with the checksum before them, found others; run again with --overwrite"
        )
    length, *measured, is_gray = _HEADER.unpack_from(body)
    content_at = _HEADER.size + length
    try:
        key = body[_HEADER.size : content_at].decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{where}: expected a name in UTF-8, found another ({error})"
        ) from error
    kept = KeptImage(
        content=body[content_at:],
        is_gray=is_gray,
        mean_C=tuple(measured[:3]),
        mean_square_C=tuple(measured[3:]),
    )
    return key, kept


def encode_part(
    frames: Sequence[bytes], labels: Sequence[int], ranks: Sequence[int]
) -> tuple[bytes, bytes]:
    """Return (part, index); frames are sorted by class and keep their order within one."""
    labels_N = np.array(labels, dtype=np.int32)
    order_N = np.argsort(labels_N, kind="stable")
    index: dict[str, np.ndarray] = {
        "labels": labels_N[order_N],
        "sizes": np.array([len(frame) for frame in frames], dtype=np.int64)[order_N],
        "ranks": np.array(ranks, dtype=np.uint64)[order_N],
    }
    return b"".join(frames[i] for i in order_N), save(index)


def decode_index(content: bytes, where: str) -> PartIndex:
    """Return the index of a part; an ArtifactError names `where` of anything else."""
    try:
        columns = load(content)
        index = PartIndex(
            labels_N=columns["labels"], sizes_N=columns["sizes"], ranks_N=columns["ranks"]
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{where}: expected the index of a part ({error})") from error
    kinds = [(array.dtype, array.shape) for array in (index.labels_N, index.sizes_N, index.ranks_N)]
    num_frames = (index.labels_N.size,)
    if kinds != [(np.dtype(kind), num_frames) for kind in (np.int32, np.int64, np.uint64)] or (
        min(index.labels_N.min(initial=0), index.sizes_N.min(initial=0)) < 0
    ):
        raise ArtifactError(f"{where}: expected the index of a part, found arrays of another kind")
    return index
