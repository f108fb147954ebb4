"""Everything on GCS: real images, what `jobs/prepare.py` makes of them, every room of a run, and its data set."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jobs import prepare
from tests.conftest import S3Uri
from tests.stages import tiny
from tests.store.written_sources import parquet_of
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


def test_images_on_gcs_are_prepared_and_distilled_on_gcs(
    gcs_server: S3Uri, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load_digits()
    pngs = [encode_png(np.uint8(image * 15)[:, :, None]) for image in digits.images[:600]]
    source, prepared, out = Store(gcs_server()).child("digits"), gcs_server(), gcs_server()
    for split, rows in (("train", slice(0, 400)), ("validation", slice(400, 600))):
        content = parquet_of(pngs[rows], digits.target[rows].tolist(), tuple("0123456789"))
        source.put(f"data/{split}-00000-of-00001.parquet", content)

    assert prepare.main([source.uri, "--out", prepared, "--max-side", "32"]) == 0
    assert f"{prepared}" in capsys.readouterr().out
    options = (
        "--data", prepared, "--val-data", prepared, "--source.format", "auto",
        # What they compute is no matter here.
        "--recover.iterations", "3", "--relabel.epochs", "2", "--evaluate.num-seeds", "1",
        "--evaluate.epochs", "1",
    )  # fmt: skip
    assert tiny.job(out, *options) == 0, capsys.readouterr().err
    assert f"distilled set   {out}/dataset\n" in capsys.readouterr().out

    dataset = DistilledDataset(f"{out}/dataset")
    assert len(dataset) == 40 * 2
    assert dataset.manifest["source"]["num_images"] == 400
    assert dataset.images.shape == (40, 16, 16, 1)

    # Again: everything is found, nothing is written.
    before = Store(out).list()
    assert tiny.job(out, *options) == 0
    assert capsys.readouterr().err.count("found committed") == 7
    changed = before.items() ^ Store(out).list().items()
    assert all(key.startswith("events/") for key, _ in changed), changed
