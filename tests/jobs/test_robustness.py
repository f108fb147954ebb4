"""The bench of robust students, small: its table, and what it says of its target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.benches.study import robustness as bench
from jobs.benches.study.robustness import markdown, robustness
from wmdd_ray.errors import ConfigError
from wmdd_ray.robustness.attacks import SETTINGS, Attacked

TINY: dict[str, Any] = {
    "ipc": (1,), "methods": ("sre2l",), "weights": (0.5,), "attacks": ("pgd",), "eps": ("8/255", "24/255"),
    "images": 12, "seeds": 1, "split": "val", "iterations": 2, "epochs": 2, "teacher_epochs": 1,
    "width": 4,
}  # fmt: skip


@pytest.mark.slow
def test_the_bench_pairs_every_row_with_a_plain_teacher_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    robustness(**TINY, out=str(out))
    said = capsys.readouterr().out
    found = json.loads((out / "robustness-digits-val.json").read_text())
    plain, curved = found["rows"]
    assert (plain["curvature_weight"], curved["curvature_weight"]) == (0.0, 0.5)
    assert plain["teacher_top1_val"] != curved["teacher_top1_val"]
    assert found["attacked"] == 12 and len(plain["clean"]["values"]) == 1
    assert found["attacks"] == {"pgd": SETTINGS["pgd"]} and "pyautoattack" in found["libraries"]
    recipe = found["recipes"]["1"]
    assert recipe["squeeze"]["epochs"] == 1 and recipe["evaluate"]["network"]["width"] == 4
    assert "| cross-entropy + global BN (SRe2L) | 1 | 0.5 |" in said
    done = {p: p.read_bytes() for p in out.rglob("units/*.json")}
    lost = next(p for p in done if "/students-pgd-" in str(p))
    lost.unlink()
    (lost.parents[1] / "stage.json").unlink()
    robustness(**TINY, out=str(out))
    again = json.loads((out / "robustness-digits-val.json").read_text())
    assert again["rows"] == found["rows"]
    assert all(p.read_bytes() == content for p, content in done.items() if p != lost)
    assert all(
        row["robust"]["pgd 24/255"]["mean"] <= row["robust"]["pgd 8/255"]["mean"]
        and row["robust"]["pgd 8/255"]["mean"] <= row["clean_attacked"]["mean"]
        for row in found["rows"]
    )

    # The test images are attacked anew, and nothing is trained again.
    before = set(out.rglob("units/*.json"))
    robustness(**{**TINY, "split": "test"}, out=str(out))
    tested = json.loads((out / "robustness-digits-test.json").read_text())
    assert tested["images"] == 360 and tested["split"] == "test"
    rooms = {p.relative_to(out).parts[0] for p in set(out.rglob("units/*.json")) - before}
    assert rooms == {"attacked", "students-pgd-8of255", "students-pgd-8of85"}

    # What an attack cannot have done is told, by student.
    real: Any = vars(bench)["read_attacked"]

    def stronger_is_weaker(room: Any, trained: str, count: int) -> Attacked:
        one = real(room, trained, count)
        robust_N = np.full_like(one.clean_N, "8of85" in room.store.uri)
        return replace(one, robust_N=robust_N, clean_N=np.ones_like(one.clean_N))

    monkeypatch.setattr(bench, "read_attacked", stronger_is_weaker)
    capsys.readouterr()
    robustness(**TINY, out=str(out))
    rows = json.loads((out / "robustness-digits-val.json").read_text())["rows"]
    assert [(c["student"], c["what"], c["eps"]) for c in rows[0]["contradictions"]] == [
        (0, "PGD-100 rises with eps", "24/255")
    ]
    assert "12 of 139 images were attacked; 2 contradictions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eps": ("24",)}, "--eps: expected fractions"),
        ({"ipc": ()}, "--ipc: expected at least one value"),
        ({"methods": ()}, "--methods: expected at least one value"),
    ],
)
def test_an_option_that_cannot_be_ends_the_bench_with_one_line(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        robustness(**{**TINY, **wrong}, out=str(tmp_path))


def row(ipc: int, weight: float, clean: float, robust: float) -> dict[str, Any]:
    told = [{"mean": value, "std": 0.0, "values": [value]} for value in (clean, robust)]
    return {
        "method": "wmdd", "ipc": ipc, "curvature_weight": weight, "teacher_top1_val": 0.9,
        "clean": told[0], "clean_attacked": told[0], "robust": {"autoattack 24/255": told[1]}, "contradictions": [],
    }  # fmt: skip


def test_a_row_of_the_table_has_clean_and_robust_accuracy_in_percent() -> None:
    text = markdown(
        {
            "rows": [row(1, 0, 0.9, 0.0), row(10, 1, 0.97, 0.5)],
            "dataset": "digits", "split": "test", "images": 99, "attacked": 9,
        }
    )  # fmt: skip
    assert "| WMDD | 10 | 1 | 90.0 | 97.0 ± 0.0 | 97.0 ± 0.0 | 50.0 ± 0.0 |" in text
