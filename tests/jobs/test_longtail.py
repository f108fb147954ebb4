"""The long-tailed table: which images it trains on, and barycenters of images and labels together in its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs import bench
from jobs.benches.study.definitions import Options
from jobs.benches.study.engine import Study
from jobs.benches.study.splits import Place, long_tailed, make_place
from jobs.benches.study.tables import table_of
from jobs.benches.study.work import rows_of
from wmdd_ray.config import SourceConfig
from wmdd_ray.recipes import recipe_of
from wmdd_ray.store.documents import unseal

ROWS = ("best", "joint_0.1")
DIGITS: SourceConfig = recipe_of("digits", 1).source


def test_counts_fall_geometrically_and_the_first_images_of_a_class_stay() -> None:
    labels = np.tile(np.arange(5), 100)
    rows = long_tailed(labels, 16.0)
    assert np.bincount(labels[rows]).tolist() == [100, 50, 25, 12, 6]
    assert rows.tolist() == sorted(rows) and rows[labels[rows] == 4].tolist() == [
        4,
        9,
        14,
        19,
        24,
        29,
    ]


def test_a_class_with_fewer_images_than_its_share_keeps_them_all() -> None:
    labels = np.repeat([0, 1, 2], [100, 3, 100])
    assert np.bincount(labels[long_tailed(labels, 4.0)]).tolist() == [100, 3, 25]


def test_only_what_is_trained_on_is_long_tailed(tmp_path: Path) -> None:
    def split(imbalance: float) -> Place:
        return make_place(str(tmp_path), "digits", DIGITS, 0, imbalance)

    plain, tailed = split(1.0), split(12.0)
    np.testing.assert_array_equal(plain.load("val").images_NHWC, tailed.load("val").images_NHWC)
    counts = np.bincount(tailed.load("train").labels_N)
    assert counts[0] == np.bincount(plain.load("train").labels_N)[0]
    assert counts[-1] == round(counts[0] / 12) and (np.diff(counts) < 0).all()
    trains = {place.source_of("train").fingerprint() for place in (plain, tailed)}
    assert len(trains) == 2 and plain.split_unit != tailed.split_unit


@pytest.mark.slow
def test_the_table_shows_joint_barycenters_beside_those_of_each_class(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # fmt: off
    options = [
        "--ipc", "2", "--distill-seeds", "1", "--student-seeds", "1", "--width", "8",
        "--epochs", "1", "--teacher-epochs", "4", "--iterations", "4",
    ]
    # fmt: on
    bench.main(["accuracy", "--table", "longtail", "--out", str(out), "--rows", *ROWS, *options])
    result = unseal((out / "accuracy-longtail.json").read_bytes(), "result")
    (group,) = result["groups"]
    assert [row["name"] for row in group["rows"]] == ["random_real", *ROWS]
    assert result["num_images"]["train"] < 600 and result["num_images"]["test"] == 360
    table = table_of(
        "longtail",
        Options(
            ipc=(2,), rows=ROWS, distill_seeds=1, student_seeds=1, width=8, epochs=1, teacher_epochs=4, iterations=4
        ),
    )  # fmt: skip
    study = Study(make_place(str(out), "digits", table.source, 0, table.imbalance))
    commits = [study.done(row.sets[0]["recover"]) for row in rows_of(table, study)]
    _, best, joint = ([f.sha256 for m in c.units.values() for f in m.files] for c in commits)
    assert best != joint
