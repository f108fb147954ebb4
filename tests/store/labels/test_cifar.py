# ruff: noqa: E501  (a line a case)
"""CIFAR as it is downloaded: the binary version, unpacked or packed; pickles are refused unread."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.store.labels.files import Files, cifar
from tests.store.written_sources import tar_of
from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, load_images, open_source
from wmdd_ray.store.sources.listing import NoSuchSplitError

COLOR = SourceConfig(image_size=32, resize=32)
TEN: Files = {
    "cifar-10-batches-bin/data_batch_1.bin": cifar([[1], [0]]),
    "cifar-10-batches-bin/data_batch_2.bin": cifar([[1]]),
    "cifar-10-batches-bin/test_batch.bin": cifar([[0], [1], [1]]),
    "cifar-10-batches-bin/batches.meta.txt": b"airplane\nautomobile\n\n",
    "cifar-10-batches-bin/readme.html": b"<html>",
}
HUNDRED: Files = {
    "cifar-100-binary/train.bin": cifar([[0, 2], [1, 0], [1, 1]]),
    "cifar-100-binary/test.bin": cifar([[1, 0]]),
    "cifar-100-binary/fine_label_names.txt": b"apple\naquarium_fish\nbaby\n",
    "cifar-100-binary/coarse_label_names.txt": b"fruit\nanimal\n",
}


def packed(files: Files) -> bytes:
    return gzip.compress(tar_of([*files.items()]), 1)


def opened(place: Path, files: Files, split: str = "train", **options: Any) -> Source:
    store = Store(str(place))
    for key, content in files.items():
        store.put(key, content)
    names = options.pop("class_names", None)
    return open_source(
        store.uri, replace(COLOR, **options), split=split, class_names=names
    )  # fmt: skip


def read(source: Source) -> tuple[list[str], list[int]]:
    """Return the class and the red value of every image, by key."""
    keys, labels_N, images_NHWC, _ = load_images(source, COLOR, 1 << 30) or pytest.fail("too large")
    assert_array_equal(images_NHWC[:, :, :, 0], images_NHWC[:, :, :, 2])
    assert_array_equal(images_NHWC[:, :, :, 0] + 100, images_NHWC[:, :, :, 1])
    order_N = np.argsort([int(key) for key in keys])
    return (
        [source.class_names[y] for y in labels_N[order_N]],
        images_NHWC[order_N, 0, 0, 0].tolist(),
    )


PLACES = {
    "the folder above": ("", TEN, HUNDRED),
    "the archive": (
        "",
        {"cifar-10-binary.tar.gz": packed(TEN)},
        {"cifar-100-binary.tar.gz": packed(HUNDRED)},
    ),
    "unpacked beside the archive": ("", {**TEN, "cifar-10-binary.tar.gz": b"x"}, HUNDRED),
    "the folder itself": (
        "",
        {key.partition("/")[2]: content for key, content in TEN.items()},
        {key.partition("/")[2]: content for key, content in HUNDRED.items()},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_both_splits_are_read_with_their_names(tmp_path: Path, place: str) -> None:
    _, ten, hundred = PLACES[place]
    train, val = (opened(tmp_path / "10", ten, split) for split in ("train", "val"))
    assert train.format == "cifar" and train.class_names == ("airplane", "automobile")
    assert read(train) == (["automobile", "airplane", "automobile"], [0, 1, 0])
    assert read(val) == (["airplane", "automobile", "automobile"], [0, 1, 2])
    assert train.fingerprint() != val.fingerprint()

    fine = opened(tmp_path / "100", hundred)
    coarse = opened(tmp_path / "100", {}, label_column="coarse_label")
    assert read(fine) == (["baby", "apple", "aquarium_fish"], [0, 1, 2])
    assert read(coarse) == (["fruit", "animal", "animal"], [0, 1, 2])
    assert fine.fingerprint() != coarse.fingerprint()


def test_held_out_classes_are_matched_by_name(tmp_path: Path) -> None:
    names = ("automobile", "airplane")
    assert read(opened(tmp_path, TEN, "val", class_names=names))[0][0] == "airplane"


def test_without_lists_of_names_classes_are_numbers(tmp_path: Path) -> None:
    batches = {key: content for key, content in TEN.items() if key.endswith(".bin")}
    assert read(opened(tmp_path, batches))[0] == ["1", "0", "1"]


PYTHON = {
    "folder": {f"cifar-10-batches-py/{name}": b"\x80\x02}q\x01." for name in ("batches.meta", "data_batch_1", "test_batch")},
    "hundred": {f"cifar-100-python/{name}": b"\x80\x02}q\x01." for name in ("meta", "train", "test")},
    "archive": {"cifar-10-python.tar.gz": b"x"},
}  # fmt: skip


@pytest.mark.parametrize("kind", PYTHON)
def test_pickles_are_refused_with_the_download_to_take(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"whose pickles .* never read; take https.*binary\.tar"):
        opened(tmp_path, PYTHON[kind])


BROKEN: dict[str, tuple[Files, dict[str, Any], str]] = {
    "cut": ({**TEN, "cifar-10-batches-bin/data_batch_1.bin": cifar([[1]])[:-1]}, {}, r"data_batch_1\.bin: expected CIFAR's records of 3073 bytes"),
    "empty": ({**TEN, "cifar-10-batches-bin/data_batch_1.bin": b""}, {}, r"found 0 bytes"),
    "another column": (HUNDRED, {"label_column": "label"}, r"fine_label or coarse_label"),
    "a label beyond the names": ({**TEN, "cifar-10-batches-bin/data_batch_2.bin": cifar([[7]])}, {}, r"has label 7, expected 0 to 1"),
    "both sets": ({**TEN, **HUNDRED}, {}, r"expected one data set, found cifar-10-batches-bin, cifar-100-binary"),
    "an archive of something else": ({"cifar-10-binary.tar.gz": packed({"a": b"b"})}, {}, r"expected batches of CIFAR's train images, found none"),
    "a batch twice": ({"cifar-10-binary.tar.gz": gzip.compress(tar_of([*TEN.items()][:1] * 2))}, {}, r"expected each batch of CIFAR once"),
    "zeros without end": ({"cifar-10-binary.tar.gz": packed({f"data_batch_{i}.bin": bytes(3073 * 400) for i in (1, 2, 3)})}, {}, r"bytes of images at most, found more at data_batch_3"),
    "a broken stream": ({"cifar-10-binary.tar.gz": packed(TEN)[:40] + b"\xff" * 40 + packed(TEN)[80:]}, {}, r"cut or malformed content \(error"),
    "a damaged archive": ({"cifar-10-binary.tar.gz": b"\x1f\x8bjunk" * 9}, {}, r"cut or malformed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_refused(tmp_path: Path, case: str) -> None:
    files, options, message = BROKEN[case]
    for key, content in files.items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(opened(tmp_path, {}, **options))


def test_a_set_without_held_out_batches_says_so(tmp_path: Path) -> None:
    train = {key: content for key, content in TEN.items() if "test" not in key}
    with pytest.raises(NoSuchSplitError):
        opened(tmp_path, train, "val")
