"""Bad images are counted, named and skipped; damaged files are refused; nothing crashes or reaches the disk."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile
import timeit
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from tests.store.written_sources import (
    CONFIG,
    IMAGES_NHWC,
    LABELS_N,
    NAMES,
    PNGS,
    WRITERS,
    parquet_of,
    tar_of,
)
from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import ArtifactError, DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import (
    DecodedChunk,
    decoded_chunks,
    load_images,
    open_source,
    refuse_too_many_bad,
)
from wmdd_ray.store.sources.tar import tar_members

CUT = PNGS[7][:-40]
# A folder with a single class is taken only when it is told.
ONE_CLASS = replace(CONFIG, layout="train/{class}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def chunks_of(
    store: Store, chunk_images: int = 5, config: SourceConfig = CONFIG
) -> list[DecodedChunk]:
    source = open_source(store.uri, config, split="train")
    return [
        chunk
        for shard in source.shards(100)
        for chunk in decoded_chunks(source, shard, CONFIG, chunk_images)
    ]


def tar_with(store: Store, members: list[tuple[str, bytes]]) -> list[DecodedChunk]:
    store.put("classes.txt", b"ant\nbee\ncat\n")
    store.put("x.tar", tar_of(members))
    return chunks_of(store)


@pytest.mark.parametrize("format", ["imagefolder", "parquet", "webdataset"])
def test_a_cut_image_is_named_and_skipped_and_moves_no_boundary(store: Store, format: str) -> None:
    whole = store.child("whole")
    WRITERS[format](whole)
    WRITERS[format](store.child("cut"), pngs=(*PNGS[:7], CUT, *PNGS[8:]))
    expected, found = chunks_of(whole), chunks_of(store.child("cut"))
    assert [chunk.last for chunk in found] == [chunk.last for chunk in expected]
    bad = [reason for chunk in found for reason in chunk.bad]
    assert len(bad) == 1 and all(word in bad[0] for word in ("train", ": OSError: "))
    good_N = [i for i in range(24) if i != 7]
    if format == "imagefolder":
        assert bad[0].startswith("train/bee/007.png: ")
        good_N = sorted(good_N, key=lambda i: LABELS_N[i])
    assert_array_equal(np.concatenate([c.images_NHWC for c in found]), IMAGES_NHWC[good_N])
    assert_array_equal(np.concatenate([c.labels_N for c in found]), LABELS_N[good_N])
    shrunk = [
        i
        for i, (a, b) in enumerate(zip(expected, found, strict=True))
        if len(a.keys) != len(b.keys)
    ]
    assert len(shrunk) == 1 and len(found[shrunk[0]].keys) == len(expected[shrunk[0]].keys) - 1


def test_more_bad_images_than_allowed_stop_the_run_and_are_named(store: Store) -> None:
    WRITERS["imagefolder"](store, pngs=(*PNGS[:6], *[b"junk"] * 6, *PNGS[12:]))
    source = open_source(store.uri, CONFIG, split="train")
    assert load_images(source, replace(CONFIG, max_bad_images=6), 1 << 20) is not None
    expected = r"6 images cannot be used, --source.max-bad-images allows 5.*train/ant/006\.png"
    with pytest.raises(DataError, match=expected):
        load_images(source, replace(CONFIG, max_bad_images=5), 1 << 20)
    refuse_too_many_bad(["x"] * 5, replace(CONFIG, max_bad_images=5), "there")


def test_files_that_are_too_large_are_bad_and_not_read(store: Store) -> None:
    plain = replace(CONFIG, max_image_pixels=64)
    big = PNGS[0] + bytes(64 * 8)
    store.put("folder/train/ant/0.png", big)
    store.put("tar/x.tar", tar_of([("0.png", big), ("0.cls", b"0")]))
    store.put("parquet/x.parquet", parquet_of([big], [0], NAMES))
    for place in ("folder", "tar", "parquet"):
        small = replace(plain, layout="train/{class}" if place == "folder" else "")
        source = open_source(store.url(place), small, split="train")
        (chunk,) = (c for s in source.shards(9) for c in decoded_chunks(source, s, small, 9))
        assert chunk.keys == () and "bytes, more than 512 (8 bytes a pixel" in chunk.bad[0]


def test_a_shard_of_garbage_stops_before_its_end(store: Store) -> None:
    WRITERS["imagefolder"](store, pngs=[b"junk"] * 24)
    source = open_source(store.uri, replace(CONFIG, max_bad_images=3), split="train")
    with pytest.raises(DataError, match="4 images cannot be used"):
        next(decoded_chunks(source, source.shards(100)[0], source.config, 100))


def test_pictures_of_formats_that_are_not_decoded_do_not_vanish(store: Store) -> None:
    store.put("train/ant/0.png", PNGS[0])
    store.put("train/ant/1.GIF", b"GIF89a")
    (chunk,) = chunks_of(store, config=ONE_CLASS)
    assert chunk.bad[0].startswith("train/ant/1.GIF: expected a JPEG, PNG or WebP")


def test_samples_without_image_or_label_are_bad_and_keep_their_place(store: Store) -> None:
    members = [
        ("0.png", PNGS[0]), ("0.cls", b"0"),
        ("1.png", PNGS[1]),
        ("2.cls", b"2"),
        ("3.png", PNGS[3]), ("3.cls", b""),
        ("4.png", PNGS[4]), ("4.json", b'{"label": ["ant"]}'),
        ("5.png", PNGS[5]), ("5.json", b"[" * 100_000),
        ("6.png", b""), ("6.cls", b"0"),
        ("7.cls", b"1"), ("7.json", b'{"label": 2}'), ("7.txt", b"a caption"), ("7.png", PNGS[7]),
    ]  # fmt: skip
    first, second = tar_with(store, members)
    assert_array_equal(first.images_NHWC, IMAGES_NHWC[:1])
    assert [reason.partition(": ")[0] for reason in first.bad] == [
        f"x.tar#{i}" for i in (1, 2, 3, 4)
    ]
    assert ["no label" in reason for reason in first.bad] == [True, False, True, True]
    assert "no image member (jpg, png, webp, ...), only cls" in first.bad[1]
    assert_array_equal(second.labels_N, [1])
    assert len(second.bad) == 2 and "the file is empty" in second.bad[1] and second.last


def test_parquet_rows_without_bytes_or_label_are_bad(store: Store) -> None:
    store.put("x.parquet", parquet_of([PNGS[0], None, PNGS[2]], [0, 1, None], NAMES))
    (chunk,) = chunks_of(store)
    assert_array_equal(chunk.labels_N, [0])
    assert chunk.bad[0].startswith("x.parquet#1: no image") and "no label" in chunk.bad[1]


@pytest.mark.parametrize("label", [-2, 3])
def test_labels_outside_the_classes_stop_the_run(store: Store, label: int) -> None:
    with pytest.raises(
        DataError, match=rf"x\.tar#0 has label {label}, expected 0 to 2 \(3 classes\)"
    ):
        tar_with(store, [("0.png", PNGS[0]), ("0.cls", b"%d" % label)])
    store.put("p/x.parquet", parquet_of(PNGS[:2], [0, label], NAMES))
    with pytest.raises(DataError, match=rf"x\.parquet#1 has label {label}"):
        chunks_of(store.child("p"))


def test_empty_shards_are_one_empty_last_chunk(store: Store) -> None:
    (chunk,) = tar_with(store, [])
    assert (chunk.chunk, chunk.last, chunk.keys) == (0, True, ())
    assert chunk.images_NHWC.shape == (0, 8, 8, 1) and chunk.labels_N.dtype == np.int64
    store.put("p/x.parquet", parquet_of([], [], NAMES))
    (chunk,) = chunks_of(store.child("p"))
    assert chunk.last and chunk.keys == ()


def test_tars_are_refused_wherever_they_are_cut(store: Store) -> None:
    content = tar_of(
        [(f"{i}.{e}", c) for i in range(2) for e, c in (("png", PNGS[i]), ("cls", b"0"))]
    )
    end = len(content.rstrip(b"\0"))
    for size in range(0, end, 97):
        with pytest.raises(DataError, match=r"^x\.tar: expected a whole tar archive, found"):
            list(tar_members(io.BytesIO(content[:size]), "x.tar", lambda *_: True))
    with pytest.raises(DataError, match="several archives were joined"):
        list(tar_members(io.BytesIO(content + content), "x.tar", lambda *_: True))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_those_of_tarfile(format: int) -> None:
    names = ["a.png", "b" * 90 + ".cls"]
    if format != tarfile.USTAR_FORMAT:
        names += ["ü" * 300 + "/" + "k" * 200 + ".png", "é.cls"]
    content = tar_of([(name, bytes([i]) * (511 + i)) for i, name in enumerate(names)], format)
    members = list(tar_members(io.BytesIO(content), "x.tar", lambda name, _: name != "a.png"))
    with tarfile.open(fileobj=io.BytesIO(content)) as reference:
        assert [(m.name, m.offset, m.size_bytes) for m in members] == [
            (header.name, header.offset_data, header.size) for header in reference
        ]
    assert [member.content for member in members] == [
        None, *(bytes([i]) * (511 + i) for i in range(1, len(names)))
    ]  # fmt: skip


def pax_header(records: bytes) -> bytes:
    """Return a tar that begins with an extended header of these records."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    return header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + bytes(1024)


def test_extended_headers_take_time_by_their_bytes() -> None:
    def seconds(count: int) -> float:
        content = pax_header(b"9 a=bcde\n" * count)
        return min(
            timeit.repeat(
                lambda: list(tar_members(io.BytesIO(content), "x", lambda *_: True)),
                number=1,
                repeat=3,
            )
        )

    # A mebibyte took 6.5 s when each record copied all that followed it; 16 times the bytes would be 256 times the time.
    assert seconds(112_000) < 60 * seconds(7_000)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"9" * 5000 + b" size=1\n", "malformed extended header"),
        (b"30 size=" + b"9" * 21 + b"\n", "an extended header with size '9{20}'"),
        (b"11 size=-1\n", "an extended header with size '-1'"),
        (b"12 size=\xc2\xb2\xc2\n", "an extended header with size"),
        (b"99 path=x\n", "malformed"),
        (b"1 path=x\n", "malformed"),
        (b"10 path=ab\n", "malformed"),
        (b" path=x\n", "malformed"),
        (b"9 path=x\n\0\0x", "content behind an extended header"),
    ],
)
def test_extended_headers_that_are_malformed_are_refused(records: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(tar_members(io.BytesIO(pax_header(records)), "x.tar", lambda *_: True))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_without_content_are_passed_over(format: int) -> None:
    sink = io.BytesIO()
    comment = {"comment": "for all members"} if format == tarfile.PAX_FORMAT else {}
    with tarfile.open(fileobj=sink, mode="w", format=format, pax_headers=comment) as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a" * 300
        archive.addfile(link)
        image = tarfile.TarInfo("0.png")
        image.size = 5
        archive.addfile(image, io.BytesIO(b"image"))
    # Some writers give a folder a size, and no content follows; tarfile would write 0.
    folder = bytearray(tarfile.TarInfo("folder").tobuf())
    folder[124:135], folder[156:157], folder[148:156] = b"00000000144", tarfile.DIRTYPE, b" " * 8
    folder[148:156] = b"%06o\0 " % sum(folder)
    content = bytes(folder) + sink.getvalue()
    (member,) = tar_members(io.BytesIO(content), "x.tar", lambda *_: True)
    assert (member.name, member.content) == ("0.png", b"image")


def test_hostile_tar_members_are_neither_followed_nor_extracted(
    store: Store, tmp_path: Path
) -> None:
    secret = tmp_path.parent / f"{uuid.uuid4().hex}.png"
    secret.write_bytes(PNGS[5])
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        ("../../evil.png", PNGS[0]), ("../../evil.cls", b"0"),
        ("/tmp/absolute.png", PNGS[1]), ("/tmp/absolute.cls", b"1"),
    ]  # fmt: skip
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.DIRTYPE,
    ):
        link = tarfile.TarInfo(f"link{kind.decode()}.png")
        link.type, link.linkname = kind, str(secret)
        members += [(link, b""), (f"link{kind.decode()}.cls", b"2")]

    def there() -> set[Path]:
        # The parent holds the folders of all tests, which would take long to walk.
        return {*tmp_path.rglob("*"), *tmp_path.parent.iterdir()}

    before = there()
    (first, second) = tar_with(store, members)
    assert_array_equal(first.images_NHWC, IMAGES_NHWC[:2])
    assert len(first.bad) + len(second.bad) == 5
    assert all("no image member" in reason for reason in (*first.bad, *second.bad))
    created = {path.name for path in there() - before}
    assert created == {"x.tar", "classes.txt"} and not Path("/tmp/absolute.png").exists()


def test_a_sparse_member_does_not_fill_the_memory() -> None:
    header = tarfile.TarInfo("0.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 1 << 40
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(DataError, match="stored sparse"):
        list(tar_members(io.BytesIO(content), "x.tar", lambda *_: True))


def test_pickled_columns_and_members_are_never_loaded(store: Store, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bomb = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    chunks = tar_with(store, [("0.png", bomb), ("0.cls", b"0"), ("1.pyd", bomb), ("1.cls", b"0")])
    store.put("p/x.parquet", parquet_of([bomb], [0], NAMES))
    chunks += chunks_of(store.child("p"))
    assert sum(len(chunk.bad) for chunk in chunks) == 3 and not canary.exists()


def numbered(rows: range, *, missing: str = "") -> list[tuple[str, bytes]]:
    """Image and label of each row as members, without the one that is missing."""
    members = [
        (f"{i:03d}.{ending}", content)
        for i in rows
        for ending, content in (("png", PNGS[i]), ("cls", b"%d" % LABELS_N[i]))
    ]
    return [member for member in members if member[0] != missing]


@pytest.mark.parametrize(
    ("missing", "reason"), [("007.png", "no image member"), ("007.cls", "no label")]
)
def test_a_missing_member_is_named_with_its_shard_and_key(
    store: Store, missing: str, reason: str
) -> None:
    chunks = tar_with(store, numbered(range(13), missing=missing))
    bad = [reason for chunk in chunks for reason in chunk.bad]
    assert len(bad) == 1 and bad[0].startswith("x.tar#007: ") and reason in bad[0]
    assert sum(len(chunk.keys) for chunk in chunks) == 12


def test_a_key_that_is_there_twice_is_named(store: Store) -> None:
    twice = [*numbered(range(3)), *numbered(range(2, 4)), *numbered(range(1)), ("009.txt", b"x")]
    chunks = tar_with(store, twice)
    bad = [reason for chunk in chunks for reason in chunk.bad]
    assert bad == [
        "x.tar#002: the archive holds cls of this key more than once",
        "x.tar#000: the archive holds this key more than once",
    ]
    assert_array_equal(np.concatenate([c.labels_N for c in chunks]), LABELS_N[[0, 1, 3]])


def test_a_stem_with_very_many_members_takes_no_time_and_no_line(store: Store) -> None:
    many = [(f"a.{i}", b"") for i in range(20_000)] + [("a.cls", b"0")]
    (chunk,) = tar_with(store, [*many, ("k" * 3000 + "\n.cls", b"0")])
    assert len(chunk.bad) == 2 and all(len(reason) < 400 for reason in chunk.bad)
    assert "\n" not in chunk.bad[1] and "k...k" in chunk.bad[1]


def indexed(store: Store, index: str, counts: dict[str, int]) -> None:
    if index == "sizes.json":
        store.put(index, json.dumps(counts).encode())
        return
    split = {"filenames": list(counts), "shard_lengths": list(counts.values())}
    store.put(index, json.dumps({"splits": {"train": split}}).encode())


@pytest.mark.parametrize("index", ["_info.json", "sizes.json"])
def test_samples_are_counted_against_the_index_beside_the_shards(store: Store, index: str) -> None:
    WRITERS["webdataset"](store)
    whole = {"train-000.tar": 13, "train-001.tar": 11}
    indexed(store, index, whole)
    source = open_source(store.uri, CONFIG, split="train")
    assert (source.num_images, [s.num_images for s in source.shards(5)]) == (24, [13, 11])
    assert sum(len(chunk.keys) for chunk in chunks_of(store)) == 24
    # Cut between two members and closed again: a whole archive, of which only the index knows better.
    store.put("train-001.tar", tar_of(numbered(range(13, 20))))
    with pytest.raises(
        DataError, match=r"train-001\.tar: expected 11 samples as the index .* found 7"
    ):
        chunks_of(store)
    indexed(store, index, {**whole, "train-002.tar": 4})
    with pytest.raises(DataError, match=rf"{index}: names 3 .* 1 of them are missing: 'train-002"):
        chunks_of(store)
    # One shard that is asked for by name needs no others.
    one = open_source(store.url("train-000.tar"), CONFIG, split="train")
    assert one.num_images == 13


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b'{"splits": []}', b'{"train-000.tar": "many"}', b"[" * 99_999]
)
def test_what_is_no_index_is_said_and_not_counted_against(
    store: Store, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    WRITERS["webdataset"](store)
    for name in ("_info.json", "sizes.json"):
        store.put(name, content)
        with caplog.at_level(logging.WARNING):
            assert open_source(store.uri, CONFIG, split="train").num_images is None
        assert f"{name}: is no index of shards" in caplog.text
        store.delete(name)


def test_parquet_with_fewer_rows_than_its_footer_says_is_refused(store: Store) -> None:
    content = parquet_of(PNGS[:7], LABELS_N[:7].tolist(), NAMES)
    found = 0
    for position in range(len(content) - 12):
        # A 64-bit field of the footer's thrift that says 7 now says 8.
        if content[position : position + 2] != b"\x16\x0e":
            continue
        changed = content[: position + 1] + b"\x10" + content[position + 2 :]
        try:
            rows = pq.read_metadata(io.BytesIO(changed)).num_rows
        except OSError:
            continue
        if rows == 8:
            found += 1
            store.put("x.parquet", changed)
            with pytest.raises(DataError, match=r"x\.parquet: expected 8 rows, found 7"):
                chunks_of(store)
            source = open_source(store.uri, CONFIG, split="train")
            with pytest.raises(DataError, match=r"x\.parquet: no row 7"):
                source.read_keys(["x.parquet#7"])
    assert found == 1


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_a_file_of_another_size_than_was_listed_is_refused_by_name(
    store: Store, format: str
) -> None:
    WRITERS[format](store)
    source = open_source(store.uri, CONFIG, split="train")
    shards = source.shards(100)
    copy = pickle.loads(pickle.dumps(source))
    name = next(iter(source.files))
    store.put(name, store.get(name) + b"\0")
    size_bytes = source.files[name]
    expected = rf"{name}: expected {size_bytes} bytes as the listing told, found {size_bytes + 1}"
    with pytest.raises(ArtifactError, match=expected):
        [raw for shard in shards for raw in copy.read_shard(shard)]


# Degenerate data -------------------------------------------------------------------------------


def test_one_image_is_a_source_and_the_same_image_twice_is_two(store: Store) -> None:
    for format in ("imagefolder", "webdataset", "parquet"):
        place = store.child(format)
        WRITERS[format](place, pngs=(PNGS[0],) * 24)
        keys = [key for chunk in chunks_of(place) for key in chunk.keys]
        assert len(set(keys)) == 24
    one = store.child("one")
    one.put("folder/train/ant/0.png", PNGS[0])
    one.put("tar/x.tar", tar_of(numbered(range(1))))
    one.put("parquet/x.parquet", parquet_of(PNGS[:1], [0], NAMES))
    for place in ("folder", "tar", "parquet"):
        (chunk,) = chunks_of(one.child(place), config=ONE_CLASS if place == "folder" else CONFIG)
        assert_array_equal(chunk.images_NHWC, IMAGES_NHWC[:1])


def test_classes_without_images_are_said_and_make_no_class(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("train/ant/0.png", PNGS[0])
    store.put("train/cat/notes.txt", b"no image")
    Path(store.uri, "train/bee").mkdir()
    with caplog.at_level(logging.WARNING):
        source = open_source(store.uri, ONE_CLASS, split="train")
    assert source.class_names == ("ant",)
    assert "1 folders are empty and make no class: 'train/bee'" in caplog.text
    assert "1 folders hold no image and make no class: 'cat'" in caplog.text


@pytest.mark.parametrize(
    "name", ["x.tar", "x.parquet", "train-images-idx3-ubyte", "train/ant/0.png"]
)
def test_files_of_zero_bytes_are_named(store: Store, name: str) -> None:
    Path(store.uri, name).parent.mkdir(parents=True, exist_ok=True)
    Path(store.uri, name).touch()
    if "idx" in name:
        store.put("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\0")
    if name.endswith("png"):
        (chunk,) = chunks_of(store, config=ONE_CLASS)
        assert chunk.bad == (f"{name}: ValueError: the file is empty",)
    else:
        with pytest.raises(DataError, match=name):
            chunks_of(store)


def test_folders_may_be_named_like_files_and_hidden_files_are_none(store: Store) -> None:
    folder = store.child("folder")
    for i, name in enumerate(("0.png", "ant.jpg")):
        folder.put(f"train/{name}/{i}.png", PNGS[i])
    for name in (".hidden/ant/0.png", "train/.DS_Store", "train/ant.jpg/._1.png", "train/.x/0.png"):
        folder.put(name, b"x")
    source = open_source(folder.uri, CONFIG, split="train")
    assert source.class_names == ("0.png", "ant.jpg")
    assert list(source.files) == ["train/0.png/0.png", "train/ant.jpg/1.png"]
    spark = store.child("spark")
    spark.put("x.parquet/part-0.parquet", parquet_of(PNGS[:2], [0, 1], NAMES))
    spark.put("x.parquet/_SUCCESS", b"x")
    assert len(chunks_of(spark)[0].keys) == 2


def test_pictures_of_every_mode_arrive_from_every_format(store: Store) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    gray = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 3
    black = gray.point(lambda value: 255 - value)
    modes: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("png", gray, {}),
        ("png", Image.fromarray(pixels.astype(np.uint16) << 8), {}),
        ("png", gray.convert("P"), {}),
        ("png", gray.convert("LA"), {}),
        ("jpg", Image.merge("CMYK", [Image.new("L", (8, 8))] * 3 + [black]), {"quality": 100}),
        ("png", gray.transpose(Image.Transpose.ROTATE_180), {"exif": exif}),
    ]
    rows: list[tuple[str, bytes]] = []
    for i, (ending, picture, options) in enumerate(modes):
        sink = io.BytesIO()
        picture.save(sink, "JPEG" if ending == "jpg" else "PNG", **options)
        rows += [(f"{i}.{ending}", sink.getvalue()), (f"{i}.cls", b"0")]
        store.put(f"folder/train/ant/{i}.{ending}", sink.getvalue())
    store.put("tar/x.tar", tar_of(rows))
    store.put("parquet/x.parquet", parquet_of([c for _, c in rows[::2]], [0] * 6, NAMES))
    for place in ("folder", "tar", "parquet"):
        config = ONE_CLASS if place == "folder" else CONFIG
        images = np.concatenate([c.images_NHWC for c in chunks_of(store.child(place), 5, config)])
        assert images.shape == (6, 8, 8, 1)
        assert np.abs(images[..., 0].astype(int) - pixels).max() <= 3, place
