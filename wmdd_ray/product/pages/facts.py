"""What a run's rooms say about it, finished or not."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import numpy as np

from wmdd_ray.config import DistillConfig
from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.product.pages.timeline import Timeline, timeline_of
from wmdd_ray.recipes import recipe_of
from wmdd_ray.redaction import printable
from wmdd_ray.spine.claims import flatten
from wmdd_ray.spine.events import read_events
from wmdd_ray.spine.provenance import as_typed
from wmdd_ray.spine.rooms import Room, StageCommit, UnitMarker
from wmdd_ray.spine.run import TAKEN, Stage
from wmdd_ray.spine.taken import is_above, origin_of, runs_in
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import load_json, read_manifest
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units.auto import choose
from wmdd_ray.units.own_data import Measured
from wmdd_ray.units.students import parts_of

T = TypeVar("T")
_TEACHER_KEY = "teacher.safetensors"


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One stage's room: its commit, None when it is not finished, and its finished units."""

    name: str
    room: Room
    commit: StageCommit | None
    units: Mapping[str, UnitMarker]

    @property
    def state(self) -> str:
        if self.commit is not None:
            return "finished"
        return "in part" if self.units else "not begun"


@dataclass(kw_only=True)
class RunFacts:
    """A run: its record, its stages by name, in order, what happened when, and what could not be found out."""

    uri: str
    record: dict[str, Any]
    config: DistillConfig
    stages: dict[str, StageFacts]
    timeline: Timeline
    class_names: tuple[str, ...] = ()
    origin: Store | None = None
    missing: list[str] = field(default_factory=list)

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics of a committed stage; nothing when it is not committed."""
        commit = self.stages[stage].commit
        return {} if commit is None else commit.metrics


def read_run(
    store: Store, stages: tuple[Stage, ...], config: DistillConfig | None, *, follow: bool = False
) -> RunFacts:
    """Return the facts of the run under `store`.

    Args:
        store: Root of the run.
        stages: The pipeline.
        config: The run's configuration; None takes what the run has recorded.
        follow: Whether rooms that it has from another run are read wherever it says, not in the folder above alone.

    Raises:
        ConfigError: There is no run.
    """
    try:
        record = load_json(store.get("run.json"), store.url("run.json"))
    except FileNotFoundError:
        record = {}
    origin, missing = origin_of(store), []
    if origin is not None and not (follow or is_above(origin, store)):
        missing.append(
            f"Teacher and features are of {origin.uri}, which is not read because a run says so; pass --follow-data if this run is "
            "yours."
        )
        origin = None
    by_stage = {
        stage.name: _read_stage(origin if origin and stage.room in TAKEN else store, stage)
        for stage in stages
    }
    inside = runs_in(store)
    if inside and not any(f.units for f in by_stage.values() if f.room.name not in TAKEN):
        raise ConfigError(
            f"{store.uri} holds a run for each ipc, with a page of its own: pass {', '.join(run.uri for run in inside)}"
        )
    if not record and not any(facts.commit or facts.units for facts in by_stage.values()):
        raise ConfigError(
            f"{store.uri}: expected the --out of a run (with run.json and a folder a stage), found neither; pass the folder or "
            "URI that `python jobs/distill.py` names, not the dataset/ inside it"
        )
    facts = RunFacts(
        uri=store.uri,
        record=record,
        config=config or config_of(record.get("config", {}), store.url("run.json")),
        stages=by_stage,
        timeline=timeline_of(read_events(store), {n: f.units for n, f in by_stage.items()}),
        origin=origin,
        missing=missing,
    )
    if not record:
        facts.missing.append("run.json is absent: options are shown as far as the stages recorded.")
    facts.missing += _stale(by_stage)
    facts.class_names = _class_names(facts)
    return facts


def _stale(stages: Mapping[str, StageFacts]) -> list[str]:
    """Return a sentence for each room that was made from another version of a room than the one that is there."""
    commits = {facts.room.name: facts.commit for facts in stages.values() if facts.commit}
    return [
        f"{name}/ was made from another version of {source}/ than the one that is here."
        for name, commit in commits.items()
        for source, fingerprint in commit.inputs.items()
        if source in commits and commits[source].fingerprint != fingerprint
    ]


def _read_stage(store: Store, stage: Stage) -> StageFacts:
    room = Room(store, stage.room)
    commit = room.read_commit()
    units = room.read_units(sorted(room.finished())) if commit is None else commit.units
    return StageFacts(name=stage.name, room=room, commit=commit, units=units)


def config_of(options: Mapping[str, Any], where: str) -> DistillConfig:
    """Return the configuration that a run has recorded; options that this version does not know are left out.

    Raises:
        ArtifactError: A value is none that the option takes.
    """
    try:
        return _made(DistillConfig, options)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where}: expected the options of a run, found others ({error}); it was made by another version of wmdd_ray"
        ) from error


def _made(kind: type[T], options: Mapping[str, Any]) -> T:
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for option in fields(kind):  # type: ignore[arg-type]
        if option.name not in options:
            continue
        value, hint = options[option.name], hints[option.name]
        if isinstance(hint, type) and is_dataclass(hint):
            value = _made(hint, value)
        values[option.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _class_names(facts: RunFacts) -> tuple[str, ...]:
    """Return the names of the classes as far as a room tells them."""
    if facts.stages["assemble"].commit is not None:
        return tuple(read_manifest(facts.stages["assemble"].room.store)[0]["class_names"])
    squeeze = facts.stages["squeeze"]
    if squeeze.commit is not None:
        content = squeeze.room.read(squeeze.commit.file(_TEACHER_KEY))
        return codecs.decode_teacher(content).class_names
    return ()


def accuracy(facts: RunFacts) -> list[dict[str, Any]]:
    """Return the accuracy table, a row each of `row` and `labels`; of an unfinished evaluation what is there."""
    if facts.stages["evaluate"].commit is not None:
        table: list[dict[str, Any]] = facts.metrics("evaluate")["table"]
        return table
    by_row: dict[tuple[str, str], list[float]] = {}
    for unit, marker in facts.stages["evaluate"].units.items():
        row, labels, _ = parts_of(unit)
        by_row.setdefault((row, labels), []).append(float(marker.metrics["top1"]))
    return [
        {
            "row": row,
            "labels": labels,
            "top1": top1,
            "top1_mean": float(np.mean(top1)),
            "top1_std": float(np.std(top1, ddof=1)) if len(top1) > 1 else 0.0,
            "num_seeds": len(top1),
        }
        for (row, labels), top1 in by_row.items()
    ]


def recall_per_class(facts: RunFacts) -> dict[str, list[float]]:
    """Return row -> the mean share of each class's held-out images that students tell right, with the first kind of labels."""
    stage = facts.stages["evaluate"]
    kinds = facts.config.evaluate.labels
    by_row: dict[str, list[list[float]]] = {}
    for unit, marker in stage.units.items():
        row, labels, _ = parts_of(unit)
        if row in ("distilled", "all_real") and labels == kinds[0]:
            entry = marker.files[0]
            result = load_json(stage.room.read(entry), entry.key)
            by_row.setdefault(row, []).append(result["recall_per_class"])
    return {row: np.mean(values, axis=0).tolist() for row, values in by_row.items()}


def classes(facts: RunFacts) -> list[dict[str, Any]]:
    """Return what is known of every class: name, images, W2 cost, last losses, accuracies; None for what is not."""
    counts = facts.metrics("features").get("class_counts", [])
    solved = {int(unit): m.metrics for unit, m in facts.stages["barycenters"].units.items()}
    losses = {
        label: loss
        for marker in facts.stages["recover"].units.values()
        for label, loss in zip(marker.metrics["labels"], marker.metrics["losses"], strict=True)
    }
    recall, names = recall_per_class(facts), facts.class_names
    num_classes = max([len(names), len(counts), *(label + 1 for label in solved)])
    return [
        {
            "label": label,
            "name": names[label] if label < len(names) else f"class {label}",
            "num_images": counts[label] if label < len(counts) else None,
            "cost": solved[label]["cost"] if label in solved else None,
            "num_iters": solved[label]["num_iters"] if label in solved else None,
            "converged": solved[label]["converged"] if label in solved else None,
            "losses": losses.get(label, {}),
            "recall": {row: v[label] for row, v in recall.items() if label < len(v)},
        }
        for label in range(num_classes)
    ]


def options_of(facts: RunFacts) -> dict[str, Any]:
    """Return the options of a run by their dotted names; without its record, those that its stages have noted."""
    record = facts.record
    if record:
        return flatten(record.get("config", {})) | flatten(record.get("resources", {}))
    return {
        f"{name}: {option}": value
        for name, stage in facts.stages.items()
        if stage.commit
        for option, value in flatten(stage.commit.options).items()
    }


def _usual(facts: RunFacts) -> DistillConfig:
    """Return what a recipe has where no option says otherwise."""
    config = facts.config
    if config.recipe != "auto":
        return recipe_of(config.recipe, config.ipc, config.variant)
    auto = facts.record["auto"]
    measured = Measured.read(auto["measured"])
    return choose(measured, auto["has_gpu"], config.ipc, variant=config.variant)[0]


def command_of(facts: RunFacts) -> str:
    """Return the command that makes the run's set: its recipe, and what differs from that; nothing without its record."""
    if not facts.record:
        return ""
    config = facts.config
    try:
        usual = flatten(asdict(_usual(facts)))
    except (ConfigError, KeyError, TypeError, ValueError):  # a recipe of another version
        usual = {}
    given = [["--ipc", str(config.ipc), "--recipe", config.recipe, "--out", facts.uri]]
    given += [["--variant", config.variant]] if config.variant != "best" else []
    given += [["--features", facts.origin.uri]] if facts.origin is not None else []
    for name, value in flatten(asdict(config)).items():
        if name in ("ipc", "recipe", "variant") or value == usual.get(name, value):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            head, _, last = option.rpartition(".")
            given.append([f"--{head}{'.' if head else ''}{'' if value else 'no-'}{last}"])
        else:
            given.append(
                [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
            )
    words = " \\\n    ".join(shlex.join(one) for one in given)
    return as_typed("python jobs/distill.py ") + printable(words)
