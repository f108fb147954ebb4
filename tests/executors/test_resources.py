"""A disk that fills up, memory that runs out, a request to end: clear, resumable, and nothing left behind.

On an idle machine about 75 s; what is marked `chaos_long` takes some 10 minutes more.
"""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from jobs import distill
from tests.stages import scarcity, tiny
from tests.stages.scarcity import Holding, Hunger, SmallDisk, SmallUnits, Unavailable
from tests.stages.tiny import ROOM_OF, ROOMS, STAGES, FinishedRun
from wmdd_ray.executors import streams
from wmdd_ray.executors.actors import fan_out
from wmdd_ray.executors.cluster import Width
from wmdd_ray.executors.dispatch import do_units
from wmdd_ray.records import FeatureChunk
from wmdd_ray.spine.rooms import MAX_ATTEMPTS, Room
from wmdd_ray.spine.run import DoUnit, Progress, Report, StageRun
from wmdd_ray.stages import barycenters, recover
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources.chunks import DecodedChunk
from wmdd_ray.units import features
from wmdd_ray.units.features import chunk_unit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

MOST_S = 20.0
"""The longest that an end may take: Kubernetes waits 30 s for it."""


def rooms_before(stage: str) -> tuple[str, ...]:
    return ROOMS[: STAGES.index(stage)]


def assert_nothing_half(out: Path) -> None:
    """Assert that all that markers and commits name is whole.

    An unfinished write may lie about: Ray kills the other workers of a run that fails, in the middle of whatever they do.
    """
    for name in ROOMS:
        room = Room(Store(str(out)), name)
        room.read_commit()
        for marker in room.read_units(sorted(room.finished())).values():
            for entry in marker.files:
                room.read(entry)


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that says why the job ended."""
    (line,) = re.findall(r"^error: .*$", capsys.readouterr().err, re.MULTILINE)
    return str(line)


def assert_goes_on(out: Path, stage: str, finished_run: FinishedRun, *options: str) -> None:
    """Assert that the same command ends well, keeps what was finished, sweeps what was not, and writes the usual bytes.

    The driver does by itself what it may, which is faster and the same.
    """
    before = tiny.markers(out)
    (out / ROOM_OF[stage] / f".x.{'0a' * 16}.part").write_bytes(b"half")
    last = stage if stage != "assemble" else "evaluate"  # whose results are part of the card
    assert tiny.job(out, "--until", last, "--executor", "auto", *options) == 0
    after = tiny.markers(out)
    assert {key: after[key] for key in before} == before
    assert not list(out.rglob("*.part"))
    tiny.assert_same_payloads(out, finished_run.payloads, *rooms_before(stage), ROOM_OF[stage])


# A full disk -------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        with scarcity.small_disk(tmp_path / "disk", size_mb=4) as found:
            yield found
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("stage", "free_kb", "num_units"),
    [
        ("squeeze", 12, 0),
        ("features", 100, 1),
        ("barycenters", 60, 1),
        ("recover", 36, 0),  # in the first group's checkpoints
        ("relabel", 32, 1),
        ("assemble", 48, 1),
        ("evaluate", 32, 1),
    ],
)
def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_when_there_is_room_again(
    stage: str,
    free_kb: int,
    num_units: int,
    disk: SmallDisk,
    finished_run: FinishedRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tiny.copy_rooms(finished_run.out, disk.folder / "run", *rooms_before(stage))
    options = ("--recover.checkpoint-s", "1e-9")
    disk.leave(free_kb << 10)
    assert tiny.job(out, "--until", stage, *options) == 5
    where = rf"error: cannot (write|create) {re.escape(str(out))}/{ROOM_OF[stage]}/\S+: "
    line = the_error(capsys)
    assert re.match(where, line)
    assert "No space left on device" in line
    assert "run the same command again" in line
    if stage == "recover":
        assert "/partial/g00000/state-" in line
    assert_nothing_half(out)
    assert num_units <= len(tiny.markers(out, ROOM_OF[stage])) < tiny.UNITS[stage]
    disk.make_space()
    assert_goes_on(out, stage, finished_run, *options)


def test_a_file_size_limit_is_named_like_a_full_disk(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms_before("assemble"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the preview is larger
    try:
        assert tiny.job(out, "--until", "assemble") == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = the_error(capsys)
    assert line.startswith(f"error: cannot create {out}/dataset/preview.png: [Errno 27] File too")
    assert_nothing_half(out)
    assert_goes_on(out, "assemble", finished_run)


# Memory that runs out ----------------------------------------------------------------------------


@pytest.fixture
def hunger(tmp_path: Path) -> Iterator[Callable[[str, int], Hunger]]:
    folder = tmp_path / "deaths"
    folder.mkdir()
    try:
        with scarcity.little_memory(64 << 20) as group:
            yield lambda unit, times: Hunger(str(group), str(folder), unit, times)
    except Unavailable as error:
        pytest.skip(str(error))


def let_starve(stage: str, hunger: Hunger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the workers of a stage take memory in a unit until the kernel kills them."""

    # Made here, so that they travel with what they are to do; by their own names, which Ray shows.
    class ClassSolver(barycenters.ClassSolver):
        def work(self, unit: str) -> None:
            hunger.eat(unit)
            super().work(unit)

    class Embedder(features.Embedder):
        def _features(self, chunk: DecodedChunk) -> FeatureChunk:
            hunger.eat(chunk_unit(chunk.shard_id, chunk.chunk))
            return super()._features(chunk)

    class EmbeddingActor(streams.EmbeddingActor):
        def __init__(self, gpus: float, **arguments: Any) -> None:
            self._embedder = Embedder(device=torch.device("cpu"), **arguments)

    if stage == "barycenters":
        monkeypatch.setattr(barycenters, "ClassSolver", ClassSolver)
    elif stage == "features":
        monkeypatch.setattr(streams, "EmbeddingActor", EmbeddingActor)
    else:
        worker = partial(hungry_worker, hunger=hunger, inner=recover.open_image_maker)
        monkeypatch.setattr(recover, "open_image_maker", worker)


def hungry_worker(
    device: torch.device, *, hunger: Hunger, inner: Callable[..., DoUnit], **options: Any
) -> DoUnit:
    do_unit = inner(device, **options)

    def do_or_die(unit: str, report: Report) -> None:
        hunger.eat(unit)
        do_unit(unit, report)

    return do_or_die


STARVING = [
    pytest.param("barycenters", "00002", (), marks=pytest.mark.chaos_long),
    pytest.param("features", "c00000-0001-00000", ()),
    pytest.param("recover", "g00002", ("--num-workers", "1"), marks=pytest.mark.chaos_long),
    pytest.param(
        "recover",
        "g00002",
        ("--num-workers", "2", "--executor", "auto"),
        marks=pytest.mark.chaos_long,
    ),
    pytest.param(
        "recover",
        "g00002",
        ("--num-workers", "2", "--executor", "actors"),
        marks=pytest.mark.chaos_long,
    ),
]


@pytest.mark.chaos
@pytest.mark.parametrize(("stage", "unit", "options"), STARVING)
def test_a_unit_for_which_memory_never_suffices_is_given_up_by_name(
    stage: str,
    unit: str,
    options: tuple[str, ...],
    hunger: Callable[[str, int], Hunger],
    finished_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms_before(stage))
    hungry = hunger(unit, 1000)
    with monkeypatch.context() as patch:
        let_starve(stage, hungry, patch)
        assert tiny.job(out, "--until", stage, *options) == 1
    line = the_error(capsys)
    assert re.match(
        # In features a process also counts its attempts at the shard that it decodes.
        rf"error: unit (shard-)?{unit.removesuffix('-00000')}(-00000)? ended its worker "
        rf"{MAX_ATTEMPTS} times \(killed, (or )?out of memory",
        line,
    )
    assert "give a worker more memory" in line
    assert hungry.deaths() == MAX_ATTEMPTS
    assert_nothing_half(out)
    assert_goes_on(out, stage, finished_run)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("stage", "unit", "options"),
    [pytest.param(*param.values, marks=pytest.mark.chaos_long) for param in STARVING],
)
def test_a_unit_for_which_memory_suffices_the_second_time_leaves_no_trace(
    stage: str,
    unit: str,
    options: tuple[str, ...],
    hunger: Callable[[str, int], Hunger],
    finished_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms_before(stage))
    hungry = hunger(unit, 1)
    let_starve(stage, hungry, monkeypatch)
    assert_goes_on(out, stage, finished_run, *options)
    assert hungry.deaths() == 1


@pytest.mark.parametrize(
    "num_workers",
    [
        0,
        pytest.param(1, marks=pytest.mark.chaos_long),
    ],
)
def test_memory_that_is_refused_names_the_unit(
    num_workers: int,
    finished_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms_before("recover"))
    with monkeypatch.context() as patch:
        patch.setattr(
            recover, "open_image_maker", partial(greedy_worker, inner=recover.open_image_maker)
        )
        assert (
            tiny.job(
                out, "--until", "recover", "--num-workers", str(num_workers), "--executor", "auto"
            )
            == 1
        )
    line = the_error(capsys)
    assert line.startswith("error: unit g00002: ")
    assert "MemoryError" in line
    assert_nothing_half(out)
    assert_goes_on(out, "recover", finished_run)


def greedy_worker(device: torch.device, *, inner: Callable[..., DoUnit], **options: Any) -> DoUnit:
    do_unit = inner(device, **options)

    def do_or_raise(unit: str, report: Report) -> None:
        if unit == "g00002":
            np.zeros(1 << 60, dtype=np.uint8)
        do_unit(unit, report)

    return do_or_raise


# Shared memory that runs out ---------------------------------------------------------------------


@pytest.mark.chaos_long
def test_shared_memory_that_is_full_is_survived_or_ends_the_run_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    # Features wide enough for the object store: smaller ones travel inside the calls.
    # fmt: off
    options = (
        "--squeeze.network.width", "256", "--squeeze.epochs", "1", "--features.chunk-images", "200",
        "--features.regroup", "always", "--until", "features",
    )
    # fmt: on
    first = scarcity.run_with_shared_memory(
        tiny.command(out, *options), size_mb=640, fill_when=out / "features" / "plan.json"
    )
    if "mount" in first.stderr:
        pytest.skip(f"shared memory cannot be limited here: {first.stderr.strip()}")
    # Never by the time limit. Where SIGBUS meets Ray's own store, Ray ends the driver, and without a word.
    assert first.returncode in (0, 1), first.stderr
    assert_nothing_half(out)
    before = tiny.markers(out, "features")
    assert len(before) >= 10  # every chunk, and so many classes
    assert (len(before) == 20) == (first.returncode == 0)
    assert tiny.typed(out, *options).exit_code == 0
    after = tiny.markers(out, "features")
    assert {key: after[key] for key in before} == before
    assert len(after) == 20


# What is left behind -----------------------------------------------------------------------------

NUM_SMALL_UNITS = 200
WARM = 20


def stage_at(folder: Path, room: str, *options: str) -> StageRun:
    run = distill.open_run(distill.parse([*tiny.OPTIONS, "--out", str(folder), *options]))
    return StageRun(run=run, stage=PIPELINE[3], room=run.room(room), progress=Progress())


def open_small_worker(device: torch.device, *, room: Room) -> DoUnit:
    return lambda unit, report: scarcity.do_small_unit(room, unit)


def small_units_in_actors(stage: StageRun, units: list[str]) -> None:
    actor = ray.remote(num_cpus=1)(SmallUnits)
    fan_out(
        stage,
        actor,
        (stage.room,),
        units,
        wide=Width(2, 1, 0.0),
        max_actors=2,
        on_done=lambda unit: None,
    )


def small_units_on_workers(stage: StageRun, units: list[str]) -> None:
    do_units(stage, units, partial(open_small_worker, room=stage.room))


def working_processes() -> Counter[str]:
    """Return the titles of this Ray's processes that work, or hold something for somebody, with their number."""
    titles = [process.title for process in scarcity.descendants(os.getpid())]
    return Counter(t for t in titles if t.startswith("ray::") and t != "ray::IDLE")


def free_cpus() -> float:
    """Return the CPUs of this Ray that nobody holds."""
    gc.collect()  # handles of actors may be held by each other alone
    return float(ray.available_resources().get("CPU", 0.0))


def assert_flat(before: Holding, after: Holding) -> None:
    print(before, after)
    assert after.pid == before.pid
    assert after.descriptors <= before.descriptors + 2
    # Pools of gRPC and Ray grow by a few threads on demand; what a unit leaves behind would be there 200 times.
    assert after.threads <= before.threads + 8
    assert after.resident_bytes <= before.resident_bytes + (24 << 20)


@pytest.mark.parametrize(
    ("do", "options"),
    [
        pytest.param(small_units_in_actors, (), id="actors"),
        pytest.param(small_units_on_workers, ("--num-workers", "0"), id="driver"),
        pytest.param(
            small_units_on_workers,
            ("--num-workers", "1"),
            id="train",
            marks=pytest.mark.chaos_long,
        ),
        pytest.param(
            small_units_on_workers,
            ("--num-workers", "1", "--executor", "actors"),
            id="isolated",
            marks=pytest.mark.chaos_long,
        ),
    ],
)
def test_two_hundred_units_leave_no_process_descriptor_thread_or_memory(
    do: Callable[[StageRun, list[str]], None],
    options: tuple[str, ...],
    tmp_path: Path,
) -> None:
    free = free_cpus()
    do(stage_at(tmp_path, "warm", *options), [f"u{i:03d}" for i in range(WARM)])
    gc.collect()
    within(MOST_S, lambda: free_cpus() >= free)
    before, working = scarcity.holding(), working_processes()
    shared = scarcity.shared_memory_bytes(os.getpid())

    stage = stage_at(tmp_path, "flat", *options)
    do(stage, [f"u{i:03d}" for i in range(NUM_SMALL_UNITS)])
    gc.collect()
    assert_flat(before, scarcity.holding())
    assert scarcity.shared_memory_bytes(os.getpid()) <= shared + (1 << 20)
    within(MOST_S, lambda: working_processes() <= working)
    within(MOST_S, lambda: free_cpus() >= free)
    assert not any((tmp_path / "train").glob("*"))  # Ray Train's notes
    assert not any((tmp_path / "flat").glob("partial/*"))

    held = scarcity.read_holdings(stage.room)
    assert len(held) == NUM_SMALL_UNITS
    for pid in {holding.pid for holding in held}:
        of_one = [holding for holding in held if holding.pid == pid]
        assert len(of_one) > NUM_SMALL_UNITS // 4  # each of them is long-lived
        assert_flat(of_one[WARM // 2], of_one[-1])


def test_two_hundred_chunks_leave_no_process_descriptor_thread_or_memory(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)

    class EmbeddingActor(streams.EmbeddingActor):
        def __call__(self, batch: pa.Table) -> pa.Table:
            table = super().__call__(batch)
            scarcity.write_holding(folder)
            return table

    monkeypatch.setattr(streams, "EmbeddingActor", EmbeddingActor)
    out = tiny.copy_rooms(finished_run.out, tmp_path / "warm", "teacher")
    free = free_cpus()
    assert tiny.job(out, "--until", "features") == 0
    gc.collect()
    within(MOST_S, lambda: free_cpus() >= free)
    before, working = scarcity.holding(), working_processes()
    shared = scarcity.shared_memory_bytes(os.getpid())

    out = tiny.copy_rooms(finished_run.out, tmp_path / "flat", "teacher")
    assert tiny.job(out, "--until", "features", "--features.chunk-images", "7") == 0
    gc.collect()
    assert_flat(before, scarcity.holding())
    assert scarcity.shared_memory_bytes(os.getpid()) <= shared + (8 << 20)
    within(MOST_S, lambda: working_processes() <= working)
    within(MOST_S, lambda: free_cpus() >= free)
    held = scarcity.read_written(folder)
    assert len(held) == len(tiny.markers(out, "features")) > NUM_SMALL_UNITS
    assert_flat(held[WARM], held[-1])


def within(timeout_s: float, is_so: Callable[[], bool]) -> None:
    """Wait until something is so, and fail when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# A request to end --------------------------------------------------------------------------------

LONG = {
    "squeeze": ("--squeeze.epochs", "100000"),
    "features": ("--features.chunk-images", "1"),
    "barycenters": ("--barycenters.tol", "0", "--barycenters.max-iters", "100000"),
    "recover": ("--recover.iterations", "1000000"),
    "relabel": ("--relabel.epochs", "100000", "--relabel.epochs-per-unit", "100000"),
    "assemble": (),
    "evaluate": ("--evaluate.epochs", "600000"),
}
"""What keeps each stage busy for longer than the test."""

ENDINGS = {
    signal.SIGINT: (130, "interrupted; finished units are kept: run the same command again"),
    signal.SIGTERM: (143, "terminated; finished units are kept: run the same command again"),
}


def assert_ended(exit_code: int, by: signal.Signals, stderr: str, out: Path, stage: str) -> None:
    expected, line = ENDINGS[by]
    assert exit_code == expected, stderr
    assert stderr.strip().splitlines()[-1].startswith(line)
    assert "Traceback" not in stderr
    assert not (out / ROOM_OF[stage] / "stage.json").exists()
    assert_nothing_half(out)


def wait_for_work(out: Path, stage: str) -> None:
    """Return when the first unit of a stage is under way."""
    within(240, lambda: any((out / ROOM_OF[stage] / "attempts").glob("*.json")))


@pytest.mark.chaos
@pytest.mark.parametrize(
    "stage",
    [
        stage if stage == "features" else pytest.param(stage, marks=pytest.mark.chaos_long)
        for stage in STAGES
    ],
)
def test_a_request_to_terminate_is_heard_in_the_middle_of_a_unit(
    stage: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms_before(stage))
    log, free = tmp_path / "log", free_cpus()
    address = ray.get_runtime_context().gcs_address
    job = tiny.started(str(out), "--until", stage, *LONG[stage], ray_address=address, log=log)
    try:
        wait_for_work(out, stage)
        assert job.pid is not None
        os.killpg(job.pid, signal.SIGTERM)
        asked = time.monotonic()
        job.join(MOST_S)
        print(f"{stage}: SIGTERM to its end {time.monotonic() - asked:.1f} s")
        assert not job.is_alive()
    finally:
        job.kill()
        job.join()
    assert job.exitcode is not None
    assert_ended(job.exitcode, signal.SIGTERM, log.read_text(), out, stage)
    within(MOST_S, lambda: free_cpus() >= free)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("stage", "by"),
    [
        pytest.param(
            stage,
            by,
            id=f"{stage}-{by.name}",
            marks=() if (stage, by) == ("recover", signal.SIGINT) else pytest.mark.chaos_long,
        )
        for stage in STAGES
        for by in ENDINGS
    ],
)
def test_a_run_that_is_asked_to_end_takes_the_ray_that_it_started_with_it(
    stage: str,
    by: signal.Signals,
    finished_run: FinishedRun,
    tmp_path: Path,
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms_before(stage))
    mark = uuid.uuid4().hex
    # A shell's job in the background ignores Ctrl-C, and what it starts inherits that.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = subprocess.Popen(
            tiny.command(out, "--until", stage, *LONG[stage]),
            cwd=tiny.ROOT,
            env={**os.environ, "WMDD_RAY_MARK": mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, heard)
    try:
        wait_for_work(out, stage)
        num_processes = len(scarcity.marked_processes(mark))
        asked = time.monotonic()
        if by == signal.SIGINT:
            os.killpg(job.pid, by)  # what a terminal does on Ctrl-C
        else:
            job.send_signal(by)
        _, stderr = job.communicate(timeout=MOST_S)
        print(f"{stage}: {by.name} to its end {time.monotonic() - asked:.1f} s")
    finally:
        job.kill()
        job.wait()
    assert_ended(job.returncode, by, stderr, out, stage)
    assert num_processes > 5  # the raylet and those that it started were seen
    within(MOST_S, lambda: not scarcity.marked_processes(mark))
