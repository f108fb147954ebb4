"""The table of labeling teachers and of the transport term: its groups, what they share, and its numbers' way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.benches.study import work
from jobs.benches.study.command import accuracy
from jobs.benches.study.definitions import Options, TableName
from jobs.benches.study.engine import Job, Study
from jobs.benches.study.rendering import rendered
from jobs.benches.study.splits import make_place
from jobs.benches.study.tables import table_of

TINY: dict[str, Any] = {
    "ipc": (2,), "distill_seeds": 1, "student_seeds": 2, "width": 8, "epochs": 1,
    "teacher_epochs": 4, "iterations": 1,
}  # fmt: skip
SETTINGS = [
    "one teacher", "LIA: 2 teachers", "LIA: 4 teachers", "one teacher, CE + MSE",
    "OTM: CE + MSE + Sinkhorn", "LIA + OTM: 4 teachers",
]  # fmt: skip


@pytest.mark.parametrize("name", ["alignment", "alignment_digits"])
def test_groups_of_one_ipc_differ_in_soft_labels_and_the_loss_to_them_alone(
    name: TableName, tmp_path: Path
) -> None:
    table = table_of(name, Options(ipc=(1, 10)))
    assert [g.title for g in table.groups[:6]] == [f"{title}, ipc 1" for title in SETTINGS]
    assert all(g.student_seeds * g.distill_seeds >= 5 for g in table.groups)
    losses = [(g.student.loss, g.student.sinkhorn_weight > 0) for g in table.groups[:6]]
    assert losses == [("kl", False)] * 3 + [("mse", False), ("mse", True), ("mse", True)]
    # On digits' arrays, which are as good as any to tell jobs apart.
    source = table_of("alignment_digits", Options()).source
    study = Study(make_place(str(tmp_path), "digits", source, 0))
    rows = [row for row in work.rows_of(table, study) if row.group.ipc == 10]
    assert [row.row.name for row in rows] == ["random_real", "best"] * 6
    ours = rows[1::2]

    def different(jobs: list[Job]) -> int:
        return len({study.id(job) for job in jobs})

    # One set of images, one pass over the data, the same students by hard labels.
    assert different([row.sets[0]["recover"] for row in ours]) == 1
    assert different([jobs["features"] for row in rows for jobs in row.sets]) == 1
    assert different([row.students["hard"][0] for row in ours]) == 1
    # Labels by one, two and four teachers, of which the first makes the images.
    assert different([row.sets[0]["relabel"] for row in ours]) == 3
    assert different([row.students["soft"][0] for row in ours]) == 6
    labelers = [row.sets[0]["relabel"].inputs[0].config.relabel.teachers for row in ours]
    assert labelers == [1, 2, 4, 1, 1, 4]
    names = [teacher.name for teacher in ours[2].group.labelers]
    assert names == ["convnet3", "convnet3-1", "convnet3-2", "convnet3-3"]


@pytest.mark.slow
def test_the_table_says_of_each_group_who_labels_and_by_what_loss(tmp_path: Path) -> None:
    accuracy(table="alignment_digits", out=str(tmp_path), options=Options(**TINY))
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
