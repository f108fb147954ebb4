from __future__ import annotations

import html
import io
import json
import re
from dataclasses import asdict, replace
from typing import Any

import markdown
import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from PIL import Image

from wmdd_ray import __version__
from wmdd_ray.config import BucketAccess
from wmdd_ray.product.card import dataset_card, export_card
from wmdd_ray.product.tables import behind_real, classes_text, results_table, size
from wmdd_ray.recipes import recipe_of
from wmdd_ray.units.pictures import preview

# Soft labels lose the second class, hard labels lose a little of it.
RECALL = {
    ("distilled", "soft"): [0.95, 0.30],
    ("distilled", "hard"): [0.90, 0.85],
    ("random_real", "soft"): [0.9, 0.9],
    ("random_real", "hard"): [0.8, 0.8],
    ("nearest_real", "soft"): [0.9, 0.9],
    ("nearest_real", "hard"): [0.8, 0.8],
    ("all_real", "soft"): [0.95, 0.97],
    ("all_real", "hard"): [0.95, 0.90],
}
TABLE: list[dict[str, Any]] = [
    {
        "row": row,
        "labels": labels,
        "num_images": n,
        "epochs": 200,
        "top1_mean": 0.9834,
        "top1_std": 0.002,
        "num_seeds": 3,
        "recall_per_class": RECALL[row, labels],
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
    "image_size": 16,
    "tiles": 1,
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
    assert "Teacher's top-1: 99.2 %" in body and "Teacher: top-1 99.2 %" in body
    assert "revision 0123456789ab" in body
    assert "variant `best`" in body
    assert body.index("## Intended use and limits") < body.index("## Provenance")
    assert "1437 images, 1 unreadable ones left out" in body
    assert (
        "20 synthetic images of 2 classes with 200 epochs of soft labels in place of 1437 real"
        in body
    )


def test_a_card_of_chosen_real_images_calls_them_real() -> None:
    about = {**META["provenance"], "options": {"recover": {"method": "real"}}}
    card = dataset_card({**META, "provenance": about}, recipe_of("digits", 10), TABLE)
    assert yaml.safe_load(card.split("---\n", 2)[1])["tags"] == ["dataset-distillation"]
    assert "20 chosen real images of 2 classes" in card
    assert "synthetic" not in card.lower() and "optimized for" not in card
    assert "these are real images, with the rights and the privacy" in card


@pytest.mark.parametrize(
    "uri", ["flowers", "/home/me/flowers/", "file:/home/me/flowers", "C:\\me\\flowers"]
)
def test_of_a_path_a_card_says_the_last_part(uri: str) -> None:
    meta = {**META, "source": {**META["source"], "uri": uri}}
    config = replace(recipe_of("digits", 10), data=uri, teacher="/home/me/run/teacher")
    card = dataset_card(meta, config, None)
    head = yaml.safe_load(card.split("---\n", 2)[1])
    assert head["pretty_name"] == "Distilled flowers, 10 images per class"
    assert "# Distilled `flowers`: 10" in card and "- Source: `flowers`, 1437" in card
    assert '"data": "flowers"' in card and '"teacher": "teacher"' in card
    assert "me/" not in card and "me\\" not in card


def test_a_card_names_a_bucket_that_all_can_see() -> None:
    meta = {**META, "source": {**META["source"], "uri": "s3://bucket/flowers"}}
    config = replace(recipe_of("digits", 10), teacher="timm:hf-hub:a/b")
    card = dataset_card(meta, config, None)
    assert "pretty_name: Distilled flowers, 10" in card and "Source: `s3://bucket/flowers`" in card
    assert '"teacher": "timm:hf-hub:a/b"' in card


def test_a_card_says_how_to_install_and_whom_to_cite() -> None:
    card = dataset_card(META, recipe_of("digits", 10), None)
    assert f"pip install .  # in a checkout of wmdd_ray, version {__version__}\n" in card
    assert "@inproceedings{liu2025wmdd,\n  title     = {Dataset Distillation via the" in card
    assert "@misc{wmdd_ray,\n  title = {wmdd_ray: Dataset distillation by" in card
    assert f"{{Version {__version__}}}" in card


def test_a_card_without_an_evaluation_says_so() -> None:
    card = dataset_card(META, recipe_of("digits", 10), None)
    assert "Not evaluated yet." in card
    assert "## Classes" not in card and " ± " not in card


def test_a_card_names_the_classes_that_are_lost_against_all_real_images() -> None:
    card = dataset_card(META, recipe_of("digits", 10), TABLE)
    assert "1 of 2 classes lose more than 10 points against students of all real images: 猫: a cat (-67.0)" in card  # fmt: skip
    assert "Coverage: 1 of 2 classes keep at least half of that recall." in card
    assert "0 of 2 classes lose more than 10 points" in card
    assert "Coverage: 2 of 2 classes" in card
    assert "| cat | 95.0 | 95.0 | +0.0 | 90.0 | 95.0 | -5.0 |" in card
    assert "| 猫: a cat | 30.0 | 97.0 | -67.0 | 85.0 | 90.0 | -5.0 |" in card


def test_without_students_of_all_real_images_a_card_does_not_say_what_is_lost() -> None:
    rows = [row for row in TABLE if row["row"] != "all_real"]
    text = classes_text(META["class_names"], rows)
    assert "so what is lost against them is not known" in text and "Coverage" not in text
    assert "| 猫: a cat | 30.0 | 85.0 |" in text


def test_results_from_before_there_was_a_recall_show_no_classes() -> None:
    rows = [{k: v for k, v in row.items() if k != "recall_per_class"} for row in TABLE]
    assert classes_text(META["class_names"], rows) == ""


def test_of_many_classes_the_worst_are_shown() -> None:
    names = [f"class|{k}" for k in range(1000)]
    rows = [
        {**TABLE[0], "recall_per_class": [0.9 if k != 777 else 0.1 for k in range(1000)]},
        {**TABLE[-2], "recall_per_class": [0.95] * 1000},
    ]
    assert [(row["row"], row["labels"]) for row in rows] == [
        ("distilled", "soft"),
        ("all_real", "soft"),
    ]
    lines = classes_text(names, rows).splitlines()
    table = [line for line in lines if line.startswith("| class")]
    assert len(table) == 1 + 30 and r"class\|777 | 10.0 | 95.0 | -85.0" in table[1]
    assert any("1 of 1000 classes lose more than 10 points" in line for line in lines)


def test_all_options_that_change_a_byte_stand_in_a_collapsed_block_as_json() -> None:
    config = recipe_of("digits", 10)
    access = BucketAccess(profile="somebody")
    config = replace(config, source=replace(config.source, bucket=access))
    card = dataset_card(META, config, None)
    assert "somebody" not in card
    block = card.partition("<details>")[2].partition("</details>")[0]
    options = json.loads(block.partition("```json\n")[2].partition("\n```")[0])
    expected = json.loads(json.dumps(asdict(config)))
    del expected["recover"]["checkpoint_s"], expected["squeeze"]["check_class_order"]
    for name in ("bucket", "layout", "tar_keys", "max_passed_over"):
        del expected["source"][name]
    assert options == expected


def test_sizes_are_shown_against_the_real_images() -> None:
    card = dataset_card(META, recipe_of("digits", 10), None)
    assert "| images | 31.0 KB | 34 % |" in card
    assert "| soft labels | 1.1 MB | 1196 % |" in card
    assert "| real images as stored | 92.0 KB | 100 % |" in card


def test_the_teacher_is_named_by_the_checksum_of_its_file_where_that_is_known() -> None:
    told = {**META, "provenance": {**META["provenance"], "teacher_sha256": "ab12"}}
    assert "SHA-256 of its file `ab12`" in dataset_card(told, recipe_of("digits", 10), None)
    assert "SHA-256" not in dataset_card(META, recipe_of("digits", 10), None)


def test_the_hub_reads_the_front_matter() -> None:
    data = DatasetCard(dataset_card(META, recipe_of("digits", 10), TABLE)).data
    assert data["license"] == "other" and data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["image-classification"]


def test_a_table_of_several_students_names_them_and_leaves_gaps_where_nothing_was_measured() -> (
    None
):
    rows = [{"student": s, **row} for s in ("resnet18", "convnet3") for row in TABLE]
    assert rows.pop()["labels"] == "hard"
    lines = results_table(rows).splitlines()
    assert len(lines) == 2 + len(TABLE)
    assert lines[2].startswith(
        "| resnet18 | (a) distilled set | 100 | 200 | 98.3 ± 0.2 | 98.3 ± 0.2"
    )
    assert lines[-1] == "| convnet3 | (d) all real images | 1437 | 200 | 98.3 ± 0.2 |  | 3 |"


NASTY = "a|b <script>alert(1)</script> [x](javascript:0) ![i](http://e/x.png) **b** `c` @me\x1b]0;t\x07\n# h 🐈 \\"


def test_names_are_text_in_the_card_whatever_they_hold() -> None:
    meta = {
        **META,
        "class_names": ["cat", NASTY],
        "source": {**META["source"], "uri": f"s3://b/`{NASTY}``"},
        "provenance": {**META["provenance"], "recipe": NASTY, "versions": {NASTY: NASTY}},
    }
    rows = [{**row, "student": NASTY} for row in TABLE]
    card = export_card(meta, table=rows, layout="huggingface", labels="hard", teacher_sha256=NASTY)
    _, head, body = card.split("---\n", 2)
    shown = markdown.markdown(body, extensions=["tables", "fenced_code"])
    # What is ours: the preview, tables, code.
    tags = set(re.findall(r"</?([a-z0-9]+)", shown))
    assert tags <= {
        *("h1", "h2", "p", "img", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"),
        *("ul", "li"),
    }
    assert re.findall(r'(?:src|href)="([^"]*)"', shown) == ["preview.png"]
    # Sites make links of these, whatever stands around them.
    prose = re.sub(r"(`+)[^`].*?\1", "", body)
    assert "http://" not in prose and "@me" not in prose
    assert "\x1b" not in card and "\x07" not in card
    assert "[x](javascript:0) ![i](http://e/x.png) **b** `c` @me" in html.unescape(shown)
    names = yaml.safe_load(head)["dataset_info"]["features"][1]["dtype"]["class_label"]["names"]
    assert names == {"0": "cat", "1": NASTY}


@pytest.mark.parametrize(
    "options", [{"assemble": "x"}, {"assemble": {"license": 3}}, {"evaluate": []}]
)
def test_options_of_another_shape_are_left_out(options: dict[str, Any]) -> None:
    meta = {**META, "provenance": {**META["provenance"], "options": options}}
    card = export_card(meta, table=None, layout="huggingface", labels="hard", teacher_sha256=None)
    assert "license: other" in card


def test_class_names_beyond_the_first_plane_come_through_the_front_matter() -> None:
    meta = {**META, "class_names": ["🐈", "𝔸\u2028\x85\ufeff"]}
    card = export_card(meta, table=None, layout="huggingface", labels="hard", teacher_sha256=None)
    head = yaml.safe_load(card.split("---\n", 2)[1])
    names = head["dataset_info"]["features"][1]["dtype"]["class_label"]["names"]
    assert names == {"0": "🐈", "1": "𝔸\u2028\x85\ufeff"}
    data: Any = DatasetCard(card).data
    assert data.dataset_info["features"][1]["dtype"]["class_label"]["names"] == names


def test_a_table_has_a_line_a_row() -> None:
    assert len(results_table(TABLE).splitlines()) == 2 + len(TABLE) // 2


def test_it_is_said_when_as_many_real_images_are_ahead() -> None:
    rows = [dict(row) for row in TABLE]
    rows[0]["top1_mean"], rows[2]["top1_mean"], rows[4]["top1_mean"] = 0.6, 0.62, 0.611
    assert [(row["row"], row["labels"]) for row in rows[:3:2]] == [("distilled", "soft"), ("random_real", "soft")]  # fmt: skip
    expected = "By soft labels random real images are 2.0 points ahead of the distilled ones."
    assert behind_real(rows) == [expected]
    assert results_table(rows).splitlines()[-1] == expected
    rows[2]["top1_mean"] = rows[4]["top1_mean"] = 0.6001
    assert behind_real(rows) == [expected.replace("2.0 points ahead of", "as good as")]
    assert behind_real(TABLE) == [], "equal is not ahead, and all real images are more"


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
