"""The one place that reads the test split: once a table, when every student of it is trained and stored.

An opening tells of those before it in the folder: who has seen test numbers of one table may have chosen another by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.claims import fingerprint
from wmdd_ray.store.documents import read_sealed, seal

from .definitions import Table
from .engine import Study
from .splits import Labeled, load_split
from .work import Trained, jobs_of, units_of


def configuration_of(table: Table, rows: Sequence[Trained], study: Study) -> dict[str, Any]:
    """Return what a table's numbers depend on: the ids of its students' jobs, which are fingerprints of all behind them."""
    jobs = {study.id(job): job for row in rows for job in row.student_jobs}
    data = "-".join(study.place.source_of(part).fingerprint()[:8] for part in ("train", "val"))
    about = {"table": table.name, "dataset": table.dataset, "data": data}
    num_students = sum(len(units_of(job)) for job in jobs.values())
    return {
        **about,
        "num_students": num_students,
        "fingerprint": fingerprint([about, sorted(jobs)]),
    }


@dataclass(frozen=True)
class Opened:
    """The test images, when the table opened them first, and which others of the data set had before: table and time."""

    images: Labeled
    opened: str
    before: list[dict[str, str]]


def open_test(table: Table, rows: Sequence[Trained], study: Study, uri: str) -> Opened:
    """Return the test images, with all earlier openings of the same data set in the folder.

    The record `opened/<data set>-<table>.json` is made before the images are read. Data sets go by their names: of the
    long-tailed digits the training images are others, and the test images the same.

    Raises:
        ConfigError: Students are missing, or the table was opened for another configuration.
    """
    missing = study.missing(jobs_of(rows))
    if missing or not rows:
        raise ConfigError(
            f"the test split stays closed: {len(missing)} jobs of table {table.name} are not done; "
            "options are chosen on --split val"
        )
    refuse_second_opening(table, rows, study)
    record = {"opened": _now(), **configuration_of(table, rows, study)}
    store = study.place.store.child("opened")
    store.create(_key(table), seal(record))
    # Read after the own record is made: of two tables that open at a time at least one knows the other.
    openings = {key: read_sealed(store, key) for key in store.list()}
    opened = openings.pop(_key(table))["opened"]
    before = [
        {"table": each["table"], "opened": each["opened"]}
        for each in sorted(openings.values(), key=lambda each: each["opened"])
        if each["dataset"] == table.dataset and each["opened"] <= opened
    ]
    return Opened(
        load_split(uri, study.place.source, "val", study.place.class_names), opened, before
    )


def refuse_second_opening(table: Table, rows: Sequence[Trained], study: Study) -> None:
    """Refuse to go on with a table whose test split was opened for another configuration, or that is not whole any more.

    Who has seen test numbers trains nothing for this table any more.

    Raises:
        ConfigError: Says when it was opened and for what.
    """
    store = study.place.store.child("opened")
    if not store.exists(_key(table)):
        return
    opening, own = read_sealed(store, _key(table)), configuration_of(table, rows, study)
    missing = study.missing(jobs_of(rows))
    if missing or opening["fingerprint"] != own["fingerprint"]:
        raise ConfigError(
            f"the test split was opened in {study.place.out} for table {table.name} on {opening['opened']} with configuration "
            f"{opening['fingerprint']} ({opening['num_students']} students), and this one is {own['fingerprint']} with "
            f"{len(missing)} jobs to do; nothing is trained after that: options are chosen on --split val, before; for a new "
            "table begin a new --out"
        )


def before_text(before: Sequence[dict[str, str]]) -> str:
    """Return earlier openings in words, or nothing where there were none."""
    tables = ", ".join(f"{each['table']} on {each['opened'][:10]}" for each in before)
    return f"the test images had been opened before: {tables}" if tables else ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _key(table: Table) -> str:
    return f"{table.dataset}-{table.name}.json"
