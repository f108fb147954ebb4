from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.manifests import manifest_of
from wmdd_ray.errors import ArtifactError
from wmdd_ray.records import (
    Barycenter,
    ClassBarycenter,
    ClassFeatures,
    ClassImages,
    FeatureChunk,
    Moments,
    SoftLabelBlock,
    SoftLabels,
    Teacher,
    Views,
)
from wmdd_ray.store import codecs, documents
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import decode_png

RNG = np.random.default_rng(0)


def moments() -> Moments:
    return Moments(
        channels_L=(2, 3),
        count_L=np.array([40, 10]),
        mean_S=RNG.normal(size=5),
        m2_S=RNG.random(5),
    )


def teacher() -> Teacher:
    weights = {
        "conv.weight": RNG.normal(size=(2, 1, 3, 3)).astype(np.float32),
        "bn.num_batches_tracked": np.array(7),
    }
    return Teacher(
        arch="convnet3",
        width=2,
        small_stem=False,
        class_names=("cat", "猫"),
        image_size=8,
        resize=8,
        channels=1,
        mean_C=(0.5,),
        std_C=(0.25,),
        top1=0.875,
        weights=weights,
    )


def chunk(num_images: int = 4) -> FeatureChunk:
    labels_N = np.arange(num_images) % 2
    return FeatureChunk(
        keys=tuple(f"train/{i}.jpg" for i in range(num_images)),
        labels_N=labels_N.astype(np.int64),
        features_ND=RNG.normal(size=(num_images, 3)).astype(np.float32),
        moments={int(label): moments() for label in np.unique(labels_N)},
    )


def class_features() -> ClassFeatures:
    return ClassFeatures(
        label=3,
        keys=("a", "b"),
        features_ND=RNG.normal(size=(2, 3)).astype(np.float32),
        moments=moments(),
    )


def class_barycenter() -> ClassBarycenter:
    found = Barycenter(
        atoms_KD=RNG.normal(size=(2, 3)).astype(np.float32),
        weights_K=np.array([0.25, 0.75]),
        cost=1.5,
        cost_history=(2.0, 1.5),
        num_iters=2,
        converged=True,
    )
    return ClassBarycenter(
        label=1,
        num_images=9,
        barycenter=found,
        nearest_keys=("a", "b"),
        whole_keys=("e",),
        random_keys=("c", "d"),
        moments=moments(),
    )


def class_images() -> ClassImages:
    return ClassImages(
        label=1,
        images_KHWC=RNG.integers(0, 256, size=(2, 4, 4, 3), dtype=np.uint8),
        weights_K=np.array([0.5, 0.5]),
        losses={"bn": 0.125, "total": 2.0},
    )


def block(top_k: bool = False) -> SoftLabelBlock:
    views = Views(
        image_V=np.arange(6, dtype=np.int32),
        crop_V4=(RNG.random((6, 4)) / 2).astype(np.float32),
        flip_V=RNG.random(6) < 0.5,
        partner_V=np.arange(6, dtype=np.int32)[::-1].copy(),
        partner_crop_V4=(RNG.random((6, 4)) / 2).astype(np.float32),
        partner_flip_V=RNG.random(6) < 0.5,
        mix_box_V4=np.array([(0, 1, 4, 1 + i) for i in range(1, 7)], dtype=np.int16),
        share_V=RNG.random(6).astype(np.float32),
    )
    labels = SoftLabels(num_classes=5, values_VK=-RNG.random((6, 5)).astype(np.float16))
    if top_k:
        labels = SoftLabels(
            num_classes=5,
            values_VK=-RNG.random((6, 2)).astype(np.float16),
            indices_VK=RNG.integers(0, 5, size=(6, 2)).astype(np.uint16),
            rest_V=RNG.normal(size=6).astype(np.float16),
        )
    return SoftLabelBlock(first_epoch=4, num_epochs=2, views=views, labels=labels)


PAIRS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any], Any]] = {
    "teacher": (codecs.encode_teacher, codecs.decode_teacher, teacher()),
    "chunk": (codecs.encode_feature_chunk, codecs.decode_feature_chunk, chunk()),
    "empty chunk": (codecs.encode_feature_chunk, codecs.decode_feature_chunk, chunk(0)),
    "class features": (
        codecs.encode_class_features,
        codecs.decode_class_features,
        class_features(),
    ),
    "barycenter": (
        codecs.encode_class_barycenter,
        codecs.decode_class_barycenter,
        class_barycenter(),
    ),
    "images": (codecs.encode_class_images, codecs.decode_class_images, class_images()),
    "full labels": (codecs.encode_soft_labels, codecs.decode_soft_labels, block()),
    "top-k labels": (codecs.encode_soft_labels, codecs.decode_soft_labels, block(top_k=True)),
}


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(got, expected, strict=True)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(got, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert list(got) == sorted(expected)
        for name, value in expected.items():
            assert_same(got[name], value)
    else:
        assert got == expected


@pytest.mark.parametrize("kind", PAIRS)
def test_a_record_comes_back_as_it_was_and_equal_records_give_equal_bytes(kind: str) -> None:
    encode, decode, record = PAIRS[kind]
    content = encode(record)
    assert_same(decode(content), record)
    assert encode(decode(content)) == content


@pytest.mark.parametrize("kind", PAIRS)
def test_any_changed_byte_is_noticed_by_a_verified_read(kind: str, tmp_path: Path) -> None:
    encode, _, record = PAIRS[kind]
    content = encode(record)
    store = Store(str(tmp_path))
    entry = documents.entry_of("file", content)
    for position in RNG.integers(len(content), size=20):
        changed = bytearray(content)
        changed[position] ^= 1
        store.put("file", bytes(changed))
        with pytest.raises(ArtifactError, match=r"file: expected \d+ bytes with SHA-256"):
            documents.read_verified(store, entry)
    store.put("file", content[:-1])
    with pytest.raises(ArtifactError, match="found .* bytes with another checksum"):
        documents.read_verified(store, entry)
    store.delete("")
    with pytest.raises(ArtifactError, match="no object"):
        documents.read_verified(store, entry)


@pytest.mark.parametrize("kind", PAIRS)
def test_garbage_is_an_artifact_error(kind: str) -> None:
    encode, decode, record = PAIRS[kind]
    for content in (b"", b"garbage" * 10, encode(record)[: len(encode(record)) // 2]):
        with pytest.raises(ArtifactError):
            decode(content)


def test_page_checksums_find_a_changed_label_even_without_the_manifest() -> None:
    content = codecs.encode_soft_labels(block())
    original = codecs.decode_soft_labels(content)
    silent = 0
    for position in range(4, len(content) - 8):
        changed = bytearray(content)
        changed[position] ^= 0x10
        try:
            found = codecs.decode_soft_labels(bytes(changed))
        except ArtifactError:
            continue
        same = np.array_equal(found.labels.values_VK, original.labels.values_VK)
        silent += not same
    assert silent == 0


@pytest.mark.parametrize(("channels", "held"), [(1, 1), (3, 1), (1, 4)])
def test_images_come_back_to_the_pixel_and_open_with_datasets(
    channels: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = RNG.integers(0, 256, size=(4, 8, 8, channels), dtype=np.uint8)
    labels = np.array([0, 0, 1, 1])
    weights = np.array([[0.3, 0.7, 0.5, 0.5]]).T / held + np.zeros(held)
    content = codecs.encode_images(images, labels, weights, ("cat", "猫"))
    pngs, got_labels, got_weights = codecs.decode_png_rows(content)
    np.testing.assert_array_equal([decode_png(png, (8, 8, channels)) for png in pngs], images)
    np.testing.assert_array_equal(got_labels, labels)
    np.testing.assert_array_equal(got_weights, weights)
    (tmp_path / "train.parquet").write_bytes(content)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    opened = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert opened.features["label"].names == ["cat", "猫"]
    pixels = np.stack([np.asarray(row["image"]) for row in opened])
    np.testing.assert_array_equal(pixels.reshape(images.shape), images)


def test_a_manifest_of_another_format_version_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ArtifactError, match="no distilled data set"):
        documents.read_manifest(store)
    entry = documents.entry_of("data/x", b"x")
    content = documents.encode_manifest(manifest_of(), [entry])
    store.put(documents.MANIFEST_KEY, content)
    assert documents.read_manifest(store) == (
        {"format_version": 2, **manifest_of()},
        [entry],
    )
    newer = {"format_version": 9, "files": []}
    store.put(documents.MANIFEST_KEY, documents.seal(newer))
    with pytest.raises(ArtifactError, match="expected format version 2 or 1, found 9"):
        documents.read_manifest(store)


def test_records_refuse_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(AssertionError, match="features_ND"):
        replace(chunk(), keys=("one",), labels_N=np.array([0]))
    with pytest.raises(AssertionError, match="weights sum"):
        replace(class_barycenter().barycenter, weights_K=np.array([0.5, 0.6]))


def test_how_images_are_resized_stands_in_a_teacher_where_it_is_not_as_it_always_was() -> None:
    bicubic = replace(teacher(), interpolation="bicubic", exif_orientation=False)
    back = codecs.decode_teacher(codecs.encode_teacher(bicubic))
    assert (back.interpolation, back.exif_orientation) == ("bicubic", False)
    usual = codecs.encode_teacher(teacher())
    assert b"interpolation" not in usual and b"exif" not in usual
    assert codecs.decode_teacher(usual).interpolation == "bilinear"
