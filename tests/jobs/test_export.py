"""Exported sets, opened by the loaders that they are made for."""

from __future__ import annotations

import gc
import io
import json
import socket
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
import webdataset
import yaml
from huggingface_hub import DatasetCard
from PIL import Image

from jobs import export as job
from tests.conftest import S3Uri
from tests.manifests import manifest_of
from tests.stages.tiny import FinishedRun
from wmdd_ray.config import NetworkConfig, SourceConfig
from wmdd_ray.core.networks import build_network, network_of, weights_of
from wmdd_ray.core.tiles import untile
from wmdd_ray.core.views import to_input
from wmdd_ray.product import export as exports
from wmdd_ray.product.export import Export, export, folder_names
from wmdd_ray.records import Teacher
from wmdd_ray.store import codecs, documents
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.sources import load_images, open_source

# Sorted they are in another order, one cannot be a folder, one is in another script.
NAMES = ("T-shirt/top", "Ankle boot", "猫")
IPC, SIZE, PER_FILE = 4, 16, 8
LABELS = np.repeat(np.arange(len(NAMES)), IPC)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LAYOUTS: tuple[exports.Format, ...] = ("imagefolder", "webdataset", "huggingface")


def teacher() -> Teacher:
    torch.manual_seed(0)
    network = build_network(
        NetworkConfig(arch="convnet3", width=4), num_classes=3, channels=3, image_size=SIZE
    )
    return Teacher(
        arch="convnet3", width=4, small_stem=False, class_names=NAMES, image_size=SIZE,
        resize=SIZE, channels=3, mean_C=MEAN, std_C=STD, top1=0.5, weights=weights_of(network),
    )  # fmt: skip


def arrays(tiles: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return stored images, and weights a row of them."""
    rng = np.random.default_rng(tiles)
    images = rng.integers(0, 256, (len(LABELS), SIZE, SIZE, 3), dtype=np.uint8)
    weights = rng.dirichlet(np.ones(IPC * tiles**2), size=len(NAMES))
    return images, weights.reshape(len(LABELS), tiles**2)


def quick_png(image_HWC: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image_HWC).save(sink, format="PNG", compress_level=1)
    return sink.getvalue()


def write_set(uri: str, tiles: int = 1, **entries: Any) -> str:
    """Write a small distilled set in two Parquet files, without label epochs: nobody trains on it here."""
    images, weights = arrays(tiles)
    files = {
        "teacher.safetensors": codecs.encode_teacher(teacher()),
        "preview.png": encode_png(images[0]),
    }
    for i, part in enumerate((slice(0, PER_FILE), slice(PER_FILE, None))):
        # Not the bytes that encoding them again would give.
        with mock.patch.object(codecs, "encode_png", quick_png):
            content = codecs.encode_images(images[part], LABELS[part], weights[part], NAMES)
        files[f"data/train-{i:05d}-of-00002.parquet"] = content
    store = Store(uri)
    for key, content in files.items():
        store.put(key, content)
    about: dict[str, Any] = {
        "class_names": NAMES,
        "image_size": SIZE,
        "mean": MEAN,
        "std": STD,
        "ipc": IPC,
    }
    about |= {"num_images": len(LABELS), "tiles": tiles, "label_epochs": 7}
    meta = manifest_of(**about, **entries)
    entries = [documents.entry_of(key, content) for key, content in files.items()]
    store.put(documents.MANIFEST_KEY, documents.encode_manifest(meta, entries))
    return uri


@pytest.fixture
def stored(tmp_path: Path) -> str:
    return write_set(str(tmp_path / "dataset"))


def png_files(uri: str) -> list[bytes]:
    """Return the PNG files of a distilled set in its order."""
    return [
        row["bytes"]
        for path in sorted(Path(uri, "data").iterdir())
        for row in pq.read_table(path)["image"].to_pylist()
    ]


def typed(uri: str, out: Path | str, *options: str) -> int:
    return job.main([uri, "--out", str(out), *options])


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it opened in the home folder otherwise."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def test_torchvision_reads_an_image_folder_with_the_labels_of_the_set(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(stored, tmp_path / "out", "--format", "imagefolder") == 0
    said = capsys.readouterr().out
    assert "12 of 3 classes, 16 x 16 px" in said and f'ImageFolder("{tmp_path}/out")' in said
    found = torchvision.datasets.ImageFolder(str(tmp_path / "out"))
    assert found.classes == ["0_T-shirt_top", "1_Ankle boot", "2_猫"]
    assert json.loads((tmp_path / "out/classes.json").read_text()) == list(NAMES)
    assert found.targets == LABELS.tolist()
    images, weights = arrays()
    for (picture, _), image in zip(found, images, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), image)
    assert [Path(path).read_bytes() for path, _ in found.samples] == png_files(stored)
    lines = [json.loads(x) for x in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [x["weight"] for x in lines] == weights[:, 0].tolist()
    assert [str(tmp_path / "out" / x["file_name"]) for x in lines] == [p for p, _ in found.samples]
    assert {x["class"] for x in lines} == {*NAMES}


def test_datasets_reads_the_same_image_folder_with_weights(stored: str, tmp_path: Path) -> None:
    export(stored, str(tmp_path / "out"), "imagefolder")
    found = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    rows = sorted(found, key=lambda row: row["label"])
    assert [row["class"] for row in rows] == [NAMES[label] for label in LABELS]
    assert {row["weight"] for row in rows} == {*arrays()[1][:, 0].tolist()}


@pytest.mark.parametrize("names", [("ant", "bee", "cat"), tuple("0123456789")])
def test_class_names_that_sort_into_the_order_of_labels_are_the_folders(
    names: tuple[str, ...],
) -> None:
    assert folder_names(names) == names


@pytest.mark.parametrize(
    "names",
    [
        ("b", "a"),
        ("A", "a"),
        ("a/b", "a_b"),
        ("..", "b"),
        (".hidden", "shown"),
        ("", "b"),
        ("a\n", "b"),
        ("x" * 400 + "1", "x" * 400 + "2"),
        tuple(str(i) for i in range(11)),
    ],
    ids=lambda names: names[0][:9],
)
def test_other_class_names_get_a_number_so_that_sorting_keeps_the_labels(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    folders = folder_names(names)
    assert sorted(folders) == list(folders) and len({f.casefold() for f in folders}) == len(names)
    for folder in folders:
        assert documents.entry_of(f"{folder}/x.png", b"x")  # a key below its folder
        (tmp_path / folder).mkdir()


def webdataset_samples(shards: str, *decoders: str) -> list[dict[str, Any]]:
    """Return all samples; the library leaves the shards open, which is no fault of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pipeline = webdataset.WebDataset(shards, shardshuffle=False)
        found = list(pipeline.decode(*decoders) if decoders else pipeline)
        del pipeline
        gc.collect()
    return found


def test_webdataset_reads_the_shards(stored: str, tmp_path: Path) -> None:
    export(stored, str(tmp_path / "out"), "webdataset")
    shards = str(tmp_path / "out" / "train-{000000..000001}.tar")
    raw = webdataset_samples(shards)
    assert [sample["png"] for sample in raw] == png_files(stored)
    found = webdataset_samples(shards, "rgb8")
    images, weights = arrays()
    np.testing.assert_array_equal(np.stack([sample["png"] for sample in found]), images)
    assert [sample["cls"] for sample in found] == LABELS.tolist()
    assert [sample["json"]["weight"] for sample in found] == weights[:, 0].tolist()
    assert [sample["json"]["class"] for sample in found] == [NAMES[label] for label in LABELS]
    assert len({sample["__key__"] for sample in found}) == len(found)


def test_datasets_reads_the_folder_by_its_name_alone(stored: str, tmp_path: Path) -> None:
    export(stored, str(tmp_path / "out"), "huggingface")
    found = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert found.features["label"].names == list(NAMES)
    assert isinstance(found.features["image"], datasets.Image)
    assert found["label"][:] == LABELS.tolist()
    images, weights = arrays()
    assert found["weight"][:] == weights[:, 0].tolist()
    for row, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), image)
    undecoded = found.cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in undecoded] == png_files(stored)


def test_the_card_of_a_hugging_face_folder_has_valid_front_matter(
    stored: str, tmp_path: Path
) -> None:
    assert typed(stored, tmp_path / "out", "--format", "huggingface", "--license", "cc-by-4.0") == 0
    text = (tmp_path / "out/README.md").read_text()
    card = DatasetCard(text)
    assert card.data["license"] == "cc-by-4.0"
    assert card.data["task_categories"] == ["image-classification"]
    assert card.data["size_categories"] == ["n<1K"]
    told = yaml.safe_load(text.split("---\n")[1])["dataset_info"]["features"]
    assert (
        datasets.Features._from_yaml_list(told)
        == datasets.load_dataset(str(tmp_path / "out"), split="train").features
    )
    sha = documents.entry_of("t", codecs.encode_teacher(teacher())).sha256
    assert f"SHA-256 of its file `{sha}`" in text
    assert "No evaluation of this set lies beside it." in text
    assert "12 synthetic images of 3 classes in place of 999 real images." in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_set_with_tiles_is_exported_as_the_images_that_students_see_and_says_so(
    layout: exports.Format, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, out = write_set(str(tmp_path / "dataset"), tiles=2), tmp_path / "out"
    assert typed(uri, out, "--format", layout) == 0
    assert (
        "2 x 2 images of each stored one, cut apart as students see them" in capsys.readouterr().out
    )
    assert "stores 2 x 2 images in one picture of 16 pixels" in (out / "README.md").read_text()
    config = SourceConfig(image_size=8, resize=8)
    loaded = load_images(open_source(str(out), config, split="train"), config, 1 << 20)
    assert loaded is not None
    _, labels_N, images_NHWC, bad = loaded
    stored, weights = arrays(tiles=2)
    np.testing.assert_array_equal(images_NHWC, untile(stored, 2))
    assert labels_N.tolist() == np.repeat(LABELS, 4).tolist() and not bad
    if layout == "huggingface":
        found = datasets.load_dataset(str(out), split="train")
        np.testing.assert_array_equal(found["weight"][:], weights.reshape(-1))


@pytest.mark.parametrize("tiles", [1, 2])
def test_soft_labels_are_the_teachers_logits_on_whole_images(tiles: int, tmp_path: Path) -> None:
    uri, out = write_set(str(tmp_path / "dataset"), tiles), tmp_path / "out"
    assert typed(uri, out, "--format", "huggingface", "--labels", "soft") == 0
    found = datasets.load_dataset(str(out), split="train")
    small = torch.from_numpy(untile(arrays(tiles)[0], tiles))
    pixels = to_input(small, MEAN, STD)
    if tiles > 1:
        pixels = torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear")
    with torch.inference_mode():
        expected = network_of(teacher())(pixels)
    torch.testing.assert_close(torch.tensor(found["logits"][:]), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(found.features["logits"], datasets.List)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_command_again_writes_nothing(
    layout: exports.Format, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert typed(stored, out, "--format", layout) == 0
    before = everything(out)
    assert typed(stored, out, "--format", layout) == 0
    assert "found exported" in capsys.readouterr().out
    assert everything(out) == before


def test_what_was_lost_or_never_written_is_written_by_the_same_command(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    export(stored, str(whole), "imagefolder")

    def die(*_: Any) -> dict[str, bytes]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exports, "_image_folder", die)
        assert typed(stored, out, "--format", "imagefolder") == 130
    assert [*everything(out)] == ["export.json"]
    assert not export(stored, str(out), "imagefolder").found
    assert {k: v for k, (v, _) in everything(out).items()} == {
        k: v for k, (v, _) in everything(whole).items()
    }
    (out / "1_Ankle boot" / "00001_00004.png").unlink()
    (out / "README.md").write_bytes(b"")
    assert not export(stored, str(out), "imagefolder").found
    assert everything(out).keys() == everything(whole).keys()
    assert export(stored, str(out), "imagefolder").found


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--format", "webdataset"), "format='imagefolder' (this run asks for 'webdataset')"),
        (("--format", "imagefolder", "--labels", "soft"), "labels='hard'"),
    ],
)
def test_another_export_is_refused_by_what_differs(
    options: tuple[str, ...], told: str, stored: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    export(stored, str(tmp_path / "out"), "imagefolder")
    before = everything(tmp_path / "out")
    assert typed(stored, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert told in error and "or another --out to keep both" in error
    assert everything(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("holiday.jpg", b"mine"), ("export.json", b"{}"), ("export.json", b"not JSON")],
)
def test_a_folder_that_holds_anything_else_is_refused_and_left_alone(
    name: str, content: bytes, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(content)
    before = everything(out)
    assert typed(stored, out, "--format", "webdataset") == 2
    error = capsys.readouterr().err
    assert "expected an empty or new folder, or an earlier export" in error and name in error
    assert everything(out) == before


def test_an_export_into_the_set_itself_is_refused(
    stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(stored, f"{stored}/out", "--format", "webdataset") == 2
    assert "outside of the data set" in capsys.readouterr().err


def test_a_place_without_a_set_and_a_changed_set_are_storage_errors(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(str(tmp_path / "nothing"), tmp_path / "out", "--format", "webdataset") == 5
    assert "no distilled data set at" in capsys.readouterr().err
    data = Path(stored, "data/train-00000-of-00002.parquet")
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert typed(stored, tmp_path / "out", "--format", "webdataset") == 5
    assert "data/train-00000-of-00002.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_object_storage_gets_the_bytes_of_a_disk(
    layout: exports.Format, stored: str, tmp_path: Path, s3_server: S3Uri
) -> None:
    export(stored, str(tmp_path / "out"), layout)
    uri = s3_server()
    copy = write_set(f"{uri}/dataset")
    done = export(copy, f"{uri}/exported", layout)
    found = Store(f"{uri}/exported")
    assert {*found.list()} == {*everything(tmp_path / "out")}
    for key, (content, _) in everything(tmp_path / "out").items():
        if key != "export.json":  # names the set's URI
            assert found.get(key) == content, key
    assert not done.found and export(copy, f"{uri}/exported", layout).found
    assert [replace(e) for e in done.files] == sorted(done.files, key=lambda e: e.key)


def is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_names_no_user_no_host_and_no_folder_of_this_machine(
    layout: exports.Format, finished_run: FinishedRun, tmp_path: Path
) -> None:
    home = "/home/zaphod/secret"
    place = {"uri": f"{home}/photos", "num_images": 9, "stored_bytes": 9, "bad_images": 0}
    options = {"data": f"{home}/photos", "recover": {"diffusion": {"model": f"{home}/dit"}}}
    told = {**manifest_of()["provenance"], "options": options}
    planted = write_set(str(tmp_path / "set"), source=place, provenance=told)
    for number, uri in enumerate((planted, f"{finished_run.out}/dataset")):
        export(uri, str(tmp_path / str(number)), layout, labels="soft")
        above = str(finished_run.out.parent.parent)  # pytest's, with the user's name
        names = ("zaphod", "secret", above, str(tmp_path), socket.gethostname())
        for key, (content, _) in everything(tmp_path / str(number)).items():
            # Two letters of a host stand in compressed pictures by chance.
            sought = [name for name in names if len(name) > 5 or is_text(content)]
            assert [name for name in sought if name.encode() in content] == [], key
    told = documents.read_sealed(Store(str(tmp_path / "0")), "export.json")
    assert told["manifest"]["source"]["uri"] == told["manifest"]["provenance"]["options"]["data"]
    assert (told["source"], told["manifest"]["source"]["uri"]) == ("set", "photos")


def test_provenance_travels_along(stored: str, tmp_path: Path) -> None:
    done: Export = export(stored, str(tmp_path / "out"), "webdataset")
    told = documents.read_sealed(Store(str(tmp_path / "out")), "export.json")
    assert (
        told["manifest"]["provenance"]["seed"] == 3
        and told["manifest"]["source"]["num_images"] == 999
    )
    assert told["class_names"] == list(NAMES) and told["tiles"] == 1 and told["num_images"] == 12
    for entry in done.files:
        content = (tmp_path / "out" / entry.key).read_bytes()
        assert documents.entry_of(entry.key, content) == entry
