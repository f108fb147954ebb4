"""Nothing vanishes: files seen = read + passed over, and what is read = images + bad images + what is passed over inside."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.labels.files import cifar
from tests.store.layouts.trees import Truth, png_of
from tests.store.written_sources import CONFIG, NAMES, idx_of, parquet_of, tar_of
from wmdd_ray.config import Format
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, decoded_chunks, open_source
from wmdd_ray.store.sources.base import told_counts
from wmdd_ray.store.sources.endings import ending_of
from wmdd_ray.store.sources.passed import SYSTEM, PassedOver, Tally, total

ALL_IN = replace(
    CONFIG, layout="train/{class}", max_passed_over=1, max_bad_images=1000, tar_keys="first-dot"
)
MANY = settings(max_examples=40, deadline=None)
GARBAGE = b"no image at all"

# What may lie anywhere beside the images: name -> whether it is a system's.
BESIDE = {
    "notes.txt": False, "LICENSE": False, "x.npy": False, "boxes.xml": False, "x.raw": False, "x.y.z": False,
    ".DS_Store": True, "._0.png": True, "Thumbs.db": True, "@eaDir/0.jpg": True, ".git/a/b": True,
}  # fmt: skip
FOLDERS = ("", "train/", "train/ant/", "val/bee/", "docs/deep/")
beside = st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(sorted(BESIDE))), max_size=12)
# What is an image by its ending is one, good or bad; what has another is one if it begins as one.
NAMED, OTHERS = (".png", ".JPG", ".jfif", ".gif", ".jp2"), ("", ".05", ".dat")
pictures = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMED + OTHERS), st.booleans()), max_size=8
)


def new_store() -> Store:
    return Store(f"memory://{uuid.uuid4().hex}/data")


def put_beside(store: Store, extra: set[tuple[str, str]]) -> dict[str, bool]:
    """Write what lies beside the images; return name -> whether it is a system's."""
    names = {folder + name: BESIDE[name] for folder, name in extra}
    for name in names:
        store.put(name, GARBAGE)
    return names


def counted(source: Source) -> tuple[int, int, tuple[PassedOver, ...]]:
    """Return how many images are good and how many bad, and what was passed over inside."""
    images, bad, inside = 0, 0, Tally()
    for shard in source.shards(100):
        for chunk in decoded_chunks(source, shard, source.config, 3):
            images += len(chunk.keys)
            bad += len(chunk.bad)
            inside.add_all(chunk.passed)
    return images, bad, inside.groups()


def check_files(source: Source, files: list[str], system: int) -> None:
    """Check that every file is read, or is in one group of those that are passed over."""
    read = {*source.files}
    passed = source.passed_over
    assert read <= {*files}
    assert len(read) + total(passed) == len(files)
    left = Counter(
        (ending_of(name), name.partition("/")[0] if "/" in name else "")
        for name in files
        if name not in read
    )
    told: Counter[tuple[str, str]] = Counter()
    for group in passed:
        told[group.ending, group.folder] += group.count
        assert group.example in files and group.example not in read
    assert told == left
    assert total(group for group in passed if group.reason == SYSTEM) == system


@MANY
@given(pictures=pictures, extra=beside)
def test_of_folders(pictures: list[tuple[str, str, bool]], extra: set[tuple[str, str]]) -> None:
    store = new_store()
    names = put_beside(store, extra)
    expected = {True: 1, False: 0}
    store.put("train/cat/first.png", png_of("first"))
    for i, (name, ending, good) in enumerate(pictures):
        path = f"train/{name}/img_{i}{ending}"
        names[path] = False
        store.put(path, png_of(path) if good else GARBAGE)
        if good or ending in NAMED:
            expected[good] += 1
    source = open_source(store.uri, ALL_IN, split="train")
    images, bad, _ = counted(source)
    assert (images, bad) == (expected[True], expected[False])
    check_files(source, [*names, "train/cat/first.png"], sum(names.values()))


@MANY
@given(
    goods=st.lists(st.booleans(), max_size=5),
    junk=st.sets(st.sampled_from(("README", "._0.png", "@eaDir/0.png", "n.txt"))),
    inner=st.booleans(),
    extra=beside,
)
def test_of_tars_of_classes(
    goods: list[bool], junk: set[str], inner: bool, extra: set[tuple[str, str]]
) -> None:
    store = new_store()
    names = put_beside(store, extra)
    others = [(name, GARBAGE) for name in sorted(junk)]
    bees = [(f"bee_{i}.JPEG", png_of(f"{i}") if good else GARBAGE) for i, good in enumerate(goods)]
    tars = [("ant.tar", tar_of([("ant_0.JPEG", png_of("x"))])), ("bee.tar", tar_of(bees + others))]
    files = {"train.tar": tar_of(tars)} if inner else {f"train/{n}": c for n, c in tars}
    for name, content in files.items():
        store.put(name, content)
    config = replace(ALL_IN, layout="", format="webdataset")
    source = open_source(store.uri, config, split="train")
    images, bad, inside = counted(source)
    assert (images, bad, total(inside)) == (1 + sum(goods), goods.count(False), len(junk))
    check_files(source, [*names, *files], sum(names.values()))
    key = next(raw.key for shard in source.shards(9) for raw in source.read_shard(shard))
    assert source.read_keys([key])[0].content == png_of("x")


@MANY
@given(
    rows=st.lists(st.booleans(), min_size=1, max_size=6), unnamed=st.integers(0, 3), extra=beside
)
def test_of_tables(rows: list[bool], unnamed: int, extra: set[tuple[str, str]]) -> None:
    store = new_store()
    names = put_beside(store, extra)
    lines = ["path,label"]
    for i, good in enumerate(rows):
        names[f"train/{i}.png"] = False
        store.put(f"train/{i}.png", png_of(f"{i}") if good or not i else GARBAGE)
        lines.append(f"train/{i}.png,{NAMES[i % 2]}")
    for i in range(unnamed):
        names[f"train/more{i}.png"] = False
        store.put(f"train/more{i}.png", png_of(f"more{i}"))
    names["labels.csv"] = False
    store.put("labels.csv", "\n".join(lines).encode())
    source = open_source(store.uri, replace(ALL_IN, layout="", format="csv"), split="train")
    images, bad, _ = counted(source)
    assert (images, bad) == (sum(rows[1:]) + 1, rows[1:].count(False))
    check_files(source, [*names], sum(names.values()))


# Members of a sample -> what becomes of it by the rule of the first dot, and of the last: images, bad ones, members passed over.
SAMPLES = {
    ("png", "cls"): ((1, 0, 0), (1, 0, 0)),
    ("jfif", "txt", "cls"): ((1, 0, 1), (1, 0, 1)),
    ("png",): ((0, 1, 0), (0, 1, 0)),
    ("cls", "txt"): ((0, 1, 1), (0, 1, 1)),
    ("txt",): ((0, 0, 1), (0, 0, 1)),
    ("05.png", "05.cls"): ((0, 1, 0), (1, 0, 0)),
    ("png", "cls", "thumb.png"): ((1, 0, 1), (1, 1, 0)),
    ("png", "cls", "jpg"): ((0, 1, 0), (0, 1, 0)),
}


@MANY
@given(
    kinds=st.lists(st.sampled_from(sorted(SAMPLES)), max_size=8),
    junk=st.sets(st.sampled_from(("README", "._0.png", "@eaDir/0.png", "./.x.cls"))),
    last=st.booleans(),
    extra=beside,
)
def test_of_archives(
    kinds: list[tuple[str, ...]], junk: set[str], last: bool, extra: set[tuple[str, str]]
) -> None:
    store = new_store()
    names = put_beside(store, extra)
    members = [
        (f"k{i}.{ending}", b"0" if ending.endswith("cls") else png_of(f"{i}"))
        for i, kind in enumerate(kinds)
        for ending in kind
    ]
    store.put("train.tar", tar_of([*members, *((name, GARBAGE) for name in sorted(junk))]))
    store.put("classes.txt", b"ant\n")
    config = replace(
        ALL_IN, layout="", format="webdataset", tar_keys="last-dot" if last else "first-dot"
    )
    source = open_source(store.uri, config, split="train")
    images, bad, inside = counted(source)
    expected = [
        sum(column) for column in zip(*(SAMPLES[kind][last] for kind in kinds), strict=True)
    ] or [0] * 3
    assert [images, bad, total(inside)] == [*expected[:2], expected[2] + len(junk)]
    check_files(source, [*names, "train.tar", "classes.txt"], sum(names.values()))


@MANY
@given(
    rows=st.lists(
        st.sampled_from(("good", "garbage", "no image", "no label")), min_size=1, max_size=8
    ),
    extra=beside,
)
def test_of_parquet(rows: list[str], extra: set[tuple[str, str]]) -> None:
    store = new_store()
    names = put_beside(store, extra)
    contents = {"good": png_of("x"), "garbage": GARBAGE, "no image": None, "no label": png_of("x")}
    labels = [None if row == "no label" else 0 for row in rows]
    store.put("train.parquet", parquet_of([contents[row] for row in rows], labels, NAMES))
    source = open_source(store.uri, replace(ALL_IN, layout="", format="parquet"), split="train")
    images, bad, _ = counted(source)
    assert (images, bad) == (rows.count("good"), len(rows) - rows.count("good"))
    check_files(source, [*names, "train.parquet"], sum(names.values()))


@MANY
@given(
    pictures=pictures,
    junk=st.sets(st.sampled_from(sorted(BESIDE))),
    extra=beside,
    several=st.booleans(),
)
def test_of_folders_in_tars(
    pictures: list[tuple[str, str, bool]],
    junk: set[str],
    extra: set[tuple[str, str]],
    several: bool,
) -> None:
    store = new_store()
    names = put_beside(store, extra)
    members = [("ant/0.png", png_of("x")), ("bee/0.png", png_of("y")), ("0.png", GARBAGE)]
    members += [(f"{folder}{name}", GARBAGE) for folder in ("", "ant/") for name in sorted(junk)]
    expected = {True: 2, False: 0}
    passed = 1 + 2 * len(junk)
    for i, (name, ending, good) in enumerate(pictures):
        path = f"./{name}/img_{i}{ending}"
        members.append((path, png_of(path) if good else GARBAGE))
        # In tars nobody looks into files.
        expected[good] += ending in NAMED
        passed += ending not in NAMED
    parts = (members[::2], members[1::2]) if several else (members,)
    files = {f"train-{k}.tar": tar_of(part) for k, part in enumerate(parts)}
    for name, content in files.items():
        store.put(name, content)
    config = replace(ALL_IN, layout="train/{class}", format="webdataset")
    source = open_source(store.uri, config, split="train")
    images, bad, inside = counted(source)
    assert (images, bad, total(inside)) == (expected[True], expected[False], passed)
    assert len(members) == images + bad + total(inside)
    check_files(source, [*names, *files], sum(names.values()))
    key = next(raw.key for shard in source.shards(9) for raw in source.read_shard(shard))
    assert source.read_keys([key])[0].content == png_of("x")


@MANY
@given(named=st.lists(st.booleans(), min_size=1, max_size=8), packed=st.booleans(), extra=beside)
def test_of_one_folder_with_a_list(
    named: list[bool], packed: bool, extra: set[tuple[str, str]]
) -> None:
    store = new_store()
    names = put_beside(store, {one for one in extra if not one[0].startswith("val/")})
    images = {f"{i}.png": png_of(f"{i}") for i in range(len(named) + 1)}
    said = {
        "0.png": "ant",
        **{f"{i}.png": "bee" for i, is_named in enumerate(named, 1) if is_named},
    }
    store.put("val.txt", "".join(f"{name} {label}\n" for name, label in said.items()).encode())
    files = {"val.tar": tar_of([*images.items()])} if packed else {}
    for name, content in (files or {f"val/{name}": png for name, png in images.items()}).items():
        store.put(name, content)
        names[name] = False
    config = replace(ALL_IN, layout="", format="webdataset" if packed else "imagefolder")
    source = open_source(store.uri, config, split="val", class_names=("ant", "bee"))
    assert counted(source) == (len(said), named.count(False), ())
    check_files(source, [*names, "val.txt"], sum(names.values()))


@MANY
@given(count=st.integers(1, 9), extra=beside)
def test_of_arrays(count: int, extra: set[tuple[str, str]]) -> None:
    store = new_store()
    names = put_beside(store, extra)
    files = {
        "train-images-idx3-ubyte": np.zeros((count, 8, 8)),
        "train-labels-idx1-ubyte": np.arange(count) % 2,
    }
    for name, array in files.items():
        store.put(name, idx_of(array))
    source = open_source(store.uri, replace(ALL_IN, layout="", format="idx"), split="train")
    assert counted(source) == (count, 0, ())
    check_files(source, [*names, *files], sum(names.values()))


@MANY
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=3), extra=beside)
def test_of_cifar(counts: list[int], extra: set[tuple[str, str]]) -> None:
    store = new_store()
    names = put_beside(store, extra)
    files = {f"data_batch_{i}.bin": count for i, count in enumerate(counts, 1)} | {
        "test_batch.bin": 2
    }
    for name, count in files.items():
        store.put(name, cifar([[i % 2] for i in range(count)]))
    config = replace(ALL_IN, layout="", format="cifar")
    source = open_source(store.uri, config, split="train")
    assert counted(source) == (sum(counts), 0, ())
    check_files(source, [*names, *files], sum(names.values()))


def test_of_the_embedded_digits() -> None:
    source = open_source("digits", CONFIG, split="train")
    assert (counted(source), source.passed_over) == ((1437, 0, ()), ())


LAWS = {
    "imagefolder": (test_of_folders, test_of_one_folder_with_a_list),
    "webdataset": (test_of_archives, test_of_tars_of_classes, test_of_folders_in_tars),
    "csv": (test_of_tables,),
    "parquet": (test_of_parquet,),
    "idx": (test_of_arrays,),
    "cifar": (test_of_cifar,),
    "digits": (test_of_the_embedded_digits,),
}


def test_every_format_keeps_the_law() -> None:
    assert LAWS.keys() | {"auto"} == {*get_args(Format)}


def test_an_account_names_every_kind_with_an_example_and_stays_a_line() -> None:
    tally = Tally()
    for i in range(5000):
        tally.add("no image", f"folder\n{i}/x.kind{i}")
    assert total(tally.groups()) == 5000 and len(tally.groups()) <= 1001
    source = open_source("digits", CONFIG, split="train")
    source.passed_over = tally.groups()
    told = told_counts(source, 2, 1, tally.groups()[:1])
    assert told.startswith(
        "5,001 files seen = 1 read + 5,000 passed over [4,000 x others (no image: folder"
    )
    assert (
        "kinds more]; in those that were read: 2 images + 1 bad + 4,000 members passed over ["
        in told
    )
    assert "\n" not in told


@pytest.mark.parametrize(("lost", "share"), [(1, 0.25), (2, 0.4)])
def test_a_share_that_is_passed_over_stops_exactly_above_the_limit(lost: int, share: float) -> None:
    store = new_store()
    truth: Truth = {f"train/{NAMES[i]}/0.png": NAMES[i] for i in range(3)}
    for path in truth:
        store.put(path, png_of(path))
    for i in range(lost):
        store.put(f"train/ant/{i}.raw", GARBAGE)
        store.put(f"train/ant/{i}.txt", GARBAGE)
    assert (
        open_source(store.uri, replace(CONFIG, max_passed_over=share), split="train").num_images
        == 3
    )
    with pytest.raises(
        DataError, match=rf"{lost} files are no images of a class, beside 3 that are read"
    ):
        open_source(store.uri, replace(CONFIG, max_passed_over=share - 0.01), split="train")
