"""How the classes of a set that somebody else distilled meet the held-out images' classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.evaluate import foreign_set
from tests.store.labels.files import Files, cls, declared, folders, table
from tests.store.written_sources import CONFIG, PNGS
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources.classes import by_number

TWELVE = [str(i) for i in range(12)]
WORDS = [f"{letter}-word" for letter in "abcdefghijkl"]


def classes_of(place: Path, files: Files, names: Sequence[str], by: str = "order") -> list[str]:
    """Return the held-out class that each image of a set is taken for."""
    store = Store(str(place))
    for key, content in files.items():
        store.put(key, content)
    asked: Any = SimpleNamespace(
        job=SimpleNamespace(classes=by, uri=store.uri),
        config=SimpleNamespace(source=CONFIG),
        place=store.uri,
    )
    source: Any = foreign_set(asked, tuple(names))
    found = {
        PNGS.index(raw.content): source.class_names[raw.label]
        for shard in source.shards(100)
        for raw in source.read_shard(shard)
    }
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["0", "1", "10", "11", *TWELVE[2:10]], TWELVE),
        (["0_cat", "10_x", *(f"{i}_y" for i in range(1, 10))], ["0_cat", *(f"{i}_y" for i in range(1, 10)), "10_x"]),
        (["new1", "new2", "new3"], ["new1", "new2", "new3"]),
        (["class10", *(f"class{i}" for i in range(1, 10))], [f"class{i}" for i in range(1, 11)]),
        (["ant7", "cat2", "dog10"], ["ant7", "cat2", "dog10"]),
        (["n01440764", "n01443537"], ["n01440764", "n01443537"]),
        (["1", "2_b", "2_a"], ["1", "2_b", "2_a"]),
    ],
)  # fmt: skip
def test_names_are_ordered_by_their_numbers_where_these_count_them(
    found: list[str], expected: list[str]
) -> None:
    assert list(by_number(found)) == expected


@pytest.mark.parametrize("pattern", ["{}", "{}_x", "new{}", "{:03d}"])
def test_by_order_folder_k_is_class_k_padded_or_not(tmp_path: Path, pattern: str) -> None:
    files = folders([pattern.format(i) for i in range(12)])
    assert classes_of(tmp_path, files, WORDS) == WORDS
    assert classes_of(tmp_path, {}, TWELVE) == TWELVE


def test_by_order_folders_of_the_held_out_images_own_names_are_these(tmp_path: Path) -> None:
    assert classes_of(tmp_path, folders(TWELVE), sorted(TWELVE)) == TWELVE


def test_by_order_names_that_look_the_same_are_the_same_however_accents_are_composed(
    tmp_path: Path,
) -> None:
    names = ["apple", "zebra", "\xe9clair"]
    composed = folders([unicodedata.normalize("NFD", name) for name in names])
    assert classes_of(tmp_path, composed, names) == names


def test_by_order_numbered_classes_in_the_order_of_text_are_refused(tmp_path: Path) -> None:
    files = folders([f"new{i:03d}" for i in range(12)])
    with pytest.raises(DataError, match="class 2 could be '2' or '10'; pad their names with zeros"):
        classes_of(tmp_path, files, sorted(TWELVE))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["10", "8", "9"], "class 0 could be '8' or '10'; pad"),
        (["cat2", "dog1"], "class 0 could be 'dog1' or 'cat2'; pad"),
        (["ant7", "bee2", "cow9"], "class 0 could be 'bee2' or 'ant7'; pad"),
    ],
)
def test_by_order_numbers_with_gaps_or_of_two_classes_are_refused_on_either_side(
    tmp_path: Path, names: list[str], message: str
) -> None:
    words = WORDS[: len(names)]
    with pytest.raises(DataError, match=f"the held-out images' .*{message}"):
        classes_of(tmp_path / "a", folders(words), names)
    torch.save([torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)], tmp_path / "x.pt")
    with pytest.raises(DataError, match=f"the held-out images' .*{message}"):
        classes_of(tmp_path / "x.pt", {}, names)
    if by_number(names) == tuple(names):  # else they count the classes, and are taken in this order
        with pytest.raises(DataError, match=f"/b's .*{message}"):
            classes_of(tmp_path / "b", folders(names), words)


def test_by_order_numbers_that_tell_no_classes_apart_are_no_doubt(tmp_path: Path) -> None:
    years = ["coupe 2012", "sedan 2007", "van 2012"]
    assert classes_of(tmp_path, folders(WORDS[:3]), years) == years


def test_by_order_labels_of_files_stay_what_they_are(tmp_path: Path) -> None:
    names = ["x", "y"]
    assert classes_of(tmp_path / "a", cls([1, 0]), names) == ["y", "x"]
    assert classes_of(tmp_path / "b", table({"label": [1, 0]}, declared(["n", "m"])), names) == [
        "y",
        "x",
    ]
    assert classes_of(tmp_path / "c", table({"label": ["b", "a"]}), names) == ["y", "x"]


def test_by_name_numbers_without_names_are_no_guess(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a number, and nothing says which"):
        classes_of(tmp_path / "a", cls([1, 0]), ["x", "y"], by="names")
    assert classes_of(tmp_path / "b", cls([1, 0]), ["0", "1"], by="names") == ["1", "0"]
