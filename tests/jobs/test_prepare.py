"""Any source in, class-contiguous Parquet out: what is kept, what is left out, and what a kill changes."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs import distill, prepare
from tests.conftest import S3Uri
from tests.stages.memory import prepare_peaks
from tests.stages.processes import in_a_process
from tests.stages.tiny import FinishedRun
from tests.store.written_sources import (
    CONFIG,
    IMAGES_NHWC,
    LABELS_N,
    NAMES,
    PNGS,
    WRITERS,
    write_imagefolder,
)
from wmdd_ray.errors import ConfigError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.spine.rooms import Room, UnitMarker
from wmdd_ray.stages import prepare as stage
from wmdd_ray.store import codecs, parts
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.shrink import kept_image
from wmdd_ray.store.sources import open_source
from wmdd_ray.telling.progress import StageLine
from wmdd_ray.units.prepared import ROW_TYPE, Scanner, Writer, part_unit
from wmdd_ray.units.splitting import PrepareConfig, held_out, output_files

COUNTS = {"ant eater": 23, "пчела": 12, "猫": 1}
LARGE = {"ant eater": 3, "пчела": 2}
OPTIONS = ("--max-side", "64", "--shard-mb", "1", "--val-fraction", "0.2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unbalanced classes in three scripts: noise of 5 to 110 KB, a few large pictures, four that are bad."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for i in range(count):
            large = i < LARGE.get(name, 0)
            shape = (100, 200, 3) if large else (64, 600 if i % 2 else 64, 3)
            # Large ones are darker: what weighs pixels instead of images finds another mean.
            brightest = 100 if large or i % 2 else 256
            picture = Image.fromarray(rng.integers(0, brightest, shape, dtype=np.uint8))
            picture.save(folder / name / (f"{i:03d}.jpg" if large else f"{i:03d}.png"))
    bees = folder / "пчела"
    (bees / "cut.png").write_bytes((bees / "005.png").read_bytes()[:2000])
    (bees / "empty.jpg").write_bytes(b"")
    (bees / "text.jpg").write_bytes(b"<html>404</html>")
    (folder / "猫" / "anim.gif").write_bytes(b"GIF89a")
    return folder


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Path:
    """The output of an undisturbed run. Read only."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert prepare.main([str(data), "--out", str(out), *OPTIONS]) == 0
    return out


def rows_of(out: Path | str, split: str) -> list[dict[str, Any]]:
    store = Store(str(out))
    keys = [key for key in store.list("data") if key.startswith(f"data/{split}-")]
    return [
        {**row["image"], "label": row["label"], "file": key}
        for key in keys
        for row in pq.read_table(io.BytesIO(store.get(key))).to_pylist()
    ]


def payloads(out: Path) -> dict[str, Any]:
    """Return what a run made, without what tells who made it."""
    found: dict[str, Any] = {p.name: p.read_bytes() for p in (out / "data").glob("*.parquet")}
    found["bad"] = (out / "bad_images.jsonl").read_text()
    manifest = json.loads((out / "prepared.json").read_text())
    return {**found, **{k: v for k, v in manifest.items() if k not in ("provenance", "checksum")}}


def test_images_are_kept_byte_for_byte_and_only_large_ones_resized(
    data: Path, prepared: Path
) -> None:
    rows = rows_of(prepared, "train") + rows_of(prepared, "validation")
    assert len(rows) == len({row["path"] for row in rows}) == sum(COUNTS.values())
    resized = []
    for row in rows:
        before = data / row["path"]
        if row["bytes"] != before.read_bytes():
            resized.append(row["path"])
            with Image.open(io.BytesIO(row["bytes"])) as after:
                assert (after.size, after.format) == ((128, 64), "JPEG")
    assert sorted(resized) == sorted(
        f"{name}/{i:03d}.jpg" for name, count in LARGE.items() for i in range(count)
    )


def test_files_hold_whole_runs_of_classes_below_their_size(data: Path, prepared: Path) -> None:
    names = sorted(COUNTS)
    for split in ("train", "validation"):
        rows = rows_of(prepared, split)
        labels = [row["label"] for row in rows]
        assert labels == sorted(labels)
        assert [row["path"].split("/")[0] for row in rows] == [names[label] for label in labels]
    files = sorted((prepared / "data").glob("train-*.parquet"))
    assert len(files) >= 2
    assert files[0].name == f"train-00000-of-{len(files):05d}.parquet"
    assert all(file.stat().st_size <= 1.01 * 2**20 for file in files)
    counts = Counter(row["label"] for row in rows_of(prepared, "validation"))
    assert counts == {names.index("ant eater"): 5, names.index("пчела"): 2}


def events_of(out: Path, name: str) -> list[dict[str, Any]]:
    lines = [
        line for file in (out / "events").glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_the_event_log_has_both_passes_with_ray_data_s_statistics(prepared: Path) -> None:
    assert [event["stage"] for event in events_of(prepared, "stage_committed")] == ["scan", "write"]
    texts = [event["text"] for event in events_of(prepared, "data_statistics")]
    assert len(texts) == 2 and all("tasks executed" in text for text in texts)


def test_bad_images_are_named_with_their_reasons(prepared: Path) -> None:
    lines = map(json.loads, (prepared / "bad_images.jsonl").read_text().splitlines())
    bad = {line["key"]: line["reason"] for line in lines}
    assert bad.keys() == {"пчела/cut.png", "пчела/empty.jpg", "пчела/text.jpg", "猫/anim.gif"}
    assert bad["пчела/empty.jpg"] == "ValueError: the file is empty"
    assert "start with b'<html>40'" in bad["пчела/text.jpg"]
    assert "OSError" in bad["пчела/cut.png"]


def test_mean_and_std_are_those_of_the_training_images(prepared: Path) -> None:
    means, squares = [], []
    for row in rows_of(prepared, "train"):
        pixels = np.asarray(Image.open(io.BytesIO(row["bytes"]))).reshape(-1, 3) / 255
        means.append(pixels.mean(axis=0))
        squares.append((pixels**2).mean(axis=0))
    manifest = json.loads((prepared / "prepared.json").read_text())
    mean_C = np.mean(means, axis=0)
    np.testing.assert_allclose(manifest["mean"], mean_C, atol=1e-4)
    np.testing.assert_allclose(
        manifest["std"], np.sqrt(np.mean(squares, axis=0) - mean_C**2), atol=1e-4
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hugging_face_datasets_opens_the_folder_with_splits_and_class_names(
    prepared: Path, tmp_path: Path
) -> None:
    import datasets

    found = datasets.load_dataset(str(prepared), cache_dir=str(tmp_path))
    assert {split: found[split].num_rows for split in found} == {"train": 29, "validation": 7}
    assert found["train"].features["label"].names == sorted(COUNTS)
    assert found["train"][0]["image"].size == (128, 64)


def test_distill_reads_the_output_with_any_recipe_and_no_format(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipe in ("digits", "fashion_mnist", "imagenette"):
        config = recipe_of(recipe, 1, "best").source
        train = open_source(str(prepared), config, split="train")
        val = open_source(str(prepared), config, split="val", class_names=train.class_names)
        assert (train.format, train.num_images, val.num_images) == ("parquet", 29, 7)
        assert train.class_names == tuple(sorted(COUNTS))
    job = ["--data", str(prepared), "--ipc", "1", "--out", str(tmp_path / "run"), "--dry-run"]
    assert distill.main(job) == 0
    assert "features" in capsys.readouterr().out


def test_running_again_changes_nothing_and_says_what_to_type(
    data: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*") if p.is_file()}
    assert prepare.main([str(data), "--out", str(prepared), *OPTIONS]) == 0
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*") if p.is_file()} == before
    said = capsys.readouterr().out
    manifest = json.loads((prepared / "prepared.json").read_text())
    assert f"jobs/distill.py --data {prepared} --ipc 10\n" in said
    assert "left out        4 bad images" in said
    assert "look at         1 class with one image: '猫'" in said
    command = said.partition("jobs/distill.py ")[2].splitlines()[0].split()
    job = distill.parse([*command, "--out", str(prepared.parent / "never")])
    assert job.config.source.mean == tuple(round(v, 4) for v in manifest["mean"])
    assert manifest["shorter_side"] == 64  # --max-side, and no image is smaller
    assert job.config.source.image_size == 64
    assert job.config.val_fraction is None


def _killed_driver(arguments: list[str], address: str, deadly: str) -> None:
    os.environ["RAY_ADDRESS"] = address

    class DeadlyLine(StageLine):
        def update(self, done: float, note: str = "") -> None:
            super().update(done, note)
            if self._name == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(prepare, "StageLine", DeadlyLine).start()
    sys.exit(prepare.main(arguments))


@pytest.mark.slow
@pytest.mark.chaos
def test_a_run_killed_in_both_passes_goes_on_and_ends_with_the_same_bytes(
    data: Path, prepared: Path, tmp_path: Path
) -> None:
    import ray

    out = tmp_path / "out"
    arguments = [str(data), "--out", str(out), *OPTIONS]
    address = ray.get_runtime_context().gcs_address
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.prepare", "wmdd_ray.stages.prepare"])
    units: dict[Path, int] = {}
    for deadly, room in (("scan", ".scan"), ("write", "data")):
        process = context.Process(target=_killed_driver, args=(arguments, address, deadly))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not (out / room / "stage.json").exists()
        made = {p: p.stat().st_mtime_ns for p in (out / room / "units").glob("*.json")}
        assert made, "killed after the first unit"
        still = {p: p.stat().st_mtime_ns for p in units if p.exists()}
        assert still == {p: t for p, t in units.items() if p in still}
        units |= made
    assert prepare.main(arguments) == 0
    written = {p: t for p, t in units.items() if p.parent.parent.name == "data"}
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert payloads(out) == payloads(prepared)
    assert not (out / ".scan").exists(), "parts are superfluous now"


class _Dying:
    """Kills its process by SIGKILL, once."""

    def __init__(self, died: str, *args: Any) -> None:
        super().__init__(*args)
        self._died = died

    def _die(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._died, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)


class _DyingScan(_Dying, Scanner):
    def _commit(self, *args: Any, **options: Any) -> UnitMarker:
        marker = super()._commit(*args, **options)
        self._die()  # a part is committed, and nobody was told
        return marker


class _DyingWrite(_Dying, Writer):
    def _table(self, rows_N: np.ndarray) -> tuple[bytes, dict[str, Any]]:
        made = super()._table(rows_N)
        self._die()  # a file is made and not stored
        return made


@pytest.mark.slow
@pytest.mark.chaos
def test_a_worker_that_is_killed_in_either_pass_is_replaced_and_the_bytes_are_the_same(
    data: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(stage, "Scanner", partial(_DyingScan, str(tmp_path / "scan")))
    monkeypatch.setattr(stage, "Writer", partial(_DyingWrite, str(tmp_path / "write")))
    assert prepare.main([str(data), "--out", str(out), *OPTIONS]) == 0, capsys.readouterr().err
    assert (tmp_path / "scan").exists() and (tmp_path / "write").exists()
    assert payloads(out) == payloads(prepared)
    assert {event["stage"] for event in events_of(out, "unit_retried")} == {"scan", "write"}


@pytest.mark.parametrize("driver_knows", [False, True])
def test_a_shard_whose_reader_died_goes_on_after_its_last_part(
    driver_knows: bool, data: Path, tmp_path: Path
) -> None:
    config = PrepareConfig(shard_mb=1, max_side=64)
    source = open_source(str(data), config.source, split="train")
    (shard, *_) = source.shards(2048)
    row = {"split": "train", "shard": shard.written(), "parts": 0, "records": 0}

    def begun(name: str, row: dict[str, Any]) -> tuple[Store, Iterator[UnitMarker]]:
        room = Room(Store(str(tmp_path)), name, run="r")
        return room.store, Scanner(room, {"train": source}, config).work(row)

    whole, undisturbed = begun("whole", row)
    assert len(list(undisturbed)) >= 2
    store, dying = begun("dying", row)
    first = next(dying)
    del dying
    before = (tmp_path / "dying" / "units" / f"{first.unit}.json").stat().st_mtime_ns
    if driver_knows:
        row |= {"parts": 1, "records": first.metrics["records"]}
    store, again = begun("dying", row)
    markers = list(again)
    assert first.unit not in [marker.unit for marker in markers]
    assert (tmp_path / "dying" / "units" / f"{first.unit}.json").stat().st_mtime_ns == before
    made, expected = ({key: s.get(key) for key in s.list("parts")} for s in (store, whole))
    assert made == expected
    records = first.metrics["records"] + sum(m.metrics["records"] for m in markers)
    assert records == shard.num_images


def test_a_part_that_lies_beside_other_bytes_at_its_key_is_the_one_that_is_read(
    data: Path, tmp_path: Path
) -> None:
    config = PrepareConfig(shard_mb=1, max_side=64)
    source = open_source(str(data), config.source, split="train")
    (shard, *_) = source.shards(2048)
    row = {"split": "train", "shard": shard.written(), "parts": 0, "records": 0}
    scanned = Room(Store(str(tmp_path)), "parts_room", run="r")
    scanned.store.put(f"parts/{part_unit('train', shard, 0)}.bin", b"another writer's")
    part, index = next(Scanner(scanned, {"train": source}, config).work(row)).files
    assert part.at
    sizes_N = parts.decode_index(scanned.read(index), "").sizes_N
    rows_N = np.zeros(len(sizes_N), dtype=ROW_TYPE)
    rows_N["size"], rows_N["offset"] = sizes_N, np.cumsum(sizes_N) - sizes_N
    writer = Writer(
        Room(Store(str(tmp_path)), "data", run="r"), scanned, [part], source.class_names
    )
    file = {"unit": "f", "key": "data/f.parquet", "split": "train", "rows": rows_N.tobytes()}
    (marker,) = writer.work(file)
    assert marker.metrics["num_images"] == len(sizes_N) > 0


def test_other_options_are_refused_and_a_damaged_output_is_found(
    data: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(data), "--out", str(prepared), "--shard-mb", "1", "--val-fraction", "0.2"]
    assert prepare.main([*arguments, "--max-side", "32"]) == 2
    told = capsys.readouterr().err
    assert "was made with max_side=64 (this run asks for 32); pass --overwrite" in told
    store = Store(str(tmp_path))
    for key, content in ((k, Store(str(prepared)).get(k)) for k in Store(str(prepared)).list()):
        store.put(key, content[:-9] if "train-00001" in key else content)
    assert prepare.main([str(data), "--out", str(tmp_path), *OPTIONS]) == 5
    assert "1 missing or of another size: 'data/train-00001" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["webdataset", "parquet", "idx"])
def test_every_format_gives_the_same_images_and_keeps_its_own_held_out_ones(
    format: str, tmp_path: Path, ray_local: None
) -> None:
    source = Store(str(tmp_path / "source"))
    for split in ("train", "val"):
        WRITERS[format](source, split)
    out = tmp_path / "out"
    assert prepare.main([source.uri, "--out", str(out)]) == 0
    names = tuple("012") if format == "idx" else NAMES
    for split in ("train", "validation"):
        rows = rows_of(out, split)
        assert [row["label"] for row in rows] == sorted(LABELS_N)
        pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"]))).tobytes() for row in rows]
        assert sorted(zip([row["label"] for row in rows], pixels, strict=True)) == sorted(
            (label, image.tobytes()) for label, image in zip(LABELS_N, IMAGES_NHWC, strict=True)
        )
        if format != "idx":
            assert sorted(row["bytes"] for row in rows) == sorted(PNGS)
    assert open_source(str(out), CONFIG, split="train").class_names == names


def test_overwriting_puts_other_options_in_the_place_of_the_first(
    tmp_path: Path, ray_local: None
) -> None:
    write_imagefolder(Store(str(tmp_path / "source")), "")
    out, names = tmp_path / "out", tmp_path / "names.txt"
    names.write_text("cat\nbee\ndog\nant\n")
    job = [str(tmp_path / "source"), "--out", str(out)]
    assert prepare.main([*job, "--val-fraction", "0"]) == 0
    assert not rows_of(out, "validation")
    before = Store(str(out)).list()
    with mock.patch.object(Store, "probe", side_effect=ConfigError("refused")):
        assert prepare.main([*job, "--classes", str(names), "--overwrite"]) == 2
    assert Store(str(out)).list() == before
    assert prepare.main([*job, "--classes", str(names), "--overwrite"]) == 0
    manifest = json.loads((out / "prepared.json").read_text())
    assert manifest["class_names"] == ["cat", "bee", "dog", "ant"]
    assert manifest["train"]["class_counts"] == [7, 7, 0, 7]
    assert manifest["validation"]["class_counts"] == [1, 1, 0, 1]
    assert {r["path"].split("/")[0] for r in rows_of(out, "train") if r["label"] == 0} == {"cat"}


@pytest.mark.slow
def test_a_table_on_s3_becomes_shards_on_s3(s3_server: S3Uri, ray_local: None) -> None:
    source, out = Store(f"{s3_server()}/csv"), Store(f"{s3_server()}/out")
    rows = ["path,label"]
    for i, (png, label) in enumerate(zip(PNGS, LABELS_N, strict=True)):
        source.put(f"images/{i:03d}.png", png)
        rows.append(f"images/{i:03d}.png,{NAMES[label]}")
    source.put("labels.csv", "\n".join(rows).encode())
    assert prepare.main([source.url("labels.csv"), "--out", out.uri]) == 0
    kept = rows_of(out.uri, "train") + rows_of(out.uri, "validation")
    assert sorted(row["bytes"] for row in kept) == sorted(PNGS)
    assert open_source(out.uri, CONFIG, split="train").class_names == NAMES


def test_a_teacher_with_the_same_names_passes_and_one_in_another_order_is_refused(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.checks.order import probe_class_order
    from wmdd_ray.units.teacher import TEACHER_KEY, UNIT, read_teacher

    digits = open_source("digits", recipe_of("digits", 1, "best").source, split="train")
    assert probe_class_order(str(finished_run.out), digits, "imagenet1k") > 0.5

    room = Room(Store(str(finished_run.out)), "teacher")
    teacher, commit = read_teacher(room), room.committed()
    weights = dict(teacher.weights)
    last = [name for name, array in weights.items() if array.shape[:1] == (10,)]
    for name in last:
        weights[name] = np.ascontiguousarray(weights[name][[1, 0, *range(2, 10)]])
    assert len(last) == 2
    swapped = Room(Store(str(tmp_path)), "teacher")
    content = codecs.encode_teacher(replace(teacher, weights=weights))
    marker = swapped.commit_unit(UNIT, {TEACHER_KEY: content}, attempt=1)
    swapped.commit(replace(commit, units={UNIT: marker}))
    out = tmp_path / "out"
    assert prepare.main(["digits", "--out", str(out), "--teacher", str(tmp_path)]) == 4
    told = capsys.readouterr().err
    assert "its classes are in another order than the data's: 2 of 10 are exchanged" in told
    assert not out.exists()

    names = tmp_path / "names.txt"
    names.write_text("1\n0\n" + "\n".join("23456789"))
    write_imagefolder(Store(str(tmp_path / "folder")), "", names=tuple("012"))
    job = [str(tmp_path / "folder"), "--classes", str(names), "--out", str(out)]
    assert prepare.main([*job, "--teacher", str(finished_run.out)]) == 4
    assert "first at class 0: ('0', '1', '2') against ('1', '0', '2')" in capsys.readouterr().err


def _folder(root: Path, *names: str) -> str:
    for name in names:
        write_imagefolder(Store(str(root / "source")), "", names=(name,) * 3, pngs=PNGS[:2])
    return str(root / "source")


def _composed(root: Path) -> list[str]:
    return [_folder(root, "caf\u00e9", "cafe\u0301"), "--out", str(root / "out")]


def _inside(root: Path) -> list[str]:
    return [_folder(root, "ant"), "--out", str(root / "source" / "out")]


def _occupied(root: Path) -> list[str]:
    Store(str(root / "out")).put("thesis.tex", b"x")
    return [_folder(root, "ant", "bee"), "--out", str(root / "out")]


def _both(root: Path) -> list[str]:
    return [_folder(root, "ant"), "--out", "x", "--val-data", "y", "--val-fraction", "0.1"]


def _secret(root: Path) -> list[str]:
    return ["https://me:secret@host/x", "--out", str(root)]


def _no_names(root: Path) -> list[str]:
    return [_folder(root, "ant"), "--out", str(root / "out"), "--classes", str(root / "absent")]


def _another_format(root: Path) -> list[str]:
    return [_folder(root, "ant"), "--out", str(root / "out"), "--format", "webdataset"]


def _outside_the_map(root: Path) -> list[str]:
    source = Store(str(root / "source"))
    WRITERS["webdataset"](source)
    source.put("classes.txt", b"ant\nbee\n")
    return [source.uri, "--out", str(root / "out")]


def _all_bad(root: Path) -> list[str]:
    source = Store(str(root / "source"))
    for i in range(3):
        source.put(f"{NAMES[i]}/{i}.jpg", b"no picture")
    return [source.uri, "--out", str(root / "out"), "--max-bad-images", "2"]


@pytest.mark.parametrize(
    ("arrange", "code", "message"),
    [
        (_composed, 4, r"two classes have names that look the same: 'cafe\u0301' and 'caf\xe9'"),
        (_inside, 2, "expected a place outside of the images' folder"),
        (_occupied, 2, "or one of this job, found 1 other files: 'thesis.tex'; give another"),
        (_both, 2, "--val-data and --val-fraction: expected one of them, got both"),
        (_secret, 2, "--source: expected a URI without a password"),
        (_no_names, 2, "absent: expected a file with class names, found none"),
        (_another_format, 4, "check SOURCE_URI, --val-data and --format"),
        (_outside_the_map, 4, "has label 2, expected 0 to 1 (2 classes); correct the labels"),
        (_all_bad, 4, "bad_images.jsonl names them): 3 images cannot be used, --max-bad-images"),
    ],
)
def test_what_cannot_be_prepared_is_refused_in_words_that_help(
    arrange: Callable[[Path], list[str]],
    code: int,
    message: str,
    tmp_path: Path,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare.main(arrange(tmp_path)) == code
    assert message in capsys.readouterr().err
    if arrange is _all_bad:
        assert len((tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()) == 3


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=80),
    st.sampled_from([0.0, 0.01, 0.05, 0.5, 0.9]),
    st.integers(1, 400),
    st.randoms(use_true_random=False),
)
def test_every_image_is_in_one_file_and_every_class_in_both_splits_where_it_can_be(
    labels: list[int], fraction: float, shard_bytes: int, random: Any
) -> None:
    labels_N = np.array(labels)
    sizes_N = np.array([random.randint(1, 100) for _ in labels])
    ranks_N = np.array([random.getrandbits(64) for _ in labels], dtype=np.uint64)
    mask_N = held_out(labels_N, ranks_N, fraction)
    for label, count in Counter(labels).items():
        of_class = labels_N == label
        taken = int(mask_N[of_class].sum())
        least = 1 if fraction and count >= 2 else 0
        assert taken == min(max(round(count * fraction), least), count - 1)
        if taken:
            assert ranks_N[of_class & mask_N].max() <= ranks_N[of_class & ~mask_N].min()
    files = output_files(labels_N, sizes_N, mask_N, shard_bytes)
    assert sorted(np.concatenate([f.rows_N for f in files])) == list(range(len(labels)))
    for file in files:
        assert set(mask_N[file.rows_N]) == {file.split == "validation"}
        assert list(labels_N[file.rows_N]) == sorted(labels_N[file.rows_N])
        assert sizes_N[file.rows_N].sum() <= shard_bytes or len(file.rows_N) == 1


def test_an_image_keeps_its_side_when_others_are_added() -> None:
    ranks_N = np.array([parts.rank_of(0, f"{i}.jpg") for i in range(300)], dtype=np.uint64)
    some, more = (held_out(np.zeros(n, dtype=np.int64), ranks_N[:n], 0.1) for n in (200, 300))
    assert (some != more[:200]).sum() <= 12
    other = np.array([parts.rank_of(1, f"{i}.jpg") for i in range(300)], dtype=np.uint64)
    assert (held_out(np.zeros(300, dtype=np.int64), other, 0.1) != more).any()


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "LA", "1", "I;16"])
def test_pixels_of_an_image_that_is_made_smaller_are_those_that_decoding_gives(mode: str) -> None:
    from wmdd_ray.config import SourceConfig
    from wmdd_ray.store.images import decode_image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels, "RGBA")
    picture = (
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) << 8)
        if mode == "I;16"
        else rgba if mode == "RGBA" else rgba.convert("RGB").convert("L").convert(mode)
        if mode in ("LA", "1") else rgba.convert("RGB").convert(mode)
    )  # fmt: skip
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    kept = kept_image(sink.getvalue(), max_side=20, max_pixels=10_000, where="x")
    config = SourceConfig(image_size=20, resize=20)
    expected = decode_image(sink.getvalue(), config, "x")
    np.testing.assert_array_equal(decode_image(kept.content, config, "x"), expected)
    assert kept.is_gray == (mode in ("L", "LA", "1", "I;16"))


@pytest.mark.parametrize("orientation", range(1, 10))
def test_a_turned_photograph_is_made_smaller_and_lies_as_it_lay(orientation: int) -> None:
    from wmdd_ray.config import SourceConfig
    from wmdd_ray.store.images import decode_image

    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", exif=exif)
    same = kept_image(sink.getvalue(), max_side=40, max_pixels=10_000, where="x")
    assert same.content == sink.getvalue()
    smaller = kept_image(sink.getvalue(), max_side=20, max_pixels=10_000, where="x")
    with Image.open(io.BytesIO(smaller.content)) as picture:
        # Nothing else of EXIF goes on: where a photograph was taken is nobody's business.
        assert (picture.size, dict(picture.getexif())) == (
            (30, 20),
            {0x0112: orientation} if 1 < orientation < 9 else {},
        )
    for turned in (True, False):
        config = SourceConfig(image_size=20, resize=20, exif_orientation=turned)
        expected = decode_image(sink.getvalue(), config, "x").astype(int)
        # Rows and columns are rounded in the other order where they change places.
        atol = 1 if turned and 5 <= orientation <= 8 else 0
        np.testing.assert_allclose(decode_image(smaller.content, config, "x"), expected, atol=atol)


def test_a_changed_frame_is_noticed() -> None:
    kept = kept_image(PNGS[0], max_side=20, max_pixels=10_000, where="x")
    frame = parts.encode_frame("猫/1.png", kept)
    assert parts.decode_frame(frame, "x") == ("猫/1.png", kept)
    for at in (0, 20, len(frame) - 1):
        changed = bytearray(frame)
        changed[at] ^= 1
        with pytest.raises(Exception, match="expected .* bytes with the checksum before them"):
            parts.decode_frame(bytes(changed), "here")


@pytest.mark.slow
def test_memory_is_flat_when_the_data_grows_eightfold() -> None:
    # In a process and a Ray of its own: workers of the session's Ray come with the memory of other tests.
    once, eight = in_a_process(prepare_peaks, 2, 1, (150, 1200))
    assert eight["mib"] > 6 * once["mib"] > 15
    assert eight["driver_grew"] < once["driver_grew"] + 0.3 * eight["mib"]
    assert eight["worker"] < once["worker"] + 0.3 * eight["mib"]


def test_options_of_labels_reach_the_source_and_count_only_where_they_are_used() -> None:
    plain = PrepareConfig()
    assert (plain.source.numbers, plain.source.label_column) == ("auto", None)
    # Names that the user gives in label order are what numbers count.
    named = PrepareConfig(classes="classes.txt")
    assert named.source.numbers == "index"
    assert named.scan_options() == plain.scan_options()
    used = PrepareConfig(label_column="fine_label", numbers="index-from-1")
    assert (used.source.numbers, used.source.label_column) == ("index-from-1", "fine_label")
    assert used.scan_options().keys() - plain.scan_options().keys() == {"label_column", "numbers"}


def test_an_option_of_another_job_is_called_as_it_was_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare.main(["x", "--out", "y", "--source.format", "csv"]) == 2
    said = capsys.readouterr().err
    assert "--source.format: there is no such option; did you mean --format?" in said
