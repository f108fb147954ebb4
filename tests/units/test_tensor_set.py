"""Sets of others in torch files: read without running their code, shown to students value by value, refused with the reason."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import evaluate
from tests.store.hostile import Canary
from wmdd_ray.config import SourceConfig
from wmdd_ray.core.views import to_input
from wmdd_ray.errors import DataError
from wmdd_ray.recipes import digits
from wmdd_ray.store.documents import read_sealed
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.sources import load_images, open_source
from wmdd_ray.units.given_set import on_this_disk
from wmdd_ray.units.tensor_set import is_tensor_set, open_tensor_set

SOURCE = SourceConfig(image_size=8, resize=8, channels=1, mean=(0.25,), std=(0.5,))
NAMES = tuple("0123456789")
IMAGES = torch.linspace(-2, 3, 10 * 64).view(10, 1, 8, 8)
LABELS = torch.arange(10)


def saved(path: Path, content: Any, **options: Any) -> str:
    torch.save(content, path, **options)
    return str(path)


def dc(*pairs: list[torch.Tensor]) -> dict[str, Any]:
    """Return what DC and DM save: the sets of their experiments, and accuracies as numpy's numbers."""
    return {"data": list(pairs), "accs_all_exps": {"ConvNet": [np.float64(0.5), np.float64(0.25)]}}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_files_of_dc_and_dm_hold_a_set_an_experiment(tmp_path: Path, legacy: bool) -> None:
    content = dc([IMAGES, LABELS], [IMAGES + 1, LABELS.flip(0)])
    path = saved(tmp_path / "res_DM.pt", content, _use_new_zipfile_serialization=not legacy)
    first, second = (
        open_tensor_set(path, SOURCE, NAMES),
        open_tensor_set(f"{path}#1", SOURCE, NAMES),
    )
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == open_tensor_set(f"{path}#0", SOURCE, NAMES).fingerprint()
    images, labels = second.read()
    # Normalized values as they are, those that no picture could have included.
    torch.testing.assert_close(images, IMAGES + 1, rtol=0, atol=0)
    assert labels.tolist() == LABELS.flip(0).tolist()
    assert (first.num_images, first.total_bytes) == (10, Path(path).stat().st_size)
    assert second.told == "set 1 of 2, values normalized by --source.mean and --source.std"
    with pytest.raises(DataError, match=r"res_DM.pt#2: expected #0 to #1"):
        open_tensor_set(f"{path}#2", SOURCE, NAMES)


def test_pixels_of_8_bits_and_values_up_to_1_are_normalized(tmp_path: Path) -> None:
    pixels = torch.arange(0, 250, 25, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 8, 8)
    path = saved(tmp_path / "data_best.pt", [pixels.clone(), LABELS])
    images, _ = open_tensor_set(path, SOURCE, NAMES).read()
    expected = to_input(pixels.permute(0, 2, 3, 1), SOURCE.mean, SOURCE.std)
    torch.testing.assert_close(images, expected, rtol=0, atol=0)
    path = saved(tmp_path / "unit.pt", [pixels / 255, LABELS])
    images, _ = open_tensor_set(path, SOURCE, NAMES).read()
    torch.testing.assert_close(images, expected)


def test_the_files_of_mtt_are_images_with_labels_beside(tmp_path: Path) -> None:
    path = saved(tmp_path / "images_best.pt", IMAGES)
    saved(tmp_path / "labels_best.pt", torch.eye(10).flip(0))
    found = open_tensor_set(path, SOURCE, NAMES)
    assert found.read()[1].tolist() == LABELS.flip(0).tolist()
    assert found.told.endswith("the likeliest class of each learned label")
    # Of whitened ones the iteration alone is saved undone, by others `best` too.
    saved(tmp_path / "labels_5000.pt", LABELS)
    for name in ("images_zca_5000.pt", "images_zca_best.pt"):
        undone = saved(tmp_path / name, IMAGES + 1)
        with pytest.raises(DataError, match=f"is ZCA-whitened, .*pass {name} beside it, where it"):
            open_tensor_set(path, SOURCE, NAMES)
        assert torch.equal(open_tensor_set(undone, SOURCE, NAMES).read()[0], IMAGES + 1)


def test_classes_in_a_column_are_classes_and_rows_of_soft_labels_their_likeliest(
    tmp_path: Path,
) -> None:
    column = open_tensor_set(saved(tmp_path / "a.pt", [IMAGES, LABELS[:, None]]), SOURCE, NAMES)
    assert column.read()[1].tolist() == LABELS.tolist() and "likeliest" not in column.told
    soft = 0.5 * torch.eye(10).flip(0)
    learned = open_tensor_set(saved(tmp_path / "b.pt", [IMAGES, soft]), SOURCE, NAMES)
    assert learned.read()[1].tolist() == LABELS.flip(0).tolist() and "likeliest" in learned.told


def learned(row: int, *values: float) -> torch.Tensor:
    """Return a learned label of every class, of which one row begins with `values` and has zeros behind."""
    labels = torch.eye(10)
    labels[row] = torch.tensor([*values, *[0.0] * (10 - len(values))])
    return labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([IMAGES, LABELS + 1], "expected labels from 0 to 9, .*found 10"),
        (
            [IMAGES[:, :, :4], LABELS],
            r"shape \(N, 1, 8, 8\), as --source.channels .*\(10, 1, 4, 8\)",
        ),
        ([IMAGES, LABELS[:4]], "for each of 10 images, found torch.int64 of shape"),
        ([IMAGES, torch.eye(10)[:, :9]], "expected learned labels of 10 classes.* found rows of 9"),
        ([IMAGES, LABELS[:, None].float()], "found rows of 1"),
        ([IMAGES, learned(2, 0.5, 0.5)], "found 1 of 10 without, first row 2: .0.5, 0.5, 0.0,"),
        ([IMAGES, learned(9, 0.0)], "found 1 of 10 without, first row 9: .0.0, 0.0,"),
        ([IMAGES, learned(0, torch.nan, 1.0)], "first row 0: .nan, 1.0, .*leave out these images"),
        ([IMAGES, learned(4, torch.inf)], "first row 4: .inf, 0.0,"),
        ([IMAGES, LABELS.float()], "for each of 10 images, found torch.float32"),
        ([IMAGES.abs() * 100, LABELS], "finite values, either in .*from 0.* to 300"),
        ([IMAGES * torch.nan, LABELS], "finite values"),
        (IMAGES, "expected images_.*with labels_.* beside it"),
        ({"state_dict": {}}, "expected tensors, as .*found a dict of other things"),
        (dc(), "found a dict of other things"),
    ],
)
def test_what_is_no_set_is_refused_with_the_reason(
    tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_tensor_set(saved(tmp_path / "set.pt", content), SOURCE, NAMES)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_refused_and_runs_none(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "canary"
    content = {**dc([IMAGES, LABELS]), "accs": Canary(canary)}
    path = saved(tmp_path / "set.pt", content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match="expected a torch file with tensors only"):
        open_tensor_set(path, SOURCE, NAMES)
    # Where numbers are dropped, nothing of theirs is made either.
    buffer = io.BytesIO()
    pickle.dump({"data": [], "accs": Canary(canary)}, buffer, protocol=2)
    (tmp_path / "plain.pt").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="expected a torch file with tensors only"):
        open_tensor_set(str(tmp_path / "plain.pt"), SOURCE, NAMES)
    assert not canary.exists()
    assert is_tensor_set("s3://b/x.pth#3") and not is_tensor_set("runs/x.pt/dataset")


@pytest.mark.slow
def test_students_of_tensors_are_those_of_the_same_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = digits(1).source
    source = open_source("digits", config, split="train")
    loaded = load_images(source, config, 1 << 30)
    assert loaded is not None
    _, labels_N, images_NHWC, _ = loaded
    pixels_NHWC = images_NHWC[[int(np.argmax(labels_N == label)) for label in range(10)]]
    for label, picture in enumerate(pixels_NHWC):
        folder = tmp_path / "folders" / str(label)
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(encode_png(picture))
    inputs = to_input(pixels_NHWC, config.mean, config.std)
    path = saved(tmp_path / "res.pt", dc([inputs, torch.arange(10)]))
    options = ("--recipe", "digits", "--data", "digits", "--seeds", "2", "--executor", "here")
    options += ("--evaluate.epochs", "8", "--evaluate.network.width", "8")
    tables = []
    for uri in (path, str(tmp_path / "folders")):
        out = str(tmp_path / f"by-{len(tables)}")
        assert evaluate.main([uri, "--out", out, *options]) == 0
        tables.append(read_sealed(Store(out), "results.json")["table"])
        assert tables[-1][0]["num_images"] == 10
    # Views of tensors are resampled in floating point, those of pictures in bytes: some of 360 images fall otherwise.
    assert tables[0][0]["top1"] == pytest.approx(tables[1][0]["top1"], abs=0.03)
    assert f"{path} (values normalized by" in capsys.readouterr().out
    assert evaluate.main([path, "--labels", "hard", "--recipe", "digits"]) in (2, 4)
    assert evaluate.main([str(tmp_path / "none.pt"), *options]) == 4
    assert "none.pt: expected a torch file there, found none" in capsys.readouterr().err


# The hub


def test_a_set_of_the_hub_is_downloaded_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"], Path(options["local_dir"]).name))
        assert not any(
            pattern.endswith((".py", ".pkl", "*")) for pattern in options["allow_patterns"]
        )
        return "/somewhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert (
        on_this_disk("hub:somebody/set") == on_this_disk("rethinkdc:sre2l-ipc-10") == "/somewhere"
    )
    assert asked == [
        ("somebody/set", "dataset", "somebody--set"),
        (
            "he-yang/2025-rethinkdc-imagenet-sre2l-ipc-10",
            "dataset",
            "he-yang--2025-rethinkdc-imagenet-sre2l-ipc-10",
        ),
    ]
    assert on_this_disk("s3://bucket/set") == "s3://bucket/set"


def test_without_the_hub_a_set_of_it_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def offline(name: str, **options: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert evaluate.main(["rethinkdc:rded-ipc-10", "--out", str(tmp_path / "out")]) == 5
    error = capsys.readouterr().err
    assert (
        "did not give he-yang/2025-rethinkdc-imagenet-rded-ipc-10 (ConnectionError: no route)"
        in error
    )
    assert "--repo-type dataset --local-dir FOLDER` and pass the folder" in error
    assert not (tmp_path / "out").exists()
