"""Results of runs and evaluations in one table, and DD-Ranking's score as that package counts it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from jobs import compare, evaluate
from tests.stages.tiny import FinishedRun
from wmdd_ray.config import EvaluateConfig, HardLabelConfig, NetworkConfig
from wmdd_ray.product.comparison import Result, compared, ddranking_scores, results_of, written
from wmdd_ray.spine.taken import note_runs
from wmdd_ray.store.documents import seal
from wmdd_ray.store.filesystem import Store

TOP1 = {
    ("distilled", "soft"): [0.8, 0.82],
    ("distilled", "hard"): [0.7, 0.7],
    ("random_real", "soft"): [0.75, 0.79],
    ("random_real", "hard"): [0.5, 0.52],
    ("all_real", "soft"): [0.9, 0.9],
    ("all_real", "hard"): [0.75, 0.71],
}


def evaluation(folder: Path, *, shift: float = 0.0, held_out: str = "v", **student: Any) -> Path:
    """Write what jobs/evaluate.py leaves of a set of ten images, with every accuracy moved by `shift`."""
    recipe = replace(
        EvaluateConfig(network=NetworkConfig(width=32), hard=HardLabelConfig(norm="instance")),
        **student,
    )
    table = [
        {
            **{"student": "convnet3", "row": row, "labels": labels, "num_seeds": 2},
            **{"top1": [one + shift for one in top1], "top1_mean": top1[0], "top1_std": 0.0},
            "num_images": 1437 if row == "all_real" else 10,
            "epochs": 20 if row == "all_real" else recipe.epochs,
        }
        for (row, labels), top1 in TOP1.items()
    ]
    document = {
        "set": {"uri": "sets/DM_v2", "stored": {"ipc": 1, "image_bytes": 5000}},
        "held_out": {"uri": "/data/digits", "fingerprint": held_out},
        "teacher": {"top1": 0.95},
        "students": {"convnet3": {"student": asdict(recipe)}},
        "table": table,
    }
    Store(str(folder)).put("results.json", seal(document))
    return folder


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_one_table_has_every_result_once_in_three_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = evaluation(tmp_path / "a"), evaluation(tmp_path / "b", shift=0.01)
    outs = [str(tmp_path / f"t.{ending}") for ending in ("md", "csv", "tex")]
    assert compare.main([str(one), f"ours & co={two}", str(one), "--out", *outs]) == 0
    rows = table(tmp_path / "t.csv")
    assert [row["method"] for row in rows if row["trained_on"] == "distilled"] == [
        *("sets/DM_v2", "ours & co"),
        *("sets/DM_v2", "ours & co"),
    ]
    # Baselines with other numbers stay, the third copy of the first is gone.
    assert len(rows) == 12
    first = rows[0]
    assert (first["ipc"], first["student"], first["labels"]) == ("1", "convnet3-32", "soft")
    assert float(first["top1_mean"]) == pytest.approx(0.81)
    assert float(first["top1_std"]) == pytest.approx(math.sqrt(2) / 100)
    assert (first["n"], first["num_bytes"], first["teacher_top1"]) == ("2", "5000", "0.95")
    assert {row["differs"] for row in rows} == {""}
    assert {row["ipc"] for row in rows if row["trained_on"] == "all_real"} == {"all"}
    page, tex = (tmp_path / "t.md").read_text(), (tmp_path / "t.tex").read_text()
    assert (
        r"| sets/DM\_v2 | digits | 1 | convnet3-32 | soft | 81.0 ± 1.4 | 2 | 95.0 | 5000 |" in page
    )
    assert "not comparable" not in page
    assert r"ours \& co & digits & 1 & convnet3-32, instance norm & hard & 71.0 $\pm$ 0.0" in tex
    assert tex.count(r"\\") == 13 and r"sets/DM\_v2" in tex
    assert capsys.readouterr().out.count("written") == 3


@pytest.mark.parametrize(
    ("other", "soft", "hard"),
    [
        ({"network": NetworkConfig(width=64)}, "student", "student"),
        ({"network": NetworkConfig(width=32, small_stem=True)}, "", ""),
        ({"epochs": 600}, "budget", "budget"),
        ({"batch_size": 50}, "training", "training"),
        ({"temperature": 4.0}, "training", ""),
        ({"hard": HardLabelConfig(learning_rate=0.1, norm="instance")}, "", "training"),
        ({"num_seeds": 5}, "", ""),
        ({"held_out": "w"}, "held-out images", "held-out images"),
    ],
)
def test_what_other_students_or_budgets_found_is_marked(
    tmp_path: Path, other: dict[str, Any], soft: str, hard: str
) -> None:
    found = results_of(str(evaluation(tmp_path / "a")))
    changed = results_of(str(evaluation(tmp_path / "b", shift=0.01, **other)))
    marked = {
        (r.labels, r.source[-1]): r.differs
        for r in compared([*found, *changed])
        if r.trained_on == "distilled"
    }
    assert marked == {
        ("soft", "a"): "",
        ("soft", "b"): soft,
        ("hard", "a"): "",
        ("hard", "b"): hard,
    }
    assert ("not comparable" in written(compared([*found, *changed]), "md")) == bool(soft + hard)


def test_results_that_were_changed_or_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = evaluation(tmp_path / "a") / "results.json"
    key.write_text(key.read_text().replace("0.82", "0.92"))
    assert compare.main([str(tmp_path / "a")]) == 5
    assert "results.json" in capsys.readouterr().err
    key.write_bytes(seal({"table": []}))
    assert compare.main([str(tmp_path / "a")]) == 5
    assert "expected results as this version of wmdd_ray writes them" in capsys.readouterr().err
    assert compare.main([str(tmp_path)]) == 2
    assert "expected a run whose evaluation is finished" in capsys.readouterr().err
    assert compare.main([str(tmp_path), "--out", "table.xlsx"]) == 2
    assert compare.main([]) == 2


def test_an_interrupted_comparison_ends_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "results_of", interrupted)
    assert compare.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().startswith("interrupted; ")


@pytest.mark.slow
def test_a_run_its_set_and_an_evaluation_of_it_are_one_table(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, root = str(finished_run.out), tmp_path / "several"
    out = str(tmp_path / "tested")
    options = ("--seeds", "2", "--labels", "soft", "--evaluate.epochs", "2", "--executor", "here")
    assert evaluate.main([run, "--out", out, "--evaluate.network.width", "8", *options]) == 0
    shutil.copytree(run, root / "ipc4")
    note_runs(Store(str(root)), (4, 7))
    [own] = [r for r in results_of(f"{run}/dataset") if r.trained_on == "distilled"]
    [tested] = results_of(out)
    assert (own.method, own.recipe, own.ipc, own.data) == ("WMDD best", "digits", 4, "digits")
    assert replace(tested, source="", training="") == replace(own, source="", training="")
    meta = json.loads((finished_run.out / "dataset/manifest.json").read_text())
    assert own.num_bytes == meta["image_bytes"] + meta["label_bytes"]
    capsys.readouterr()
    assert compare.main([run, f"again={root}"]) == 0
    said = capsys.readouterr().out
    assert (
        said.count("WMDD best") == said.count("| again |") == said.count("| all real images |") == 1
    )


# DD-Ranking


def test_the_score_of_the_package_is_that_of_its_published_formula() -> None:
    # HLR 5, IOR 5, alpha 0; HLR 1, IOR 3, alpha 1: in percentage points.
    found = ddranking_scores(
        full_hard=[0.75, 0.71], hard=[0.7, 0.7], soft=[0.8, 0.82], random_soft=[0.75, 0.79]
    )
    assert [row["hard_label_recovery"] for row in found] == pytest.approx([5, 1])
    assert [row["improvement_over_random"] for row in found] == pytest.approx([5, 3])
    zero = (1 - math.exp(-1)) / (math.e - math.exp(-1))
    assert [row["lrs"] for row in found] == pytest.approx([zero, 1])


def test_the_file_of_a_set_is_that_of_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = evaluation(tmp_path / "a"), tmp_path / "lrs.csv"
    assert compare.main([str(run), "--ddranking", str(path)]) == 0
    rows = [{k: float(v) for k, v in row.items()} for row in table(path)]
    assert rows == ddranking_scores(
        full_hard=TOP1["all_real", "hard"],
        hard=TOP1["distilled", "hard"],
        soft=TOP1["distilled", "soft"],
        random_soft=TOP1["random_real", "soft"],
    )
    [own, _] = [r for r in results_of(str(run)) if r.trained_on == "distilled"]
    assert own.lrs_ddranking == pytest.approx(sum(row["lrs"] for row in rows) / 2)
    assert own.lrs == pytest.approx(
        (math.exp(0.01) - math.exp(-1)) / (math.e - math.exp(-1)), abs=3e-3
    )
    two = evaluation(tmp_path / "b", shift=0.01)
    assert compare.main([str(run), str(two), "--ddranking", str(path)]) == 2
    assert "--ddranking: expected one set" in capsys.readouterr().err


def test_the_package_counts_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DD-Ranking itself, given the accuracies. It asks for numpy below 2, so: pip install --no-deps ddranking kornia kornia_rs."""
    metrics = pytest.importorskip("ddranking.metrics")
    score = object.__new__(metrics.LabelRobustScoreSoft)
    score.__dict__.update(
        use_dist=False, rank=0, num_eval=2, ipc=1, num_classes=10, eval_full_data=True
    )
    score.__dict__.update(soft_label_mode="M", save_path=str(tmp_path / "theirs.csv"))
    given = {key: iter(top1) for key, top1 in TOP1.items()}
    monkeypatch.setattr(score, "_get_random_data_helper", lambda eval_iter: ("random", None, None))

    def hard(**asked: Any) -> tuple[float, float]:
        row = "distilled" if asked["mode"] == "syn" else "all_real"
        return 100 * next(given[row, "hard"]), 0.1

    def soft(**asked: Any) -> tuple[float, float]:
        row = "random_real" if asked["image_path"] == "random" else "distilled"
        return 100 * next(given[row, "soft"]), 0.1

    monkeypatch.setattr(score, "_compute_hard_label_metrics_helper", hard)
    monkeypatch.setattr(score, "_compute_soft_label_metrics_helper", soft)
    theirs = score.compute_metrics(image_path="set")
    ours = tmp_path / "ours.csv"
    run = evaluation(tmp_path / "a")
    assert compare.main([str(run), "--ddranking", str(ours)]) == 0
    read = [table(path) for path in (ours, tmp_path / "theirs.csv")]
    assert read[0][0].keys() == read[1][0].keys() and len(read[0]) == len(read[1]) == 2
    for mine, yours in zip(*read, strict=True):
        assert [float(v) for v in mine.values()] == pytest.approx(
            [float(v) for v in yours.values()]
        )
    [own, _] = [r for r in results_of(str(run)) if isinstance(r, Result) and r.lrs is not None]
    assert own.lrs_ddranking == pytest.approx(theirs["label_robust_score_mean"])
