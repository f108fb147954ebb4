"""The spine, with stages that the tests make: no Ray, no networks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from wmdd_ray.config import DistillConfig, RecoverConfig, Resources
from wmdd_ray.errors import ArtifactError, ConfigError, LostRaceError
from wmdd_ray.recipes import RECIPES, recipe_of
from wmdd_ray.spine.events import read_events
from wmdd_ray.spine.run import (
    Progress,
    Run,
    Stage,
    StageRun,
    Work,
    expected_plan,
    run_pipeline,
    unit_seed,
)
from wmdd_ray.store.documents import seal
from wmdd_ray.store.filesystem import Store

UNITS = ("u0", "u1", "u2")


@dataclass
class Worked:
    """Which units were done, by stage, and a unit to fail at."""

    done: list[tuple[str, str]] = field(default_factory=list)
    fail_at: tuple[str, str] | None = None


class FakeSource:
    def __init__(self, name: str) -> None:
        self.name = name

    def fingerprint(self) -> str:
        return self.name


def stage_of(
    name: str,
    inputs: tuple[str, ...],
    options: Callable[[DistillConfig], dict[str, Any]],
    worked: Worked,
) -> Stage:
    def work(stage: StageRun) -> dict[str, Any]:
        finished = stage.room.finished()
        for unit in UNITS:
            if unit in finished:
                continue
            if worked.fail_at == (name, unit):
                raise RuntimeError("killed here")
            worked.done.append((name, unit))
            payload = f"{name} {unit} {[c.fingerprint for c in stage.inputs.values()]}".encode()
            attempt = stage.room.begin_unit(unit)
            assert attempt is not None
            stage.room.commit_unit(
                unit, {f"{unit}.bin": payload}, attempt=attempt, metrics={"n": 1}
            )
        return {"units": len(UNITS)}

    return Stage(
        name=name,
        room=f"{name}_room",
        version=1,
        inputs=inputs,
        reads_data=not inputs,
        options=options,
        plan=lambda stage: Work(units=UNITS, estimated_bytes=0),
        work=work,
    )


@pytest.fixture
def worked() -> Worked:
    return Worked()


@pytest.fixture
def pipeline(worked: Worked) -> tuple[Stage, ...]:
    return (
        stage_of("first", (), lambda c: {"seed": c.seed}, worked),
        stage_of("second", ("first_room",), lambda c: {"recover": asdict(c.recover)}, worked),
        stage_of("third", ("first_room", "second_room"), lambda c: {"ipc": c.ipc}, worked),
    )


def run_at(out: Path, config: DistillConfig | None = None, data: str = "v1") -> Run:
    return Run(
        store=Store(str(out)),
        config=config or recipe_of("digits", 10),
        resources=Resources(),
        open_source=lambda split: FakeSource(f"{split} {data}"),
        progress=lambda name: Progress(),
        connect=lambda: None,
    )


def test_a_second_run_finds_every_room_committed_and_works_on_nothing(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    first = run_pipeline(run_at(tmp_path), pipeline)
    assert len(worked.done) == 9
    second = run_pipeline(run_at(tmp_path), pipeline)
    assert len(worked.done) == 9
    assert first == second


def test_a_run_that_failed_midway_does_only_what_is_left(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    worked.fail_at = ("second", "u1")
    with pytest.raises(RuntimeError, match="killed here"):
        run_pipeline(run_at(tmp_path), pipeline)
    assert not (tmp_path / "second_room" / "stage.json").exists()
    worked.fail_at = None
    run_pipeline(run_at(tmp_path), pipeline)
    assert len(worked.done) == len(set(worked.done)) == 9


def test_a_changed_option_is_refused_with_its_name_and_both_values(
    tmp_path: Path, pipeline: tuple[Stage, ...]
) -> None:
    config = recipe_of("digits", 10)
    run_pipeline(run_at(tmp_path, config), pipeline)
    changed = replace(config, recover=replace(config.recover, iterations=777))
    with pytest.raises(
        ConfigError, match=r"recover\.iterations=100 \(this run asks for 777\).*--overwrite"
    ):
        run_pipeline(run_at(tmp_path, changed), pipeline)


def test_an_option_changed_before_the_room_was_committed_is_refused_too(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    worked.fail_at = ("first", "u1")
    with pytest.raises(RuntimeError):
        run_pipeline(run_at(tmp_path), pipeline)
    worked.fail_at = None
    with pytest.raises(ConfigError, match=r"seed=0 \(this run asks for 5\)"):
        run_pipeline(run_at(tmp_path, replace(recipe_of("digits", 10), seed=5)), pipeline)


def test_other_input_data_is_refused_by_name(tmp_path: Path, pipeline: tuple[Stage, ...]) -> None:
    run_pipeline(run_at(tmp_path), pipeline)
    with pytest.raises(ConfigError, match="another version of its input data"):
        run_pipeline(run_at(tmp_path, data="v2"), pipeline)


def test_overwrite_replaces_the_changed_room_and_those_after_and_leaves_those_before(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    config = recipe_of("digits", 10)
    before = run_pipeline(run_at(tmp_path, config), pipeline)
    worked.done.clear()
    changed = replace(config, recover=RecoverConfig(iterations=5))
    after = run_pipeline(run_at(tmp_path, changed), pipeline, overwrite=True)
    assert {name for name, _ in worked.done} == {"second", "third"}
    assert after["first_room"] == before["first_room"]
    assert after["third_room"].fingerprint != before["third_room"].fingerprint


def test_from_with_overwrite_does_that_room_and_those_after_again(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    run_pipeline(run_at(tmp_path), pipeline)
    worked.done.clear()
    run_pipeline(run_at(tmp_path), pipeline, first="second", overwrite=True)
    assert {name for name, _ in worked.done} == {"second", "third"}


def test_from_with_overwrite_empties_no_folder_that_was_never_a_room(
    tmp_path: Path, pipeline: tuple[Stage, ...]
) -> None:
    run_pipeline(run_at(tmp_path), pipeline, last="first")
    (tmp_path / "second_room").mkdir()
    (tmp_path / "second_room" / "cat.png").write_bytes(b"somebody's")
    run_pipeline(run_at(tmp_path), pipeline, first="second", overwrite=True)
    assert (tmp_path / "second_room" / "cat.png").read_bytes() == b"somebody's"


@pytest.mark.parametrize("first", ["second", None])
@pytest.mark.parametrize("refused_by", ["the store", "the cluster"])
def test_overwrite_empties_nothing_when_the_store_or_the_cluster_refuses(
    refused_by: str,
    first: str | None,
    tmp_path: Path,
    pipeline: tuple[Stage, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_pipeline(run_at(tmp_path), pipeline)
    before = Store(str(tmp_path)).list()

    def refuse(*_: object) -> None:
        raise ConfigError("not here")

    run = run_at(tmp_path, replace(recipe_of("digits", 10), recover=RecoverConfig(iterations=5)))
    if refused_by == "the cluster":
        run.connect = refuse
    else:
        monkeypatch.setattr(Store, "probe", refuse)
    with pytest.raises(ConfigError, match="not here"):
        run_pipeline(run, pipeline, first=first, overwrite=True)
    assert Store(str(tmp_path)).list() == before


def test_from_needs_the_rooms_before_and_until_stops(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    with pytest.raises(ConfigError, match="--from second needs a committed first_room/"):
        run_pipeline(run_at(tmp_path), pipeline, first="second")
    run_pipeline(run_at(tmp_path), pipeline, last="first")
    assert {name for name, _ in worked.done} == {"first"}
    run_pipeline(run_at(tmp_path), pipeline, first="second", last="second")
    assert {name for name, _ in worked.done} == {"first", "second"}
    with pytest.raises(ConfigError, match="--from third comes after --until first"):
        run_pipeline(run_at(tmp_path), pipeline, first="third", last="first")


def test_resources_take_no_part_in_fingerprints_and_options_do(
    tmp_path: Path, pipeline: tuple[Stage, ...]
) -> None:
    one, many = run_at(tmp_path), run_at(tmp_path)
    many.resources = Resources(num_workers=64, max_actors=7)
    plan = expected_plan(one, pipeline[0], {})
    assert expected_plan(many, pipeline[0], {}) == plan
    other = run_at(tmp_path, replace(recipe_of("digits", 10), seed=1))
    assert expected_plan(other, pipeline[0], {})["fingerprint"] != plan["fingerprint"]


def test_a_reader_follows_the_commit_and_not_what_lies_beside_it(
    tmp_path: Path, pipeline: tuple[Stage, ...]
) -> None:
    run_pipeline(run_at(tmp_path), pipeline)
    (tmp_path / "first_room" / "stray.bin").write_bytes(b"not committed")
    commit = run_at(tmp_path).room("first_room").committed()
    assert sorted(f.key for m in commit.units.values() for f in m.files) == [
        "u0.bin",
        "u1.bin",
        "u2.bin",
    ]


def test_a_run_that_loses_the_race_for_a_room_ends_and_the_next_one_finds_it_committed(
    tmp_path: Path, pipeline: tuple[Stage, ...]
) -> None:
    finished = run_pipeline(run_at(tmp_path / "other"), pipeline, last="first")["first_room"]
    first = replace(pipeline[0], work=_racing(pipeline[0], tmp_path, asdict(finished)))
    with pytest.raises(LostRaceError, match=r"with the same options .* run the same command again"):
        run_pipeline(run_at(tmp_path), (first,))
    assert run_pipeline(run_at(tmp_path), (first,))["first_room"] == finished


def test_a_commit_whose_reply_was_lost_is_not_a_lost_race(
    tmp_path: Path, pipeline: tuple[Stage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, lost = Store.create, list[str]()

    def create(store: Store, key: str, content: bytes) -> bool:
        if key == "stage.json":
            lost.append(key)
            assert put(store, key, content)  # what a client repeats that got no answer
        return put(store, key, content)

    monkeypatch.setattr(Store, "create", create)
    run = run_at(tmp_path)
    assert run_pipeline(run, pipeline[:1])["first_room"].run == run.token
    assert lost == ["stage.json"]


def test_a_store_that_ignores_conditions_is_refused_before_the_first_write_unless_accepted(
    tmp_path: Path, pipeline: tuple[Stage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignores(store: Store, key: str, content: bytes) -> bool:
        store.put(key, content)
        return True

    monkeypatch.setattr(Store, "create", ignores)
    with pytest.raises(ArtifactError, match="--allow-unsafe-commits"):
        run_pipeline(run_at(tmp_path), pipeline)
    assert Store(str(tmp_path)).list() == {}
    accepted = run_at(tmp_path)
    accepted.unsafe_commits = True
    assert len(run_pipeline(accepted, pipeline)) == len(pipeline)


def test_the_event_log_tells_what_a_run_did(tmp_path: Path, pipeline: tuple[Stage, ...]) -> None:
    first, second = run_at(tmp_path), run_at(tmp_path)
    run_pipeline(first, pipeline, last="first")
    first.end(0)
    run_pipeline(second, pipeline)
    second.end(0)
    events = read_events(Store(str(tmp_path)))
    told = [(e["run"], e["event"], e.get("stage")) for e in events]
    expected = [(first.token, "run_started", None)]
    expected += [(first.token, e, "first") for e in ("stage_started", "stage_committed")]
    expected += [(first.token, "run_ended", None), (second.token, "run_started", None)]
    for stage in pipeline[1:]:
        expected += [(second.token, e, stage.name) for e in ("stage_started", "stage_committed")]
    assert told == [*expected, (second.token, "run_ended", None)]


def test_a_run_that_loses_the_race_to_other_options_says_so(
    tmp_path: Path, pipeline: tuple[Stage, ...]
) -> None:
    finished = run_pipeline(run_at(tmp_path / "other"), pipeline, last="first")["first_room"]
    foreign = {**asdict(finished), "fingerprint": "0123456789abcdef"}
    first = replace(pipeline[0], work=_racing(pipeline[0], tmp_path, foreign))
    with pytest.raises(LostRaceError, match=r"other options .* Give each run its own --out"):
        run_pipeline(run_at(tmp_path), (first,))


def _racing(
    stage: Stage, out: Path, commit: dict[str, Any]
) -> Callable[[StageRun], dict[str, Any]]:
    """Return the stage's work, after which another run has committed the room."""

    def work(stage_run: StageRun) -> dict[str, Any]:
        metrics = stage.work(stage_run)
        assert Store(str(out)).create(f"{stage.room}/stage.json", seal(commit))
        return metrics

    return work


def test_a_run_whose_room_was_taken_over_does_not_commit_into_it(
    tmp_path: Path, pipeline: tuple[Stage, ...]
) -> None:
    other = run_at(tmp_path, replace(recipe_of("digits", 10), seed=5))

    def work(stage_run: StageRun) -> dict[str, Any]:
        metrics = pipeline[0].work(stage_run)
        stage_run.room.clear()
        plan = expected_plan(other, pipeline[0], {})
        stage_run.room.store.put("plan.json", seal(plan))
        return metrics

    with pytest.raises(LostRaceError, match="was replaced by another run"):
        run_pipeline(run_at(tmp_path), (replace(pipeline[0], work=work),))
    assert other.room("first_room").read_commit() is None


def test_of_two_runs_that_begin_a_room_at_once_the_second_is_held_to_the_first_ones_plan(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = run_at(tmp_path, replace(recipe_of("digits", 10), seed=5))
    plan = seal(expected_plan(faster, pipeline[0], {}))
    create = Store.create

    def beaten(store: Store, key: str, content: bytes) -> bool:
        if key == "plan.json":
            create(store, "plan.json", plan)
            create(store, "units/u0.json", b"{}")
        return create(store, key, content)

    monkeypatch.setattr(Store, "create", beaten)
    with pytest.raises(ConfigError, match=r"seed=5 \(this run asks for 0\)"):
        run_pipeline(run_at(tmp_path), pipeline, last="first")
    assert worked.done == []
    assert (tmp_path / "first_room" / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("deletions", range(6))
def test_what_a_killed_overwrite_leaves_is_never_taken_for_the_new_options_work(
    deletions: int,
    tmp_path: Path,
    pipeline: tuple[Stage, ...],
    worked: Worked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_pipeline(run_at(tmp_path), pipeline, last="first")
    assert (
        len(list((tmp_path / "first_room").iterdir())) == 7
    )  # 3 payloads, attempts, units, plan, commit
    new = run_at(tmp_path, replace(recipe_of("digits", 10), seed=5))
    delete, done = Store.delete, list[str]()

    def killed(store: Store, key: str) -> None:
        if len(done) == deletions:
            raise KeyboardInterrupt
        done.append(key)
        delete(store, key)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(new, pipeline, last="first", overwrite=True)
    worked.done.clear()
    commit = run_pipeline(new, pipeline, last="first", overwrite=True)["first_room"]
    assert commit.options == {"seed": 5}
    assert [unit for _, unit in worked.done] == list(UNITS)


def test_seeds_of_units_differ_and_are_the_same_everywhere() -> None:
    seeds = {
        unit_seed(seed, stage, unit)
        for seed in (0, 1)
        for stage in ("a", "b")
        for unit in ("0", "1")
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert unit_seed(0, "recover", "g00000") == unit_seed(0, "recover", "g00000")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("ipc", [1, 10, 100])
def test_every_recipe_is_a_valid_configuration_that_json_can_hold(name: str, ipc: int) -> None:
    config = recipe_of(name, ipc)
    assert (config.recipe, config.ipc) == (name, ipc)
    json.dumps(asdict(config))


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="digits, fashion_mnist, cifar10, cifar100, imagenette"):
        recipe_of("cifar", 10)


def test_a_room_in_which_nothing_was_done_can_be_begun_with_other_options(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    worked.fail_at = ("first", "u0")
    with pytest.raises(RuntimeError):
        run_pipeline(run_at(tmp_path), pipeline)
    worked.fail_at = None
    run_pipeline(run_at(tmp_path, replace(recipe_of("digits", 10), seed=5)), pipeline, last="first")
    assert {name for name, _ in worked.done} == {"first"}


class Stops:
    """Two drivers in two threads, of which the first stops before its n-th write until the second has come to its m-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, m: int) -> None:
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self._left = {"first": n, "second": m}
        for name in ("create", "put", "delete"):
            monkeypatch.setattr(Store, name, self._counted(getattr(Store, name)))

    def _counted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def before(store: Store, *arguments: Any) -> Any:
            name = threading.current_thread().name
            left = self._left.get(name, -1)
            self._left[name] = left - 1
            if left == 0 and name == "first":
                self.stopped.set()
                assert self.go_on.wait(20)
            elif left == 0:
                self.go_on.set()
                self.first.join(20)
            return write(store, *arguments)

        return before

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """Return what came of both: a result, or the exception."""
        ends: dict[str, Any] = {}

        def told(name: str, drive: Callable[[], Any]) -> None:
            try:
                ends[name] = drive()
            except Exception as error:
                ends[name] = error
            self.stopped.set()

        self.first = threading.Thread(target=told, name="first", args=("first", first))
        self.first.start()
        assert self.stopped.wait(20)
        other = threading.Thread(target=told, name="second", args=("second", second))
        other.start()
        other.join(20)
        self.go_on.set()
        self.first.join(20)
        return ends["first"], ends["second"]


def check_whole(run: Run, seed: int) -> None:
    """Check that a room is committed, of one plan's units alone, and that each file is what its marker says."""
    room = Run(**{**vars_of(run), "token": "reader"}).room("first_room")
    commit = room.committed()
    assert commit.options == {"seed": seed} and set(commit.units) == set(UNITS)
    for unit, marker in commit.units.items():
        for entry in marker.files:
            assert room.read(entry) == f"seed {seed} {unit}".encode()


def vars_of(run: Run) -> dict[str, Any]:
    names = ("store", "config", "resources", "open_source", "progress", "connect")
    return {name: getattr(run, name) for name in names}


def seeded(pipeline: tuple[Stage, ...]) -> Stage:
    """Return the first stage with payloads that tell whose they are."""

    def work(stage: StageRun) -> dict[str, Any]:
        for unit in UNITS:
            if unit in stage.room.finished():
                continue
            attempt = stage.room.begin_unit(unit)
            if attempt is not None:
                payload = f"seed {stage.config.seed} {unit}".encode()
                stage.room.commit_unit(unit, {f"{unit}.bin": payload}, attempt=attempt)
        return {"units": len(UNITS)}

    return replace(pipeline[0], work=work)


@pytest.mark.parametrize("n", range(13))
@pytest.mark.parametrize("m", [1, 4, 8, 99])
def test_a_driver_that_was_taken_over_at_any_write_harms_nothing_when_it_wakes(
    n: int,
    m: int,
    tmp_path: Path,
    pipeline: tuple[Stage, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = run_at(tmp_path, replace(recipe_of("digits", 10), seed=1))
    new = run_at(tmp_path, replace(recipe_of("digits", 10), seed=2))
    old.unsafe_commits = new.unsafe_commits = True  # without probes, whose writes would be counted
    stage = seeded(pipeline)
    stops = Stops(monkeypatch, n, m)
    first, second = stops.run(
        lambda: run_pipeline(old, (stage,)),
        lambda: run_pipeline(new, (stage,), overwrite=True),
    )
    # The second took it over, or came when the first had only begun and lost; who has not lost is whole.
    assert isinstance(first, (dict, LostRaceError, ConfigError)), first
    assert isinstance(second, (dict, LostRaceError, ConfigError)), second
    assert isinstance(first, dict) or isinstance(second, dict)
    check_whole(new, 2 if isinstance(second, dict) else 1)


@pytest.mark.parametrize("n", range(1, 13, 3))
def test_without_overwrite_a_second_driver_with_other_options_is_refused_and_harms_nothing(
    n: int, tmp_path: Path, pipeline: tuple[Stage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = run_at(tmp_path, replace(recipe_of("digits", 10), seed=1))
    new = run_at(tmp_path, replace(recipe_of("digits", 10), seed=2))
    old.unsafe_commits = new.unsafe_commits = True
    stage = seeded(pipeline)
    first, second = Stops(monkeypatch, n, 0).run(
        lambda: run_pipeline(old, (stage,)), lambda: run_pipeline(new, (stage,))
    )
    assert isinstance(first, dict) and isinstance(second, ConfigError)
    check_whole(old, 1)


def test_a_stage_that_was_refused_before_it_did_anything_makes_way_for_other_options(
    tmp_path: Path, pipeline: tuple[Stage, ...], worked: Worked
) -> None:
    worked.fail_at = ("first", "u0")
    with pytest.raises(RuntimeError, match="killed here"):
        run_pipeline(run_at(tmp_path), pipeline, last="first")
    worked.fail_at = None
    other = run_at(tmp_path, replace(recipe_of("digits", 10), seed=5))
    commit = run_pipeline(other, pipeline, last="first")["first_room"]
    assert commit.options == {"seed": 5}
