"""The one place that reads the test split: once a table, when every student of it is trained and stored."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jobs.benches.accuracy.definitions import Table
from jobs.benches.accuracy.splits import Labeled, Workplace, load_split
from jobs.benches.accuracy.work import Trained, stages_of, unfinished
from wmdd_ray.errors import ConfigError
from wmdd_ray.run import fingerprint
from wmdd_ray.store.documents import read_sealed, seal
from wmdd_ray.store.filesystem import Store


def configuration_of(table: Table, rows: Sequence[Trained], place: Workplace) -> dict[str, Any]:
    """Return what a table's numbers depend on: the ids of its students, which are fingerprints of all behind them."""
    ids = sorted(unit.id for unit in stages_of(rows)[-1])
    about = {"table": table.name, "dataset": table.dataset, "data": place.data}
    return {**about, "num_students": len(ids), "fingerprint": fingerprint([about, ids])}


def open_test(
    table: Table, rows: Sequence[Trained], place: Workplace, uri: str
) -> tuple[Labeled, str]:
    """Return the test images, and when the table opened them first.

    The record `opened/<table>.json` is made before the images are read.

    Args:
        table: The table.
        rows: All its rows.
        place: Where they were trained.
        uri: Where the real images are.

    Raises:
        ConfigError: Students are missing, or the table was opened for another configuration.
    """
    missing = [unit for stage in stages_of(rows) for unit in unfinished(stage, place)]
    if missing or not rows:
        raise ConfigError(
            f"the test split stays closed: {len(missing)} units of table {table.name} are not done ({missing[:1]}); "
            "options are chosen on --split val"
        )
    refuse_second_opening(table, rows, place)
    record = {
        "opened": datetime.now(UTC).isoformat(timespec="seconds"),
        **configuration_of(table, rows, place),
    }
    store = Store(place.out).child("opened")
    store.create(_key(table), seal(record))
    found = read_sealed(store, _key(table))
    images = load_split(uri, place.source, "val", place.class_names)
    return images, str(found["opened"])


def refuse_second_opening(table: Table, rows: Sequence[Trained], place: Workplace) -> None:
    """Refuse to go on with a table whose test split was opened for another configuration, or that is not whole any more.

    Who has seen test numbers trains nothing for this table any more.

    Raises:
        ConfigError: Says when it was opened and for what.
    """
    store = Store(place.out).child("opened")
    if not store.exists(_key(table)):
        return
    found, asked = read_sealed(store, _key(table)), configuration_of(table, rows, place)
    missing = [unit for stage in stages_of(rows) for unit in unfinished(stage, place)]
    if missing or found["fingerprint"] != asked["fingerprint"]:
        raise ConfigError(
            f"the test split was opened in {place.out} for table {table.name} on {found['opened']} with configuration "
            f"{found['fingerprint']} ({found['num_students']} students), and this one is {asked['fingerprint']} with "
            f"{len(missing)} units to do; nothing is trained after that: options are chosen on --split val, before; for a new "
            "table begin a new --out"
        )


def _key(table: Table) -> str:
    return f"{table.dataset}-{table.name}.json"
