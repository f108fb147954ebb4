"""Several small images in each stored one, through all seven stages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.core.tiles import tile
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.store import codecs
from wmdd_ray.store.documents import unseal
from wmdd_ray.store.images import decode_png

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

# fmt: off
TILED = (
    "--ipc", "2", "--recover.tiles", "2", "--recover.start", "mosaic",
    "--evaluate.labels", "soft", "hard", "--evaluate.num-seeds", "1",
    "--evaluate.baselines", "random_real", "nearest_real", "random_tiles", "nearest_tiles",
)
# fmt: on


@pytest.fixture(scope="module")
def out(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Teacher and features know nothing of tiles.
    folder = tmp_path_factory.mktemp("tiled") / "run"
    out = tiny.copy_rooms(finished_run.out, folder, "teacher", "features")
    assert tiny.job(out, *TILED) == 0
    return out


def test_a_student_sees_the_tiles_and_the_store_holds_their_grids(out: Path) -> None:
    dataset = DistilledDataset(str(out / "dataset"))
    assert dataset.images.shape == (10 * 2 * 4, 8, 8, 1)
    np.testing.assert_array_equal(dataset.labels, np.repeat(np.arange(10), 8))
    np.testing.assert_allclose(dataset.weights.reshape(10, 8).sum(axis=1), 1)
    view, logits, _ = dataset[len(dataset) - 1]
    assert len(dataset) == 80 * 6 and view.shape == (1, 16, 16) and logits.shape == (10,)

    (file,) = (out / "dataset" / "data").glob("*.parquet")
    pngs, labels, weights = codecs.decode_png_rows(file.read_bytes())
    stored = np.stack([decode_png(png, (16, 16, 1)) for png in pngs])
    assert len(stored) == len(labels) == 20 and weights.shape == (20, 4)
    np.testing.assert_array_equal(stored, tile(dataset.images, 2, 16))


def test_every_row_has_as_many_views_whatever_its_images_are(out: Path) -> None:
    found = [
        unseal(content, str(key)) if b"checksum" in content else json.loads(content)
        for key in sorted((out / "evaluation" / "results").glob("*.json"))
        for content in [key.read_bytes()]
    ]
    views = {(r["row"], r["labels"]): (r["num_images"], r["epochs"]) for r in found}
    rows = ("distilled", "random_real", "nearest_real", "random_tiles", "nearest_tiles")
    assert set(views) == {(row, labels) for row in rows for labels in ("soft", "hard")}
    for (row, _), (num_images, epochs) in views.items():
        assert num_images == (20 if row.endswith("real") else 80)
        assert num_images * epochs == 80 * 2
