"""Held-out images in memory and streamed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.images import decode_image, encode_png
from wmdd_ray.store.sources import chunks, open_source
from wmdd_ray.units.held_out import Listed

LOOKS: list[Callable[[Listed], Any]] = [
    lambda listed: listed.load(1 << 20),
    lambda listed: [*listed.chunks()],
]


@pytest.mark.parametrize("look", LOOKS, ids=["in memory", "streamed"])
def test_bad_images_are_counted_over_all_shards(
    look: Callable[[Listed], Any], tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            content = encode_png(np.full((8, 8, 3), i, dtype=np.uint8)) if i < 2 else b"no image"
            (tmp_path / name / f"{i}.png").write_bytes(content)

    def listed(most: int) -> Listed:
        config = SourceConfig(image_size=8, resize=8, max_bad_images=most)
        return Listed.of(open_source(str(tmp_path), config, split="train"), config)

    look(listed(6))
    with pytest.raises(
        DataError, match="6 images cannot be used, --source.max-bad-images allows 5"
    ):
        look(listed(5))


def test_streamed_images_are_decoded_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=60)

    def decode(content: bytes, config: SourceConfig, key: str) -> np.ndarray:
        both.wait()
        return decode_image(content, config, key)

    monkeypatch.setattr(chunks, "decode_image", decode)
    for i in range(4):
        folder = tmp_path / ("cat" if i < 2 else "dog")
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.png").write_bytes(encode_png(np.full((8, 8, 3), i, dtype=np.uint8)))
    config = SourceConfig(image_size=8, resize=8)
    listed = Listed.of(open_source(str(tmp_path), config, split="train"), config)
    images_NHWC, labels_N = map(np.concatenate, zip(*listed.chunks(), strict=True))
    assert images_NHWC[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and labels_N.tolist() == [0, 0, 1, 1]


def test_images_are_loaded_in_the_order_in_which_they_are_streamed(tmp_path: Path) -> None:
    config = SourceConfig(image_size=8, resize=8, channels=1, mean=(0.5,), std=(0.5,))
    listed = Listed.of(open_source("digits", config, split="val"), config, 50)
    images_NHWC, labels_N = listed.load(1 << 20) or pytest.fail("too large")
    streamed = [np.concatenate(column) for column in zip(*listed.chunks(), strict=True)]
    np.testing.assert_array_equal(images_NHWC, streamed[0])
    np.testing.assert_array_equal(labels_N, streamed[1])
    assert listed.load(images_NHWC.nbytes - 1) is None
