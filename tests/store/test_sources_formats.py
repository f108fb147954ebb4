"""What is particular to a format, and how one is told from another."""

from __future__ import annotations

import gzip
import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal
from sklearn.datasets import load_digits

from tests.store.written_sources import (
    CONFIG,
    IMAGES_NHWC,
    LABELS_N,
    NAMES,
    PNGS,
    WRITERS,
    idx_of,
    parquet_of,
    tar_of,
    write_idx,
    write_imagefolder,
    write_parquet,
    write_webdataset,
)
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, load_images, open_source
from wmdd_ray.store.sources.listing import Split
from wmdd_ray.store.sources.passed import OTHER_SPLIT
from wmdd_ray.store.sources.patterns import expand_braces


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def labels_of(source: Source) -> list[int]:
    return [raw.label for shard in source.shards(100) for raw in source.read_shard(shard)]


def test_digits_are_split_once_and_for_all_with_equal_classes() -> None:
    images_NHW, labels_N = load_digits().images, load_digits().target
    parts = {}
    for split in ("train", "val"):
        source = open_source("digits", CONFIG, split=split)
        assert source.class_names == tuple("0123456789")
        keys, source_labels_N, pixels_NHWC, _ = load_images(source, CONFIG, 1 << 20) or ((),) * 4
        parts[split] = (source_labels_N, pixels_NHWC, source.fingerprint())
    assert [len(parts[split][0]) for split in parts] == [1437, 360]
    assert_array_equal(np.bincount(parts["val"][0]), [36] * 10)
    assert parts["train"][2] != parts["val"][2]
    # Together they are the 1797 images, each with its label, scaled from 0..16 to 0..255.
    expected = sorted(
        (int(y), np.rint(x * 255 / 16).astype(np.uint8).tobytes())
        for x, y in zip(images_NHW, labels_N, strict=True)
    )
    found = sorted(
        (int(y), x.tobytes()) for part in parts.values() for y, x in zip(*part[:2], strict=True)
    )
    assert found == expected
    # Golden: a run of last year must have held out the same images.
    val = parts["val"][1]
    assert (int(val.sum()), int(val[0].sum()), int(val[-1].sum())) == (1780203, 5724, 5136)


def test_digits_know_no_other_place_and_no_other_classes() -> None:
    embedded = replace(CONFIG, format="digits")
    with pytest.raises(DataError, match="elsewhere: expected images, found nothing there"):
        open_source("elsewhere", embedded, split="train")
    with pytest.raises(DataError, match="says `digits`, which is embedded"):
        open_source(str(Path(__file__).parent), embedded, split="train")
    with pytest.raises(DataError, match="others: '0'"):
        open_source("digits", CONFIG, split="val", class_names=NAMES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_mnist_s_files_of_the_other_split_are_known_as_such(store: Store, split: Split) -> None:
    for part in ("train", "val"):
        write_idx(store, part)
    config = replace(CONFIG, channels=1, mean=(0.5,), std=(0.5,))
    source = open_source(store.uri, config, split=split)
    assert {group.reason for group in source.passed_over if "idx" in group.example} == {OTHER_SPLIT}


def test_idx_classes_have_names_only_where_the_place_says_fashion(tmp_path: Path) -> None:
    labels_N = np.arange(24) % 10
    places = dict.fromkeys(("mnist/raw", "old-fashioned/mnist", "fashion-of-1920/raw"), "0")
    fashion = ("Fashion-MNIST/raw", "fashion_mnist/raw", "FashionMNIST/raw", "fashion/mnist")
    places |= dict.fromkeys((*fashion, "dataset-fashion-mnist/raw"), "T-shirt/top")
    for folder, first in places.items():
        store = Store(str(tmp_path / folder))
        store.put("train-images-idx3-ubyte", idx_of(IMAGES_NHWC[:, :, :, 0]))
        store.put("train-labels-idx1-ubyte.gz", gzip.compress(idx_of(labels_N)))
        source = open_source(str(tmp_path / folder.partition("/")[0]), CONFIG, split="train")
        assert source.class_names[0] == first and len(source.class_names) == 10
        assert sorted(labels_of(source)) == sorted(labels_N)
    for file in ("fashion-mnist-train", "old-fashion-train"):
        store = Store(str(tmp_path / file))
        store.put(f"{file}-images-idx3-ubyte", idx_of(IMAGES_NHWC[:, :, :, 0]))
        store.put(f"{file}-labels-idx1-ubyte", idx_of(labels_N))
        source = open_source(store.uri, CONFIG, split="train")
        assert (source.class_names[0] == "T-shirt/top") == (file == "fashion-mnist-train")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            idx_of(IMAGES_NHWC[:, :, :, 0])[:-1],
            idx_of(LABELS_N),
            "expected 1536 bytes.*found fewer",
        ),
        (idx_of(IMAGES_NHWC[:, :, :, 0]) + b"x", idx_of(LABELS_N), "found more"),
        (idx_of(IMAGES_NHWC[:9, :, :, 0]), idx_of(LABELS_N), "found 9 images and 24 labels"),
        (
            idx_of(LABELS_N),
            idx_of(LABELS_N),
            "expected an IDX file .* 3 or 4 dimensions, found .* 1",
        ),
        (b"PK\3\4" + bytes(99), idx_of(LABELS_N), "found type 0x3"),
        (b"\0\0", idx_of(LABELS_N), "cut or malformed"),
        (b"\0\0\x08\x03" + b"\xff" * 12, idx_of(LABELS_N), "found fewer"),
        (idx_of(np.zeros((0, 8, 8))), idx_of(np.zeros(0)), "at least one"),
    ],
    ids=["cut", "longer", "unequal", "labels", "zip", "two-bytes", "lying-header", "none"],
)
def test_idx_files_that_are_damaged_are_refused(
    store: Store, images: bytes, labels: bytes, message: str
) -> None:
    store.put("train-images-idx3-ubyte", images)
    store.put("train-labels-idx1-ubyte", labels)
    with pytest.raises(DataError, match=message):
        open_source(store.uri, CONFIG, split="train").shards(5)


def test_idx_labels_beyond_the_training_classes_are_named(store: Store) -> None:
    WRITERS["idx"](store, "val")
    val = open_source(store.uri, CONFIG, split="val", class_names=("0", "1"))
    with pytest.raises(DataError, match=r"image 2 has label 2, expected 0 to 1"):
        val.shards(5)


def test_class_folders_may_have_folders_inside(store: Store) -> None:
    for label, name in enumerate(NAMES):
        store.put(f"train/{name}/images/0.PNG", PNGS[label])
        store.put(f"train/{name}/boxes.txt", b"not an image")
        store.put(f"train/{name}/._0.png", b"a resource fork")
    source = open_source(store.uri, CONFIG, split="train")
    assert source.class_names == NAMES and labels_of(source) == [0, 1, 2]


def test_many_files_read_ahead_come_in_order(store: Store) -> None:
    for i in range(60):
        store.put(f"ant/{i:02d}.png", b"%d" % i)
    source = open_source(store.uri, replace(CONFIG, layout="{class}"), split="train")
    contents = [raw.content for shard in source.shards(60) for raw in source.read_shard(shard)]
    assert contents == [b"%d" % i for i in range(60)]


def test_a_class_called_train_is_no_split(store: Store) -> None:
    for name in ("car", "train"):
        store.put(f"{name}/0.png", PNGS[0])
    assert open_source(store.uri, CONFIG, split="train").class_names == ("car", "train")


def test_validation_folders_are_preferred_to_test_folders(store: Store) -> None:
    write_imagefolder(store, "test")
    test = open_source(store.uri, CONFIG, split="val", class_names=NAMES)
    write_imagefolder(store, "validation")
    validation = open_source(store.uri, CONFIG, split="val", class_names=NAMES)
    assert {name.split("/")[0] for name in test.files} == {"test"}
    assert {name.split("/")[0] for name in validation.files} == {"validation"}


def test_training_images_are_not_taken_from_a_held_out_folder(store: Store) -> None:
    write_imagefolder(store, "val")
    with pytest.raises(DataError, match="expected training images .* found 'val/'; .*--data"):
        open_source(store.uri, CONFIG, split="train")


def test_missing_held_out_classes_are_a_warning_and_loose_images_are_counted(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("val/ant/0.png", PNGS[0])
    store.put("val/0.png", PNGS[0])
    with pytest.raises(
        DataError, match="1 files are no images of a class, beside 1 .* of no class"
    ):
        open_source(store.uri, CONFIG, split="val", class_names=NAMES)
    half = replace(CONFIG, max_passed_over=0.5)
    with caplog.at_level(logging.WARNING):
        source = open_source(store.uri, half, split="val", class_names=NAMES)
    assert source.class_names == NAMES and source.num_images == 1
    assert "no images of 2 training classes: 'bee', 'cat'" in caplog.text
    assert [group.example for group in source.passed_over] == ["val/0.png"]


def test_tar_labels_may_be_json_and_classes_may_be_numbers(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    members = [
        (name, content)
        for i in range(6)
        for name, content in (
            (f"a/{i}.jpeg", PNGS[i]),
            (f"a/{i}.json", json.dumps({"label": i, "text": "x"}).encode()),
            (f"a/{i}.txt", b"a caption"),
        )
    ]
    store.put("shard.tar", tar_of([("README.md", b"no sample"), *members]))
    with caplog.at_level(logging.WARNING):
        source = open_source(store.uri, CONFIG, split="train")
    assert "no classes.txt or classes.json" in caplog.text
    assert source.class_names == tuple("012345") and labels_of(source) == list(range(6))


@pytest.mark.parametrize(
    "content", [b'["ant", "bee", "cat"]', b'{"2": "cat", "0": "ant", "1": "bee"}']
)
def test_class_names_of_tars_may_be_json(store: Store, content: bytes) -> None:
    write_webdataset(store, names=())
    store.put("classes.json", content)
    assert open_source(store.uri, CONFIG, split="train").class_names == NAMES


@pytest.mark.parametrize("content", [b"[1, 2]", b'{"a": 1}', b"[", b"[]", b'"abc"[', b"\xff"])
def test_class_names_that_are_none_are_refused(store: Store, content: bytes) -> None:
    write_webdataset(store, names=())
    store.put("classes.json", content)
    with pytest.raises(DataError, match=r"classes\.json: expected .* a JSON list"):
        open_source(store.uri, CONFIG, split="train")


@pytest.mark.parametrize("format", [pa.binary(), pa.large_binary()], ids=str)
def test_parquet_images_may_be_plain_binary_and_classes_numbers(
    store: Store, format: pa.DataType
) -> None:
    table = pa.table(
        {
            "png": pa.array(PNGS, format),
            "id": pa.array(range(24)),
            "cls": pa.array(LABELS_N, pa.int8()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.put("x.parquet", sink.getvalue())
    source = open_source(store.uri, CONFIG, split="train")
    assert source.class_names == ("0", "1", "2") and labels_of(source) == LABELS_N.tolist()


def test_parquet_columns_are_chosen_by_the_declared_features(store: Store) -> None:
    table = pa.table(
        {"photo": pa.array(PNGS), "coarse": LABELS_N * 0, "fine": LABELS_N, "id": range(24)}
    )
    features = {
        "photo": {"_type": "Image"},
        "fine": {"names": list(NAMES), "_type": "ClassLabel"},
        "id": {"_type": "Value"},
    }
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.put("x.parquet", sink.getvalue())
    source = open_source(store.uri, CONFIG, split="train")
    assert source.class_names == NAMES and labels_of(source) == LABELS_N.tolist()


def test_parquet_without_the_two_columns_says_what_it_has(store: Store) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": PNGS, "width": [8] * 24}), sink)
    store.put("x.parquet", sink.getvalue())
    with pytest.raises(
        DataError, match="expected a label column .* found image: binary, width: int64; name the"
    ):
        open_source(store.uri, CONFIG, split="train")


def test_parquet_rows_are_read_from_their_own_row_group(store: Store) -> None:
    pngs = [PNGS[i % 24] for i in range(200)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pngs, "label": np.arange(200) % 3}), sink, row_group_size=70)
    store.put("x.parquet", sink.getvalue())
    source = open_source(store.uri, CONFIG, split="train")
    rows = [199, 0, 69, 70, 139, 140, 33, 0]
    found = source.read_keys([f"x.parquet#{row}" for row in rows])
    assert [raw.content for raw in found] == [pngs[row] for row in rows]
    assert [raw.label for raw in found] == [row % 3 for row in rows]


@pytest.mark.parametrize(
    ("format", "pattern"),
    [
        ("webdataset", "train-{000..001}.tar"),
        ("parquet", "data/train-{00000..00001}-of-00002.parquet"),
    ],
)
def test_brace_patterns_and_single_files_name_what_is_read(
    store: Store, format: str, pattern: str
) -> None:
    WRITERS[format](store)
    source = open_source(store.url(pattern), CONFIG, split="train")
    assert source.class_names == NAMES and labels_of(source) == LABELS_N.tolist()
    one_file = store.url(expand_braces(pattern)[0])
    first = open_source(one_file, CONFIG, split="train")
    assert first.class_names == NAMES and labels_of(first) == LABELS_N[:13].tolist()
    with pytest.raises(DataError, match="expected 4 files, 2 of them are missing: '.*2"):
        open_source(store.url(pattern.replace("1}", "3}")), CONFIG, split="train")


def test_braces_in_the_name_of_a_folder_are_none_of_the_pattern(store: Store) -> None:
    write_webdataset(store.child("set {v1}/{a,b}"))
    for uri in ("set {v1}/{a,b}", "set {v1}/{a,b}/train-{000..001}.tar", "set {v1}"):
        source = open_source(store.url(uri), CONFIG, split="train")
        assert labels_of(source) == LABELS_N.tolist()
    with pytest.raises(
        DataError, match=r"set \{v1\}/x-\{0..1\}.tar: expected 2 files, 2 of them are"
    ):
        open_source(store.url("set {v1}/x-{0..1}.tar"), CONFIG, split="train")


def test_braces_stand_for_ranges_and_lists() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    for broken in ("a{0..3", "a}b{", "{5..2}", "{0..999999}", "{0..99999}{0..9}", "{{0..1}..3}"):
        with pytest.raises(DataError, match="expected|stands for more"):
            expand_braces(broken)


def test_files_are_split_by_the_words_in_their_names(store: Store) -> None:
    train = ["my-training2.parquet", "train-0.parquet"]
    names = ["val/a.parquet", "x_test.parquet", "constrained.parquet", *train]
    for name in names:
        store.put(name, parquet_of(PNGS[:3], [0, 1, 2], NAMES))
    assert list(open_source(store.uri, CONFIG, split="train").files) == train
    assert list(open_source(store.uri, CONFIG, split="val").files) == ["val/a.parquet"]


def test_nothing_there_is_said(store: Store) -> None:
    for uri in (store.url("absent"), store.uri, f"memory://{store.uri}"):
        with pytest.raises(DataError, match="expected images, found nothing there"):
            open_source(uri, CONFIG, split="train")


def test_unknown_content_is_listed_beside_what_was_expected(store: Store) -> None:
    for name in ("a.csv", "b.csv", "notes.txt", "loose.png"):
        store.put(name, b"x")
    with pytest.raises(
        DataError,
        match=r"image folders \(CLASS.*found 4 other files \(2 x \.csv, .*'a\.csv', 'b\.csv'",
    ):
        open_source(store.uri, CONFIG, split="train")


def test_two_formats_in_one_place_need_a_choice(store: Store) -> None:
    write_imagefolder(store)
    write_parquet(store)
    with pytest.raises(
        DataError, match=r"expected one format, found 2: Parquet .*--source\.format"
    ):
        open_source(store.uri, CONFIG, split="train")
    for format in ("imagefolder", "parquet"):
        source = open_source(store.uri, replace(CONFIG, format=format), split="train")
        assert source.format == format and len(labels_of(source)) == 24
    with pytest.raises(DataError, match="expected WebDataset shards"):
        open_source(store.uri, replace(CONFIG, format="webdataset"), split="train")
