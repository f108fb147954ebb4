"""Jobs on clusters that others started: `ray job submit` and `ray job stop`, with and without a token.

Two heads are started for all of them: an open one, where the image's pods start theirs, and one that asks for a token.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.checks.cluster import authentication
from tests.conftest import free_port
from tests.jobs.test_doctor import failures, report_of
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.test_cluster import copy_image

import psutil  # isort: skip - Ray puts its own on the path

pytestmark = pytest.mark.slow

BESIDE_PYTHON = Path(sys.executable).parent
RAY = str(BESIDE_PYTHON / "ray")


@dataclass(frozen=True)
class Head:
    """A running head node: the address of its dashboard and the environment that may talk to it."""

    address: str
    environment: dict[str, str]


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    path = os.pathsep.join([str(BESIDE_PYTHON), kept["PATH"]])
    return {**kept, "PATH": path, "PYTHONWARNINGS": "default", **changes}


@contextmanager
def ended_with_its_children(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process and all that it started, however the test ends."""
    root = psutil.Process(process.pid)
    try:
        yield
    finally:
        # Killed: asked to end, a head takes twenty seconds for it.
        started = root.children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for child in started:
            if child.is_running():
                child.kill()
        psutil.wait_procs(started, timeout=10)


@contextmanager
def head_node(working_directory: Path | None = None, **variables: str) -> Iterator[Head]:
    """Start a head node on 127.0.0.1, with ports and a folder of its own."""
    for is_last in (False, True):
        # Not under pytest's folder: the path of a socket has at most 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="wmdd-"))
        dashboard = free_port()
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                start_of_a_head(folder, dashboard),
                stdout=log,
                stderr=log,
                cwd=working_directory,
                env=environment(**variables),
                text=True,
                start_new_session=True,
            )
        head = Head(f"http://127.0.0.1:{dashboard}", environment(**variables))
        try:
            with ended_with_its_children(process):
                try:
                    wait_for(f"{head.address}/api/version", process, folder / "log")
                except RuntimeError:
                    if is_last:
                        raise
                    continue  # one start of Ray in hundreds fails, and how Ray starts is not tested here
                yield head
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def start_of_a_head(folder: Path, dashboard: int) -> list[str]:
    start = [RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000"]
    start += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    start += [f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    names = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "ray-client-server",
        "metrics-export",
    )
    start += [f"--{name}-port={free_port()}" for name in names]
    return [*start, "--min-worker-port=0", "--max-worker-port=0"]  # any that is free


def wait_for(url: str, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except urllib.error.HTTPError as refused:
            refused.close()
            return  # it answers: that it wants a token is for the test to see
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no head node: {log.read_text()}") from None
        time.sleep(0.3)


@pytest.fixture(scope="module")
def open_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head that asks for no token, started in a folder with the files of the image and no others."""
    image = copy_image(tmp_path_factory.mktemp("open") / "image")
    with head_node(image, RAY_AUTH_MODE="disabled", PYTHONPATH=str(image)) as head:
        yield head


@pytest.fixture(scope="module")
def token_head() -> Iterator[Head]:
    """A head that asks for a token."""
    token = secrets.token_hex(32)
    with head_node(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as head:
        yield head


def submit(
    head: Head,
    *job: str,
    options: tuple[str, ...] = ("--working-dir", "."),
    cwd: Path = tiny.ROOT,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Type `ray job submit`, in the checkout and uploading it unless told otherwise."""
    return subprocess.run(
        [RAY, "job", "submit", "--address", head.address, *options, "--", "python", *job],
        cwd=cwd,
        env=env or head.environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_a_cluster_with_a_token_runs_the_submitted_job_of_who_has_it_only(
    token_head: Head, tmp_path: Path
) -> None:
    stranger = environment(RAY_AUTH_MODE="disabled")
    job = tiny.command(tmp_path / "refused", "--until", "squeeze")[1:]
    refused = submit(token_head, *job, env=stranger)
    assert refused.returncode != 0
    assert "authentication" in (refused.stdout + refused.stderr).lower()
    assert not (tmp_path / "refused").exists()

    done = submit(token_head, *tiny.command(tmp_path / "run", "--until", "squeeze")[1:])
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "succeeded" in said
    assert "squeeze     1/1 done" in said
    assert token_head.environment["RAY_AUTH_TOKEN"] not in said
    assert (tmp_path / "run/teacher/stage.json").exists()


def test_a_job_api_that_asks_for_a_token_is_fine(token_head: Head) -> None:
    found = authentication(token_head.address.removeprefix("http://"))
    assert (found.mark, found.found) == (
        "ok",
        f"{token_head.address}/api/jobs/ answers 401 to who has no token",
    )


def test_the_submitted_command_finds_the_job_in_the_image_with_nothing_uploaded(
    open_head: Head, tmp_path: Path
) -> None:
    job = ("jobs/distill.py", "--ipc", "100", "--dry-run")
    done = submit(open_head, *job, options=(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wmdd_ray_runs/digits-ipc100" in done.stdout
    assert "succeeded" in done.stdout


def test_a_submitted_doctor_warns_of_a_cluster_that_is_open(
    open_head: Head, tmp_path: Path
) -> None:
    done = submit(open_head, "jobs/doctor.py", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(done.stdout)
    assert failures(report) == []
    assert report["cluster"][0].startswith(f"ok Ray {ray.__version__} at 127.0.0.1:")
    assert report["cluster"][1] == "ok stages work in this process; no autoscaler is seen"
    assert report["cluster"][2].startswith(
        f"warning {open_head.address}/api/jobs/ runs commands of anybody, without a token -> "
    )
    assert report["nodes"][0].startswith("ok 1 node ")
    assert list(tmp_path.iterdir()) == []


ENDED = (JobStatus.STOPPED, JobStatus.SUCCEEDED, JobStatus.FAILED)


def wait_until_ended(client: JobSubmissionClient, job: str) -> JobStatus:
    deadline = time.monotonic() + 300
    while (status := client.get_job_status(job)) not in ENDED:
        assert time.monotonic() < deadline, f"{status}; {client.get_job_logs(job)}"
        time.sleep(0.2)
    return status


# `ray job stop` gives a job three seconds.
@pytest.mark.chaos
def test_a_stopped_job_says_so_keeps_its_units_and_goes_on_when_submitted_again_without_a_token(
    open_head: Head, finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher")
    command = ["python", *tiny.command(out, "--until", "features")[1:]]
    client = JobSubmissionClient(open_head.address)
    uploaded = {"working_dir": str(tiny.ROOT)}
    job = client.submit_job(entrypoint=shlex.join(command), runtime_env=uploaded)
    deadline = time.monotonic() + 300
    while not (before := tiny.markers(out, "features")):
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.05)
    stopped = time.monotonic()
    assert client.stop_job(job)
    assert wait_until_ended(client, job) == JobStatus.STOPPED
    assert time.monotonic() - stopped < 20
    # It was not killed in the end, it ended.
    assert "terminated; finished units are kept" in client.get_job_logs(job)
    assert not (out / "features/stage.json").exists()

    again = submit(open_head, *command[1:])
    assert again.returncode == 0, again.stdout + again.stderr
    after = tiny.markers(out)
    assert {key: after[key] for key in before} == before
    tiny.assert_same_payloads(out, finished_run.payloads, "teacher", "features")
