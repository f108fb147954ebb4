"""The table of labeling teachers and of the transport term: its groups, what they share, and its numbers' way out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs.benches.accuracy import work
from jobs.benches.study.units import ImagesUnit, LabelsUnit, StudentUnit

from jobs.benches.speed.otm import otm
from jobs.benches.study.command import accuracy
from jobs.benches.study.definitions import Options, TableName
from jobs.benches.study.rendering import rendered
from jobs.benches.study.splits import Workplace, make_splits
from jobs.benches.study.tables import table_of

TINY: dict[str, Any] = {
    "ipc": (2,), "distill_seeds": 1, "student_seeds": 2, "width": 4, "epochs": 1,
    "teacher_epochs": 1, "iterations": 1,
}  # fmt: skip
SETTINGS = [
    "one teacher", "LIA: 2 teachers", "LIA: 4 teachers", "one teacher, CE + MSE",
    "OTM: CE + MSE + Sinkhorn", "LIA + OTM: 4 teachers",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    source = table_of("alignment_digits", Options()).source
    return make_splits(str(tmp_path_factory.mktemp("place")), "digits", source, 0, "cpu")


@pytest.mark.parametrize("name", ["alignment", "alignment_digits"])
def test_groups_of_one_ipc_differ_in_soft_labels_and_the_loss_to_them_alone(
    name: TableName, place: Workplace
) -> None:
    table = table_of(name, Options(ipc=(1, 10)))
    assert [g.title for g in table.groups[:6]] == [f"{title}, ipc 1" for title in SETTINGS]
    assert [len(g.labelers) for g in table.groups[:6]] == [1, 2, 4, 1, 1, 4]
    assert all(g.student_seeds * g.distill_seeds >= 5 for g in table.groups)
    weights = [(g.student.loss, g.student.sinkhorn_weight > 0) for g in table.groups[:6]]
    assert weights == [("kl", False)] * 3 + [("mse", False), ("mse", True), ("mse", True)]
    rows = [row for row in work.rows_of(table, place) if row.group.ipc == 10]
    assert [row.row.name for row in rows] == ["random_real", "best"] * 6
    ours = rows[1::2]
    # One set of images, one pass over the data, the same students by hard labels.
    assert len({row.images for row in ours}) == 1
    assert len({u for row in rows for image in row.images for u in image.features}) == 1
    assert len({row.students["hard"] for row in ours}) == 1
    # Labels by one, two and four teachers, of which the first makes the images.
    assert len({row.labeled for row in ours}) == 3
    assert len({row.students["soft"] for row in ours}) == 6
    names = [teacher.recipe.name for teacher in ours[2].labeled[0].teachers]
    assert names == ["convnet3", "convnet3-1", "convnet3-2", "convnet3-3"]
    assert len(work.stages_of(work.rows_of(table, place))[0]) == 4


def test_options_that_are_off_and_teachers_that_are_named_elsewhere_change_no_id(
    place: Workplace,
) -> None:
    row = work.rows_of(table_of("digits", Options(ipc=(1,))), place)[0]
    student, labels = row.students["soft"][0], row.labeled[0]
    assert isinstance(student, StudentUnit) and isinstance(labels, LabelsUnit)

    def changed(**options: Any) -> str:
        return replace(student, student=replace(student.student, **options)).id

    assert changed(sinkhorn_iterations=3, sinkhorn_regularization=1.0) == student.id
    assert changed(sinkhorn_weight=0.1) != student.id
    assert changed(sinkhorn_weight=0.1) != changed(sinkhorn_weight=0.1, sinkhorn_iterations=3)
    images = next(image for image in row.images if isinstance(image, ImagesUnit))

    def led(**options: Any) -> str:
        sampled = replace(images.recover.diffusion, model="m", **options)
        recover = replace(images.recover, method="diffusion", diffusion=sampled)
        return replace(images, recover=recover).id

    assert led(influence_epochs=(0, 1), influence_latents=5) == led() != images.id
    assert led(influence_weight=0.1) != led()
    assert replace(labels, relabel=replace(labels.relabel, teachers=3)).id == labels.id
    assert replace(labels, teachers=labels.teachers * 2).id != labels.id


@pytest.mark.slow
def test_the_table_says_of_each_group_who_labels_and_by_what_loss(tmp_path: Path) -> None:
    accuracy(table="alignment_digits", out=str(tmp_path), **TINY)
    path = tmp_path / "accuracy-alignment_digits.json"
    found = json.loads(path.read_bytes())
    assert [len(g["labelers"]) for g in found["groups"]] == [1, 2, 4, 1, 1, 4]
    assert set(found["teachers"]) == {"convnet3", "convnet3-1", "convnet3-2", "convnet3-3"}
    assert len({teacher["top1_val"] for teacher in found["teachers"].values()}) > 1
    ours = [next(r for r in g["rows"] if r["name"] == "best") for g in found["groups"]]
    assert len({str(row["hard"]["weights"]) for row in ours}) == 1
    assert len({str(row["soft"]["weights"]) for row in ours}) == 6
    text = rendered(path.read_bytes(), "here")
    named = dict(re.findall(r"^\| ([^|(]+?)(?: \((.+)\))? \| random real", text, re.MULTILINE))
    assert list(named) == SETTINGS
    assert named["one teacher"] == ""
    assert named["LIA: 4 teachers"] == "labels by convnet3 and 3 more"
    loss = "by soft labels: MSE to logits, ce_weight 0.025"
    assert named["OTM: CE + MSE + Sinkhorn"] == f"{loss}, Sinkhorn distance 0.1"


@pytest.mark.slow
def test_the_bench_of_the_term_tells_its_share_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "otm.json"
    otm(batch_sizes=(4,), image_size=16, small_stem=False, steps=2, out=str(path))
    (row,) = json.loads(path.read_text())["rows"]
    assert row["share_of_step"] == pytest.approx(
        row["term_ms"]["median"] / row["without_ms"]["median"], rel=1e-3
    )
    assert row["with_ms"]["n"] == 2 and 0 < row["term_ms"]["median"] < row["with_ms"]["median"]
