"""The pipeline with every room on S3. Real images on S3 are read in test_features.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import S3Uri
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.store.written_sources import parquet_of
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.sources import open_source

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


def test_the_command_distills_images_that_lie_on_s3_into_a_run_on_s3(s3_server: S3Uri) -> None:
    data, out = Store(s3_server()).child("digits"), s3_server()
    for split, name in (("train", "train"), ("val", "validation")):
        source = open_source("digits", tiny.config().source, split=split)
        raws = [raw for shard in source.shards(500) for raw in source.read_shard(shard)]
        pngs = [encode_png(raw.content[:, :, None]) for raw in raws]
        content = parquet_of(pngs, [raw.label for raw in raws], source.class_names)
        data.put(f"data/{name}-00000-of-00001.parquet", content)

    typed = tiny.typed(out, "--data", data.uri, "--source.format", "auto")

    assert typed.exit_code == 0, typed.stderr
    assert "(d) all real images | 1437 | 1 |" in typed.stdout
    dataset = DistilledDataset(f"{out}/dataset")
    assert dataset.manifest["source"]["num_images"] == 1437
    assert dataset.images.shape == (40, 16, 16, 1)
    views, logits, weights = next(iter(DataLoader(dataset, batch_size=7, num_workers=1)))
    assert (views.shape, logits.shape, weights.shape) == ((7, 1, 16, 16), (7, 10), (7,))
