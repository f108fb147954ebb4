import copy
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import bench
from jobs.benches.study import command
from jobs.benches.study.checks import check_result, read_result, required_rows
from jobs.benches.study.definitions import Options
from jobs.benches.study.rendering import (
    README,
    RESULTS,
    committed,
    markers,
    published_lines,
    render,
    rendered,
)
from jobs.benches.study.scores import label_robust_score
from jobs.benches.study.summary import published_numbers, summary_lines
from jobs.benches.study.tables import table_of
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.documents import dump_json, seal

Result = dict[str, Any]


def students(*top1: float) -> Result:
    return {
        "mean": statistics.fmean(top1),
        "std": statistics.stdev(top1),
        "top1": list(top1),
        "seeds": [[0, seed] for seed in range(len(top1))],
        "views": 1000,
        "weights": [f"{seed:064x}" for seed in range(len(top1))],
    }


def row(name: str, soft: Result, hard: Result, **changed: Any) -> Result:
    return {
        "name": name,
        "title": f"the {name}",
        "kind": "recover",
        "recover": {"iterations": 10, "mixed_precision": False, "tiles": 1},
        "barycenters": {"solver": "lloyd"},
        "epochs": 10,
        "num_stored": 100,
        "num_read": 100,
        "image_bytes": [34_000, 36_000],
        "label_bytes": [1_500_000],
        "distill_seconds": [2.0, 4.0],
        "soft": soft,
        "hard": hard,
        **changed,
    }


def made_up() -> Result:
    network = {"arch": "convnet3", "width": 128, "small_stem": False, "norm": "batch"}
    views = {"crop_scale_min": 0.25, "flip": True, "mix": "cutmix", "mix_alpha": 1.0}
    hard = {"optimizer": "sgd", "learning_rate": 0.1, "norm": "instance"}
    hard["views"] = {"crop_scale_min": 0.5, "flip": False, "mix": "none", "mix_alpha": 1.0}
    student = {"network": network, "epochs": 10, "batch_size": 25, "optimizer": "adamw"}
    student |= {"learning_rate": 1e-3, "weight_decay": 0.01, "temperature": 20.0}
    student |= {"mixed_precision": False, "hard": hard}
    about: Result = {"labeled_by": "convnet3", "relabel": {"epochs": 10, "views": views}}
    about["student"] = student
    about |= {"distill_seeds": 1, "student_seeds": 2}
    ours = row("best", students(0.79, 0.81), students(0.69, 0.71))
    ours["lrs"] = label_robust_score(full_hard=0.9, hard=0.7, soft=0.8, random_soft=0.75)
    random = row("random_real", students(0.74, 0.76), students(0.64, 0.66), kind="random")
    random["lrs"] = label_robust_score(full_hard=0.9, hard=0.65, soft=0.75, random_soft=0.75)
    real = []
    for name, kind in (("herding", "herding"), ("nearest_real", "nearest"), ("mosaic", "mosaic")):
        real.append(row(name, students(0.74, 0.76), students(0.64, 0.66), kind=kind))
        real[-1]["lrs"] = dict(random["lrs"])
    full = row("full_data", students(0.91, 0.93), students(0.89, 0.91), kind="full")
    return {
        "table": "main",
        "dataset": "fashion_mnist",
        "data": "f00",
        "fingerprint": "abc",
        "split": "test",
        "opened": "2026-11-22T10:00:00+00:00",
        "num_images": {"train": 55000, "val": 5000, "test": 10000},
        "teachers": {
            "convnet3": {
                "top1": 0.921,
                "top1_val": 0.93,
                "given": "",
                "squeeze": {"epochs": 20, "mixed_precision": False},
                "seconds": 100.0,
            }
        },
        "groups": [
            {"title": "ipc 10", "ipc": 10, **about, "rows": [random, ours, *real]},
            {"title": "all real images", "ipc": 0, **about, "rows": [full]},
        ],
        "hardware": "a processor",
        "versions": {"python": "3.11", "torch": "2.15"},
        "git_revision": "0123456789ab",
    }


# Label-robust score


def test_the_label_robust_score_is_that_of_a_hand_computation() -> None:
    found = label_robust_score(full_hard=0.9, hard=0.7, soft=0.8, random_soft=0.75)
    # HLR 0.2, IOR 0.05, alpha = (0.05 - 0.2) / 2 = -0.075, (0.927743 - 0.367879) / (2.718282 - 0.367879)
    assert found["hlr"] == pytest.approx(0.2)
    assert found["ior"] == pytest.approx(0.05)
    assert found["lrs"] == pytest.approx(0.238199, abs=1e-6)


@pytest.mark.parametrize(
    ("full_hard", "hard", "soft", "random_soft", "lrs"),
    [(0.0, 1.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0, 0.0)],
)
def test_the_label_robust_score_of_fractions_lies_between_0_and_1(
    full_hard: float, hard: float, soft: float, random_soft: float, lrs: float
) -> None:
    found = label_robust_score(full_hard=full_hard, hard=hard, soft=soft, random_soft=random_soft)
    assert found["lrs"] == pytest.approx(lrs)
    equal = label_robust_score(full_hard=0.5, hard=0.5, soft=0.5, random_soft=0.5)
    assert equal["lrs"] == pytest.approx((1 - math.exp(-1)) / (math.e - math.exp(-1)))


# What is shown


def test_a_whole_result_is_rendered_with_everything_a_reader_would_ask_for() -> None:
    text = rendered(seal(made_up()), "r.json")
    lines = text.splitlines()
    full = "| the full_data | 92.0 ± 1.4 | 90.0 ± 1.4 | 2 | 35.0 KB | 1.5 MB | 2.0 |"
    assert full in lines
    ours = "| the best | 80.0 ± 1.4 | 70.0 ± 1.4 | 2 | 35.0 KB | 1.5 MB | 2.0 | 0.238 (+0.200, +0.050) |"
    assert ours in lines
    for fact in (
        *("Teacher convnet3 (20 epochs): top-1 92.1 %", "the 10,000 test images were opened once"),
        *("convnet3 of width 128", "1,000 views", "batch 25", "adamw at 0.001", "KL at T 20"),
        *("1 set x 2 students", "torch 2.15", "revision 0123456789ab", "2026-11-22"),
    ):
        assert fact in text


def test_what_students_by_each_kind_of_labels_do_is_said_once_where_all_groups_share_it() -> None:
    text = rendered(seal(made_up()), "r.json")
    recipe = (
        "Recipe: student convnet3 of width 128, batch 25, cosine schedule, weight decay 0.01. "
        "By soft labels: adamw at 0.001, batch norm, crops from 25 % of the area, flips, CutMix, KL at T 20. "
        "By hard labels: sgd at 0.1, instance norm, crops from 50 % of the area, no mixing, cross-entropy."
    )
    assert recipe in text.splitlines()
    heads = [line for line in text.splitlines() if line.startswith("**")]
    assert heads == [
        "**ipc 10**: 1,000 views; labels by convnet3; 1 set x 2 students.",
        "**all real images**: 1,000 views; labels by convnet3; 1 set x 2 students.",
    ]


def test_what_differs_between_groups_is_said_of_each() -> None:
    result = json.loads(json.dumps(made_up()))  # groups share nothing
    student, relabel = (at(result, "groups", 1, part) for part in ("student", "relabel"))
    student |= {
        "mixed_precision": True,
        "loss": "mse",
        "ce_weight": 0.025,
        "schedule": "half_cosine",
    }
    student["hard"] |= {"norm": "batch", "learning_rate": 0.01}
    relabel["views"] |= {"mix": "none"}
    lines = rendered(seal(result), "r.json").splitlines()
    assert (
        "**all real images**: 1,000 views, half cosine schedule, bfloat16; by soft labels: crops from 25 % of the area, flips, "
        "no mixing, MSE to logits, ce_weight 0.025; by hard labels: sgd at 0.01, batch norm; labels by convnet3; "
        "1 set x 2 students."
    ) in lines
    assert any(
        line.startswith("**ipc 10**: 1,000 views, cosine schedule; by soft") for line in lines
    )
    (recipe,) = (line for line in lines if line.startswith("Recipe:"))
    assert "crops from 50 %" in recipe and "instance" not in recipe and "KL" not in recipe


def test_neighbors_with_the_same_rows_share_a_table_that_says_what_each_does_unlike_the_most() -> (
    None
):
    result = json.loads(json.dumps(made_up() | {"table": "ablation"}))
    usual, full = result["groups"]
    usual["student"]["ema_decay"] = 0.99
    others = [json.loads(json.dumps(usual)) for _ in range(3)]
    result["groups"] = [*others[:2], usual, others[2], full]
    for group, name in zip(
        result["groups"][:4], ("as usual", "KL at T 4", "more views", "no average"), strict=True
    ):
        group["title"] = f"{name}, ipc 10"
    result["groups"][1]["student"]["temperature"] = 4.0
    for found in (row[kind] for row in usual["rows"] for kind in ("soft", "hard")):
        found["views"] = 2000
    del result["groups"][3]["student"]["ema_decay"]
    lines = rendered(seal(result), "r.json").splitlines()
    head, _ = (line for line in lines if line.startswith("**"))
    assert head == (
        "**ipc 10**: 1,000 views, ema_decay 0.99; by soft labels: KL at T 20; labels by convnet3; 1 set x 2 students; "
        "except where said."
    )
    merged = lines[lines.index(head) : -5]
    firsts = [line.split(" | ")[:2] for line in merged if line.startswith("| ")]
    rows = [row["title"] for row in usual["rows"]]
    titles = [
        "as usual",
        "KL at T 4 (by soft labels: KL at T 4)",
        "more views (2,000 views)",
        "no average (no ema_decay 0.99)",
    ]
    assert firsts == [
        ["| labels and student", "trained on"],
        *([f"| {title if row == rows[0] else ''}", row] for title in titles for row in rows),
    ]
    ours = "| 80.0 ± 1.4 | 70.0 ± 1.4 | 2 | 35.0 KB | 1.5 MB | 2.0 | 0.238 (+0.200, +0.050) |"
    assert lines.count(f"|  | the best {ours}") == len(titles)


def test_what_was_computed_in_half_precision_is_said() -> None:
    result = made_up()
    assert "bfloat16" not in rendered(seal(result), "r.json")
    result["teachers"]["convnet3"]["squeeze"]["mixed_precision"] = True
    at(result, *OURS, "recover")["mixed_precision"] = True
    lines = rendered(seal(result), "r.json").splitlines()
    assert "Teacher convnet3 (20 epochs, bfloat16): top-1 92.1 %." in lines
    assert "Images that are optimized: in bfloat16." in lines
    plain = copy.deepcopy(at(result, *OURS)) | {"title": "another"}
    plain["recover"]["mixed_precision"] = False
    result["groups"][0]["rows"].append(plain)
    assert "Images that are optimized (the best): in bfloat16." in rendered(seal(result), "r.json")


def test_who_had_opened_the_test_images_before_is_told() -> None:
    result = made_up()
    assert "before" not in rendered(seal(result), "r.json")
    result["opened_before"] = []
    assert "before" not in rendered(seal(result), "r.json")
    result["opened_before"] = [
        {"table": name, "opened": f"2026-11-{day}T10:00:00+00:00"}
        for name, day in (("digits", 20), ("alignment", 21))
    ]
    told = "on 2026-11-22; the test images had been opened before: digits on 2026-11-20, alignment on 2026-11-21."
    assert told in rendered(seal(result), "r.json")
    for wrong in (None, [{"table": "digits", "on": ""}], "digits"):
        result["opened_before"] = wrong
        with pytest.raises(ArtifactError, match="opened_before: expected tables and times"):
            rendered(seal(result), "r.json")


def test_students_that_are_one_by_their_weights_count_once() -> None:
    result = made_up()
    once = rendered(seal(result), "r.json")
    # Three sets of the same images, trained by the same two seeds.
    random, *_ = result["groups"][0]["rows"]
    for found in (row[kind] for row in result["groups"][0]["rows"] for kind in ("soft", "hard")):
        found |= {name: found[name] * 3 for name in ("top1", "seeds", "weights")}
        found["std"] = statistics.stdev(found["top1"])
    assert random["soft"]["std"] < 0.0110
    thrice = rendered(seal(result), "r.json")
    assert "which count once" in thrice and "which count once" not in once
    # Spread, mean, number and LRS are those of the two.
    assert [line for line in once.splitlines() if line.startswith("|")] == [
        line for line in thrice.splitlines() if line.startswith("|")
    ]
    random["hard"]["weights"] = [f"{number:064x}" for number in range(6)]
    assert "| 2 and 6 |" in rendered(seal(result), "r.json")


def test_published_numbers_have_three_columns_a_label_kind_and_a_source() -> None:
    lines = [line for dataset in published_numbers() for line in published_lines(dataset)]
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert all(len(cells) == 6 for cells in rows)
    assert all(cells[1].split(",")[0] in ("labels", "soft", "hard") for cells in rows)
    assert all(cells[-1].rstrip(" |") for cells in rows)


# What is refused


def test_a_result_with_a_changed_number_is_refused() -> None:
    content = seal(made_up())
    better = content.replace(b"0.81", b"0.91")
    assert better != content
    with pytest.raises(ArtifactError, match="checksum"):
        read_result(better, "r.json")
    with pytest.raises(ArtifactError, match="checksum"):
        read_result(dump_json(made_up()), "r.json")


def at(result: Result, *path: Any) -> Any:
    for key in path:
        result = result[key]
    return result


OURS = ("groups", 0, "rows", 1)


@pytest.mark.parametrize(
    "path",
    [
        *[("versions",), ("hardware",), ("git_revision",), ("fingerprint",), ("opened",)],
        *[("teachers",), ("teachers", "convnet3", "top1"), ("groups", 0, "student")],
        *[("groups", 0, "student", "batch_size"), ("groups", 0, "relabel")],
        *[("groups", 0, "student", "hard"), ("groups", 1, "student", "mixed_precision")],
        *[("groups", 0, "student", "hard", "norm"), ("groups", 0, "student", "hard", "views")],
        *[("groups", 0, "relabel", "views", "mix"), ("groups", 0, "student", "network", "norm")],
        *[("teachers", "convnet3", "squeeze", "mixed_precision")],
        *[(*OURS, "recover", "mixed_precision")],
        *[("groups", 0, "student_seeds"), ("groups", 0, "distill_seeds")],
        *[(*OURS, "soft"), (*OURS, "hard"), (*OURS, "hard", "seeds"), (*OURS, "soft", "top1")],
        *[(*OURS, "label_bytes"), (*OURS, "image_bytes"), (*OURS, "distill_seconds")],
        *[(*OURS, "soft", "weights"), ("groups", 0, "rows", 0), ("groups", 1, "rows", 0, "hard")],
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_result_that_lacks_a_part_is_refused(path: tuple[Any, ...]) -> None:
    check_result(made_up(), "r.json")
    result = made_up()
    del at(result, *path[:-1])[path[-1]]
    with pytest.raises(ArtifactError, match="it is not rendered without"):
        read_result(seal(result), "r.json")


def of_val(result: Result) -> None:
    result["split"] = "val"


def other_mean(result: Result) -> None:
    at(result, *OURS, "soft")["mean"] += 0.01


def other_views(result: Result) -> None:
    at(result, *OURS, "soft")["views"] *= 2


def fewer_students(result: Result) -> None:
    at(result, *OURS)["soft"] = students(0.79, 0.81, 0.8)


def more_images(result: Result) -> None:
    at(result, *OURS)["num_stored"] = 200


def other_score(result: Result) -> None:
    at(result, *OURS, "lrs")["lrs"] += 0.1


def no_score(result: Result) -> None:
    del at(result, *OURS)["lrs"]


def other_teacher(result: Result) -> None:
    at(result, "groups", 0)["labeled_by"] = "resnet50"


def without_mosaics(result: Result) -> None:
    at(result, "groups", 0, "rows").pop()


def without_real_images_beside_small_ones(result: Result) -> None:
    at(result, *OURS, "recover")["tiles"] = 2


def other_top1_of_the_same_weights(result: Result) -> None:
    at(result, *OURS, "soft")["weights"] = ["f" * 64] * 2


def a_student_more_often(result: Result) -> None:
    for shown in result["groups"][0]["rows"]:
        for kind in ("soft", "hard"):
            shown[kind] = students(0.7, 0.8, 0.7)
            shown[kind]["weights"][2] = shown[kind]["weights"][0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without_mosaics, "group ipc 10 has no row mosaic; run"),
        (
            without_real_images_beside_small_ones,
            "no row random_tiles and no nearest_tiles and no mo",
        ),
        (other_top1_of_the_same_weights, "students of the same weights and other top-1"),
        (a_student_more_often, "students that are there more often than others"),
        (of_val, "expected numbers of the test split, found val"),
        (other_mean, "mean and std are not those of its students"),
        (other_views, "had other budgets"),
        (fewer_students, "had other budgets"),
        (more_images, "had other budgets"),
        (other_score, "LRS does not follow from the accuracies"),
        (no_score, "LRS and the row full_data go together"),
        (other_teacher, "labeled by an unknown teacher"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(
    fault: Callable[[Result], None], message: str
) -> None:
    result = copy.deepcopy(made_up())
    fault(result)
    with pytest.raises(ArtifactError, match=message):
        read_result(seal(result), "r.json")


def test_the_main_table_must_have_every_row_of_real_images_that_it_trains() -> None:
    for group in table_of("main", Options()).groups:
        rows = [
            {"name": row.name, "kind": row.kind, "recover": {"tiles": row.recover.tiles}}
            for row in group.rows
        ]
        real = {row.name for row in group.rows if row.kind not in ("recover", "full")}
        required = set(required_rows("main", group.ipc, rows))
        # Where `best` is whole images its crops by themselves came later: results of before do not have them.
        whole = any(row.name == "best" and row.tiles == 1 for row in group.rows)
        assert real == required | ({"mosaic_tiles"} if whole else set())


@pytest.mark.parametrize("name", ["herding", "nearest_real", "mosaic"])
def test_only_the_main_table_must_have_every_kind_of_real_images(name: str) -> None:
    result = made_up()
    group = result["groups"][0]
    group["rows"] = [row for row in group["rows"] if row["name"] != name]
    with pytest.raises(ArtifactError, match=f"has no row {name};"):
        check_result(result, "r.json")
    check_result(result | {"table": "digits"}, "r.json")


# The pages


def test_rendering_fills_the_places_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    page = results / "README.md"
    results.mkdir()
    content = seal(made_up())
    (results / "accuracy-main.json").write_bytes(content)
    (results / "accuracy-main-ipc50.json").write_bytes(content)

    def places(*names: str) -> str:
        return "# before\n" + "".join(
            "\n{}\nold\n{}\n\nafter\n".format(*markers(name)) for name in names
        )

    def filled(text: str, name: str, table: str) -> str:
        begin, end = markers(name)
        return text.replace(f"{begin}\nold\n{end}", f"{begin}\n{table}{end}")

    published = {f"published-{dataset}": dataset for dataset in published_numbers()}
    tables, summary = places("main", *published, "main-ipc50"), places("summary")
    page.write_text(tables)
    readme.write_text(summary)
    for _ in range(2):
        assert render(readme, results) == ["main", "main-ipc50"]
        text = tables
        for name, dataset in published.items():
            text = filled(text, name, "\n".join(published_lines(dataset)) + "\n")
        for name in ("main", "main-ipc50"):
            text = filled(text, name, rendered(content, "r.json"))
        assert page.read_text() == text
        lines = summary_lines([made_up()])
        assert readme.read_text() == filled(summary, "summary", "\n".join(lines) + "\n")
    page.write_text("# before\n")
    with pytest.raises(ArtifactError, match="expected the lines <!-- accuracy:main -->"):
        render(readme, results)


def shown(page: Path) -> dict[str, str]:
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- accuracy:(\S+) -->\n(.*?)<!-- /accuracy:\1 -->", text, re.DOTALL))


def test_the_pages_show_the_committed_results_and_no_others() -> None:
    tables = shown(RESULTS / "README.md")
    for dataset in published_numbers():
        lines = published_lines(dataset)
        assert tables.pop(f"published-{dataset}") == "\n".join(lines) + "\n"
    # A table that nobody can check has no place.
    assert tables == {name: rendered(path.read_bytes(), name) for name, path in committed().items()}
    results = [json.loads(path.read_bytes()) for path in committed().values()]
    assert shown(README) == {"summary": "\n".join(summary_lines(results)) + "\n"}
    for name, result in zip(committed(), results, strict=True):
        assert name.split("-")[0] == result["table"]


# The summary


def options_typed(page: str) -> list[list[str]]:
    """Return the options of each `bench.py accuracy` of a page; a piece of code from `--ipc` on changes those above it."""
    typed: list[list[str]] = []
    pattern = r"python jobs/bench\.py accuracy((?:\\\n|[^`\n])*)|`(--ipc [^`]*)`"
    for whole, changes in re.findall(pattern, page):
        words = shlex.split((whole or changes).replace("\\\n", " "))
        typed.append([*typed[-1], *words] if changes else words)
    return [words for words in typed if "--render" not in words]


class TableFoundError(Exception):
    """A command line named a table, and rows and groups of it."""


@pytest.fixture
def stops_at_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `bench.py accuracy` end once it has made the table that its options ask for."""

    def stop(*asked: Any) -> None:
        table_of(*asked)
        raise TableFoundError

    monkeypatch.setattr(command, "table_of", stop)


@pytest.mark.usefixtures("stops_at_its_table")
@pytest.mark.parametrize("words", options_typed((RESULTS / "README.md").read_text()), ids=" ".join)
def test_the_commands_of_the_page_name_tables_groups_and_rows_that_there_are(
    words: list[str],
) -> None:
    with pytest.raises(TableFoundError):
        bench.main(["accuracy", *words])


@pytest.mark.usefixtures("stops_at_its_table")
def test_a_row_of_before_in_a_command_of_a_page_is_found() -> None:
    page = "```bash\npython jobs/bench.py accuracy --table ablation \\\n    --rows best\n```\nand `--ipc 50 --rows uniform`"
    right, wrong = options_typed(page)
    assert wrong == ["--table", "ablation", "--rows", "best", "--ipc", "50", "--rows", "uniform"]
    with pytest.raises(TableFoundError):
        bench.main(["accuracy", *right])
    with pytest.raises(SystemExit, match="--rows: expected some of best, lloyd"):
        bench.main(["accuracy", *wrong])


def test_the_summary_has_means_by_both_labels_all_real_images_and_the_published_best() -> None:
    ablation = made_up() | {"table": "ablation"}
    assert summary_lines([made_up(), made_up(), ablation])[2:] == [
        "| `fashion_mnist`, convnet3 of width 128 | 10 | 80.0 / 70.0 | 75.0 / 65.0 | 75.0 / 65.0 | 86.8 (KIP) / 85.3 (IDC) |",
        "| `fashion_mnist`, convnet3 of width 128 | all | – | 92.0 / 90.0 | – | – |",
    ]


def test_images_that_decode_to_several_are_compared_with_published_ones_that_do() -> None:
    result = made_up()
    result["groups"][0]["rows"][1]["num_read"] = 400
    # Those of one image decoded of each are rivals too.
    assert summary_lines([result])[2].endswith("| 86.8 (KIP) / 89.1 (FreD) |")


@pytest.mark.parametrize(("key", "value"), [("dataset", "digits"), ("width", 32)])
def test_published_numbers_stand_beside_their_own_data_and_network_only(
    key: str, value: str | int
) -> None:
    result = made_up()
    if key == "width":
        for group in result["groups"]:
            group["student"]["network"]["width"] = value
    else:
        result[key] = value
    assert summary_lines([result])[2].endswith("75.0 / 65.0 | – |")
