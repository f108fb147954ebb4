import ast
import dataclasses
import gzip
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import bench, distill
from jobs.benches.study import ablation, definitions, judge, work
from jobs.benches.study.definitions import (
    Group,
    Options,
    Row,
    Table,
    budget_of,
    require_equal_budgets,
)
from jobs.benches.study.engine import Job, Study
from jobs.benches.study.splits import make_place
from jobs.benches.study.tables import table_of
from wmdd_ray.config import (
    EvaluateConfig,
    LabelKind,
    RecoverConfig,
    RelabelConfig,
    SourceConfig,
    SqueezeConfig,
)
from wmdd_ray.core.views import draw_block
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.run import run_pipeline
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import unseal
from wmdd_ray.store.sources import load_images, open_source
from wmdd_ray.units import images

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jobs" / "benches" / "study"
ROWS = (
    *("random_real", "herding", "nearest_real", "mosaic", "random_tiles", "nearest_tiles"),
    *("mean_matching", "best", "full_data"),
)
# A table of all kinds of rows in seconds: it shows how the harness works, and nothing about methods.
TINY = Options(
    ipc=(2,),
    rows=ROWS,
    distill_seeds=1,
    student_seeds=2,
    width=8,
    epochs=1,
    full_epochs=1,
    teacher_epochs=2,
    iterations=4,
    tiles=2,
)
TIMES = {"opened", "seconds", "features_seconds", "distill_seconds", "label_seconds"}


def arguments(out: Path, **changed: Any) -> list[str]:
    options = {k: v for k, v in dataclasses.asdict(TINY).items() if v not in (None, "", (), False)}
    options |= {"table": "digits", "out": str(out), **changed}
    words = ["accuracy"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *(str(v) for v in values)]
    return words


def result_of(out: Path, name: str = "accuracy-digits.json") -> dict[str, Any]:
    return unseal((out / name).read_bytes(), name)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def opened_at(out: Path, options: Options = TINY) -> tuple[Table, Study, list[work.Trained]]:
    table = table_of("digits", options)
    study = Study(make_place(str(out), "digits", table.source, table.held_out))
    return table, study, work.rows_of(table, study)


def lose(study: Study, job: Job) -> None:
    """Remove a student of a finished job, and the commit of its room."""
    room = Path(study.room(job).store.uri)
    (room / "stage.json").unlink()
    (room / "units" / f"{work.units_of(job)[-1]}.json").unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished table, made by this process. Read only."""
    out = tmp_path_factory.mktemp("accuracy") / "out"
    bench.main(arguments(out))
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished table that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def unopened(copied: Path) -> Path:
    """A table whose students are trained and whose test split is closed."""
    shutil.rmtree(copied / "opened")
    (copied / "accuracy-digits.json").unlink()
    return copied


# One budget


def test_all_rows_have_the_same_views_steps_labels_and_number_of_students(finished: Path) -> None:
    group = result_of(finished)["groups"][0]
    assert [row["name"] for row in group["rows"]] == [*ROWS[:-1]]
    assert {row["num_stored"] for row in group["rows"]} == {20}
    # Where a stored image is four small ones, students read four times the images in a quarter of the passes.
    tiled = {row["name"] for row in group["rows"] if (row["num_read"], row["epochs"]) == (80, 1)}
    assert tiled == {"random_tiles", "nearest_tiles", "best"}
    whole = {row["name"] for row in group["rows"] if (row["num_read"], row["epochs"]) == (20, 4)}
    assert tiled | whole == {row["name"] for row in group["rows"]}
    for kind in ("soft", "hard"):
        assert {row[kind]["views"] for row in group["rows"]} == {80}
        assert {len(set(map(tuple, row[kind]["seeds"]))) for row in group["rows"]} == {2}
    _, study, rows = opened_at(finished)
    for row in rows[:-1]:
        room = study.room(row.sets[0]["relabel"])
        files = [f for marker in room.committed().units.values() for f in marker.files]
        blocks = [codecs.decode_soft_labels(room.read(f), draw_block) for f in files]
        assert sum(len(block.views) for block in blocks) == 80


def test_no_two_students_of_a_row_start_from_the_same_weights(finished: Path) -> None:
    # Herded images are the same in every set, so that nothing but the seed can tell its students apart.
    three = dataclasses.replace(TINY, rows=("herding", "full_data"), distill_seeds=3)
    _, study, rows = opened_at(finished, three)
    first = {row.row.name: row.students for row in opened_at(finished)[2]}
    for row in rows:
        for kind in work.LABELS:
            jobs = row.students[kind]
            students = [(job.config.seed, unit) for job in jobs for unit in work.units_of(job)]
            assert len(set(students)) == 6
            # What was trained for one set is found again.
            if row.row.kind != "full":
                assert study.id(jobs[0]) == study.id(first[row.row.name][kind][0])


def test_students_of_hard_labels_are_made_by_the_recipe_for_hard_labels(finished: Path) -> None:
    _, study, rows = opened_at(finished)
    names = {}
    for kind in work.LABELS:
        job = rows[0].students[kind][0]
        entry = study.done(job).file(f"students/{work.units_of(job)[0]}.safetensors")
        names[kind] = codecs.decode_state(study.room(job).read(entry)).keys()
    assert "bn1.running_mean" in names["soft"]
    assert "in1.weight" in names["hard"]
    assert not any(name.startswith("bn") for name in names["hard"])


def test_rows_have_no_field_for_labels_or_students() -> None:
    held = {field.name for field in dataclasses.fields(Row)}
    assert held == {"name", "title", "kind", "barycenters", "recover"}


def group_of(rows: tuple[Row, ...], ipc: int = 1, batch_size: int = 10, tiles: int = 1) -> Group:
    return Group(
        title="g",
        ipc=ipc,
        tiles=tiles,
        teacher=definitions.TeacherRecipe(name="t", squeeze=SqueezeConfig()),
        relabel=RelabelConfig(epochs=8),
        student=EvaluateConfig(epochs=8, batch_size=batch_size),
        rows=rows,
        distill_seeds=1,
        student_seeds=1,
    )


RANDOM_ROW = Row(name="random_real", title="", kind="random")
TILED_ROW = Row(name="tiled", title="", kind="random", recover=RecoverConfig(tiles=2))


def test_a_group_whose_rows_would_take_other_steps_is_refused() -> None:
    require_equal_budgets(group_of((RANDOM_ROW, TILED_ROW), batch_size=10))
    # Ten images are one step of at most 20, forty are two, in a quarter of the epochs: half the steps.
    require_equal_budgets(group_of((RANDOM_ROW, TILED_ROW), batch_size=10, tiles=2))
    with pytest.raises(ConfigError, match=r"differ in \(views, steps, labels\)"):
        require_equal_budgets(group_of((RANDOM_ROW, TILED_ROW), batch_size=20))


def test_a_group_without_random_real_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="without the row random_real proves nothing"):
        require_equal_budgets(group_of((TILED_ROW,)))


def test_epochs_that_small_images_do_not_divide_are_refused() -> None:
    row = dataclasses.replace(TILED_ROW, recover=RecoverConfig(tiles=3))
    with pytest.raises(ConfigError, match="9 small images a stored one divide"):
        budget_of(group_of((row,)), row, 90)


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rows: expected some of best"):
        table_of("digits", dataclasses.replace(TINY, rows=("bets",)))
    with pytest.raises(ConfigError, match=r"--groups: expected parts of \['ipc 2', .*got 'ipc 3'"):
        table_of("digits", dataclasses.replace(TINY, groups=("all", "ipc 3")))


def test_groups_are_had_whole_by_a_part_of_their_title() -> None:
    whole = table_of("alignment", Options(ipc=(1, 10)))
    found = table_of("alignment", Options(ipc=(1, 10), groups=("one teacher, ipc", "2 teachers")))
    assert [group.title for group in found.groups] == [
        *("one teacher, ipc 1", "LIA: 2 teachers, ipc 1"),
        *("one teacher, ipc 10", "LIA: 2 teachers, ipc 10"),
    ]
    assert set(found.groups) < set(whole.groups)


@pytest.mark.parametrize("name", ["main", "cross", "digits", "ablation"])
def test_every_table_has_equal_budgets_and_ids_of_its_own(name: Any, finished: Path) -> None:
    table = table_of(name, Options())
    assert all(group.student_seeds * group.distill_seeds >= 5 for group in table.groups)
    assert all(group.distill_seeds >= 3 for group in table.groups if 0 < group.ipc <= 10)
    # On digits' arrays, which are as good as any to count jobs.
    _, study, _ = opened_at(finished)
    rows = work.rows_of(dataclasses.replace(table, dataset="digits"), study)
    stages = [job.stage for job in study.closure(work.jobs_of(rows))]
    # One pass over the data a teacher that atoms are of; three others are trained together.
    passes = 2 if name == "cross" else 1
    assert stages.count("features") == passes
    assert stages.count("squeeze") == passes + (name == "ablation")
    for kind in work.LABELS:
        ids = [study.id(job) for row in rows for job in row.students[kind]]
        assert len(set(ids)) == len(ids) or name != "main"


def test_the_ablation_takes_back_every_difference_between_best_and_paper_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of the paper's recipe, so that the differences are the ones that are named here.
    plain = recipe_of("fashion_mnist", 10, "paper")
    best = dataclasses.replace(
        plain,
        recover=dataclasses.replace(
            plain.recover, start="nearest", tiles=2, residual_blends=3, moments="blend"
        ),
        evaluate=dataclasses.replace(plain.evaluate, loss="mse", ema_decay=0.99),
    )
    monkeypatch.setattr(
        definitions,
        "recipe_of",
        lambda name, ipc, variant="best": plain if variant == "paper" else best,
    )
    images, *students, published = table_of("ablation", Options()).groups
    names = [row.name for row in images.rows]
    taken_back = ["moments", "start", "tiles", "residual_blends"]
    built = list(ablation.IMAGE_OPTIONS)
    for name in ("with_blended_moments", "with_residual_blends", "with_tiles"):
        built.remove(name)  # which `best` has
    assert names == ["random_real", "best", *(f"without_{name}" for name in taken_back), *built]
    for row in images.rows[2 : -len(built)]:
        differs = ablation.differences(best.recover, row.recover)
        # Noise has no start to be blended with.
        extra = {"residual_blends"} if row.name == "without_start" else set()
        assert set(differs) == {row.name.removeprefix("without_")} | extra
    assert [group.student.loss for group in students[:2]] == ["kl", "mse"]
    assert [group.student.ema_decay for group in students[:2]] == [0.99, 0.0]
    for group in students[2:]:
        parts = ("relabel", "student")
        changed = [ablation.differences(getattr(group, p), getattr(images, p)) for p in parts]
        together = {"loss", "ce_weight"} if "CE" in group.title else {"epochs"}
        assert len({*changed[0], *changed[1]}) == 1 or {*changed[0], *changed[1]} == together
    assert all([r.name for r in group.rows] == ["random_real", "best"] for group in students)
    assert [row.name for row in published.rows] == ["random_real", "paper"]
    assert published.rows[1].recover == plain.recover
    assert (published.relabel, published.student.optimizer) == (plain.relabel, "adamw")


@pytest.mark.parametrize("ipc", [1, 10])
def test_everything_that_was_built_for_a_recipe_is_in_its_ablation_once(ipc: int) -> None:
    images, _, *students, published = table_of("ablation", Options(ipc=(ipc,))).groups
    assert len({ablation.images_of(row) for row in images.rows}) == len(images.rows)
    recipes = [(g.relabel, g.student) for g in (images, *students, published)]
    assert len(set(recipes)) == len(recipes)
    # Fields of which no value but that of `best` is tried, and why.
    untried = {
        *("method", "diffusion", "feature_weight", "beta1", "beta2"),  # bn_weight is their lambda
        *("flip", "mixed_precision", "images_per_group", "checkpoint_s"),  # no choice of quality
        *("max_iters", "tol", "num_starts", "reg", "num_projections"),  # of solvers, to their end
        "label_weight",  # the table `longtail`
        "anchor_depth",
    }
    for part in ("barycenters", "recover"):
        values = [getattr(row, part) for row in images.rows[1:]]
        for name in (f.name for f in dataclasses.fields(values[0])):
            tried = len({getattr(value, name) for value in values}) > 1
            # Of the start's own options a recipe that begins from noise has none.
            assert tried != (name in untried) or name in {
                "iterations",
                "learning_rate",
                "bn_weight",
            }, name


@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_every_row_and_group_of_the_ablation_trains_students_that_best_does_not(
    ipc: int, finished: Path
) -> None:
    # On digits' arrays, which are as good as any to count jobs.
    _, study, _ = opened_at(finished)
    table = table_of("ablation", Options(ipc=(ipc,)))
    images, *others = table.groups

    def students(group: Group, row: Row) -> set[str]:
        # Those of the labels that the group changes: what is of hard labels alone leaves soft ones alone.
        labels: LabelKind = "soft" if group.student.hard == images.student.hard else "hard"
        trained = work.jobs_of_row(table, group, row, study)
        return {study.id(job) for job in trained.students[labels]}

    random, best, *rows = images.rows
    pairs = [(images, row) for row in (best, *rows)] + [(g, g.rows[1]) for g in others]
    ids = [students(group, row) for group, row in pairs]
    assert len(set().union(*ids)) == sum(map(len, ids))
    beside = [students(group, group.rows[0]) for group in others]
    whole = work.jobs_of_row(table, images, random, study)
    assert not set().union(*beside) & {study.id(job) for job in whole.student_jobs}


def names_in_ablation(**options: Any) -> set[str]:
    images, *students = table_of("ablation", Options(**options)).groups
    return {row.name for row in images.rows} | {group.title.split(",")[0] for group in students}


def test_options_that_the_rest_of_a_recipe_rules_out_are_left_out_of_its_ablation() -> None:
    all_of_it = names_in_ablation(ipc=(10,))
    # A fourth of an epoch is no epoch, and a fourth of 11 batches of 10 images no batch of 25.
    assert all_of_it - names_in_ablation(ipc=(10,), epochs=2) == {"with_tiles", "900 epochs"}
    assert all_of_it - names_in_ablation(ipc=(11,)) == {"with_tiles"}
    # Three blends need four iterations; as many as this asks for both variants have.
    short = {"with_residual_blends", "without_iterations"}
    assert all_of_it - names_in_ablation(ipc=(10,), iterations=3) == short
    assert "with_residual_blends" in names_in_ablation(ipc=(10,), iterations=4)
    # One atom is a mean, whatever it is found by.
    idle = {"without_solver", "lloyd", "with_margin", "with_mean", "with_weighted_moments"}
    alone = {*idle, "loss by the atoms' weights", "batch size 100"}
    assert all_of_it - names_in_ablation(ipc=(1,), tiles=1) >= alone
    assert not names_in_ablation(ipc=(1,), tiles=1) & {*alone, "sliced"}
    assert "sliced" in names_in_ablation(ipc=(1,))


def test_residual_blends_are_left_out_where_best_starts_from_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = recipe_of("fashion_mnist", 10, "paper")
    monkeypatch.setattr(definitions, "recipe_of", lambda *_: plain)
    images = table_of("ablation", Options()).groups[0]
    built = set(ablation.IMAGE_OPTIONS) - {"with_residual_blends"}
    assert {row.name for row in images.rows} == {"random_real", "best"} | built


@pytest.mark.parametrize(("table", "ipc"), [("main", 10), ("main", 50), ("digits", 5)])
def test_easiest_crops_stand_alone_too_where_best_is_whole_images(table: Any, ipc: int) -> None:
    group = table_of(table, Options(ipc=(ipc,))).groups[0]
    rows = {row.name: row for row in group.rows}
    assert (rows["best"].tiles, rows["mosaic_tiles"].tiles) == (1, 2)
    least = f"{100 * rows['best'].recover.crop_scale_min:g} % of the area"
    for name in ("mosaic", "mosaic_tiles"):
        assert least in rows[name].title
        assert rows[name].recover.crop_scale_min == rows["best"].recover.crop_scale_min
    few = table_of(table, Options(ipc=(ipc,), epochs=1)).groups[0]
    assert set(rows) - {row.name for row in few.rows} == {"mosaic_tiles"}


# Found again


def test_a_table_runs_again_without_doing_anything(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    def written() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in finished.glob("*/**/*") if p.is_file()}

    before, found = written(), result_of(finished)
    bench.main(arguments(finished))
    assert written() == before
    assert " left" not in capsys.readouterr().out
    assert result_of(finished) == found


@pytest.mark.chaos
def test_a_table_whose_driver_was_killed_goes_on_to_the_numbers_of_one_process(
    finished: Path, tmp_path: Path
) -> None:
    names = ("random_real", "nearest_tiles", "best")
    script = (
        "import sys; sys.modules['ray'] = None\nfrom jobs import bench\nbench.main(sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    two = [sys.executable, "-c", script, *arguments(tmp_path, rows=names, processes=2)]
    with subprocess.Popen(two, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        while driver.poll() is None and not [*tmp_path.glob("**/students/*/units/*.json")]:
            time.sleep(0.05)
        driver.kill()
        # The line closes when the worker processes, which write to it too, have seen it and ended.
        assert driver.stderr is not None
        driver.stderr.read()
    done = {p: p.read_bytes() for p in tmp_path.rglob("*.json") if p.parent.name == "units"}
    students = [p for p in done if p.parents[2].name == "students"]
    assert 1 <= len(students) < 12
    assert not (tmp_path / "opened").exists()
    bench.main(arguments(tmp_path, rows=names, processes=2))
    assert {p: p.read_bytes() for p in done} == done
    expected = {row["name"]: row for row in result_of(finished)["groups"][0]["rows"]}
    for row in result_of(tmp_path)["groups"][0]["rows"]:
        scored = {k: v for k, v in expected[row["name"]].items() if k != "lrs"}
        assert without_times(row) == without_times(scored)


def test_an_option_of_the_student_changes_students_and_nothing_upstream(finished: Path) -> None:
    _, study, rows = opened_at(finished)

    def ids(options: Options, students: bool) -> set[str]:
        jobs = study.closure(work.jobs_of(opened_at(finished, options)[2]))
        return {study.id(job) for job in jobs if (job.stage == "students") == students}

    more = dataclasses.replace(TINY, student_seeds=3)
    assert ids(TINY, students=False) == ids(more, students=False)
    assert not ids(TINY, students=True) & ids(more, students=True)
    deeper = opened_at(finished, dataclasses.replace(TINY, iterations=5))[2]
    other = [
        a.row.name
        for a, b in zip(rows, deeper, strict=True)
        if [study.id(job) for job in a.jobs] != [study.id(job) for job in b.jobs]
    ]
    assert other == ["mean_matching", "best"]


def test_a_given_teacher_takes_the_place_of_the_trained_one(finished: Path, tmp_path: Path) -> None:
    _, study, rows = opened_at(finished)
    teacher = study.room(rows[0].sets[0]["squeeze"]).store.uri
    out, names = tmp_path / "given", ("random_real",)
    bench.main(arguments(out, teacher=teacher, rows=names, split="val"))
    given = result_of(out, "accuracy-digits-val.json")
    assert given["teachers"]["convnet3"]["given"] == teacher
    bench.main(arguments(tmp_path / "own", rows=names, split="val"))
    same = result_of(tmp_path / "own", "accuracy-digits-val.json")
    assert without_times(given["groups"]) == without_times(same["groups"])


def test_a_plan_counts_the_jobs_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main([*arguments(tmp_path), "--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert "squeeze          1 jobs,     1 to do" in lines
    assert "students        18 jobs,    18 to do" in lines
    assert {p.name for p in tmp_path.iterdir()} == {"splits"}


# The product's own units


def test_a_study_makes_the_bytes_of_the_pipeline(finished: Path, tmp_path: Path) -> None:
    _, study, rows = opened_at(finished)
    job = next(row for row in rows if row.row.name == "best").sets[0]["recover"]
    config = job.config
    run = distill.open_run(
        distill.parse(["--executor", "here", "--out", str(tmp_path), "--recipe", "digits"])
    )
    run.config, run.open_source = config, study.place.source_of
    commits = run_pipeline(run, PIPELINE, last="recover")
    assert commits["images"].fingerprint == study.id(job)
    files = {f.key: f.sha256 for m in commits["images"].units.values() for f in m.files}
    assert files == {f.key: f.sha256 for m in study.done(job).units.values() for f in m.files}


def test_an_error_in_the_units_of_the_product_changes_the_numbers_of_a_study(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("random_real", "best")
    moments: Any = vars(images)["variance_S"]
    # Variances that a class does not have are met by other images.
    monkeypatch.setattr(images, "variance_S", lambda of_class: 9 * moments(of_class))
    bench.main(arguments(tmp_path, rows=names))
    expected = {row["name"]: row for row in result_of(finished)["groups"][0]["rows"]}
    for row in result_of(tmp_path)["groups"][0]["rows"]:
        same = row["soft"]["weights"] == expected[row["name"]]["soft"]["weights"]
        assert same == (row["name"] == "random_real")


# Splits


def write_idx(folder: Path, split: str, images_NHW: np.ndarray, labels_N: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    head = struct.pack(">HBB", 0, 8, 3) + struct.pack(">III", *images_NHW.shape)
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
        file.write(head + images_NHW.tobytes())
    head = struct.pack(">HBB", 0, 8, 1) + struct.pack(">I", len(labels_N))
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(head + labels_N.astype(np.uint8).tobytes())


GRAY = SourceConfig(format="idx", image_size=8, resize=8, channels=1, mean=(0.5,), std=(0.25,))


def test_val_is_the_last_of_the_training_file_and_test_is_nowhere_in_the_folder(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    train_NHW, test_NHW = (rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for n in (50, 30))
    label_N = rng.permutation(np.arange(50) % 10)
    write_idx(tmp_path / "data", "train", train_NHW, label_N)
    write_idx(tmp_path / "data", "t10k", test_NHW, np.arange(30) % 10)
    place = make_place(str(tmp_path / "out"), str(tmp_path / "data"), GRAY, 20)
    train, val = place.load("train"), place.load("val")
    np.testing.assert_array_equal(train.images_NHWC[..., 0], train_NHW[:30])
    np.testing.assert_array_equal(val.images_NHWC[..., 0], train_NHW[30:])
    np.testing.assert_array_equal(train.labels_N, label_N[:30])
    np.testing.assert_array_equal(val.labels_N, label_N[30:])
    stored = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert train_NHW[0].tobytes() in stored
    assert not any(image.tobytes() in stored for image in test_NHW)
    # Neither the folder nor what training is handed says where the data is.
    assert str(tmp_path / "data").encode() not in stored
    assert str(tmp_path / "data") not in repr(place)


def test_val_of_digits_is_a_tenth_of_each_class_of_the_training_part(finished: Path) -> None:
    place = opened_at(finished)[1].place
    train_Y, val_Y = (np.bincount(place.load(part).labels_N) for part in ("train", "val"))
    per_class = train_Y + val_Y
    np.testing.assert_array_equal(val_Y, per_class // 10)
    assert per_class.sum() == 1437


# Leaks


def reachable(thing: Any, seen: set[int]) -> Iterator[Any]:
    """Everything that can be reached from an object by attributes, items and fields."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield thing
    if isinstance(thing, dict):
        inner = [*thing.keys(), *thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset):
        inner = list(thing)
    elif type(thing).__module__.startswith(("wmdd_ray", "jobs")):
        names = [n for n in dir(thing) if not n.startswith("__")]
        inner = [v for n in names if not callable(v := getattr(thing, n))]
    else:
        inner = []
    for each in inner:
        yield from reachable(each, seen)


def test_nothing_that_training_is_handed_leads_to_the_test_images(finished: Path) -> None:
    table, study, rows = opened_at(finished)
    parts = [study.place.source_of(part) for part in ("train", "val")]
    for part in parts:
        part.shards(100)  # what is loaded at the first use
    source = open_source("digits", table.source, split="val")
    loaded = load_images(source, table.source, 1 << 30)
    assert loaded is not None
    test = {image.tobytes() for image in loaded[2]}
    seen: set[int] = set()
    found = [x for root in (study.place, *parts, *rows) for x in reachable(root, seen)]
    arrays = [x for x in found if isinstance(x, np.ndarray)]
    images = {bytes(image) for array in arrays if array.ndim == 4 for image in array}
    assert len(images) > 1000
    # Of 1797 digits of 8 x 8 pixels none is there twice.
    assert not images & test
    assert not [x for x in found if isinstance(x, type(source))]


READING = ("open_source", "load_split")


def readers_of_other_splits_than_train(source: str) -> list[tuple[str, str, str]]:
    """The function, what it calls, and its split argument: wherever that is not the constant `train`."""
    tree = ast.parse(source)
    # Outer functions come first, so that the inner one stays.
    inside = {
        node: function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    calls: dict[ast.AST, ast.Call] = {
        call.func: call for call in ast.walk(tree) if isinstance(call, ast.Call)
    }
    found = []
    for node in ast.walk(tree):
        name = getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
        if name not in READING or isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.alias):
            if node.asname is not None:
                found.append((inside.get(node, ""), name, f"as {node.asname}"))
            continue
        call = calls.get(node)
        splits = [] if call is None else [k.value for k in call.keywords if k.arg == "split"]
        splits += [] if call is None else call.args[2:3]
        if [getattr(split, "value", None) for split in splits] != ["train"]:
            found.append((inside.get(node, ""), name, " ".join(map(ast.unparse, splits))))
    return found


def test_one_function_reads_the_test_split_and_only_scoring_calls_it() -> None:
    readers, callers = [], []
    for path in sorted(PACKAGE.glob("*.py")):
        source = path.read_text()
        readers += [(path.name, *found) for found in readers_of_other_splits_than_train(source)]
        callers += [path.name] * sum(
            isinstance(node, ast.Call) and ast.unparse(node.func).endswith("open_test")
            for node in ast.walk(ast.parse(source))
        )
    assert readers == [
        ("judge.py", "open_test", "load_split", "'val'"),
        ("labels.py", "labels", "load_split", "'val'"),
        ("otg.py", "otg", "load_split", "'val'"),
        ("robustness.py", "robustness", "load_split", "'val'"),
        ("splits.py", "load_split", "open_source", "split"),
        ("splits.py", "judged_source_of", "open_source", "'val'"),
    ]
    assert callers == ["scores.py"]
    for name in ("engine.py", "work.py", "definitions.py", "rows.py", "ablation.py", "tables.py"):
        assert "judge import" not in (PACKAGE / name).read_text()
        assert "open_source(" not in (PACKAGE / name).read_text()


@pytest.mark.parametrize(
    ("leak", "found"),
    [
        ("load_split(train_uri, config, 'val')", ("load_split", "'val'")),
        ("splits.load_split('training', config, split=which)", ("load_split", "which")),
        ("open_source('train', config)", ("open_source", "")),
        ("read = load_split", ("load_split", "")),
        ("from splits import load_split as read", ("load_split", "as read")),
    ],
)
def test_a_planted_reader_of_another_split_is_found(leak: str, found: tuple[str, str]) -> None:
    source = f"def train(uri):\n    {leak}\n"
    assert readers_of_other_splits_than_train(source) == [("train", *found)]
    honest = "load_split(uri, config, 'train')\nopen_source(uri, config, split='train')\n"
    assert readers_of_other_splits_than_train(honest) == []


def test_a_table_with_a_student_to_train_does_not_open_the_test_split(unopened: Path) -> None:
    table, study, rows = opened_at(unopened)
    lose(study, rows[0].students["soft"][0])
    with pytest.raises(ConfigError, match="the test split stays closed: 1 jobs of table digits"):
        judge.open_test(table, rows, study, "digits")
    assert not (unopened / "opened").exists()
    study.bring(work.jobs_of(rows))
    opened = judge.open_test(table, rows, study, "digits")
    assert len(opened.images.labels_N) == 360 and opened.before == []


def test_no_rows_at_all_do_not_open_the_test_split(unopened: Path) -> None:
    table, study, _ = opened_at(unopened)
    with pytest.raises(ConfigError, match="stays closed"):
        judge.open_test(table, [], study, "digits")


def test_after_the_test_split_was_opened_another_configuration_is_neither_trained_nor_scored(
    copied: Path,
) -> None:
    rooms = {p for p in copied.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match="the test split was opened in .* nothing is trained"):
        bench.main(arguments(copied, epochs=8))
    assert {p for p in copied.rglob("*") if p.is_file()} == rooms
    table, study, rows = opened_at(copied, dataclasses.replace(TINY, rows=("best",)))
    with pytest.raises(ConfigError, match="options are chosen on --split val"):
        judge.open_test(table, rows, study, "digits")


def test_an_opening_tells_of_all_before_it_of_the_same_data_in_the_folder(
    unopened: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, study, rows = opened_at(unopened)
    clock = iter(f"2026-11-2{day}T10:00:00+00:00" for day in range(1, 10))
    monkeypatch.setattr(judge, "_now", lambda: next(clock))

    def opening(table: Table) -> tuple[str, list[str]]:
        found = judge.open_test(table, rows, study, "digits")
        return found.opened[:10], [
            f"{each['table']} {each['opened'][:10]}" for each in found.before
        ]

    # The same test images behind other training images, and other data with a table of the same name.
    longtail = dataclasses.replace(table, name="longtail")
    other = dataclasses.replace(table, dataset="fashion_mnist")
    assert opening(longtail) == ("2026-11-21", [])
    assert opening(other) == ("2026-11-22", [])
    assert opening(table) == ("2026-11-23", ["longtail 2026-11-21"])
    # Whoever asks again gets what it was.
    assert opening(longtail) == ("2026-11-21", [])
    cross = dataclasses.replace(table, name="cross")
    assert opening(cross)[1] == ["longtail 2026-11-21", "digits 2026-11-23"]
    bench.main(arguments(unopened))
    found = result_of(unopened)["opened_before"]
    assert [each["table"] for each in found] == ["longtail"]
    assert "had been opened before: longtail on 2026-11-21\n" in capsys.readouterr().out


def test_a_table_that_lost_a_student_after_it_was_opened_is_not_trained_again(
    copied: Path,
) -> None:
    _, study, rows = opened_at(copied)
    lose(study, rows[0].students["hard"][0])
    with pytest.raises(SystemExit, match="with 1 jobs to do"):
        bench.main(arguments(copied))


def test_options_are_chosen_on_val_before_and_the_test_split_stays_closed(
    tmp_path: Path, finished: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    shutil.rmtree(out / "opened")
    bench.main(arguments(out, split="val"))
    found = result_of(out, "accuracy-digits-val.json")
    assert found["split"] == "val" and found["opened"] is None and found["opened_before"] is None
    assert not (out / "opened").exists()
    # The very same students as those of the test table.
    weights = [row["soft"]["weights"] for row in found["groups"][0]["rows"]]
    assert weights == [r["soft"]["weights"] for r in result_of(finished)["groups"][0]["rows"]]
