from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from safetensors.numpy import save

from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.parts import decode_frame, decode_index, encode_frame, encode_part
from wmdd_ray.store.shrink import KeptImage

KEPT = KeptImage(
    content=b"image", is_gray=False, mean_C=(0.1, 0.2, 0.3), mean_square_C=(0.4, 0.5, 0.6)
)


def test_frames_and_their_index_come_back_sorted_by_class() -> None:
    frames = [encode_frame(name, KEPT) for name in ("b/猫.png", "a.png")]
    part, content = encode_part(frames, [1, 0], [7, 2**64 - 1])
    index = decode_index(content, "x")
    assert index.labels_N.tolist() == [0, 1] and index.ranks_N.tolist() == [2**64 - 1, 7]
    first = int(index.sizes_N[0])
    assert decode_frame(part[:first], "x") == ("a.png", KEPT)
    assert decode_frame(part[first:], "x") == ("b/猫.png", KEPT)


INDEX = {
    "labels": np.zeros(2, np.int32),
    "sizes": np.ones(2, np.int64),
    "ranks": np.zeros(2, np.uint64),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": -np.ones(2, np.int64)},
        {"sizes": np.ones(3, np.int64)},
        {"labels": np.full(2, -5, np.int32)},
        {"labels": np.zeros(2, np.float32)},
        {"ranks": np.zeros((2, 1), np.uint64)},
    ],
)
def test_an_index_that_cannot_be_is_refused(changes: dict[str, np.ndarray]) -> None:
    with pytest.raises(ArtifactError, match="x: expected the index of a part"):
        decode_index(save({**INDEX, **changes}), "x")


@pytest.mark.parametrize("name", [b"\xff\xfe", b""])
def test_a_frame_with_a_right_checksum_and_another_name_is_refused(name: bytes) -> None:
    body = struct.pack("<I6d?", 2, *[0.0] * 6, False) + (name or b"\x80\x80")
    frame = hashlib.sha256(body).digest()[:16] + body
    with pytest.raises(ArtifactError, match="x: expected a name in UTF-8"):
        decode_frame(frame, "x")
