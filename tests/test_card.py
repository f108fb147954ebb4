from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from wmdd_ray.card import dataset_card, results_table, size
from wmdd_ray.pictures import preview
from wmdd_ray.recipes import recipe_of

TABLE: list[dict[str, Any]] = [
    {
        "row": row,
        "labels": labels,
        "num_images": n,
        "epochs": 200,
        "top1_mean": 0.9834,
        "top1_std": 0.002,
        "num_seeds": 3,
    }
    for row, n in (
        ("distilled", 100),
        ("random_real", 100),
        ("nearest_real", 100),
        ("all_real", 1437),
    )
    for labels in ("soft", "hard")
]
META: dict[str, Any] = {
    "class_names": ["cat", "猫: a cat"],
    "ipc": 10,
    "num_images": 20,
    "label_epochs": 200,
    "image_bytes": 31_000,
    "label_bytes": 1_100_000,
    "teacher_bytes": 83_400,
    "teacher_top1": 0.992,
    "source": {"uri": "digits", "num_images": 1437, "stored_bytes": 91_968, "bad_images": 1},
    "provenance": {
        "recipe": "digits",
        "seed": 0,
        "versions": {"torch": "2.15.0"},
        "git_revision": "0123456789ab",
    },
}


def test_a_card_begins_with_what_the_hub_reads_and_ends_with_provenance() -> None:
    card = dataset_card(META, recipe_of("digits", 10), TABLE)
    _, head, body = card.split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["license"] == "other"
    assert found["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert "| (b) random real images | 100 | 200 | 98.3 ± 0.2 | 98.3 ± 0.2 | 3 |" in body
    assert "teacher's top-1: 99.2 %" in body
    assert "revision 0123456789ab" in body
    assert "1437 images, 1 unreadable ones left out" in body


def test_a_card_without_an_evaluation_says_so() -> None:
    assert "Not evaluated yet." in dataset_card(META, recipe_of("digits", 10), None)


def test_a_table_has_a_line_a_row() -> None:
    assert len(results_table(TABLE).splitlines()) == 2 + len(TABLE) // 2


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(999, "999 B"), (1000, "1.0 KB"), (31_900, "31.9 KB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_written_as_people_write_them(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize("channels", [1, 3])
def test_a_preview_shows_every_image_of_every_row(channels: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(2, 3, 8, 8, channels), dtype=np.uint8)
    content = preview([(0, "cat", images[0]), (1, "a very long name of a class", images[1])])
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] < pixels.shape[1]
    assert pixels.std() > 20
    assert content == preview(
        [(0, "cat", images[0]), (1, "a very long name of a class", images[1])]
    )


def test_a_preview_of_names_in_any_script_raises_no_warning() -> None:
    image = np.zeros((1, 8, 8, 1), dtype=np.uint8)
    assert preview([(0, "猫", image), (1, "кошка", image), (2, "قط", image)])
