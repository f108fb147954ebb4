"""What a run is said to cost before it starts, and that the default evaluation of large images costs less than their set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from jobs import distill, forecast
from tests.conftest import ROOT
from wmdd_ray.config import NetworkConfig
from wmdd_ray.recipes import RECIPES, full_table, recipe_of
from wmdd_ray.units.students import unit_ids

IMAGES = {
    "imagenette": (10, 9_469),
    "tiny_imagenet": (200, 100_000),
    "imagenet1k": (1000, 1_281_167),
}
RESNET18 = NetworkConfig(arch="resnet18")


def test_a_resnet18_takes_the_operations_that_torchvision_counts() -> None:
    # 1.81 billion multiplications and as many additions.
    assert forecast.operations(RESNET18, 1000, 3, 224) == pytest.approx(3.628e9, rel=1e-3)


@pytest.mark.parametrize("variant", ["best", "paper"])
@pytest.mark.parametrize("recipe", IMAGES)
def test_the_default_evaluation_of_large_images_costs_less_than_their_set(
    recipe: str, variant: str
) -> None:
    for ipc in (1, 10, 50, 100):
        config = replace(recipe_of(recipe, ipc, variant), teacher="torchvision:given")
        assert unit_ids(config) == ("distilled-soft-s000", "random_real-soft-s000")
        found = forecast.price(config, *IMAGES[recipe], forecast.ASSUMED)
        assert found.students_h < found.making_h
        full = forecast.price(full_table(config), *IMAGES[recipe], forecast.ASSUMED)
        assert (found.num_students, full.num_students) == (2, 18)
        assert full.making_h == found.making_h


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in IMAGES])
def test_recipes_of_small_images_train_their_whole_table_by_default(recipe: str) -> None:
    config = recipe_of(recipe, 10)
    assert full_table(config) == config


def test_hours_are_passes_by_unit_times() -> None:
    config = replace(recipe_of("imagenet1k", 10), teacher="torchvision:given")
    times = replace(forecast.ASSUMED, features=100, recover=10, relabel=50, students=20)
    found = forecast.price(config, 1000, 360_000, times)
    hours = 360_000 / 100 + 10_000 * 1000 / 10 + 10_000 * 300 / 50
    assert found.making_h == pytest.approx(hours / 3600)
    # Two students, one of whom has images that nobody has labeled.
    assert found.students_h == pytest.approx((2 * 10_000 * 300 / 20 + 10_000 * 300 / 50) / 3600)


def test_unit_times_are_assumed_until_a_measurement_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert forecast.unit_times(path) is forecast.ASSUMED
    rates = {f"{kind}_images_per_s": 7.0 for kind in ("features", "recover", "relabel", "students")}
    about = {"state": "partial", "chip": "NVIDIA H200", "date": "2026-12-01T00:00:00"}
    document = {**about, "settings": {"quick": False}, "unit_times": rates}
    path.write_text(json.dumps(document))
    assert forecast.unit_times(path) is forecast.ASSUMED
    path.write_text(json.dumps(document | {"state": "complete"}))
    found = forecast.unit_times(path)
    assert (found.chip, found.known, found.recover) == ("NVIDIA H200", "measured 2026-12-01", 7.0)


def test_full_is_the_whole_table_and_what_is_typed_comes_over_it() -> None:
    def students(*options: str) -> int:
        words = ["--recipe", "imagenet1k", "--data", "images", *options]
        return len(unit_ids(distill.parse(words).config))

    assert students() == 2
    assert students("--evaluate.full") == 18
    assert students("--evaluate.full", "--evaluate.num-seeds", "5") == 30
    assert students("--evaluate.labels", "hard") == 2
    assert full_table(full_table(recipe_of("imagenette", 1))) == full_table(
        recipe_of("imagenette", 1)
    )


def test_the_plan_tells_both_prices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (64, 64), (20 * i, 0, 0)).save(folder / f"{i}.png")
    words = ["--data", f"{tmp_path}/images", "--out", f"{tmp_path}/out", "--dry-run", "--ipc", "2"]
    assert distill.main(["--recipe", "tiny_imagenet", *words]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("price: "))
    assert line.endswith("for the 18 of --evaluate.full (L4, unit times assumed)")
    assert " for 2 students; " in line and not (tmp_path / "out").exists()
    assert distill.main(["--recipe", "tiny_imagenet", "--evaluate.full", *words]) == 0
    assert distill.main(["--dry-run", "--out", f"{tmp_path}/digits"]) == 0
    cheap = ["--evaluate.labels", "soft", "--evaluate.epochs", "1", "--relabel.epochs", "1"]
    assert distill.main(["--dry-run", "--out", f"{tmp_path}/digits", *cheap]) == 0
    assert "price: " not in capsys.readouterr().out


def test_the_table_of_the_page_is_what_the_program_prints() -> None:
    page = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(forecast.table()) in page, "python -m jobs.forecast"
