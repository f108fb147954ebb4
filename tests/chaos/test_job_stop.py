"""`ray job stop` gives a job three seconds: it ends by itself in that time, and can be submitted again."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.jobs.test_job_submit import head_node
from tests.stages import tiny
from tests.stages.tiny import FinishedRun

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

ENDED = (JobStatus.STOPPED, JobStatus.SUCCEEDED, JobStatus.FAILED)


def submit(client: JobSubmissionClient, out: Path) -> str:
    command = shlex.join(["python", *tiny.command(out, "--until", "features")[1:]])
    return client.submit_job(entrypoint=command, runtime_env={"working_dir": str(tiny.ROOT)})


def ended(client: JobSubmissionClient, job: str) -> JobStatus:
    deadline = time.monotonic() + 150
    while (status := client.get_job_status(job)) not in ENDED:
        assert time.monotonic() < deadline, f"{status}; {client.get_job_logs(job)}"
        time.sleep(0.2)
    return status


def test_a_stopped_job_says_so_keeps_its_units_and_goes_on_when_submitted_again(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher")
    with head_node(RAY_AUTH_MODE="disabled") as head:
        client = JobSubmissionClient(head.address)
        job = submit(client, out)
        deadline = time.monotonic() + 150
        while not (before := tiny.markers(out, "features")):
            assert time.monotonic() < deadline, client.get_job_logs(job)
            time.sleep(0.05)
        stopped = time.monotonic()
        assert client.stop_job(job)
        assert ended(client, job) == JobStatus.STOPPED
        assert time.monotonic() - stopped < 20
        # It was not killed in the end, it ended.
        assert "terminated; finished units are kept" in client.get_job_logs(job)
        assert not (out / "features/stage.json").exists()

        again = submit(client, out)
        assert ended(client, again) == JobStatus.SUCCEEDED, client.get_job_logs(again)
    after = tiny.markers(out)
    assert {key: after[key] for key in before} == before
    tiny.assert_same_payloads(out, finished_run.payloads, "teacher", "features")
