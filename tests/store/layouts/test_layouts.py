"""Layouts as people have them: the labels and pixels that come out, or the words that are said. The table is in `cases`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.store.layouts.cases import READ, REFUSED
from tests.store.layouts.trees import Case, Truth, pixels_of
from tests.store.written_sources import CONFIG
from wmdd_ray.errors import WmddError
from wmdd_ray.store.sources import Source, decoded_chunks, open_source
from wmdd_ray.store.sources.passed import total


def classes_by_pixels(source: Source) -> tuple[dict[bytes, str], int]:
    """Return pixels -> class of all images that come out, and how many are bad."""
    found: dict[bytes, str] = {}
    num_images = num_bad = 0
    for part in source.shards(100):
        for chunk in decoded_chunks(source, part, source.config, 100):
            num_images += len(chunk.keys)
            num_bad += len(chunk.bad)
            for pixels, label in zip(chunk.images_NHWC, chunk.labels_N, strict=True):
                found[pixels.tobytes()] = source.class_names[label]
    assert len(found) == num_images, "an image came twice"
    return found, num_bad


def opened(case: Case, folder: Path, split: str, names: tuple[str, ...] | None = None) -> Source:
    place = case.at if split == "train" or case.val_at is None else case.val_at
    return open_source(
        str(folder / place),
        replace(CONFIG, **case.options),
        split=split,
        class_names=names,
        dedicated=split == "val" and case.val_at is not None,
    )


def check(
    expected: Truth | str, case: Case, folder: Path, split: str, names: tuple[str, ...] | None
) -> Source | None:
    """Look whether a split comes out as it must, or is refused in the words that it must."""
    if isinstance(expected, str):
        with pytest.raises(WmddError, match=expected):
            classes_by_pixels(opened(case, folder, split, names))
        return None
    source = opened(case, folder, split, names)
    found, bad = classes_by_pixels(source)
    assert found == {pixels_of(path).tobytes(): name for path, name in expected.items()}
    assert bad == (case.bad if split == "train" else 0)
    place = folder / (case.val_at if split == "val" and case.val_at is not None else case.at)
    assert len(source.files) + total(source.passed_over) == sum(
        p.is_file() for p in place.rglob("*")
    )
    return source


def test_classes_keep_their_ids_and_have_their_words_beside_them(tmp_path: Path) -> None:
    for name in ("tiny-imagenet", "kaggle-ilsvrc"):
        case = next(case for case in READ if case.name == name)
        case.write(tmp_path / name)
        source = opened(case, tmp_path / name, "train")
        assert source.titles == tuple(f"word of {wnid}" for wnid in source.class_names)


def test_the_table_has_as_many_layouts_as_it_says() -> None:
    assert len({case.name for case in [*READ, *REFUSED]}) == len(READ) + len(REFUSED) >= 120


@pytest.mark.parametrize("case", [*READ, *REFUSED], ids=lambda case: case.name)
def test_layout(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path)
    train = check(case.train, case, tmp_path, "train", None)
    if case.val is not None:
        assert train is not None
        check(case.val, case, tmp_path, "val", train.class_names)
