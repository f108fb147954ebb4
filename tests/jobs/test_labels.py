"""The benchmarks of label files and of the loader: small runs whose numbers are checked."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs.benches.labels import files
from jobs.benches.labels.command import labels
from jobs.benches.labels.options import options_of
from jobs.benches.labels.students import Comparison

from jobs.benches.speed.loader import loader, write_random_set
from jobs.benches.study.splits import load_split, make_splits
from tests.store.written_sources import idx_of
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.store.filesystem import Store


def test_thousand_classes_shrink_by_steps_by_the_largest_and_by_shared_epochs() -> None:
    rows = files.synthetic_rows(1.0, 5, num_views=1000)
    size = {row["labels"]: row["bytes"] for row in rows}
    names = list(size)
    assert names[0].endswith("(FKD)") and len(size) == 7
    # FKD's arrays are 1000 x 2 bytes of logits and 54 of boxes a view; zstd takes at most a third off.
    assert 0.66 * 2054 < size[names[0]] / (10 * 1000 * 300) < 2054
    assert list(size.values()) == sorted(size.values(), reverse=True)
    assert rows[-1]["times_smaller"] > 40 and rows[-1]["label_epochs"] == 60
    assert size[names[-2]] == pytest.approx(5 * size[names[-1]], rel=1e-3)


@pytest.fixture
def tiny_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of a benchmark whose teacher knows nothing, on a few noisy images."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
        Store(str(folder)).put(f"{prefix}-images-idx3-ubyte", idx_of(images))
        Store(str(folder)).put(f"{prefix}-labels-idx1-ubyte", idx_of(np.arange(60) % 10))
    teacher = DistilledDataset(write_random_set(str(tmp_path / "set"), epochs=1)).teacher()
    # Logits some steps apart.
    weights = {name: 300 * w if w.ndim == 2 else w for name, w in teacher.weights.items()}
    teacher = replace(teacher, weights=weights)
    few = partial(files.synthetic_rows, num_views=100)
    monkeypatch.setattr(files, "synthetic_rows", few)
    monkeypatch.setattr("wmdd_ray.units.teacher.read_teacher", lambda room: teacher)
    return [str(tmp_path / "teacher"), str(folder)]


def measure(tiny_bench: list[str], tmp_path: Path, **options: Any) -> None:
    asked = {"ipc": (2,), "seeds": (2,), "steps": (1.0,), "shared": (1,), "alone": 10} | options
    labels(
        *tiny_bench,
        epochs=10,
        width=4,
        held_out=10,
        mixed_precision=False,
        folder=str(tmp_path / "folder"),
        **asked,
    )  # type: ignore[arg-type]


def test_a_table_of_bytes_and_accuracy_has_students_of_every_option(
    tiny_bench: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.json"
    measure(tiny_bench, tmp_path, out=str(out))
    record: dict[str, Any] = json.loads(out.read_text())
    assert record["hardware"] and record["versions"] and record["settings"]["seeds"] == {"2": 2}
    assert (record["settings"]["split"], record["settings"]["held_out"]) == ("val", 10)
    rows = [row for row in record["rows"] if row["ipc"] == 2]
    by_name = {row["labels"]: row for row in rows}
    assert len(by_name) == 7
    fkd = by_name["fp16, views stored (FKD)"]
    assert fkd["difference"] == 0 and fkd["times_smaller"] == 1 and len(fkd["students"]) == 2
    seeded = by_name["fp16, views by seed"]
    assert seeded["students"] == fkd["students"] and seeded["bytes"] < fkd["bytes"]
    assert "students" not in by_name["int8, steps of 1/8"]
    online = by_name["online: the teacher only"]
    assert online["bytes"] < 2000 < online["with_teacher"]
    for row in rows:
        if "students" in row:
            assert row["top1"] == pytest.approx(np.mean(row["students"]), abs=0.01)
            expected = np.mean(row["students"]) - np.mean(fkd["students"])
            assert row["difference"] == pytest.approx(expected, abs=0.011)
    assert "times_smaller" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="number of seeds for every ipc"):
        labels(*tiny_bench, ipc=(2, 3), seeds=(1,))


@pytest.mark.parametrize("option", ["ipc", "steps", "shared"])
def test_an_option_without_values_ends_the_bench_with_one_line(option: str) -> None:
    given: dict[str, Any] = {option: ()}
    with pytest.raises(SystemExit, match=f"labels: --{option}: expected at least one value"):
        labels("runs/none", "nowhere", **given)


def test_the_same_command_again_trains_nobody_and_the_test_split_finds_the_same_students(
    tiny_bench: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, again, tested = (tmp_path / f"{name}.json" for name in ("first", "again", "tested"))
    measure(tiny_bench, tmp_path, seeds=(1,), out=str(first))
    assert "4 students to train, about" in capsys.readouterr().err

    def train(*args: Any, **options: Any) -> None:
        raise AssertionError("somebody was trained again")

    monkeypatch.setattr("jobs.benches.labels.students.train_student", train)
    monkeypatch.setattr("jobs.benches.study.work.speed_on", train)
    measure(tiny_bench, tmp_path, seeds=(1,), out=str(again))
    assert "0 students to train" in capsys.readouterr().err
    assert json.loads(again.read_text())["rows"] == json.loads(first.read_text())["rows"]
    opened: list[str] = []
    monkeypatch.setattr(
        "jobs.benches.study.splits.load_split",
        lambda uri, config, split, names: (
            opened.append(split) or load_split(uri, config, split, names)
        ),
    )
    measure(tiny_bench, tmp_path, seeds=(1,), out=str(tested), split="test")
    assert opened == ["val"]  # the source's own held-out part, which the first two did not open
    assert json.loads(tested.read_text())["settings"]["split"] == "test"
    # Another step is another student.
    with pytest.raises(AssertionError, match="trained again"):
        measure(tiny_bench, tmp_path, seeds=(1,), steps=(0.25,))


def test_what_a_student_learns_from_is_what_the_file_holds(
    tiny_bench: list[str], tmp_path: Path
) -> None:
    from wmdd_ray.recipes import recipe_of
    from wmdd_ray.units.teacher import read_teacher

    teacher, data = tiny_bench
    recipe = recipe_of("fashion_mnist", 1)
    stored = replace(recipe.relabel, epochs=20, stored_views="rows", epochs_per_unit=4)
    config = replace(recipe, data=data, relabel=stored)
    options = options_of(stored, (1.0,), (2,), 20)
    place = make_splits(str(tmp_path / "folder"), data, config.source, 0, "cpu")
    comparison = Comparison(config, read_teacher(None), None, options, place)  # type: ignore[arg-type]
    comparison.label()
    exact, coarse, shared = (
        next(comparison.stored[o.name].epoch for o in comparison.options if o.students == students)
        for students in ("fkd", "coarse", "shared")
    )
    for epoch in range(20):
        true_VY = comparison.asked.logits[epoch] - comparison.asked.logits[epoch].max(
            axis=1, keepdims=True
        )
        np.testing.assert_allclose(exact(epoch)[1], true_VY, atol=0.01)
        assert abs(coarse(epoch)[1] - true_VY).max() <= 0.501
        np.testing.assert_array_equal(coarse(epoch)[1] % 1, 0)
    assert np.ptp(comparison.asked.logits[0]) > 5
    again = [shared(epoch)[1].tobytes() for epoch in range(20)]
    assert len(set(again)) == 10 and sorted(again[:10]) == sorted(again[10:])


def test_rates_of_the_loader_are_compared_with_tensors_in_memory(tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    loader(workers=(0,), widths=(4,), seconds=0.05, repeats=2, out=str(out))
    rows = {row["what"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "rendering alone",
        "DataLoader, 0 workers",
        "tensors in memory -> ConvNet-3, width 4",
        "DataLoader, 0 workers -> ConvNet-3, width 4",
        "DataLoader from s3://, 0 workers -> ConvNet-3, width 4",
    ]
    assert all(row["images_per_s"]["n"] == 2 for row in rows.values())
    in_memory, local, remote = (row for name, row in rows.items() if "->" in name)
    assert in_memory["of_in_memory"] == 1
    rendered = rows["DataLoader, 0 workers"]["images_per_cpu_s"]["median"]
    assert local["images_per_cpu_s"]["median"] < rendered
    # Without workers all rendering is waiting.
    assert in_memory["waiting"]["max"] < local["waiting"]["min"] < 1
    assert "first_batch_s" not in in_memory and remote["first_batch_s"]["min"] > 0
