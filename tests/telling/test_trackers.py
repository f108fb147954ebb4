from __future__ import annotations

import errno
import logging
import struct
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from jobs import distill
from tests.conftest import free_port
from wmdd_ray.config import Reporting
from wmdd_ray.errors import ConfigError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.telling.trackers import Number, Told, TrackedRun, Tracker, trackers_of

RUN = TrackedRun(name="digits-ipc4", key="0123456789abcdef", options={"ipc": 4, "recover.tiles": 1})
NUMBERS = [
    Number(stage="recover", metric="loss", part="bn", detail="g00000", value=0.5, step=7),
    Number(stage="recover", metric="loss", part="bn", detail="g00000", value=0.25, step=8),
    Number(stage="barycenters", metric="cost", value=6.5, step=3),
    Number(stage="evaluate", metric="top1", part="distilled-soft", value=0.875, step=1),
    Number(stage="recover", metric="units_done", value=2.5, step=12),
]
SERIES = {
    "recover/loss/bn/g00000": [(7, 0.5), (8, 0.25)],
    "barycenters/cost": [(3, 6.5)],
    "top1/distilled-soft": [(1, 0.875)],
    "progress/recover/units_done": [(12, 2.5)],
}


def tell(tracker: Tracker, numbers: list[Number], exit_code: int = 0) -> None:
    """Tell numbers as a run does, and end."""
    told = Told(tracker)
    told.tell(numbers)
    told.end(exit_code)
    told.join(60)


def tracker_of(**reporting: Any) -> Tracker:
    (tracker,) = trackers_of(Reporting(**reporting), RUN)
    return tracker


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files as TensorBoard does."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder))
    events.Reload()
    assert (
        events.Tensors("options/text_summary")[0]
        .tensor_proto.string_val[0]
        .startswith(b"    ipc: 4\n")
    )
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_reads_the_numbers_in_a_folder_named_like_the_run(tmp_path: Path) -> None:
    tell(tracker_of(tensorboard=str(tmp_path)), NUMBERS)
    assert scalars_of(tmp_path / "digits-ipc4") == SERIES


def test_a_number_that_is_not_finite_is_told_to_nobody(tmp_path: Path) -> None:
    bad = Number(stage="squeeze", metric="loss", value=float("nan"), step=1)
    tell(tracker_of(tensorboard=str(tmp_path)), [bad, *NUMBERS])
    assert scalars_of(tmp_path / "digits-ipc4") == SERIES


def test_event_files_of_an_object_store_arrive_whole(tmp_path: Path) -> None:
    uri = f"memory://tracking-{uuid.uuid4().hex}"
    tell(tracker_of(tensorboard=uri), NUMBERS)
    store = Store(f"{uri}/digits-ipc4")
    (key,) = store.list()
    (tmp_path / key).write_bytes(store.get(key))
    assert scalars_of(tmp_path) == SERIES


def test_a_full_disk_is_one_warning_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record_writer = pytest.importorskip("tensorboardX.record_writer")

    def full(writer: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, "flush", full)
    told = Told(tracker_of(tensorboard=str(tmp_path)))
    for _ in range(5):
        told.tell(NUMBERS)
        time.sleep(0.02)
    told.end(0)
    told.join(10)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.getMessage() == (
        "TensorBoard failed ([Errno 28] No space left on device) and is told nothing more; the run goes on"
    )


def test_a_tracker_that_hangs_holds_up_neither_the_run_nor_another_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go, heard = threading.Event(), threading.Event()

    class Hanging(Tracker):
        title = "Hanging"

        def log(self, numbers: Any) -> None:
            go.wait()

    class Hearing(Tracker):
        def log(self, numbers: Any) -> None:
            heard.set()

    both = [Told(Hanging()), Told(Hearing())]
    started = time.monotonic()
    for told in both:
        told.tell(NUMBERS)
        told.end(0)
    assert heard.wait(5)
    for told in both:
        told.join(0.2)
    assert time.monotonic() - started < 5
    assert [r.getMessage() for r in caplog.records] == [
        "Hanging did not take everything in time; the rest is lost"
    ]
    go.set()


def mlflow_metrics(uri: str) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """Return the one run of the experiment, and its metrics by step."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("wmdd_ray").experiment_id
    (run,) = client.search_runs([experiment])
    history = {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }
    return run, history


@pytest.fixture
def mlflow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracking store in files, which MLflow asks to be allowed; its databases are not in `mlflow-skinny`."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return (tmp_path / "mlruns").as_uri()


def test_mlflow_keeps_numbers_options_and_the_end(mlflow_folder: str) -> None:
    tell(tracker_of(mlflow=mlflow_folder), NUMBERS)
    run, metrics = mlflow_metrics(mlflow_folder)
    assert metrics == SERIES
    assert run.info.run_name == "digits-ipc4" and run.info.status == "FINISHED"
    assert run.data.params == {"ipc": "4", "recover.tiles": "1"}


def test_the_same_command_goes_on_in_the_same_mlflow_run(mlflow_folder: str) -> None:
    tell(tracker_of(mlflow=mlflow_folder), NUMBERS[:1], exit_code=143)
    assert mlflow_metrics(mlflow_folder)[0].info.status == "KILLED"
    tell(tracker_of(mlflow=mlflow_folder), NUMBERS[1:])
    run, metrics = mlflow_metrics(mlflow_folder)
    assert metrics == SERIES and run.info.status == "FINISHED"


def test_an_mlflow_server_that_is_gone_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tell(tracker_of(mlflow=f"http://127.0.0.1:{free_port()}"), NUMBERS)
    (warning,) = [r for r in caplog.records if r.name == "wmdd_ray.telling.trackers"]
    assert warning.getMessage().startswith("MLflow failed (API request to ")


def wandb_history(path: Path) -> tuple[Any, list[dict[str, float]]]:
    """Return the run and the rows of an offline run's log: LevelDB's log format, after a header of 7 bytes."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    json_format = pytest.importorskip("google.protobuf.json_format")
    log, at, found, rows = path.read_bytes(), 7, None, []
    whole = b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # no room for a head: the rest of a block is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # full, last
            continue
        record = records.Record.FromString(whole)
        whole = b""
        if record.WhichOneof("record_type") == "run" and found is None:
            found = json_format.MessageToDict(record.run)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: float(i.value_json) for i in items})
    return found, rows


def test_wandb_keeps_numbers_by_their_own_steps_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tell(tracker_of(wandb="me/distilling"), NUMBERS)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    run, rows = wandb_history(path)
    deadline = time.monotonic() + 30
    while len(rows) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)  # its own process writes the file, and later than it says so
        run, rows = wandb_history(path)
    assert (run["entity"], run["project"], run["runId"]) == ("me", "distilling", RUN.key)
    assert run["displayName"] == "digits-ipc4"
    options = {
        "/".join(i.get("nestedKey", [i.get("key", "")])): i["valueJson"]
        for i in run["config"]["update"]
    }
    assert options["ipc"] == "4"
    kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert kept == [
        {"recover/iteration": 7, "recover/loss/bn/g00000": 0.5},
        {"recover/iteration": 8, "recover/loss/bn/g00000": 0.25},
        {"barycenters/class": 3, "barycenters/cost": 6.5},
        {"top1/seed": 1, "top1/distilled-soft": 0.875},
        {"progress/seconds": 12, "progress/recover/units_done": 2.5},
    ]


def test_wandb_without_credentials_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb").teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="found none; run `wandb login`, set WANDB_API_KEY, or"):
        tracker_of(wandb="distilling")


@pytest.mark.parametrize(
    ("option", "where", "package"),
    [
        ("tensorboard", "runs", "tensorboardX"),
        ("mlflow", "http://h", "mlflow"),
        ("wandb", "p", "wandb"),
    ],
)
def test_a_tracker_that_is_not_installed_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    where: str,
    package: str,
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "run"
    assert distill.main(["--out", str(out), f"--{option}", where]) == 2
    told = capsys.readouterr().err
    assert f"error: --{option}: expected {package} to be installed" in told
    assert f"`pip install {package}`, or leave out --{option}" in told
    assert not out.exists()


@pytest.mark.parametrize(
    "reporting", [{"tensorboard": "s3://me:secret@bucket/x"}, {"mlflow": "http://me:secret@host"}]
)
def test_a_password_in_a_trackers_uri_is_refused_and_not_repeated(
    reporting: dict[str, str],
) -> None:
    with pytest.raises(ConfigError, match="without a password") as refused:
        Reporting(**reporting)
    assert "secret" not in str(refused.value)


def test_who_is_told_takes_no_part_in_what_a_run_is(tmp_path: Path) -> None:
    plain = distill.parse(["--out", str(tmp_path)])
    told = distill.parse(
        ["--out", str(tmp_path), "--tensorboard", "t", "--mlflow", "m", "--wandb", "w"]
    )
    assert told.reporting == Reporting(tensorboard="t", mlflow="m", wandb="w")
    assert told.config == plain.config and told.resources == plain.resources
