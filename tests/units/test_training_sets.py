"""Training sets that are kept: made once for all passes and students, and the same students come of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests.stages import tiny
from wmdd_ray.config import DistillConfig
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.soft_labels import decompress
from wmdd_ray.core.training import train_student
from wmdd_ray.core.views import StoredImages, draw_views, view_bytes
from wmdd_ray.records import Views
from wmdd_ray.units import training_sets
from wmdd_ray.units.labels import blocks, label_block, rows_of, slice_name
from wmdd_ray.units.training_sets import Input, TrainingSet

CONFIG = tiny.config("--evaluate.network.width", "4")
SHOWN = Input(10, 1, 16, (0.3,), (0.35,))
CYCLE, EPOCHS = 3, 7


def made(epochs_made: list[int]) -> TrainingSet:
    """Return random images, with soft labels that are drawn anew, and noted, whenever they are made."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8)

    def label_epoch(epoch: int) -> tuple[Views, np.ndarray | None]:
        epoch %= CYCLE
        epochs_made.append(epoch)
        logits = np.random.default_rng([1, epoch]).normal(size=(40, 10)).astype(np.float32)
        return draw_views(40, 16, CONFIG.relabel.views, seed=5, epoch=epoch), logits

    images = StoredImages(pixels, SHOWN.mean_C, SHOWN.std_C)
    return TrainingSet(images, np.arange(40) // 4, label_epoch, np.ones(40), EPOCHS, CYCLE)


def student(seed: int, chosen: TrainingSet, labels: Literal["soft", "hard"]) -> list[torch.Tensor]:
    """Return the weights of a student after its last epoch."""
    recipe = replace(CONFIG.evaluate.for_labels(labels), batch_size=16)
    torch.manual_seed(seed)
    network = build_network(recipe.network, num_classes=10, channels=1, image_size=16)
    train_student(
        network,
        chosen.images,
        chosen.label_epoch,
        chosen.weights_N,
        recipe,
        epochs=chosen.epochs,
        image_size=16,
        seed=seed,
        classes_N=chosen.classes_N,
        labels=labels,
        pixels=chosen.pixels,
    )
    return list(network.state_dict().values())


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_student_is_the_same_alone_and_after_others_on_kept_views(
    labels: Literal["soft", "hard"],
) -> None:
    epochs_made: list[int] = []
    shared = made(epochs_made).kept(SHOWN)
    assert shared.pixels is not None
    first, second = (student(seed, shared, labels) for seed in (0, 1))
    assert sorted(epochs_made) == list(range(CYCLE))
    for seed, found in ((1, second), (0, first)):
        alone = student(seed, made([]), labels)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert not torch.equal(first[0], second[0])


def test_kept_views_are_rendered_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_sets, "_TOGETHER_BYTES", 7 * 256)
    chosen = made([]).kept(SHOWN)
    assert chosen.pixels is not None
    assert isinstance(chosen.images, StoredImages)
    views, _ = chosen.label_epoch(4)
    assert torch.equal(chosen.pixels(4), view_bytes(chosen.images, views, 16))


def test_what_is_too_large_is_made_whenever_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_view = 4 * 10 + training_sets._VIEW_BYTES
    monkeypatch.setattr(training_sets, "_KEPT_BYTES", 40 * CYCLE * per_view)
    assert made([]).kept(SHOWN).pixels is None  # 256 bytes a view
    monkeypatch.setattr(training_sets, "_KEPT_BYTES", 40 * CYCLE * per_view - 1)
    epochs_made: list[int] = []
    chosen = made(epochs_made).kept(SHOWN)
    for epoch in (0, 3, 3):
        chosen.label_epoch(epoch)
    assert epochs_made == [0, 0, 0]


def test_a_baseline_is_labeled_slice_by_slice_as_the_distilled_set_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With the batch's statistics its company is in the label.
    options = ("--relabel.batch-statistics", "--relabel.batch-size", "16")
    config = tiny.config(*options, "--relabel.slice-images", "12")
    network = build_network(config.squeeze.network, num_classes=10, channels=1, image_size=16)
    network.eval()
    monkeypatch.setattr(training_sets, "labeler_of", lambda *_, **__: network)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8)
    teacher: Any = SimpleNamespace(num_classes=10, image_size=16, mean_C=(0.3,), std_C=(0.35,))
    device = torch.device("cpu")
    _, logits_VY = training_sets._stored_labels(pixels, [teacher], config, device)(0)
    assert logits_VY is not None
    parts = [(name, rows_of(labels, config)) for name, (_, labels) in first_block(config).items()]
    assert len(parts) == 4
    stored = [
        decompress(
            label_block(
                network,
                StoredImages(pixels[index_N], teacher.mean_C, teacher.std_C),
                range(1),
                config,
                image_size=16,
                name=slice_name(name),
                report=lambda *_: None,
            ).labels
        )
        for name, index_N in parts
    ]
    np.testing.assert_allclose(logits_VY, np.concatenate(stored), atol=1e-3)


def first_block(config: DistillConfig) -> dict[str, tuple[range, np.ndarray]]:
    """Return the units of the first label epochs, a slice each."""
    units = blocks(config, 10)
    return {unit: block for unit, block in units.items() if block[0].start == 0}
