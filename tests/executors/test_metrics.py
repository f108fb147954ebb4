from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import ray

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.config import Resources
from wmdd_ray.executors.metrics import RayWatch
from wmdd_ray.executors.queue import UnitQueue, reporter
from wmdd_ray.spine.events import read_events
from wmdd_ray.spine.numbers import Number
from wmdd_ray.spine.rooms import Room, UnitMarker
from wmdd_ray.spine.run import Progress, Run, StageRun
from wmdd_ray.stages import evaluate, recover, relabel
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.telling import watch as watching
from wmdd_ray.telling.trackers import TrackedRun, Tracker
from wmdd_ray.telling.watch import LiveWatch

# Ray hands its metrics on every ten seconds.
_EXPORT_S = 60.0


def scraped(run: str) -> dict[tuple[str, str, str], float]:
    """Return (metric, stage, part) -> value of a run, as Prometheus gets them from the node."""
    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    found = {}
    for line in lines:
        if not line.startswith("ray_wmdd_"):
            continue
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags["run"] == quote(run):
            key = (name.removeprefix("ray_wmdd_"), tags["stage"], tags["part"])
            found[key] = float(value)
    return found


def tensorboard_curve(folder: Path, name: str) -> list[tuple[int, float]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def redone(
    ray_local: None, finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that found everything but two rooms committed, and told of those."""
    out = tmp_path_factory.mktemp("metrics") / f"zähler{time.time_ns()}"
    rooms = [room for room in tiny.ROOMS if room not in ("barycenters", "images")]
    tiny.copy_rooms(finished_run.out, out, *rooms)
    assert tiny.job(out, "--tensorboard", str(out.parent / "board")) == 0
    return out


def test_prometheus_gets_units_images_losses_and_costs_from_the_node(redone: Path) -> None:
    store = Store(str(redone))
    cost = Room(store, "barycenters").committed().metrics["cost_per_class"]
    images = Room(store, "images").committed()
    losses = [
        {
            term: np.mean([of_class[term] for of_class in marker.metrics["losses"]])
            for term in ("bn", "feature")
        }
        for marker in images.units.values()
    ]
    deadline = time.monotonic() + _EXPORT_S
    found: dict[tuple[str, str, str], float] = {}
    while found.get(("images_done", "recover", "")) != 40 and time.monotonic() < deadline:
        time.sleep(1)
        found = scraped(redone.name)
    for stage in ("recover", "barycenters"):
        units = tiny.UNITS[stage]
        assert found["units_done", stage, ""] == found["units_total", stage, ""] == units
        assert found["images_per_second", stage, ""] > 0
    assert found["images_done", "recover", ""] == 40
    assert found["images_done", "barycenters", ""] == 1437
    assert min(abs(np.array(cost) - found["cost", "barycenters", ""])) < 1e-6
    # The terms of one and the same unit, the one that was finished last.
    told = {term: found["loss", "recover", term] for term in ("bn", "feature")}
    assert any(told == pytest.approx(of_unit) for of_unit in losses)


def test_prometheus_is_told_what_a_metric_is_and_in_which_unit(redone: Path) -> None:
    scraped(redone.name)
    (node,) = ray.nodes()
    with urllib.request.urlopen(
        f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10
    ) as reply:
        text = reply.read().decode()
    assert re.search(r"# HELP ray_wmdd_cost W2\^2 .* \(squared feature units\)", text)
    assert re.search(r"# HELP ray_wmdd_images_per_second .* \(images/s\)", text)


def test_tensorboard_has_the_curves_that_the_images_carry_and_a_cost_a_class(redone: Path) -> None:
    store, board = Store(str(redone)), redone.parent / "board" / redone.name
    unit, marker = next(iter(Room(store, "images").committed().units.items()))
    records = [codecs.decode_class_images(store.child("images").get(f.key)) for f in marker.files]
    at_P = records[0].curve_at_P
    assert at_P is not None
    for term in ("bn", "feature"):
        curve = tensorboard_curve(board, f"recover/loss/{term}/{unit}")
        mean_P = np.mean([record.curves[term] for record in records], axis=0)
        assert [step for step, _ in curve] == at_P.tolist()
        np.testing.assert_allclose([value for _, value in curve], mean_P, rtol=1e-6)
    cost = Room(store, "barycenters").committed().metrics["cost_per_class"]
    told = dict(tensorboard_curve(board, "barycenters/cost"))
    np.testing.assert_allclose([told[label] for label in range(len(cost))], cost, rtol=1e-6)


def test_a_run_that_reports_has_the_same_payloads(redone: Path, finished_run: FinishedRun) -> None:
    tiny.assert_same_payloads(redone, finished_run.payloads)


@pytest.mark.usefixtures("ray_local")
def test_the_event_log_has_ray_datas_own_statistics(
    finished_run: FinishedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher")
    assert tiny.job(out, "--until", "features") == 0
    told = [e for e in read_events(Store(str(out))) if e["event"] == "data_statistics"]
    assert [event["stage"] for event in told] == ["features"]
    assert re.search(r"MapBatches\(EmbeddingActor\).*: \d+ tasks executed", told[0]["text"])
    said = capfd.readouterr().err
    assert "20/20 done" in said and "statistics" not in said and "Operator" not in said


class Heard(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.numbers: list[Number] = []
        self.exit_code: int | None = None

    def log(self, numbers: Sequence[Number]) -> None:
        self.numbers += numbers

    def close(self, exit_code: int) -> None:
        self.exit_code = exit_code

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(n.step, n.value) for n in self.numbers if n.name == name]


class Images:
    num_images = 100


@pytest.fixture
def squeezing(ray_local: None, tmp_path: Path) -> Iterator[tuple[StageRun, LiveWatch, Heard]]:
    """A stage at work whose watch tells a tracker."""
    heard = Heard()
    watch = RayWatch(TrackedRun(name="run", key="key", options={}), [heard])
    run = Run(
        store=Store(str(tmp_path)),
        config=tiny.config(),
        resources=Resources(),
        open_source=lambda split: Images(),
        progress=lambda name: Progress(),
        connect=lambda: None,
        watch=watch,
    )
    run.begin_work()
    stage = StageRun(run=run, stage=PIPELINE[0], room=run.room("teacher"), progress=Progress())
    watch.units("squeeze", 0, 1)
    yield stage, watch, heard
    if heard.exit_code is None:
        run.end(0)


def test_epochs_are_told_while_their_unit_is_under_way_and_once(
    squeezing: tuple[StageRun, LiveWatch, Heard],
) -> None:
    stage, _, heard = squeezing
    queue = UnitQueue(["teacher"], on_event=stage.event)
    queue.join(0, 1)
    queue.take(0)
    queue.report("teacher", 0.1, "", {"epoch": 1, "loss": 2.0})
    queue.report("teacher", 0.1, "", {"epoch": 1, "loss": 2.0})
    queue.report("teacher", 0.3, "", {"epoch": 3, "loss": 1.0})
    attempt = stage.room.begin_unit("teacher")
    assert attempt is not None
    stage.room.commit_unit(
        "teacher", {}, attempt=attempt, metrics={"losses": [2.0, 1.5, 1.0, 0.5], "top1": 0.75}
    )
    queue.report("teacher", 1.0, "")
    stage.run.end(0)
    assert heard.series("squeeze/loss") == [(1, 2.0), (3, 1.0), (4, 0.5)]
    assert heard.series("top1/teacher") == [(0, 0.75)]
    assert heard.exit_code == 0
    events = [event["event"] for event in read_events(stage.run.store)]
    assert "unit_told" not in events and "unit_done" in events


def test_images_per_second_of_a_training_that_goes_on_leave_out_what_was_done_before(
    squeezing: tuple[StageRun, LiveWatch, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, watch, heard = squeezing
    for epoch in (31, 32):
        stage.event("unit_told", unit="teacher", values={"epoch": epoch, "loss": 1.0})
        time.sleep(0.2)
    watch.units("squeeze", 0.5, 1, final=True)
    stage.run.end(0)
    ((_, rate),) = heard.series("progress/squeeze/images_per_second")
    # 100 images in 0.2 s, by clocks that are read a little early or late, and not 3,200.
    assert 0 < rate < 2 * 100 / 0.2
    assert [value for _, value in heard.series("progress/squeeze/images_done")] == [3200]


def test_a_marker_that_cannot_be_read_is_one_warning_and_no_end(
    squeezing: tuple[StageRun, LiveWatch, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, watch, heard = squeezing
    warnings: list[str] = []
    # Not caplog, which hears nothing once Ray Train has run in this process.
    monkeypatch.setattr(
        watching.logger, "warning", lambda text, *about: warnings.append(text % about)
    )
    for unit in ("lost", "lost too"):
        stage.event("unit_done", unit=unit)
    stage.event("unit_retried", unit="lost", reason="its node went")
    watch.units("squeeze", 1, 1, final=True)
    stage.run.end(0)
    assert len(warnings) == 1 and warnings[0].startswith("metrics: FileNotFoundError")
    assert [value for _, value in heard.series("progress/squeeze/units_done")] == [0, 1]
    assert [value for _, value in heard.series("progress/squeeze/units_retried")] == [1]


def test_a_terminated_run_does_not_wait_for_a_tracker(
    squeezing: tuple[StageRun, LiveWatch, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, _, heard = squeezing
    go = threading.Event()
    monkeypatch.setattr(heard, "log", lambda numbers: go.wait())
    stage.event("unit_told", unit="teacher", values={"epoch": 1, "loss": 1.0})
    started = time.monotonic()
    stage.run.end(143)
    # Not the 20 s of a run that ends by itself; the margin is a busy machine's.
    assert time.monotonic() - started < 10
    go.set()


def test_a_worker_hands_on_what_its_unit_tells() -> None:
    queue = UnitQueue(["a"])
    queue.join(0, 1)
    queue.take(0)
    report = reporter(queue, "a")
    time.sleep(0.6)  # twice a second at most
    report(0.4, "step 3/4")
    report(0.5, "half", epoch=2, loss=0.25)
    told = [event for event in queue.drain() if event["event"] == "unit_told"]
    assert [(event["unit"], event["values"]) for event in told] == [
        ("a", {"epoch": 2, "loss": 0.25})
    ]


@pytest.mark.parametrize(
    ("stage", "unit", "expected"),
    [
        ("evaluate", "distilled-soft-s002", ("distilled-soft", 2)),
        ("mobilenet_v2", "random_real-hard-s000", ("random_real-hard", 0)),
        ("relabel", "e00000-00024-s0000", None),
    ],
)
def test_students_of_any_stage_tell_their_top1_by_row_and_seed(
    stage: str, unit: str, expected: tuple[str, int] | None
) -> None:
    marker = UnitMarker(
        unit=unit,
        files=(),
        metrics={"top1": 0.5},
        seconds=1.0,
        host="host",
        run="run",
        attempt=1,
        finished="2026-01-01T00:00:00Z",
    )
    under_way: Any = SimpleNamespace(stage=SimpleNamespace(name=stage))
    tells = relabel.NUMBERS if stage == "relabel" else evaluate.NUMBERS
    found = tells.numbers(under_way, marker)
    assert [(n.metric, n.part, n.step, n.value) for n in found] == (
        [("top1", *expected, 0.5)] if expected else []
    )


def test_the_surrogate_of_sampled_images_tells_its_losses_by_epoch_and_no_images() -> None:
    marker = UnitMarker(
        unit="surrogate",
        files=(),
        metrics={"epoch_losses": [2.0, 1.5]},
        seconds=1.0,
        host="host",
        run="run",
        attempt=1,
        finished="2026-01-01T00:00:00Z",
    )
    under_way: Any = SimpleNamespace(
        stage=SimpleNamespace(name="recover"), config=SimpleNamespace(num_atoms=4)
    )
    found = recover.NUMBERS.numbers(under_way, marker)
    assert [(n.metric, n.part, n.detail, n.step, n.value) for n in found] == [
        ("loss", "surrogate", "", 1, 2.0),
        ("loss", "surrogate", "", 2, 1.5),
    ]
    assert recover.NUMBERS.curves(under_way, marker) == []
    assert recover.NUMBERS.images(under_way, marker) == 0
