"""Small labels through relabel, assemble and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.stages import tiny
from wmdd_ray.dataset import DistilledDataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

# fmt: off
BEFORE = ("teacher", "features", "barycenters", "images")
FEW = ("--evaluate.num-seeds", "1", "--evaluate.baselines", "random_real")
# fmt: on


def label_files(out: Path) -> list[Path]:
    return sorted((out / "dataset" / "labels").glob("*.parquet"))


def test_online_shared_epochs_train_students_on_the_views_of_stored_ones(
    finished_run: tiny.FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path, *BEFORE)
    options = ("--relabel.labels", "online", "--relabel.epochs", "3", "--evaluate.epochs", "6")
    assert tiny.job(out, *options, *FEW) == 0
    stored, online = (DistilledDataset(f"{run}/dataset") for run in (finished_run.out, out))
    assert (stored.online, online.online, online.label_epochs) == (False, True, 3)
    assert sum(f.stat().st_size for f in label_files(out)) < 4000
    for epoch in range(3):
        (views, logits_VY), (same, expected_VY) = (
            dataset.label_epoch(epoch) for dataset in (online, stored)
        )
        for name, array in vars(same).items():
            np.testing.assert_array_equal(getattr(views, name), array, err_msg=name)
        relative_VY = logits_VY - logits_VY.max(axis=1, keepdims=True)
        np.testing.assert_allclose(relative_VY, expected_VY, rtol=2**-10, atol=1e-4)
    results = [json.loads(f.read_bytes()) for f in (out / "evaluation/results").glob("*.json")]
    assert {(r["row"], r["epochs"]) for r in results} == {("distilled", 6), ("random_real", 6)}


def test_steps_and_stored_rows_hold_the_same_labels_to_half_a_step(
    finished_run: tiny.FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path, *BEFORE)
    options = ("--relabel.precision", "int8", "--relabel.step", "0.5", "--until", "assemble")
    assert tiny.job(out, *options, "--relabel.stored-views", "rows") == 0
    assert "crop" in pq.read_schema(label_files(out)[0]).names
    assert "crop" not in pq.read_schema(label_files(finished_run.out)[0]).names
    coarse, fine = (DistilledDataset(f"{run}/dataset") for run in (out, finished_run.out))
    for epoch in (0, 5):
        (views, found_VY), (same, expected_VY) = (d.label_epoch(epoch) for d in (coarse, fine))
        np.testing.assert_array_equal(views.mix_box_V4, same.mix_box_V4)
        assert abs(found_VY - expected_VY).max() <= 0.26
    # The options of a room are part of what it is.
    assert tiny.job(out, *options) == 2
    assert "relabel.stored_views='rows' (this run asks for 'seed')" in capsys.readouterr().err
