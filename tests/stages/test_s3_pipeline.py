"""The pipeline with every room on S3. Real images on S3 are read in test_features.py and test_secrets.py."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import S3Uri
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.dataset import DistilledDataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


def test_a_run_on_s3_writes_the_same_bytes_and_its_data_set_the_same_items(
    finished_run: FinishedRun, s3_server: S3Uri, capsys: pytest.CaptureFixture[str]
) -> None:
    out = s3_server()
    assert tiny.job(out) == 0
    assert f"distilled set   {out}/dataset\n" in capsys.readouterr().out
    tiny.assert_same_payloads(out, finished_run.payloads)

    there, here = (
        DistilledDataset(f"{out}/dataset"),
        DistilledDataset(f"{finished_run.out}/dataset"),
    )
    assert len(there) == len(here) == 40 * 6
    for index in (0, 39, 40, 239):
        torch.testing.assert_close(there[index], here[index], rtol=0, atol=0)

    # Again: everything is found, nothing is written.
    assert tiny.job(out) == 0
    assert capsys.readouterr().err.count("found committed") == 7
