"""What holds for every format: same images, fixed shards, keys that find images again, splits, fingerprints."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.store.faulty_s3 import FaultyS3
from tests.store.written_sources import CONFIG, IMAGES_NHWC, LABELS_N, NAMES, PNGS, WRITERS
from wmdd_ray.errors import ArtifactError, DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources import Source, decoded_chunks, load_images, open_source

FORMATS = sorted(WRITERS)
BY_CLASS = ("idx", "imagefolder")
NAMED = ("imagefolder", "parquet", "webdataset")


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}/data")


def opened(store: Store, format: str, **options: object) -> Source:
    """Write the images in a format and open them."""
    WRITERS[format](store)
    return open_source(store.uri, CONFIG, split="train", **options)


def keys_of(source: Source) -> list[str]:
    return [raw.key for shard in source.shards(5) for raw in source.read_shard(shard)]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_reads_back_the_same_images_and_labels(store: Store, format: str) -> None:
    source = opened(store, format)
    assert source.format == format
    assert source.class_names == (("0", "1", "2") if format == "idx" else NAMES)
    loaded = load_images(source, CONFIG, limit_bytes=1 << 20)
    assert loaded is not None
    keys, labels_N, images_NHWC, bad = loaded
    order = np.argsort(LABELS_N, kind="stable") if format in BY_CLASS else np.arange(24)
    assert_array_equal(images_NHWC, IMAGES_NHWC[order])
    assert_array_equal(labels_N, LABELS_N[order])
    assert (labels_N.dtype, images_NHWC.dtype) == (np.int64, np.uint8)
    assert len(set(keys)) == 24 and bad == ()


@pytest.mark.parametrize("format", FORMATS)
def test_a_pickled_copy_finds_images_again_by_key_in_the_order_asked(
    store: Store, format: str
) -> None:
    source = opened(store, format)
    shards = source.shards(5)
    first = {raw.key: raw for shard in shards for raw in source.read_shard(shard)}
    asked = list(first)[::-3] + list(first)[:4] + list(first)[:1]
    copy = pickle.loads(pickle.dumps(source))
    found = copy.read_keys(asked)
    assert [raw.key for raw in found] == asked
    for raw in found:
        assert raw.label == first[raw.key].label
        assert_array_equal(
            decode_image(raw.content, CONFIG, ""), decode_image(first[raw.key].content, CONFIG, "")
        )
    assert [raw.key for shard in shards for raw in copy.read_shard(shard)] == list(first)


@pytest.mark.parametrize("format", FORMATS)
def test_a_copy_on_a_worker_is_small_and_does_not_list(store: Store, format: str) -> None:
    copy = pickle.loads(content := pickle.dumps(opened(store, format)))
    assert len(content) < 1000
    with pytest.raises(AssertionError, match="made on the driver"):
        copy.fingerprint()


@pytest.mark.parametrize("format", FORMATS)
def test_shards_are_the_same_at_every_opening_and_can_be_file_names(
    store: Store, format: str
) -> None:
    shards = opened(store, format).shards(5)
    assert open_source(store.uri, CONFIG, split="train").shards(5) == shards
    assert pickle.loads(pickle.dumps(shards)) == shards
    ids = [shard.id for shard in shards]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z0-9-]+", i) for i in ids)


@pytest.mark.parametrize("format", FORMATS)
def test_shards_know_as_much_as_a_listing_tells(store: Store, format: str) -> None:
    source = opened(store, format)
    shards = source.shards(5)
    if format in BY_CLASS:
        assert [shard.id for shard in shards[:3]] == ["c00000-0000", "c00000-0001", "c00001-0000"]
        assert [shard.num_images for shard in shards] == [5, 3] * 3
        assert [shard.labels for shard in shards] == [(0,), (0,), (1,), (1,), (2,), (2,)]
    else:
        assert [shard.id for shard in shards] == ["s00000", "s00001"]
        assert [shard.labels for shard in shards] == [None, None]
        known = format == "parquet"
        assert [shard.num_images for shard in shards] == ([13, 11] if known else [None, None])
    assert source.num_images == (None if format == "webdataset" else 24)
    for shard in shards:
        labels = {raw.label for raw in source.read_shard(shard)}
        assert shard.labels is None or labels == set(shard.labels)


@pytest.mark.parametrize("format", FORMATS)
def test_fingerprint_is_of_the_data_and_not_of_its_place(
    store: Store, format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = opened(store, format)
    elsewhere = opened(Store(str(tmp_path_factory.mktemp("copy"))), format)
    assert source.fingerprint() == elsewhere.fingerprint()
    if format == "idx":
        name = "train-images-idx3-ubyte.gz"
        store.put(name, gzip.compress(gzip.decompress(store.get(name)), 1) + gzip.compress(b""))
    else:
        WRITERS[format](store, pngs=(PNGS[0] + b"\0" * 20_000, *PNGS[1:]))
    assert open_source(store.uri, CONFIG, split="train").fingerprint() != source.fingerprint()


@pytest.mark.parametrize("format", FORMATS)
def test_splits_in_one_place_are_kept_apart(store: Store, format: str) -> None:
    train = opened(store, format)
    WRITERS[format](store, "val")
    assert open_source(store.uri, CONFIG, split="train").fingerprint() == train.fingerprint()
    val = open_source(store.uri, CONFIG, split="val", class_names=train.class_names)
    assert set(val.files).isdisjoint(train.files)
    assert len(keys_of(val)) == 24


@pytest.mark.parametrize("format", FORMATS)
def test_without_held_out_images_the_error_says_to_pass_them(store: Store, format: str) -> None:
    WRITERS[format](store)
    with pytest.raises(DataError, match="expected held-out images.*found.*train.*--val-data"):
        open_source(store.uri, CONFIG, split="val")


@pytest.mark.parametrize("format", NAMED)
def test_held_out_classes_are_matched_by_name(store: Store, format: str) -> None:
    order = ("cat", "ant", "bee")
    WRITERS[format](store, "val")
    val = open_source(store.uri, CONFIG, split="val", class_names=order)
    assert val.class_names == order
    for raw in (raw for shard in val.shards(9) for raw in val.read_shard(shard)):
        pixels = decode_image(raw.content, CONFIG, "")
        position = next(i for i in range(24) if (IMAGES_NHWC[i] == pixels).all())
        assert order[raw.label] == NAMES[LABELS_N[position]]
        assert val.read_keys([raw.key])[0].label == raw.label


@pytest.mark.parametrize("format", ["imagefolder", "parquet"])
def test_images_to_train_on_of_other_classes_than_those_given_are_called_so(
    store: Store, format: str
) -> None:
    WRITERS[format](store, "train")
    expected = (
        "expected the 3 given classes, found 1 others: 'bee'; absent: 'dog'; pass images with"
    )
    with pytest.raises(DataError, match=expected):
        open_source(store.uri, CONFIG, split="train", class_names=("ant", "cat", "dog"))


@pytest.mark.parametrize("format", NAMED)
def test_other_held_out_classes_are_refused_by_name(store: Store, format: str) -> None:
    WRITERS[format](store, "val")
    expected = "expected the 3 training classes, found 1 others: 'bee'; absent: 'dog'"
    with pytest.raises(DataError, match=expected):
        open_source(store.uri, CONFIG, split="val", class_names=("ant", "cat", "dog"))


@pytest.mark.parametrize("format", NAMED)
def test_a_dedicated_place_needs_no_split_in_its_names(store: Store, format: str) -> None:
    WRITERS[format](store, {"imagefolder": ""}.get(format, "part"))
    train = open_source(store.uri, CONFIG, split="train")
    val = open_source(store.uri, CONFIG, split="val", class_names=NAMES, dedicated=True)
    assert keys_of(val) == keys_of(train)
    with pytest.raises(DataError, match="--val-data"):
        open_source(store.uri, CONFIG, split="val", class_names=NAMES)


@pytest.mark.parametrize("format", FORMATS)
def test_keys_that_name_nothing_are_refused(store: Store, format: str) -> None:
    source = opened(store, format)
    outside = ("train/ant/../../../z.png", "../train-000.tar#0:1:0", "data/../../x.parquet#0")
    for key in ("", "../x", "nothing", "99999", "a.tar#0:1:9", "a.parquet#-1", *outside):
        with pytest.raises(DataError, match=re.escape(f"no image {key!r}") + "|impossible"):
            source.read_keys([key])


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_gone_is_a_fault_of_the_storage_and_not_a_bad_image(
    store: Store, format: str
) -> None:
    source = opened(store, format)
    shard, keys = source.shards(5)[0], keys_of(source)
    source = pickle.loads(pickle.dumps(source))
    store.delete("")
    for read in (lambda: source.read_keys(keys[:1]), lambda: list(source.read_shard(shard))):
        with pytest.raises(ArtifactError, match="cannot read .*still there"):
            read()


@pytest.mark.parametrize("chunk_images", [4, 5, 8, 13, 100])
@pytest.mark.parametrize("format", FORMATS)
def test_chunks_cut_a_shard_and_exactly_one_is_last(
    store: Store, format: str, chunk_images: int
) -> None:
    source = opened(store, format)
    for shard in source.shards(8):
        raws = list(source.read_shard(shard))
        chunks = list(decoded_chunks(source, shard, CONFIG, chunk_images))
        assert [chunk.chunk for chunk in chunks] == list(range(-(-len(raws) // chunk_images)))
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert {len(chunk.keys) for chunk in chunks[:-1]} <= {chunk_images}
        assert [key for chunk in chunks for key in chunk.keys] == [raw.key for raw in raws]
        assert {chunk.shard_id for chunk in chunks} == {shard.id}
        skipped = decoded_chunks(source, shard, CONFIG, chunk_images, frozenset({0}))
        for chunk, again in itertools.zip_longest(chunks[1:], skipped):
            assert (chunk.chunk, chunk.last, chunk.keys) == (again.chunk, again.last, again.keys)
            assert_array_equal(chunk.images_NHWC, again.images_NHWC)


def test_a_set_that_does_not_fit_is_not_loaded(store: Store) -> None:
    for format in FORMATS:
        place = store.child(format)
        source = opened(place, format)
        assert load_images(source, CONFIG, limit_bytes=24 * 64) is not None
        assert load_images(source, CONFIG, limit_bytes=24 * 64 - 1) is None


def test_sources_are_read_over_s3(s3_server: Callable[[], str]) -> None:
    for format in FORMATS:
        source = opened(Store(s3_server()), format)
        keys, labels_N, images_NHWC, _ = load_images(
            source, CONFIG, limit_bytes=1 << 20
        ) or pytest.fail("too large")
        assert_array_equal(np.sort(labels_N), np.sort(LABELS_N))
        copy = pickle.loads(pickle.dumps(source))
        raw = copy.read_keys(keys[7:8])[0]
        assert_array_equal(decode_image(raw.content, CONFIG, ""), images_NHWC[7])


@pytest.mark.parametrize("format", FORMATS)
def test_replies_that_are_shorter_than_asked_never_become_data(
    s3_server: Callable[[], str], monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    uri = s3_server()
    source = opened(Store(uri), format)
    expected = load_images(source, CONFIG, limit_bytes=1 << 20)
    assert expected is not None
    shard = source.shards(100)[0]
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        # Once, it is read again.
        proxy.break_down("short", times=1, method="GET")
        keys = [raw.key for raw in pickle.loads(pickle.dumps(source)).read_shard(shard)]
        assert keys and set(keys) <= set(expected[0]) and proxy.left == 0
        proxy.break_down("short", times=1000, method="GET")
        with pytest.raises(ArtifactError, match="the store answered with fewer, 4 times"):
            list(pickle.loads(pickle.dumps(source)).read_shard(shard))
