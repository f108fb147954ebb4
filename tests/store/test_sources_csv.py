"""A CSV of paths and labels as a source of images: what it says, and what is wrong with it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.store.written_sources import (
    CONFIG,
    IMAGES_NHWC,
    LABELS_N,
    NAMES,
    PNGS,
    write_imagefolder,
    write_webdataset,
)
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import Source, load_images, open_source
from wmdd_ray.store.sources.listing import NoSuchSplitError

PATHS = [f"images/{i:03d}.png" for i in range(24)]
ROWS = [f"{path},{NAMES[label]}" for path, label in zip(PATHS, LABELS_N, strict=True)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A folder of images without a word about their classes."""
    store = Store(str(tmp_path))
    for path, png in zip(PATHS, PNGS, strict=True):
        store.put(path, png)
    return store


def write(store: Store, *rows: str, header: str = "path,label", name: str = "labels.csv") -> str:
    lines = [header, *rows] if header else [*rows]
    store.put(name, "".join(f"{line}\r\n" for line in lines).encode())
    return store.url(name)


def opened(uri: str, **options: object) -> Source:
    return open_source(uri, CONFIG, split="train", **options)


def labels_by_path(source: Source) -> dict[str, str]:
    records = [r for shard in source.shards(5) for r in source.read_shard(shard) if not r.problem]
    return {r.key.rpartition("#")[0]: source.class_names[r.label] for r in records}


EXPECTED = {path: NAMES[label] for path, label in zip(PATHS, LABELS_N, strict=True)}


def test_rows_become_classes_in_sorted_order_and_pixels_stay_with_their_labels(
    store: Store,
) -> None:
    source = opened(write(store, *reversed(ROWS)))
    assert source.class_names == NAMES
    loaded = load_images(source, CONFIG, 1 << 30)
    assert loaded is not None
    keys, labels_N, images_NHWC, bad = loaded
    assert not bad
    numbers = [int(key[7:10]) for key in keys]
    assert sorted(numbers) == list(range(24))
    np.testing.assert_array_equal(images_NHWC, IMAGES_NHWC[numbers])
    np.testing.assert_array_equal(labels_N, LABELS_N[numbers])


@pytest.mark.parametrize(
    "header",
    ["filename,label", "Image Path,Class", "name,kind", "\ufeffpath,label", "label,path", ""],
)
def test_columns_are_found_by_name_or_by_place(store: Store, header: str) -> None:
    rows = [",".join(reversed(row.split(","))) for row in ROWS] if header == "label,path" else ROWS
    assert labels_by_path(opened(write(store, *rows, header=header))) == EXPECTED


def test_other_columns_semicolons_quotes_and_backslashes_are_understood(store: Store) -> None:
    rows = [f'{i};"{row.split(",")[0]}";{row.split(",")[1]}' for i, row in enumerate(ROWS)]
    rows[3] = rows[3].replace("/", "\\")
    assert labels_by_path(opened(write(store, *rows, header="id;path;label"))) == EXPECTED


def test_a_folder_with_its_table_needs_no_format_and_absolute_paths_may_lie_below(
    store: Store,
) -> None:
    write(store, *(f"{store.uri}/{row}" for row in ROWS), name="train.csv")
    source = open_source(
        store.uri, CONFIG.__class__(**{**_fields(), "format": "csv"}), split="train"
    )
    assert labels_by_path(source) == EXPECTED


def _fields() -> dict[str, object]:
    return {name: getattr(CONFIG, name) for name in CONFIG.__slots__}


def test_folders_of_classes_beside_a_table_of_labels_are_a_question_and_beside_another_none(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    write_imagefolder(store, "")
    write(store, *ROWS)
    with pytest.raises(
        DataError, match="expected one format, found 2: .*name one by --source.format"
    ):
        opened(store.uri)
    store.delete("labels.csv")
    write(store, "1,2", name="noisy_labels.csv", header="a,b")
    assert opened(store.uri).format == "imagefolder"


def test_one_folder_of_images_is_no_class_where_a_table_of_labels_lies_beside_it(
    store: Store,
) -> None:
    write(store, *ROWS)
    assert labels_by_path(opened(store.uri)) == EXPECTED


def test_a_table_beside_tars_changes_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_webdataset(store)
    write(store, "1,2", name="metadata.csv", header="a,b")
    assert opened(store.uri).format == "webdataset"


def test_a_folder_with_nothing_but_its_table_and_loose_images_is_a_table(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for i, png in enumerate(PNGS):
        store.put(f"{i:03d}.png", png)
    write(store, *(row.removeprefix("images/") for row in ROWS))
    assert (opened(store.uri).format, opened(store.uri).num_images) == ("csv", 24)


def test_splits_come_from_a_column_or_from_the_names_of_tables(store: Store) -> None:
    rows = [f"{row},{'valid' if i % 4 == 0 else 'train'}" for i, row in enumerate(ROWS)]
    uri = write(store, *rows, header="path,label,split")
    val = open_source(uri, CONFIG, split="val", class_names=NAMES)
    assert (opened(uri).num_images, val.num_images) == (18, 6)

    store.delete("labels.csv")
    write(store, *ROWS[:20], name="train.csv")
    write(store, *ROWS[20:], name="val.csv")
    write(store, "001", header="path", name="test.csv")  # competitions keep these labels
    config = CONFIG.__class__(**{**_fields(), "format": "csv"})
    sizes = [open_source(store.uri, config, split=s).num_images for s in ("train", "val")]
    assert sizes == [20, 4]
    store.delete("val.csv")
    with pytest.raises(NoSuchSplitError, match="expected held-out images in folders or files"):
        open_source(store.uri, config, split="val")


def test_numbers_are_classes_by_number_and_by_name_where_names_lie_beside(store: Store) -> None:
    uri = write(store, *(f"{p},{y}" for p, y in zip(PATHS, LABELS_N, strict=True)))
    assert opened(uri).class_names == ("0", "1", "2")
    store.put("classes.txt", "\n".join(NAMES).encode())
    assert labels_by_path(opened(uri)) == EXPECTED


def test_the_order_of_classes_beside_the_table_is_kept(store: Store) -> None:
    store.put("classes.txt", b"\xef\xbb\xbfcat\nbee\nant\n")  # as an editor of Windows writes it
    source = opened(write(store, *ROWS))
    assert source.class_names == ("cat", "bee", "ant")
    assert labels_by_path(source) == EXPECTED


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "images/000.png,dog",
            "image images/000.png has label 'dog', expected one of the 3 classes",
        ),
        ("images/000.png,7", r"image images/000.png has label 7, expected 0 to 2 \(3 classes\)"),
    ],
)
def test_a_label_outside_the_map_is_refused(store: Store, row: str, message: str) -> None:
    store.put("classes.txt", "\n".join(NAMES).encode())
    with pytest.raises(DataError, match=message):
        opened(write(store, row, *ROWS[1:]))


def test_a_number_outside_the_map_is_refused(store: Store) -> None:
    store.put("classes.txt", b"ant\nbee\n")
    uri = write(store, *(f"{p},{y}" for p, y in zip(PATHS, LABELS_N, strict=True)))
    with pytest.raises(DataError, match=r"label 2, expected 0 to 1 \(2 classes\)"):
        opened(uri)


def test_rows_that_are_no_image_are_bad_images_by_line_and_reason(store: Store) -> None:
    uri = write(
        store, *ROWS, ",ant", "images/001.png,ant", "images/x.png,ant", "../../etc/passwd,bee",
        "images/000.png,",
    )  # fmt: skip
    source = pickle.loads(pickle.dumps(opened(uri)))  # as it travels to a worker
    shards = opened(uri).shards(100)
    bad = {r.key: r.problem for s in shards for r in source.read_shard(s) if r.problem}
    assert bad == {
        "labels.csv:26": "no path",
        "labels.csv:27": "images/001.png stands at labels.csv:3 already with label 'bee'",
        "labels.csv:28": "no file images/x.png below the folder of the table",
        "labels.csv:29": "no file ../../etc/passwd below the folder of the table",
        "labels.csv:30": "images/000.png stands at labels.csv:2 already with label 'ant'",
    }


def test_rows_of_a_table_without_a_header_are_counted_from_its_first_line(store: Store) -> None:
    source = opened(write(store, "gone/a.png,ant", "", "gone/b.png,bee", *ROWS, header=""))
    bad = [r.key for shard in source.shards(5) for r in source.read_shard(shard) if r.problem]
    assert sorted(bad) == ["labels.csv:1", "labels.csv:3"]


@pytest.mark.parametrize("name", ["target", "Class", "split"])
def test_a_first_row_whose_class_is_called_like_a_column_is_no_header(
    store: Store, name: str
) -> None:
    rows = [row.replace("ant", name) for row in ROWS]
    if name == "split":  # nobody can tell, and it is said
        with pytest.raises(DataError, match="expected a header"):
            opened(write(store, *rows, header=""))
    else:
        assert len(labels_by_path(opened(write(store, *rows, header="")))) == len(ROWS)


def test_a_file_that_stands_there_with_both_slashes_is_one_image(store: Store) -> None:
    source = opened(write(store, *ROWS, "images\\000.png,bee"))
    bad = [r.problem for shard in source.shards(9) for r in source.read_shard(shard) if r.problem]
    assert bad == ["images/000.png stands at labels.csv:2 already with label 'ant'"]
    assert labels_by_path(source) == EXPECTED


def test_a_table_without_a_good_row_says_what_is_wrong_with_the_first(store: Store) -> None:
    with pytest.raises(DataError, match="no good one; the first is labels.csv:2: no file x/0.png"):
        opened(write(store, "x/0.png,ant", "1.png,bee"))


def test_more_bad_rows_than_allowed_stop_at_once(store: Store) -> None:
    rows = [f"gone/{i}.png,ant" for i in range(11)]
    with pytest.raises(
        DataError, match="11 rows cannot be used, .* allows 10; .*labels.csv:26: no file gone/0.png"
    ):
        opened(write(store, *ROWS, *rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,c\n1,2,3\n", "expected a header with a column of paths .* found 'a', 'b', 'c'"),
        (b'path,label\n"x,ant\n', "line 2 is malformed"),
        (
            b"path,label\nimages/000.png,\xff\n",
            "expected a table in UTF-8, found text in another encoding .*; save it as UTF-8",
        ),
        (b"000,ant\n001,bee\n", r"the first line \('000', 'ant'\) may name the columns or be an"),
        (
            b"path,label,split\na.png,ant,train\nb.png,ant,holdout\nc.png,ant,holdout\nd.png,bee,\n",
            r"expected a column split of dev, .*found 'nothing' \(1 rows\), 'holdout' \(2 rows\)",
        ),
        (b"path,label\n", "expected rows with paths and labels, found none"),
        (b"", "expected a header .* found an empty table"),
    ],
)
def test_tables_that_cannot_be_understood_are_refused(
    store: Store, content: bytes, message: str
) -> None:
    store.put("labels.csv", content)
    with pytest.raises(DataError, match=message):
        opened(store.url("labels.csv"))


def test_changed_labels_change_the_fingerprint(store: Store) -> None:
    before = opened(write(store, *ROWS)).fingerprint()
    assert opened(write(store, *ROWS)).fingerprint() == before
    swapped = [ROWS[0].replace("ant", "bee"), ROWS[1].replace("bee", "ant"), *ROWS[2:]]
    assert opened(write(store, *swapped)).fingerprint() != before


def test_keys_that_lead_out_of_the_folder_are_refused(store: Store) -> None:
    source = opened(write(store, *ROWS))
    for key in ("../x#0", "images/000.png", "#1"):
        with pytest.raises(DataError, match="no image"):
            source.read_keys([key])
    assert source.read_keys(["images/002.png#2"])[0].content == PNGS[2]


def test_a_table_in_another_store_is_read_the_same() -> None:
    store = Store("memory://csv-source")
    write_imagefolder(store, "images")
    rows = [f"images/{NAMES[y]}/{i:03d}.png,{NAMES[y]}" for i, y in enumerate(LABELS_N)]
    assert len(labels_by_path(opened(write(store, *rows)))) == 24
