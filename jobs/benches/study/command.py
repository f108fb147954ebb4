"""The command `accuracy`: one table, from real images to a sealed result."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from wmdd_ray.errors import WmddError

from .definitions import Options, TableName


def accuracy(
    table: TableName = "main",
    data: str | None = None,
    out: str = "runs/accuracy",
    ipc: tuple[int, ...] = (),
    rows: tuple[str, ...] = (),
    groups: tuple[str, ...] = (),
    student_seeds: int | None = None,
    distill_seeds: int | None = None,
    split: Literal["test", "val"] = "test",
    processes: int = 1,
    teacher: str | None = None,
    width: int | None = None,
    epochs: int | None = None,
    full_epochs: int | None = None,
    teacher_epochs: int | None = None,
    iterations: int | None = None,
    tiles: int | None = None,
    bf16: bool = False,
    result: str | None = None,
    plan: bool = False,
    render: bool = False,
) -> None:
    """Students on distilled and real images under one budget: a table of jobs/benches/results. Resumable; needs no Ray.

    Choose options with `--split val`, which trains the same students and scores them on held-out training images; the
    test split is opened once an --out and table, after the last student, and refused to any other configuration; a result
    names the other tables that had opened it there before.

    Args:
        table: `main` (Fashion-MNIST), `digits`, `cross` (other students and teachers), `ablation` (best less one thing, or
            with other terms), `longtail` (digits, of which the last class has a twelfth of the first's images), `alignment`
            (several labeling teachers and the transport term of students) and `alignment_digits`.
        data: Real images; the recipe's by default, and for Fashion-MNIST the folder with the IDX files.
        out: Folder of the jobs; what is there already is not done again.
        ipc: Images a class; the table's own by default.
        rows: Rows to have; `random_real` always is. A result of `main` is rendered with all its rows of real images only.
        groups: Groups to have, by parts of their titles ("LIA"); each keeps all its rows.
        student_seeds: Students a distilled set; by default at least 5 a row.
        distill_seeds: Distilled sets a row; 3 up to ipc 10, 1 above.
        split: Images that students are scored on.
        processes: Processes with one computing thread each.
        teacher: A run whose teacher is taken instead of training one (ConvNet-3).
        width: Channels of teachers' and students' ConvNet-3 blocks.
        epochs: Student epochs and label epochs.
        full_epochs: Student epochs on all real images.
        teacher_epochs: Epochs of the teacher.
        iterations: Recover iterations.
        tiles: Small images along a side of each stored one, in `best` and in the real rows beside it.
        bf16: Train and recover in bfloat16: 1.5 to 2.5 times as fast on processors that have it, and much slower on others.
        result: File that the result is written to; in `out` by default, to be committed to jobs/benches/results.
        plan: Print the jobs of each stage, and do nothing.
        render: Only write the committed results into the README beside them, and their summary into the root one.
    """
    try:
        if render:
            from .rendering import render as render_tables

            print(f"rendered: {', '.join(render_tables()) or 'nothing is committed'}")
            return
        options = Options(
            ipc=ipc,
            rows=rows,
            groups=groups,
            distill_seeds=distill_seeds,
            student_seeds=student_seeds,
            width=width,
            epochs=epochs,
            full_epochs=full_epochs,
            teacher_epochs=teacher_epochs,
            iterations=iterations,
            tiles=tiles,
            bf16=bf16,
            given=teacher or "",
        )
        _run(table, options, data, out, split, processes, result, plan)
    except WmddError as error:
        raise SystemExit(f"accuracy: {error}") from error


def _run(
    name: TableName,
    options: Options,
    data: str | None,
    out: str,
    split: Literal["test", "val"],
    processes: int,
    result: str | None,
    plan: bool,
) -> None:
    from .engine import Study, print_plan
    from .judge import before_text, refuse_second_opening
    from .scores import score, sealed
    from .splits import make_place
    from .tables import table_of
    from .work import jobs_of, rows_of

    table = table_of(name, options)
    uri = data or ("digits" if table.dataset == "digits" else "fashion-mnist")
    study = Study(make_place(out, uri, table.source, table.held_out, table.imbalance))
    rows = rows_of(table, study)
    if plan:
        print_plan(jobs_of(rows), study)
        return
    if split == "test":
        refuse_second_opening(table, rows, study)
    study.bring(jobs_of(rows), processes)
    found = score(table, rows, study, uri, split, processes)
    path = Path(result or Path(out) / f"accuracy-{name}{'' if split == 'test' else '-val'}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed(found))
    for group in found["groups"]:
        print(f"{group['title']}, {split}")
        for row in group["rows"]:
            soft, hard = (
                f"{100 * row[k]['mean']:5.1f} ± {100 * row[k]['std']:.1f}" for k in ("soft", "hard")
            )
            print(f"  {row['name']:18} soft {soft}   hard {hard}")
    if before := before_text(found["opened_before"] or []):
        print(before)
    print(f"written: {path}")
