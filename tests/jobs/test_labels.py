"""The benchmarks of label files and of the loader: small runs whose numbers are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jobs.benches.speed.loader import loader
from jobs.benches.study import labels as study
from tests.store.written_sources import idx_of
from wmdd_ray.errors import ConfigError
from wmdd_ray.store.filesystem import Store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of IDX files: digits, enlarged to 28 pixels."""
    digits, folder = load_digits(), str(tmp_path_factory.mktemp("data"))
    large_NHW = np.pad(np.kron(15 * digits.images, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2)))
    for prefix, part in (("train", slice(0, 1500)), ("t10k", slice(1500, 1700))):
        images_NHW = large_NHW[part].astype(np.uint8)
        Store(folder).put(f"{prefix}-images-idx3-ubyte", idx_of(images_NHW))
        Store(folder).put(f"{prefix}-labels-idx1-ubyte", idx_of(digits.target[part]))
    return folder


def measured(data: str, folder: Path, **options: Any) -> dict[str, Any]:
    tiny: dict[str, Any] = {
        "ipc": (2,), "seeds": (2,), "shared": (2,), "alone": 4, "epochs": 4, "width": 16, "held_out": 100,
        "mixed_precision": False, "out": str(folder / "labels.json"),
    }  # fmt: skip
    study.labels(data, folder=str(folder), **tiny | options)
    record: dict[str, Any] = json.loads((folder / "labels.json").read_text())
    return record


def jobs_in(folder: Path) -> dict[str, int]:
    rooms = [p.relative_to(folder).parts[0] for p in folder.glob("*/*/stage.json")]
    return {room: rooms.count(room) for room in rooms}


@pytest.mark.slow
def test_a_table_of_bytes_and_accuracy_has_students_of_every_option_and_is_made_once(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = measured(data, tmp_path)
    assert record["hardware"] and record["versions"] and record["settings"]["seeds"] == {"2": 2}
    assert (record["settings"]["split"], record["settings"]["held_out"]) == ("val", 100)
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

    # The same command finds everything, whichever images score the students; a given teacher has its own.
    jobs = jobs_in(tmp_path)
    assert jobs["teacher"] == jobs["images"] == 1 and jobs["students"] == 4
    assert measured(data, tmp_path)["rows"] == record["rows"]
    assert measured(data, tmp_path, split="test")["settings"]["split"] == "test"
    assert jobs_in(tmp_path) == jobs
    teacher = next(tmp_path.glob("teacher/*/stage.json")).parent
    given = measured(data, tmp_path, teacher=str(teacher), seeds=(1,))
    assert given["settings"]["teacher_top1"] == record["settings"]["teacher_top1"]
    assert jobs_in(tmp_path)["students"] == 8


@pytest.mark.parametrize("option", ["ipc", "steps", "shared"])
def test_an_option_without_values_is_refused(option: str) -> None:
    given: dict[str, Any] = {option: ()}
    with pytest.raises(ConfigError, match=f"--{option}: expected at least one value"):
        study.labels("nowhere", **given)
    with pytest.raises(ConfigError, match="number of seeds for every ipc"):
        study.labels("nowhere", ipc=(2, 3), seeds=(1,))


def test_rates_of_the_loader_are_compared_with_tensors_in_memory(tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    loader(28, 30, workers=(0,), widths=(4,), seconds=0.05, repeats=2, out=str(out))
    rows = {row["what"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "decoding PNG",
        "decoding WebP, lossless",
        "rendering",
        "DataLoader, 0 workers",
        "tensors in memory -> ConvNet-3, width 4",
        "DataLoader, 0 workers -> ConvNet-3, width 4",
    ]
    assert all(row["images_per_s"]["n"] == 2 for row in rows.values())
    in_memory, local = (row for name, row in rows.items() if "->" in name)
    assert in_memory["of_in_memory"] == 1
    rendered = rows["DataLoader, 0 workers"]["images_per_cpu_s"]["median"]
    assert local["images_per_cpu_s"]["median"] < rendered
    # Without workers all rendering is waiting.
    assert in_memory["waiting"]["max"] < local["waiting"]["min"] < 1
