# ruff: noqa: E501  (a line a case)
"""What labels become, a line a case: the class of every image, or the words that must be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.store.labels.files import (
    Files,
    classes,
    cls,
    csv,
    declared,
    folders,
    idx,
    jsons,
    outcome,
    parquet,
    shard,
    table,
)
from tests.store.written_sources import CONFIG, PNGS, tar_of
from wmdd_ray.errors import DataError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import open_source

TYPED: dict[str, Callable[[Sequence[Any]], Files]] = {"parquet": parquet, "json": jsons}
TEXT: dict[str, Callable[[Sequence[Any]], Files]] = {"cls": cls, "csv": csv}
ALL = TYPED | TEXT
NUMBERS = ALL | {"idx": idx}
WORDS = ("ant", "bee", "cat")
# In the order of text, as folders come.
FOLDERS_12 = ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
E_ACUTE, E_ACUTE_IN_TWO, CYRILLIC_A = "caf\u00e9", "cafe\u0301", "\u0430nt"

Formats = Mapping[str, Callable[[Sequence[Any]], Files]]

# Labels of images 0, 1, ...; formats; options; class names and the class of each image.
RULE: dict[str, tuple[Sequence[Any], Formats, dict[str, Any], Sequence[str], Sequence[Any]]] = {
    "from 0": ([0, 1, 2, 0], NUMBERS, {}, ["0", "1", "2"], ["0", "1", "2", "0"]),
    "from 1": ([1, 2, 3], NUMBERS, {}, ["1", "2", "3"], ["1", "2", "3"]),
    "gaps": ([0, 7, 2], NUMBERS, {}, ["0", "2", "7"], ["0", "7", "2"]),
    "beyond nine": ([10, 2, 1, 9], NUMBERS, {}, ["1", "2", "9", "10"], ["10", "2", "1", "9"]),
    "gaps as places": ([0, 3], NUMBERS, {"numbers": "index"}, ["0", "1", "2", "3"], ["0", "3"]),
    "from 1 as places": ([1, 2], NUMBERS, {"numbers": "index-from-1"}, ["0", "1"], ["0", "1"]),
    "as names": ([10, 2], NUMBERS, {"numbers": "name"}, ["2", "10"], ["10", "2"]),
    "unlabeled": ([0, -1, 1], ALL, {}, ["0", "1"], ["0", None, "1"]),
    "words": (["cat", "ant", "bee"], ALL, {}, WORDS, ["cat", "ant", "bee"]),
    "composed": ([E_ACUTE, "x", E_ACUTE_IN_TWO], ALL, {}, [E_ACUTE_IN_TWO, "x"], [E_ACUTE_IN_TWO, "x", E_ACUTE_IN_TWO]),
    "spaces around": ([" ant", "ant "], TEXT, {}, ["ant"], ["ant", "ant"]),
    "whole floats": ([0.0, 2.0, 1.0], ALL, {}, ["0", "1", "2"], ["0", "2", "1"]),
    "truth": ([True, False], TYPED, {}, ["False", "True"], ["True", "False"]),
    "digits in quotes": (["10", "9"], TYPED, {}, ["9", "10"], ["10", "9"]),
    "digits in quotes as places": (["1", "0"], TYPED, {"numbers": "index"}, ["0", "1"], ["1", "0"]),
    "nothing": (["ant", None], TYPED, {}, ["ant"], ["ant"]),
    "padded": (["100", "007", "010", "0"], TEXT, {}, ["0", "007", "010", "100"], ["100", "007", "010", "0"]),
    "padded twins as places": (["00", "01", "1"], TEXT, {"numbers": "index"}, ["0", "1"], ["0", "1", "1"]),
    "padded twins as names": (["01", "1"], TEXT, {"numbers": "name"}, ["1", "01"], ["01", "1"]),
    "names with joiners and wide spaces": (["\u0645\u06cc\u200c\u0631", "a\u3000b", "a\u00a0b", "\U0001f469\u200d\U0001f4bb"], ALL, {}, ["a\u00a0b", "a\u3000b", "\u0645\u06cc\u200c\u0631", "\U0001f469\u200d\U0001f4bb"], ["\u0645\u06cc\u200c\u0631", "a\u3000b", "a\u00a0b", "\U0001f469\u200d\U0001f4bb"]),
    "words and numbers as names": (["ant", 1], TEXT, {"numbers": "name"}, ["1", "ant"], ["ant", "1"]),
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.mark.parametrize(
    ("case", "format"), [(case, format) for case in RULE for format in RULE[case][1]]
)
def test_one_rule_for_all_formats(store: Store, case: str, format: str) -> None:
    labels, formats, options, names, expected = RULE[case]
    found_names, found = outcome(store, formats[format](labels), **options)
    assert list(found_names) == list(names)
    assert found == list(expected)


# Labels of held-out images; formats; training classes; options; the class of each image, or words.
HELD_OUT: dict[str, tuple[Sequence[Any], Formats, Sequence[str], dict[str, Any], Any]] = {
    "numbers by value": ([2, 10, 11], NUMBERS, FOLDERS_12, {}, ["2", "10", "11"]),
    "numbers by value, padded": ([2, 10], NUMBERS, ("02", "10"), {}, ["02", "10"]),
    "padded numbers by value": (["02", "010"], TEXT, ("2", "10"), {}, ["2", "10"]),
    "padded numbers by name": (["02", "10"], TEXT, ("02", "10"), {}, ["02", "10"]),
    "numbers from 1 by value": ([3, 1], NUMBERS, ("1", "2", "3"), {}, ["3", "1"]),
    "numbers of words": ([0, 1], NUMBERS, WORDS, {}, r"label [01], a number, and nothing says which .*--source\.numbers index"),
    "numbers of words as places": ([0, 2], NUMBERS, WORDS, {"numbers": "index"}, ["ant", "cat"]),
    "numbers of words from 1": ([1, 3], NUMBERS, WORDS, {"numbers": "index-from-1"}, ["ant", "cat"]),
    "a number beyond": ([12], NUMBERS, FOLDERS_12, {}, r"has label 12, expected one of the 12 classes '0', '1', '10'"),
    "a place beyond": ([3], NUMBERS, WORDS, {"numbers": "index"}, r"has label 3, expected 0 to 2 \(3 classes\).*index-from-1"),
    "a place beyond, from 1": ([4], NUMBERS, WORDS, {"numbers": "index-from-1"}, r"has label 4, expected 1 to 3 \(3 classes\); correct the labels or the class names$"),
    "words": (["cat", "ant"], ALL, WORDS, {}, ["cat", "ant"]),
    "composed": ([E_ACUTE_IN_TWO], ALL, (E_ACUTE, "tea"), {}, [E_ACUTE]),
    "decomposed": ([E_ACUTE], ALL, (E_ACUTE_IN_TWO, "tea"), {}, [E_ACUTE_IN_TWO]),
    "another word": (["dog"], ALL, WORDS, {}, r"has label 'dog', expected one of the 3 classes 'ant', 'bee', 'cat'; correct"),
    "a word that looks the same": ([CYRILLIC_A], ALL, WORDS, {}, r"has label '.nt' \(\\u0430nt\), expected .* 'ant', 'bee'"),
    "digits as a name": (["2"], TYPED, FOLDERS_12, {}, ["2"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "format"), [(case, format) for case in HELD_OUT for format in HELD_OUT[case][1]]
)
def test_held_out_labels_meet_the_training_classes_by_one_rule(
    store: Store, case: str, format: str
) -> None:
    labels, formats, names, options, expected = HELD_OUT[case]
    files = idx(labels, "t10k") if format == "idx" else formats[format](labels)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            outcome(store, files, classes_are=names, **options)
    else:
        assert outcome(store, files, classes_are=names, **options)[1] == expected


def both(first: Sequence[str], second: Sequence[str] | None) -> Files:
    """Return two files of two images, labels 0 and 1 in each, with their own names."""
    return shard(0, [0, 1], first, "a.parquet") | shard(2, [0, 1], second, "b.parquet")


def _two_folders(second: str) -> Files:
    """Return two shards in folders of their own, image 0 and image 1 of label 1, with class names beside each."""
    members = [[(f"{i}.cls", b"1"), (f"{i}.png", PNGS[i])] for i in range(2)]
    files = {f"{i}/x.tar": tar_of(members[i]) for i in range(2)}
    return files | {"0/classes.txt": b"ant\nbee\n", "1/classes.txt": second.encode()}


IMAGES = pa.array(PNGS[:2])
OTHER_IMAGES = pa.array(PNGS[2:4])
TWO = {"fine_label": {"_type": "ClassLabel", "names": ["f", "g"]}, "coarse_label": {"_type": "ClassLabel", "names": ["c"]}}  # fmt: skip
NAMED_JSON = {"classes.json": b'["10", "2"]'}

# Files; options; the class of each image, or words.
CASES: dict[str, tuple[Files, dict[str, Any], Any]] = {
    # Which column is the label.
    "text beside an index of rows": (table({"label": ["cat", "ant"], "__index_level_0__": [0, 1]}), {}, ["cat", "ant"]),
    "text beside a width": (table({"width": [8, 9], "label": ["cat", "ant"]}), {}, ["cat", "ant"]),
    "an integer of another name": (table({"width": [8, 9]}), {}, r"expected a label column .* found image: binary, width: int64"),
    "an integer that is named": (table({"kind": [1, 0]}), {"label_column": "kind"}, ["1", "0"]),
    "a column that is not there": (table({"label": [1, 0]}), {"label_column": "kind"}, r"expected a label column .*found image"),
    "several labels a row": (table({"label": [[1], [0]], "id": [0, 1]}), {}, r"expected a label column \(numbers or text, one"),
    "declared under another name": (table({"kind": [1, 0]}, declared(["a", "b"], "kind")), {}, ["b", "a"]),
    "declared beside the usual name": (table({"kind": [1, 0], "label": [5, 5]}, declared(["a", "b"], "kind")), {}, r"found 2: 'kind', 'label'; name one by --source\.label-column"),
    "declared for a column that is not there": (table({"label": [1, 0]}, declared(["a", "b"], "gone")), {}, ["1", "0"]),
    "fine and coarse": (table({"fine_label": [1, 0], "coarse_label": [0, 0]}, TWO), {}, r"found 2: 'fine_label', 'coarse_label'; name one by --source\.label-column"),
    "fine": (table({"fine_label": [1, 0], "coarse_label": [0, 0]}, TWO), {"label_column": "fine_label"}, ["g", "f"]),
    "coarse": (table({"fine_label": [1, 0], "coarse_label": [0, 0]}, TWO), {"label_column": "coarse_label"}, ["c", "c"]),
    "img and label": (table({"image": None, "img": IMAGES, "label": [1, 0]}, {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}), {}, ["dog", "cat"]),
    "categories": (table({"label": pa.array(["cat", "ant"]).dictionary_encode()}), {}, ["cat", "ant"]),
    "categories of numbers": (table({"label": pa.array([4, 3]).dictionary_encode()}), {}, ["4", "3"]),
    "bytes": (table({"label": [b"cat", b"ant"]}), {"image_column": "image"}, ["cat", "ant"]),
    "large text": (table({"label": pa.array(["cat", "ant"], pa.large_string())}), {}, ["cat", "ant"]),
    "halves": (table({"label": [0.5, 1.0, 0.0]}), {}, [None, "1", "0"]),
    "no label at all": (table({"label": pa.array([None, None], pa.int64())}), {}, r"found no label; pass --source\.label-column"),
    "numbers below 0": (table({"label": [-5, 0]}), {}, r"expected labels from 0, found -5 \(x\.parquet\)"),
    "more values than classes can be": (table({"image": pa.array([PNGS[0]] * 65_600), "label": list(range(65_600))}), {}, r"at most 65536 classes in label, found more"),
    # Which column is the image.
    "a thumbnail called image": (table({"image": OTHER_IMAGES, "photo": IMAGES, "label": [1, 0]}, {"photo": {"_type": "Image"}}), {}, ["1", "0"]),
    "two declared images": (table({"photo": IMAGES, "label": [1, 0]}, {"photo": {"_type": "Image"}, "image": {"_type": "Image"}}), {}, r"expected one image column, found 2: 'photo', 'image'"),
    "the image that is named": (table({"image": OTHER_IMAGES, "photo": IMAGES, "label": [1, 0]}), {"image_column": "photo"}, ["1", "0"]),
    "the usual image beside others": (table({"mask": OTHER_IMAGES, "label": [1, 0]}), {}, ["1", "0"]),
    "two unusual images": (table({"image": None, "mask": OTHER_IMAGES, "photo": IMAGES, "label": [1, 0]}), {}, r"expected an image column"),
    "two images of a key": ({"x.tar": tar_of([("0.cls", b"0"), ("0.jpg", PNGS[1]), ("0.png", PNGS[0])])}, {}, []),
    "two images of a key, one named": ({"x.tar": tar_of([("0.cls", b"0"), ("0.jpg", PNGS[1]), ("0.png", PNGS[0])])}, {"image_column": "png"}, ["0"]),
    # Class names of several files.
    "names in another order": (both(["ant", "bee"], ["bee", "ant"]), {}, ["ant", "bee", "bee", "ant"]),
    "names of which some are new": (both(["ant", "bee"], ["cat", "ant"]), {}, ["ant", "bee", "cat", "ant"]),
    "names composed otherwise": (both([E_ACUTE, "x"], [E_ACUTE_IN_TWO, "x"]), {}, [E_ACUTE, "x", E_ACUTE, "x"]),
    "a file without names": (both(["ant", "bee"], None), {}, r"image b\.parquet#0 has label 0, a number, and nothing says which"),
    "a file without names, by place": (both(["ant", "bee"], None), {"numbers": "index"}, ["ant", "bee", "ant", "bee"]),
    "text in a file without names": (shard(0, [1], ["ant", "bee"], "a.parquet") | shard(1, ["ant"], None, "b.parquet"), {}, ["bee", "ant"]),
    "names that are numbers": (table({"label": [1, 0]}, declared(["10", "2"])), {}, ["2", "10"]),
    "a number beyond the names": (table({"label": [2, 0]}, declared(["ant", "bee"])), {}, r"has label 2, expected 0 to 1 \(2 classes\)"),
    "unlabeled among names": (table({"label": [1, -1, 0]}, declared(["ant", "bee"])), {}, ["bee", None, "ant"]),
    # Names beside the files.
    "names beside numbers": (classes(cls([1, 0]), "ant\nbee\n"), {}, ["bee", "ant"]),
    "names beside words": (classes(cls(["bee", "ant"]), "cat\nbee\nant\n"), {}, ["bee", "ant"]),
    "names beside JSON": (classes(jsons([1, "ant"]), '{"0": "ant", "1": "bee"}', "classes.json"), {}, ["bee", "ant"]),
    "names beside numbers from 1": (classes(cls([1, 2]), "ant\nbee\n"), {"numbers": "index-from-1"}, ["ant", "bee"]),
    "numbers beyond the names": (classes(cls([1, 2]), "ant\nbee\n"), {}, r"has label 2, expected 0 to 1 .*--source\.numbers index-from-1 if they count from 1"),
    "numbers whose names are numbers": (cls([0, 1]) | NAMED_JSON, {}, r"a number could be a name or a place .*--source\.numbers name or"),
    "numbers whose names are numbers, as places": (cls([0, 1]) | NAMED_JSON, {"numbers": "index"}, ["10", "2"]),
    "numbers whose names are numbers, as names": (cls([2, 10]) | NAMED_JSON, {"numbers": "name"}, ["2", "10"]),
    "names that are their own places": (classes(cls([1, 0]), "0\n1\n"), {}, ["1", "0"]),
    "names beside a table": (classes(csv(["bee", "ant"]), "bee\nant\n"), {}, ["bee", "ant"]),
    "words that are not beside": (classes(cls(["dog"]), "ant\nbee\n"), {}, r"has label 'dog', expected one of the 2 classes"),
    "padded numbers of names beside": (classes(csv(["01", "00"]), "ant\nbee\n"), {}, ["bee", "ant"]),
    "padded twins": (csv(["01", "1"]), {}, r"leading zeros, found 01 \(00\.png\) and 1 \(01\.png\); pass --source\.numbers name if"),
    "padded twins that are both padded": (cls(["01", "001"]), {}, r"leading zeros, found 001 \(.*\) and 01 "),
    "padded numbers and words": (csv(["ant", "01"]), {}, r"found both, such as 01 \(01.png\) and 'ant' \(00.png\); pass --source\.numbers"),
    "numbers below 1": (csv([0, 1]), {"numbers": "index-from-1"}, r"expected labels from 1, found 0 \(00.png\); correct"),
    "names beside that are numbered otherwise": (classes(cls([0, 1]), "1 dog\n0 cat\n"), {}, r"classes.txt: expected the name of number 0 in line 1, found '1 dog', which may be that of 1; sort"),
    "names beside that are numbered from 1": (classes(csv([0, 1]), "1 dog\n2 cat\n"), {}, r"number 0 in line 1, found '1 dog'"),
    "names beside that are numbered from 1 as labels are": (classes(csv([1, 2]), "1 dog\n2 cat\n"), {"numbers": "index-from-1"}, ["1 dog", "2 cat"]),
    "names beside that are numbered as labels are": (classes(cls([1, 0]), "0 cat\n1 dog\n"), {}, ["1 dog", "0 cat"]),
    "names beside that begin with numbers, as a list": (classes(cls([1, 0]), '["3 series", "1 series"]', "classes.json"), {}, ["1 series", "3 series"]),
    "names of two folders that are alike": (_two_folders("ant\nbee\n"), {}, ["bee", "bee"]),
    "names of two folders that differ": (_two_folders("bee\nant\n"), {}, r"same class names beside all files, found others in 1/classes.txt \('bee', 'ant'\) and in 0/classes.txt"),
    # What holds no label.
    "words and numbers": (csv(["ant", 1]), {}, r"found both, such as 1 \(01.png\) and 'ant' \(00.png\); pass --source\.numbers name"),
    "a label of several lines": (cls([0, "a\nb"]), {}, ["0"]),
    "another key of JSON": (jsons([1, 0], "fine_label"), {"label_column": "fine_label"}, ["1", "0"]),
    "JSON without the key": (jsons([1, 0], "fine_label"), {}, r"found no label; pass --source\.label-column"),
    "an object in JSON": (jsons([{"id": 3}, 0]), {}, [None, "0"]),
    "both .cls and .json": ({"x.tar": tar_of([("0.cls", b"1"), ("0.json", b'{"label": 2}'), ("0.png", PNGS[0])])}, {}, ["1"]),
    "another column of a table": (csv([1, 0], "path,kind"), {"label_column": "Kind", "image_column": "path"}, ["1", "0"]),
    "a column that a table has not": (csv([1, 0], "path,kind"), {"label_column": "class"}, r"name them by --source\.image-column"),
    # IDX.
    "letters from 1": (idx([1, 26, 5]), {}, ["1", "26", "5"]),
    "fashion": (idx(list(range(10)), folder="fashion/"), {}, ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]),
    # Folders.
    "folders that look the same": (folders([E_ACUTE, E_ACUTE_IN_TWO]), {}, r"look the same: 'cafe\\u0301' and 'caf\\xe9'"),
    # Names that nobody can tell apart, or that cannot stand on a line.
    "two declared names that are one": (table({"label": [0]}, declared(["ant", "ant"])), {}, r"look the same: 'ant' and 'ant'; rename or join"),
    "two names beside that are one": (classes(cls([0]), "ant \nant\n"), {}, r"look the same: 'ant' and 'ant'"),
    "an empty name": (table({"label": [0]}, declared(["ant", " "])), {}, r"class names of one line each, found ' '; rename"),
    "half a character as a name": (table({"label": [0]}, declared(["ant", "b\ud800"])), {}, r"one line each, found 'b\\ud800'"),
    "a name with a control character": (table({"label": [0]}, declared(["ant", "b\x00"])), {}, r"one line each, found 'b\\x00'"),
    "a name with a line's end": (folders(["ant", "b\u2028c"]), {}, r"one line each, found 'b\\u2028c'"),
    "names of many scripts": (table({"label": [0, 3]}, declared(["T-shirt/top", "пчела", "猫 🐈", "a.b:c"])), {}, ["T-shirt/top", "a.b:c"]),
    "folders by number are their own names": (folders(["0", "10", "2"]), {}, ["0", "10", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_labels_are_read_rightly_or_refused_with_the_word_that_helps(
    store: Store, case: str
) -> None:
    files, options, expected = CASES[case]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            outcome(store, files, **options)
    else:
        assert outcome(store, files, **options)[1] == expected


@pytest.mark.parametrize("format", ["parquet", *TEXT])
def test_a_text_that_cannot_be_a_label_is_told_as_such(store: Store, format: str) -> None:
    files = ALL[format](["ant", "b\x01c", "", "a" * 1001])
    for key, content in files.items():
        store.put(key, content)
    source = open_source(store.uri, CONFIG, split="train")
    problems = sorted(
        r.problem for s in source.shards(9) for r in source.read_shard(s) if r.problem
    )
    assert len(problems) == 3
    assert problems[0].startswith(r"its label 'aaa")
    assert "\\x01c' is no name of one line of at most 1000" in problems[1]
    assert problems[2].startswith("no label")


HELD_OUT_CASES: dict[str, tuple[Files, Sequence[str], dict[str, Any], Any]] = {
    "names in another order": (table({"label": [1, 0]}, declared(["cat", "ant"])), ("ant", "cat"), {}, ["ant", "cat"]),
    "two files in two orders": (both(["ant", "bee"], ["bee", "ant"]), ("bee", "ant"), {}, ["ant", "bee", "bee", "ant"]),
    "names composed otherwise": (table({"label": [0]}, declared([E_ACUTE_IN_TWO])), (E_ACUTE,), {}, [E_ACUTE]),
    "names that look the same": (table({"label": [0]}, declared([CYRILLIC_A])), ("ant",), {}, r"found 1 others: '.nt' \(\\u0430nt\); absent: 'ant'"),
    "folders composed otherwise": (folders([E_ACUTE_IN_TWO, "tea"]), ("tea", E_ACUTE), {}, [E_ACUTE, "tea"]),
    "names beside the files": (classes(cls([1, 0]), "bee\nant\n"), ("ant", "bee"), {}, ["ant", "bee"]),
    "fashion beside fashion": (idx([9, 0], "t10k", "fashion/"), ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"), {}, ["Ankle boot", "T-shirt/top"]),
    "fashion under other words": (idx([9, 0], "t10k", "fashion/"), WORDS, {}, r"label 0, a number, and nothing says which"),
}  # fmt: skip


@pytest.mark.parametrize("case", HELD_OUT_CASES)
def test_held_out_files_are_matched_by_the_names_they_bring(store: Store, case: str) -> None:
    files, names, options, expected = HELD_OUT_CASES[case]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            outcome(store, files, classes_are=names, **options)
    else:
        assert outcome(store, files, classes_are=names, **options)[1] == expected
