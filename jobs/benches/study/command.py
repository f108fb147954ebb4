"""The command `accuracy`: one table, from real images to a sealed result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from wmdd_ray.store.documents import seal

from .definitions import Options, TableName
from .engine import Study, print_plan
from .judge import before_text, refuse_second_opening
from .rendering import render as render_tables
from .scores import score
from .splits import make_place, uri_of
from .summary import percent
from .tables import table_of
from .work import jobs_of, rows_of

_AS_IT_IS = Options()


def accuracy(
    table: TableName = "main",
    data: str | None = None,
    out: str = "runs/accuracy",
    split: Literal["test", "val"] = "test",
    processes: int = 1,
    options: Annotated[Options, tyro.conf.OmitArgPrefixes] = _AS_IT_IS,
    result: str | None = None,
    plan: bool = False,
    render: bool = False,
) -> None:
    """Students on distilled and real images under one budget: a table of jobs/benches/results. Resumable; needs no Ray.

    Choose options with `--split val`, which trains the same students and scores them on held-out training images; the
    test split is opened once an --out and table, after the last student, and refused to any other configuration; a result
    names the other tables that had opened it there before.

    Args:
        table: `main` (Fashion-MNIST), `digits`, `cifar10`, `cifar10_resnet18` (that network as teacher and student), `cross`
            (other students and teachers), `ablation` (best less one thing, or with other terms), `longtail` (digits, of which
            the last class has a twelfth of the first's images), `alignment` (several labeling teachers and the transport term
            of students) and `alignment_digits`.
        data: Real images; the recipe's by default, and for Fashion-MNIST the folder with the IDX files.
        out: Folder of the jobs; what is there already is not done again.
        split: Images that students are scored on.
        processes: Processes with one computing thread each.
        options: What is changed of the table.
        result: File that the result is written to; in `out` by default, to be committed to jobs/benches/results.
        plan: Print the jobs of each stage, and do nothing.
        render: Only write the committed results into the README beside them, and their summary into the root one.
    """
    if render:
        print(f"rendered: {', '.join(render_tables()) or 'nothing is committed'}")
        return
    defined = table_of(table, options)
    uri = uri_of(defined.dataset, data)
    study = Study(make_place(out, uri, defined.source, defined.held_out, defined.imbalance))
    trained = rows_of(defined, study)
    if plan:
        print_plan(jobs_of(trained), study)
        return
    if split == "test":
        refuse_second_opening(defined, trained, study)
    study.bring(jobs_of(trained), processes)
    scores = score(defined, trained, study, uri, split, processes)
    path = Path(result or Path(out) / f"accuracy-{table}{'' if split == 'test' else '-val'}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(seal(scores))  # no number changes by hand
    for group in scores["groups"]:
        print(f"{group['title']}, {split}")
        for row in group["rows"]:
            soft, hard = (percent(row[kind]) for kind in ("soft", "hard"))
            print(f"  {row['name']:18} soft {soft:>11}   hard {hard:>11}")
    if before := before_text(scores["opened_before"] or []):
        print(before)
    print(f"written: {path}")
