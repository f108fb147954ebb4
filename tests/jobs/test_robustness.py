"""The bench of robust students, small: its units, its table, and what it says of its target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.benches.robustness.attacks import sample_rows
from jobs.benches.robustness.command import robustness
from jobs.benches.robustness.scores import markdown, targets

TINY: dict[str, Any] = {
    "ipc": (1,), "methods": ("sre2l",), "weights": (0.5,), "attacks": ("pgd",), "eps": ("24/255",),
    "images": 12, "seeds": 1, "split": "val", "iterations": 2, "epochs": 2, "teacher_epochs": 1,
    "width": 4,
}  # fmt: skip


@pytest.mark.slow
def test_the_bench_pairs_every_row_with_a_plain_teacher_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    robustness(**TINY, out=str(out))
    said = capsys.readouterr().out
    found = json.loads((out / "robustness-digits-val.json").read_text())
    plain, curved = found["rows"]
    assert (plain["curvature_weight"], curved["curvature_weight"]) == (0.0, 0.5)
    assert plain["teacher_top1_val"] != curved["teacher_top1_val"]
    assert found["attacked"] == 12 and len(plain["clean"]["values"]) == 1
    assert {c["form"]: c["cpu_seconds_a_step"]["n"] for c in found["cost"]} == dict.fromkeys(
        ("plain", "loss", "gradient"), 12
    )
    costs = [c["times_plain"] for c in found["cost"]]
    assert costs[0] == 1.0 and costs[2] > 1.5  # a double backward is no single one
    assert "| cross-entropy + global BN (SRe2L) | 1 | 0.5 |" in said
    units = {p: p.stat().st_mtime_ns for p in out.rglob("units/*.json")}
    lost = next(p for p in units if "/attacks/" in str(p))
    lost.unlink()
    robustness(**{**TINY, "cost": False}, out=str(out))
    again = json.loads((out / "robustness-digits-val.json").read_text())
    assert again["rows"] == found["rows"] and "cost" not in again
    assert all(p.stat().st_mtime_ns == t for p, t in units.items() if p != lost)


def test_an_option_that_cannot_be_ends_the_bench_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="robustness: --eps: expected fractions"):
        robustness(**{**TINY, "eps": ("24",)}, out=str(tmp_path))


def test_classes_take_turns_in_the_sample() -> None:
    labels_N = np.array([0] * 50 + [1] * 3 + [2] * 50)
    rows_N = sample_rows(labels_N, 20)
    assert np.bincount(labels_N[rows_N]).tolist() in ([9, 3, 8], [8, 3, 9])
    assert len(set(rows_N.tolist())) == 20
    np.testing.assert_array_equal(rows_N, sample_rows(labels_N, 20))
    assert len(sample_rows(labels_N, 1000)) == 103


def row(ipc: int, weight: float, clean: float, robust: float) -> dict[str, Any]:
    told = [{"mean": value, "std": 0.0, "values": [value]} for value in (clean, robust)]
    return {
        "method": "wmdd", "ipc": ipc, "curvature_weight": weight, "teacher_top1_val": 0.9,
        "clean": told[0], "robust": {"autoattack 24/255": told[1]}, "contradictions": [],
    }  # fmt: skip


def test_gain_and_cost_are_against_the_plain_row_of_the_same_method_and_ipc() -> None:
    rows = [row(1, 0, 0.9, 0.0), row(1, 1, 0.8, 0.1), row(10, 0, 0.98, 0.2), row(10, 1, 0.97, 0.5)]
    first, second = targets(rows)
    assert first["times_as_robust"] == {"autoattack 24/255": None}
    assert first["clean_cost"] == pytest.approx(0.1)
    assert second["times_as_robust"]["autoattack 24/255"] == pytest.approx(2.5)
    assert second["clean_cost"] == pytest.approx(0.01)
    text = markdown({"rows": rows, "dataset": "digits", "split": "test", "attacked": 9})
    assert "| WMDD | 10 | 1 | 90.0 | 97.0 ± 0.0 | 50.0 ± 0.0 |" in text
