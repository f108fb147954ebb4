"""The distilled data set: same items in any order, with any workers, from any store."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import ExifTags, Image
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler

from tests.manifests import manifest_of
from wmdd_ray.config import (
    DistillConfig,
    EvaluateConfig,
    NetworkConfig,
    RelabelConfig,
    SourceConfig,
    ViewConfig,
)
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.soft_labels import compress, decompress, take_labels
from wmdd_ray.core.training import train_student
from wmdd_ray.core.views import (
    StoredImages,
    concatenate_views,
    draw_block,
    draw_views,
    render_views,
    take,
)
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.errors import ArtifactError, ConfigError, DataError
from wmdd_ray.records import SoftLabelBlock, SoftLabels, Teacher, ViewDraw
from wmdd_ray.stages.assemble import options_of
from wmdd_ray.store import codecs, documents, packing
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import decode_image, encode_png

NAMES = ("cat", "dog", "emu")
IPC, SIZE, EPOCHS, N = 4, 10, 5, 12
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EPOCHS_PER_FILE = 2
RELABEL = RelabelConfig(compression="top_k", top_k=2)


def source_arrays() -> dict[str, Any]:
    """Return images, labels, weights, and each epoch's views and logits, as they are written."""
    rng = np.random.default_rng(0)
    weights_CK = rng.dirichlet(np.ones(IPC), size=len(NAMES))
    views = [draw_views(N, SIZE, ViewConfig(), seed=0, epoch=e) for e in range(EPOCHS)]
    logits = [3 * rng.standard_normal((N, len(NAMES))).astype(np.float32) for _ in range(EPOCHS)]
    return {
        "images": rng.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8),
        "labels": np.repeat(np.arange(len(NAMES)), IPC),
        "weights": weights_CK.reshape(-1),
        "views": views,
        "logits": logits,
    }


SOURCE = source_arrays()


def small_teacher() -> Teacher:
    return Teacher(
        arch="convnet3",
        width=4,
        small_stem=False,
        class_names=NAMES,
        image_size=SIZE,
        resize=SIZE,
        channels=3,
        mean_C=MEAN,
        std_C=STD,
        top1=0.5,
        weights={"fc.weight": np.zeros((3, 4), dtype=np.float32)},
    )


def label_files(slices: int, config: RelabelConfig) -> dict[str, bytes]:
    """Return the label files; with several slices, each holds interleaved images."""
    files = {}
    for first in range(0, EPOCHS, EPOCHS_PER_FILE):
        epochs = range(first, min(first + EPOCHS_PER_FILE, EPOCHS))
        for s in range(slices):
            rows = np.arange(N)[s::slices]
            block = SoftLabelBlock(
                first_epoch=first,
                num_epochs=len(epochs),
                views=concatenate_views([take(SOURCE["views"][e], rows) for e in epochs]),
                labels=compress(
                    np.concatenate([SOURCE["logits"][e][rows] for e in epochs]), config
                ),
            )
            stop = epochs.stop - 1
            name = (
                f"e{first:05d}-{stop:05d}-s{s:04d}"
                if slices > 1
                else f"epochs-{first:05d}-{stop:05d}"
            )
            files[f"labels/{name}.parquet"] = codecs.encode_soft_labels(block)
    return files


def write_dataset(
    uri: str,
    *,
    slices: int = 1,
    config: RelabelConfig = RELABEL,
    changes: dict[str, bytes | None] | None = None,
    **meta: Any,
) -> str:
    """Write a small data set under `uri` and return `uri`; `changes` replaces or drops files."""
    files: dict[str, bytes | None] = {"teacher.safetensors": codecs.encode_teacher(small_teacher())}
    for i, part in enumerate((slice(0, 8), slice(8, N))):
        images, labels, weights = (SOURCE[name][part] for name in ("images", "labels", "weights"))
        content = codecs.encode_images(images, labels, weights[:, None], NAMES)
        files[f"data/train-{i:05d}-of-00002.parquet"] = content
    files |= label_files(slices, config)
    files |= changes or {}
    store = Store(uri)
    written = {key: content for key, content in files.items() if content is not None}
    for key, content in written.items():
        store.put(key, content)
    about = {"class_names": NAMES, "image_size": SIZE, "mean": MEAN, "std": STD, "ipc": IPC}
    about |= {"num_images": N, "label_epochs": EPOCHS}
    manifest = manifest_of(**{**about, **meta})
    entries = [documents.entry_of(key, content) for key, content in written.items()]
    store.put(documents.MANIFEST_KEY, documents.encode_manifest(manifest, entries))
    return uri


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("distilled")))


@pytest.fixture(scope="module")
def drawn_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same data set, of which the views are not stored."""
    return write_dataset(str(tmp_path_factory.mktemp("drawn")), changes=drawn_files())


def expected_items() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all views, logits and weights, computed from the arrays that were written."""
    stored = StoredImages(SOURCE["images"], MEAN, STD)
    views = torch.cat([render_views(stored, v, SIZE) for v in SOURCE["views"]])
    logits = [decompress(compress(x, RELABEL)) for x in SOURCE["logits"]]
    weights = SOURCE["weights"] / SOURCE["weights"].mean()
    return views, torch.tensor(np.concatenate(logits)), torch.tensor(weights).float().repeat(EPOCHS)


def assert_is_everything(batches: Any, order: Any = None) -> None:
    """Assert that the batches, put together, are all items (in `order`) to the last bit."""
    parts = [torch.cat(column) for column in zip(*batches, strict=True)]
    for part, expected in zip(parts, expected_items(), strict=True):
        target = expected if order is None else expected[torch.as_tensor(order)]
        torch.testing.assert_close(part, target, rtol=0, atol=0)


def test_a_set_of_format_1_gives_the_views_that_its_labels_belong_to(tmp_path: Path) -> None:
    dataset = DistilledDataset(write_dataset(str(tmp_path), format_version=1))
    in_float = StoredImages(SOURCE["images"], MEAN, STD, in_float=True)
    expected = torch.cat([render_views(in_float, v, SIZE) for v in SOURCE["views"]])
    got = torch.cat([views for views, _, _ in DataLoader(dataset, batch_size=8)])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not torch.equal(got, expected_items()[0])


def test_opening_tells_what_the_data_set_is(uri: str) -> None:
    dataset = DistilledDataset(uri)
    assert len(dataset) == N * EPOCHS
    assert (dataset.num_images, dataset.label_epochs, dataset.image_size) == (N, EPOCHS, SIZE)
    assert dataset.class_names == NAMES and dataset.manifest["ipc"] == IPC
    assert dataset.mean_C == MEAN and dataset.std_C == STD
    np.testing.assert_array_equal(dataset.images, SOURCE["images"])
    np.testing.assert_array_equal(dataset.labels, SOURCE["labels"])
    np.testing.assert_array_equal(dataset.weights, SOURCE["weights"])
    assert dataset.teacher().class_names == NAMES


def test_item_i_is_image_i_mod_n_in_epoch_i_div_n(uri: str) -> None:
    dataset = DistilledDataset(uri)
    views, logits, weights = expected_items()
    for i in (0, 5, N, 2 * N + 3, N * EPOCHS - 1):
        view, soft_label, weight = dataset[i]
        assert view.dtype == soft_label.dtype == weight.dtype == torch.float32
        assert view.shape == (3, SIZE, SIZE) and soft_label.shape == (3,) and weight.shape == ()
        torch.testing.assert_close(view, views[i], rtol=0, atol=0)
        torch.testing.assert_close(soft_label, logits[i], rtol=0, atol=0)
        torch.testing.assert_close(weight, weights[i], rtol=0, atol=0)


def test_weights_have_mean_one_over_the_images(uri: str) -> None:
    dataset = DistilledDataset(uri)
    weights = torch.stack([dataset[i][2] for i in range(N)])
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


@pytest.mark.parametrize("batch_size", [1, 7, N, 1000])
def test_any_batch_size_gives_the_same_items(uri: str, batch_size: int) -> None:
    assert_is_everything(DataLoader(DistilledDataset(uri), batch_size=batch_size))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_both_start_methods_give_the_same_items(drawn_uri: str, method: str) -> None:
    # A spawned worker starts from a pickle and draws for itself, as another machine does.
    dataset = DistilledDataset(drawn_uri)
    loader = DataLoader(
        dataset,
        batch_size=9,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    assert_is_everything(loader)


def test_any_order_gives_the_same_items(uri: str) -> None:
    order = np.random.default_rng(0).permutation(N * EPOCHS)
    dataset = DistilledDataset(uri, cache_gib=0)  # blocks come and go
    loader = DataLoader(dataset, batch_size=11, sampler=order.tolist())
    assert_is_everything(loader, order)
    plain = DataLoader(dataset, batch_size=11, sampler=SubsetRandomSampler(range(N * EPOCHS)))
    assert sum(len(view) for view, _, _ in plain) == len(dataset)


def test_an_iteration_is_a_shuffled_pass_in_batches_of_equal_size(uri: str) -> None:
    dataset = DistilledDataset(uri)
    loader = DataLoader(dataset, batch_sampler=dataset.batches(5, seed=3))
    assert len(loader) == 3
    passes = [list(loader) for _ in range(EPOCHS)]
    assert [[len(batch[0]) for batch in batches] for batches in passes] == [[4, 4, 4]] * EPOCHS
    sampler = dataset.batches(5, seed=3)
    order = np.array([list(sampler) for _ in range(EPOCHS)]).reshape(EPOCHS, N)
    assert_is_everything([batch for batches in passes for batch in batches], order.reshape(-1))
    for e, row in enumerate(order):
        np.testing.assert_array_equal(np.sort(row), np.arange(e * N, (e + 1) * N))
    assert (order[0] != order[1] - N).any()
    assert list(dataset.batches(5, seed=3)) != list(dataset.batches(5, seed=4))


def test_a_pass_can_be_taken_up_again_and_passes_cycle_through_the_labels(uri: str) -> None:
    for dataset, labels in (
        (DistilledDataset(uri), EPOCHS),
        (DistilledDataset(uri, epochs=2), 2),
        (DistilledDataset(uri, epochs=99), EPOCHS),
    ):
        batches = dataset.batches(5)
        passes = [list(batches) for _ in range(2 * EPOCHS)]
        resumed = dataset.batches(5)
        resumed.set_epoch(4)
        assert [list(resumed), list(resumed)] == passes[4:6]
        used = [batches[0][0] // N for batches in passes]
        assert used == [e % labels for e in range(2 * EPOCHS)]
        assert passes[0] != [[i - passes[labels][0][0] // N * N for i in b] for b in passes[labels]]


def test_ranks_have_equal_and_disjoint_shares_of_every_batch(uri: str) -> None:
    dataset = DistilledDataset(uri)
    whole = list(dataset.batches(12))
    shares = [list(dataset.batches(12, rank=rank, world=5)) for rank in range(5)]
    assert [len(batch) for share in shares for batch in share] == [2] * 5
    assert [index for share in shares for index in share[0]] == whole[0][:10]
    with pytest.raises(
        ConfigError, match=r"for each of 5 processes, got 4, which makes batches of 4"
    ):
        dataset.batches(4, world=5)


def test_the_loader_s_batches_are_those_that_a_student_of_evaluate_is_trained_on(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = DistilledDataset(uri, epochs=2 * EPOCHS)
    seen: list[torch.Tensor] = []

    class Student(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach().clone())
            return super().forward(x.flatten(1))

    labels: list[torch.Tensor] = []

    def loss_of(student: torch.Tensor, teacher: torch.Tensor, *_: Any) -> torch.Tensor:
        labels.append(teacher)
        return student.sum()

    monkeypatch.setattr("wmdd_ray.core.training.soft_label_loss", loss_of)
    train_student(
        Student(3 * SIZE**2, 3),
        StoredImages(dataset.images, MEAN, STD),
        dataset.label_epoch,
        None,
        EvaluateConfig(batch_size=5),
        epochs=2 * EPOCHS,
        image_size=SIZE,
        seed=7,
    )
    loader = DataLoader(dataset, batch_sampler=dataset.batches(5, seed=7))
    ours = [batch for _ in range(dataset.epochs) for batch in loader]
    assert len(ours) == len(seen) == 2 * EPOCHS * 3
    for (views, logits, _), images, taught in zip(ours, seen, labels, strict=True):
        torch.testing.assert_close(views, images, rtol=0, atol=0)
        torch.testing.assert_close(logits, taught, rtol=0, atol=0)


def test_reading_label_epochs_again_for_single_rows_warns_and_a_pass_does_not(uri: str) -> None:
    dataset = DistilledDataset(uri, cache_gib=0, epochs=3 * EPOCHS)
    for batch in DataLoader(dataset, batch_sampler=dataset.batches(5)):
        assert len(batch[0]) == 4
    for i in range(len(dataset)):
        dataset[i]
    here_and_there = [i % 3 * 2 * N for i in range(40 * N)]
    with pytest.warns(UserWarning, match=r"cache_gib=0; pass batch_sampler=dataset.batches\("):
        list(DataLoader(dataset, batch_size=1, sampler=here_and_there))


def test_epoch_is_a_subset_of_its_items(uri: str) -> None:
    dataset = DistilledDataset(uri)
    epochs = [dataset.epoch(e) for e in range(EPOCHS)]
    assert [len(subset) for subset in epochs] == [N] * EPOCHS
    batches = [batch for subset in epochs for batch in DataLoader(subset, batch_size=5)]
    assert_is_everything(batches)
    for epoch in (-1, EPOCHS):
        with pytest.raises(IndexError, match=f"epoch {epoch} of {EPOCHS}"):
            dataset.epoch(epoch)


def test_items_outside_the_data_set_are_an_index_error(uri: str) -> None:
    dataset = DistilledDataset(uri)
    for index in (-1 - N * EPOCHS, N * EPOCHS):
        with pytest.raises(IndexError, match=f"item {index} of {N * EPOCHS}"):
            dataset[index]
    for mine, same in zip(dataset[-1], dataset[N * EPOCHS - 1], strict=True):
        torch.testing.assert_close(mine, same, rtol=0, atol=0)


def test_label_epoch_returns_the_stored_arrays(uri: str) -> None:
    dataset = DistilledDataset(uri)
    for e in (3, 0, 4):
        views, logits_VY = dataset.label_epoch(e)
        for name, array in vars(SOURCE["views"][e]).items():
            np.testing.assert_array_equal(getattr(views, name), array, err_msg=name)
        labels = compress(SOURCE["logits"][e], RELABEL)
        np.testing.assert_array_equal(logits_VY, decompress(labels))


def test_label_files_may_hold_slices_of_the_images(tmp_path: Path) -> None:
    dataset = DistilledDataset(write_dataset(str(tmp_path), slices=3))
    assert_is_everything(DataLoader(dataset, batch_size=7))


def test_full_labels_are_read_too(tmp_path: Path) -> None:
    config = replace(RELABEL, compression="full")
    dataset = DistilledDataset(write_dataset(str(tmp_path), config=config))
    _, logits_VY = dataset.label_epoch(1)
    np.testing.assert_array_equal(logits_VY, decompress(compress(SOURCE["logits"][1], config)))


def test_a_pickled_data_set_is_small_and_gives_the_same_items(uri: str) -> None:
    dataset = DistilledDataset(uri)
    dataset[0]
    content = pickle.dumps(dataset)
    assert len(content) < SOURCE["images"].nbytes
    assert_is_everything(DataLoader(pickle.loads(content), batch_size=6))


def test_cache_holds_no_more_than_it_may(uri: str) -> None:
    everything, little = DistilledDataset(uri), DistilledDataset(uri, cache_gib=0)
    for dataset in (everything, little):
        for e in range(EPOCHS):
            dataset.label_epoch(e)
    assert (len(everything._blocks), len(little._blocks)) == (3, 1)


def drawn_files(*, online: bool = False) -> dict[str, bytes | None]:
    """Return label files that hold the seed of the very views of `SOURCE`, with its logits or without."""
    views = ViewConfig()
    draw = ViewDraw(
        seed=0,
        image_size=SIZE,
        index_N=np.arange(N, dtype=np.int32),
        crop_scale_min=views.crop_scale_min,
        flip=views.flip,
        mix=views.mix,
    )
    files: dict[str, bytes | None] = {}
    for key, content in label_files(1, RELABEL).items():
        block = replace(codecs.decode_soft_labels(content), draw=draw)
        if online:
            none = np.empty((len(block.views), 0), np.float16)
            block = replace(block, labels=SoftLabels(num_classes=3, values_VK=none))
        files[key] = codecs.encode_soft_labels(block)
    return files


def test_views_that_are_drawn_again_are_the_stored_ones(drawn_uri: str) -> None:
    assert_is_everything(DataLoader(DistilledDataset(drawn_uri), batch_size=7))


def online_dataset(folder: Path, **options: Any) -> tuple[DistilledDataset, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(
            NetworkConfig(width=4), num_classes=3, channels=3, image_size=SIZE
        ).eval()
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    teacher = codecs.encode_teacher(replace(small_teacher(), weights=weights))
    uri = write_dataset(
        str(folder),
        changes={**drawn_files(online=True), "teacher.safetensors": teacher},
        labels={"labels": "online", "batch_size": 5},
    )
    return DistilledDataset(uri, **options), network


def test_images_justify_the_memory_of_views_without_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored_bytes(pattern: str) -> int:
        return max(path.stat().st_size for path in tmp_path.glob(pattern))

    dataset, _ = online_dataset(tmp_path)
    assert dataset.images.shape[0] == N
    # Of many small images, 25 epochs of views take more than 64 times a file of their seed.
    views = 2 * N
    allowed = packing.BUDGET_RATIO * (stored_bytes("labels/*") + stored_bytes("data/*") / 2)
    monkeypatch.setattr(packing, "BUDGET_BYTES", 1 << 16)
    for module in ("wmdd_ray.store.label_files", "wmdd_ray.dataset"):
        monkeypatch.setattr(f"{module}.VIEW_BYTES", allowed / views)
    views_read, _ = DistilledDataset(str(tmp_path)).label_epoch(0)
    assert len(views_read) == N
    with pytest.raises(ArtifactError, match="expected a label file that takes at most"):
        codecs.decode_soft_labels(
            (tmp_path / "labels/epochs-00000-00001.parquet").read_bytes(), draw_block
        )
    monkeypatch.setattr("wmdd_ray.dataset.VIEW_BYTES", 4 * allowed / views)
    with pytest.raises(ArtifactError, match="expected a block of label epochs that takes at most"):
        DistilledDataset(str(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_online_labels_are_the_teachers_on_the_views_of_stored_ones(
    tmp_path: Path, workers: int
) -> None:
    dataset, network = online_dataset(tmp_path)
    assert dataset.online
    views, logits, weights = (
        torch.cat(column)
        for column in zip(*DataLoader(dataset, batch_size=9, num_workers=workers), strict=True)
    )
    expected_views, _, expected_weights = expected_items()
    torch.testing.assert_close(views, expected_views, rtol=0, atol=0)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)
    with torch.no_grad():
        expected = network(expected_views)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not logits.is_inference() and not logits.requires_grad
    drawn, logits_VY = dataset.label_epoch(2)
    np.testing.assert_array_equal(drawn.crop_V4, SOURCE["views"][2].crop_V4)
    np.testing.assert_allclose(logits_VY, expected[2 * N : 3 * N], rtol=1e-4, atol=1e-5)


def test_more_epochs_use_the_labels_again_in_the_same_order(uri: str) -> None:
    dataset = DistilledDataset(uri, epochs=2 * EPOCHS + 1)
    assert (len(dataset), dataset.label_epochs) == ((2 * EPOCHS + 1) * N, EPOCHS)
    views = expected_items()[0].reshape(EPOCHS, N, -1)
    for epoch in range(dataset.epochs):
        (batch,) = DataLoader(dataset.epoch(epoch), batch_size=N)
        torch.testing.assert_close(batch[0].flatten(1), views[epoch % EPOCHS], rtol=0, atol=0)


def test_fewer_epochs_are_the_first_label_epochs(uri: str) -> None:
    dataset = DistilledDataset(uri, epochs=2)
    (batch,) = DataLoader(dataset, batch_size=2 * N)
    torch.testing.assert_close(batch[0], expected_items()[0][: 2 * N], rtol=0, atol=0)
    with pytest.raises(ConfigError, match="expected epochs >= 1 or None, got 0"):
        DistilledDataset(uri, epochs=0)


def test_a_set_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_dataset(str(tmp_path))
    store = Store(str(tmp_path))
    manifest = documents.read_sealed(store, documents.MANIFEST_KEY)
    del manifest["labels"]
    store.put(documents.MANIFEST_KEY, documents.seal(manifest))
    with pytest.raises(ArtifactError, match="entry 'labels'; an earlier wmdd_ray.*relabel and"):
        DistilledDataset(str(tmp_path))


def real_images(folder: Path) -> str:
    """Write an image of each class to train on and four held-out ones, and return the folder."""
    values = {f"train/{name}/0": 0 for name in NAMES}
    values |= {"val/emu/0": 30, "val/emu/1": 30, "val/cat/0": 200, "val/dog/0": 90}
    for name, value in values.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((2 * SIZE, 3 * SIZE, 3), value, np.uint8)))
    return str(folder)


# Of the four held-out images.
TOP1 = ("0.0", "25.0", "50.0", "75.0", "100.0")


def test_held_out_images_are_those_beside_the_source_or_at_a_uri_as_students_see_them(
    tmp_path: Path,
) -> None:
    real = real_images(tmp_path / "real")
    about = {**manifest_of()["source"], "uri": "real"}  # a set has no path; its run has
    dataset = DistilledDataset(write_dataset(str(tmp_path / "set"), source=about))
    (tmp_path / "run.json").write_text(json.dumps({"config": {"data": real}}))
    with pytest.raises(ConfigError, match="which is not read because a set says so"):
        next(dataset.held_out())
    for batches in (dataset.held_out(follow_data=True), dataset.held_out(f"{real}/val")):
        parts = list(batches)
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        assert images.shape == (4, 3, SIZE, SIZE) and labels.tolist() == [0, 1, 2, 2]
        value = torch.tensor([200, 90, 30, 30]).reshape(4, 1, 1, 1) / 255
        mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (MEAN, STD))
        torch.testing.assert_close(images, ((value - mean) / std).expand_as(images))
    with pytest.raises(DataError, match="val"):
        next(DistilledDataset(dataset.uri).held_out(f"{real}/train/cat"))


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_held_out_images_are_resized_and_turned_as_the_teacher_s_were(
    bicubic: bool, turned: bool, tmp_path: Path
) -> None:
    given: Any = {"interpolation": "bicubic" if bicubic else "bilinear", "exif_orientation": turned}
    teacher = codecs.encode_teacher(replace(small_teacher(), **given))
    uri = write_dataset(str(tmp_path / "set"), changes={"teacher.safetensors": teacher})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    contents = []
    for name in NAMES:
        (tmp_path / "real" / name).mkdir(parents=True)
        file = tmp_path / "real" / name / "0.jpg"
        Image.fromarray(pixels).save(file, exif=exif)
        contents.append(file.read_bytes())
    batches = DistilledDataset(uri).held_out(str(tmp_path / "real"))
    images = torch.cat([images for images, _ in batches])
    config = SourceConfig(image_size=SIZE, resize=SIZE, channels=3, **given)
    shown = np.stack([decode_image(content, config, "") for content in contents])
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (MEAN, STD))
    expected = (torch.from_numpy(shown).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(images, expected)


def set_by_column(folder: Path) -> str:
    """Return a run with a set whose classes stand in another column than `label`, which its real images have too."""
    for split in ("train", "val"):
        images = [encode_png(np.full((SIZE, SIZE, 3), 80 * i, np.uint8)) for i in range(3)]
        columns = {"image": images, "label": NAMES[::-1], "diagnosis": NAMES}
        (folder / "real").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / "real" / f"{split}-0.parquet")
    typed = SourceConfig(label_column="diagnosis", layout="*/{class}")
    options = options_of(DistillConfig(source=typed))
    write_dataset(
        str(folder / "run" / "dataset"),
        source={**manifest_of()["source"], "uri": "real"},
        provenance={**manifest_of()["provenance"], "options": options},
    )
    told = {"config": {"data": str(folder / "real")}}
    (folder / "run" / "run.json").write_text(json.dumps(told))
    return str(folder / "run")


def test_held_out_images_have_the_labels_that_the_run_s_options_say(tmp_path: Path) -> None:
    dataset = DistilledDataset(f"{set_by_column(tmp_path)}/dataset")

    def labels(*place: str, **reading: Any) -> list[int]:
        batches = dataset.held_out(*place, follow_data=not place, layout="", **reading)
        return torch.cat([labels for _, labels in batches]).tolist()

    assert labels() == [0, 1, 2]
    assert labels(label_column="label") == [2, 1, 0]
    real = str(tmp_path / "real" / "val-0.parquet")
    with pytest.raises(ConfigError, match=r"held_out\(uri\): .*label-column 'diagnosis' \(in Py"):
        labels(real)
    assert labels(real, label_column="diagnosis") == [0, 1, 2]
    assert labels(real, label_column=None) == [2, 1, 0]
    with pytest.raises(ConfigError, match=r"layout '\*/\{class\}' .*or another value"):
        next(dataset.held_out(real, label_column=None))
    with pytest.raises(TypeError, match="expected options among .*got resize"):
        next(dataset.held_out(real, resize="9"))


def test_held_out_images_that_were_cut_off_the_training_images_are_asked_for(
    tmp_path: Path,
) -> None:
    about = {**manifest_of()["source"], "uri": "real", "val_fraction": 0.1}
    dataset = DistilledDataset(write_dataset(str(tmp_path / "set"), source=about))
    (tmp_path / "run.json").write_text(
        json.dumps({"config": {"data": real_images(tmp_path / "real")}})
    )
    with pytest.raises(ConfigError, match="tested on 0.1 of the training images"):
        next(dataset.held_out(follow_data=True))


def readme_lines() -> str:
    """Return the code of the README's section on using a distilled set."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    section = text.partition("## Use a distilled set\n")[2].partition("\n## ")[0]
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_the_readme_s_lines_train_a_torchvision_model(
    where: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = str(tmp_path)
    if where == "s3":
        uri = f"{request.getfixturevalue('s3_server')()}/dataset"
    write_dataset(uri)
    real = f"{real_images(tmp_path / 'real')}/val"
    code = readme_lines().replace("held_out()", f"held_out({real!r})")
    assert code.count("runs/digits-ipc10/dataset") == 1
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code.replace("runs/digits-ipc10/dataset", uri), found)
    student, loss = found["student"], found["loss"]
    assert len(found["dataset"]) == N * EPOCHS and student.fc.out_features == len(NAMES)
    assert torch.isfinite(loss) and found["teacher_logits"].shape == (N, len(NAMES))
    assert capsys.readouterr().out in {f"top-1 {t} % of held-out real images\n" for t in TOP1}
    torch.manual_seed(0)
    untrained = torchvision.models.resnet18(num_classes=len(NAMES))
    assert not torch.equal(student.fc.weight, untrained.fc.weight)
    assert student.bn1.num_batches_tracked == EPOCHS


def test_a_student_trains_on_it_by_both_ways(uri: str) -> None:
    dataset = DistilledDataset(uri)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 3))
    train_student(
        network,
        StoredImages(dataset.images, dataset.mean_C, dataset.std_C),
        dataset.label_epoch,
        dataset.weights,
        EvaluateConfig(batch_size=4, weighted_loss=True),
        epochs=EPOCHS,
        image_size=dataset.image_size,
        seed=0,
    )
    views, soft_labels, _ = next(iter(DataLoader(dataset, batch_size=4)))
    assert network(views).shape == soft_labels.shape


def test_memory_store_is_read_like_a_disk() -> None:
    dataset = DistilledDataset(write_dataset("memory://distilled-test/dataset"))
    assert_is_everything(DataLoader(dataset, batch_size=8))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_workers_read_an_object_store_that_the_parent_has_read(
    s3_server: Callable[[], str],
) -> None:
    dataset = DistilledDataset(write_dataset(f"{s3_server()}/dataset"))
    dataset[0]
    loader = DataLoader(dataset, batch_size=9, num_workers=2, multiprocessing_context="fork")
    assert_is_everything(loader)


def test_no_data_set_at_the_uri_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"no distilled data set at {tmp_path}.*manifest.json"):
        DistilledDataset(str(tmp_path))


@pytest.mark.parametrize(
    "key", ["data/train-00001-of-00002.parquet", "labels/epochs-00002-00003.parquet"]
)
def test_changed_bytes_are_refused_with_the_key(tmp_path: Path, key: str) -> None:
    path = Path(write_dataset(str(tmp_path))) / key
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=key):
        DistilledDataset(str(tmp_path)).label_epoch(2)


def test_missing_label_epochs_are_refused_at_opening(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), changes={"labels/epochs-00002-00003.parquet": None})
    with pytest.raises(ArtifactError, match="label epochs 0 to 4, found 3 epochs"):
        DistilledDataset(str(tmp_path))


def test_missing_images_are_refused_at_opening(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), changes={"data/train-00001-of-00002.parquet": None})
    with pytest.raises(ArtifactError, match="expected 12 images with a weight each, found 8"):
        DistilledDataset(str(tmp_path))


def test_a_manifest_without_an_entry_names_it(tmp_path: Path) -> None:
    write_dataset(str(tmp_path))
    store = Store(str(tmp_path))
    manifest = documents.read_sealed(store, documents.MANIFEST_KEY)
    manifest["number"] = manifest.pop("num_images")
    store.put(documents.MANIFEST_KEY, documents.seal(manifest))
    with pytest.raises(ArtifactError, match="'num_images' is a required property"):
        DistilledDataset(str(tmp_path))


def test_a_block_that_lacks_an_image_is_refused(tmp_path: Path) -> None:
    key = "labels/epochs-00004-00004.parquet"
    block = codecs.decode_soft_labels(label_files(1, RELABEL)[key])
    twice = np.array([0, 0, *range(2, N)])  # image 0 twice, image 1 never
    content = codecs.encode_soft_labels(
        replace(block, views=take(block.views, twice), labels=take_labels(block.labels, twice))
    )
    dataset = DistilledDataset(write_dataset(str(tmp_path), changes={key: content}))
    dataset.label_epoch(3)
    with pytest.raises(ArtifactError, match=f"{key}: expected one view of each of 12 images"):
        dataset.label_epoch(4)


def test_a_block_of_other_epochs_than_its_name_is_refused(tmp_path: Path) -> None:
    files = label_files(1, RELABEL)
    content = files["labels/epochs-00000-00001.parquet"]
    changes: dict[str, bytes | None] = {"labels/epochs-00002-00003.parquet": content}
    dataset = DistilledDataset(write_dataset(str(tmp_path), changes=changes))
    with pytest.raises(ArtifactError, match="label epochs 2 to 3"):
        dataset.label_epoch(2)


def test_importing_the_data_set_does_not_import_ray() -> None:
    code = "import sys, wmdd_ray.dataset; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
