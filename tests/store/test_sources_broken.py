"""Bad images are counted, named and skipped; damaged files are refused; nothing crashes or reaches the disk."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

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
)
from wmdd_ray.errors import DataError
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


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def chunks_of(store: Store, chunk_images: int = 5) -> list[DecodedChunk]:
    source = open_source(store.uri, CONFIG, split="train")
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
    small = replace(CONFIG, max_image_pixels=64)
    big = PNGS[0] + bytes(64 * 8)
    store.put("folder/train/ant/0.png", big)
    store.put("tar/x.tar", tar_of([("0.png", big), ("0.cls", b"0")]))
    store.put("parquet/x.parquet", parquet_of([big], [0], NAMES))
    for place in ("folder", "tar", "parquet"):
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
    (chunk,) = chunks_of(store)
    assert chunk.bad[0].startswith("train/ant/1.GIF: expected a JPEG, PNG or WebP")


def test_samples_without_image_or_label_are_bad_and_keep_their_place(store: Store) -> None:
    members = [
        ("0.png", PNGS[0]), ("0.cls", b"0"),
        ("1.png", PNGS[1]),
        ("2.cls", b"2"),
        ("3.png", PNGS[3]), ("3.cls", b"three"),
        ("4.png", PNGS[4]), ("4.json", b'{"label": "ant"}'),
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
    assert "no image member (jpg, jpeg, png, webp), only cls" in first.bad[1]
    assert_array_equal(second.labels_N, [1])
    assert len(second.bad) == 2 and "the file is empty" in second.bad[1] and second.last


def test_parquet_rows_without_bytes_or_label_are_bad(store: Store) -> None:
    store.put("x.parquet", parquet_of([PNGS[0], None, PNGS[2]], [0, 1, None], NAMES))
    (chunk,) = chunks_of(store)
    assert_array_equal(chunk.labels_N, [0])
    assert chunk.bad[0].startswith("x.parquet#1: no image") and "no label" in chunk.bad[1]


@pytest.mark.parametrize("label", [-1, 3])
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
    before = sorted(tmp_path.parent.rglob("*"))
    (first, second) = tar_with(store, members)
    assert_array_equal(first.images_NHWC, IMAGES_NHWC[:2])
    assert len(first.bad) + len(second.bad) == 5
    assert all("no image member" in reason for reason in (*first.bad, *second.bad))
    created = {path.name for path in set(tmp_path.parent.rglob("*")) - set(before)}
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


def mutations(contents: list[bytes], count: int) -> Iterator[bytes]:
    """Yield `count` damaged copies: bytes set, put in or taken out, the end cut off."""
    rng = random.Random(0)
    for _ in range(count):
        content = bytearray(rng.choice(contents))
        for _ in range(rng.choice((1, 1, 2, 5))):
            position = rng.randrange(len(content))
            if rng.random() < 0.4:  # footers and end markers
                position = max(0, len(content) - 1 - rng.randrange(900))
            kind = rng.randrange(6)
            if kind < 3:
                content[position] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            elif kind == 3:
                content[position:position] = rng.randbytes(rng.randrange(1, 9))
            elif kind == 4:
                del content[position : position + rng.randrange(1, 600)]
            else:
                del content[position + 1 :]
            content = content or bytearray(b"x")
        yield bytes(content)


@pytest.mark.parametrize("format", ["webdataset", "parquet", "idx", "imagefolder"])
def test_mutated_files_give_images_or_data_errors_and_nothing_else(format: str) -> None:
    rows = [
        (f"{'deep/' * 30}{i}.{e}", c)
        for i in range(6)
        for e, c in (("png", PNGS[i]), ("cls", b"%d" % (i % 3)))
    ]
    name, contents = {
        "webdataset": ("x.tar", [tar_of(rows), tar_of(rows, tarfile.GNU_FORMAT)]),
        "parquet": ("x.parquet", [parquet_of(PNGS[:6], [0, 1, 2] * 2, NAMES), parquet_of(PNGS[:6], [0, 1, 2] * 2)]),
        "idx": ("train-images-idx3-ubyte.gz", [gzip.compress(idx_of(IMAGES_NHWC[:, :, :, 0]))]),
        "imagefolder": ("train/ant/0.png", [PNGS[0]]),
    }[format]  # fmt: skip
    store = Store(f"memory://{uuid.uuid4().hex}")
    if format == "idx":
        store.put("train-labels-idx1-ubyte", idx_of(LABELS_N))
    outcomes = Counter[str]()
    for content in mutations(contents, 400):
        store.put(name, content)
        try:
            source = open_source(store.uri, CONFIG, split="train")
            keys, _, images_NHWC, bad = load_images(source, CONFIG, 1 << 20) or pytest.fail("large")
            assert len(keys) == len(images_NHWC)
            assert [raw.key for raw in source.read_keys(keys)] == list(keys)
            outcomes["bad image" if bad else "images"] += 1
        except DataError as error:
            outcomes[type(error).__name__] += 1
    assert set(outcomes) <= {"DataError", "images", "bad image"} and len(outcomes) >= 2, outcomes
