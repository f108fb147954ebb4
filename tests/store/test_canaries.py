"""Data that would run code or lead out of its folder: refused or passed over, and nothing happens.

A canary is an object whose unpickling makes a file. Each is unpickled on purpose at the end, to hear it sing.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.hostile import Canary
from tests.store.written_sources import (
    CONFIG,
    IMAGES_NHWC,
    NAMES,
    PNGS,
    WRITERS,
    parquet_of,
    read_all,
    tar_of,
)
from wmdd_ray.core.checkpoints import read_checkpoint
from wmdd_ray.errors import ArtifactError, DataError
from wmdd_ray.store import codecs, documents
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.sources import open_source
from wmdd_ray.store.sources.listing import list_files


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "data"))


@pytest.fixture
def bird(tmp_path: Path) -> Iterator[bytes]:
    """A pickled canary, that must be silent until the test is over."""
    sung = tmp_path / "sung"
    content = pickle.dumps(Canary(sung))
    yield content
    assert not sung.exists(), "code in the data was run"
    pickle.loads(content)
    assert sung.exists(), "the canary itself must sing"


def object_array(content: bytes) -> bytes:
    """An .npy file of Python objects, which numpy would unpickle if it were told to."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        sink, {"descr": "|O", "fortran_order": False, "shape": (1,)}
    )
    return sink.getvalue() + content


# Code ------------------------------------------------------------------------------------------


def test_members_that_hold_pickles_are_not_read(store: Store, bird: bytes) -> None:
    endings = ("pkl", "pickle", "pth", "pt", "npy", "npz", "pyd", "ten", "tb", "mp", "yaml")
    others = [*((f"0.{ending}", bird) for ending in endings), ("0.o.npy", object_array(bird))]
    members = [
        ("README.pkl", bird),
        ("0.png", PNGS[0]),
        *others,
        ("0.cls", b"0"),
        ("1.png", bird),
        ("1.cls", b"0"),
    ]
    store.put("classes.txt", b"ant\n")
    store.put("x.tar", tar_of(members))
    (chunk,) = read_all(store)
    assert len(chunk.keys) == 1 and len(chunk.bad) == 1
    for label in (bird, object_array(bird)):
        store.put("x.tar", tar_of([("0.png", PNGS[0]), ("0.cls", label)]))
        (chunk,) = read_all(store)
        assert chunk.keys == () and "no label" in chunk.bad[0]
    # Text that is YAML to others is a name, and no class's.
    text = b'!!python/object/apply:os.system ["x"]'
    store.put("x.tar", tar_of([("0.png", PNGS[0]), ("0.cls", text)]))
    with pytest.raises(DataError, match="expected one of the 1 classes 'ant'"):
        read_all(store)


def hostile_schema(bird: bytes) -> pa.Schema:
    """Columns that older readers build from pickles in the schema: pyarrow's, Ray's and its objects."""
    names = {
        "arrow.py_extension_type": bird,
        "ray.data.arrow_tensor": bird,
        "ray.data.arrow_tensor_v2": bird,
        "ray.data.arrow_variable_shaped_tensor": bird,
        "ray.data.arrow_pickled_object": bird,
    }
    fields = [
        pa.field(
            f"extra{i}",
            pa.binary(),
            metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": content},
        )
        for i, (name, content) in enumerate(names.items())
    ]
    return pa.schema([pa.field("image", pa.binary()), pa.field("label", pa.int64()), *fields])


def write_hostile_parquet(path: Path, bird: bytes, png: bytes) -> None:
    schema = hostile_schema(bird)
    columns = [[png], [0], *([[bird]] * (len(schema) - 2))]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    # Stored as it is written here, whatever extension types this process knows.
    assert b"ARROW:schema" in path.read_bytes()


def test_extension_types_and_object_columns_of_parquet_are_not_unpickled(
    store: Store, bird: bytes, tmp_path: Path
) -> None:
    write_hostile_parquet(tmp_path / "data/x.parquet", bird, PNGS[0])
    # In processes of their own: other tests of this one may have imported Ray, which registers its types for good.
    ended = read_in_child(store, "")
    assert ended.stdout.split() == ["1", "1"], ended.stderr
    # And where Ray has registered its types, as in every worker of the pipeline.
    ended = read_in_child(store, ", ray.data, ray.data.extensions")
    # They are refused one by one, by Ray's own checks; nothing else may come out.
    assert "DataError" in ended.stderr.splitlines()[-1], ended.stderr


def read_in_child(store: Store, imports: str) -> subprocess.CompletedProcess[str]:
    script = (
        f"import sys{imports}\n"
        "from tests.store.written_sources import read_all, Store\n"
        "chunks = read_all(Store(sys.argv[1]))\n"
        "print(len(chunks), len(chunks[0].keys))\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, store.uri],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_an_image_column_that_is_an_extension_type_is_not_unpickled(
    store: Store, bird: bytes, tmp_path: Path
) -> None:
    for i, name in enumerate(("image", "label")):
        schema = hostile_schema(bird)
        hostile = schema.field("extra0").metadata
        schema = schema.set(i, schema.field(name).with_metadata(hostile))
        table = pa.table(
            [pa.array([PNGS[0]]), pa.array([0]), *[pa.array([bird])] * 5], schema=schema
        )
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data/x.parquet")
        try:
            read_all(store)
        except DataError as error:
            assert "x.parquet" in str(error)  # noqa: PT017


def test_class_names_are_text_and_nothing_in_them_is_obeyed(store: Store, bird: bytes) -> None:
    tag = '!!python/object/apply:os.system ["touch sung"]'
    store.put("x.tar", tar_of([("0.png", PNGS[0]), ("0.cls", b"0")]))
    store.put("classes.yaml", f"- {tag}\n".encode())
    store.put("classes.pkl", bird)
    assert open_source(store.uri, CONFIG, split="train").class_names == ("0",)
    store.put("classes.txt", f"{tag}\n__import__('os')\n".encode())
    assert open_source(store.uri, CONFIG, split="train").class_names == (tag, "__import__('os')")
    store.put("classes.txt", bird)
    with pytest.raises(DataError, match=r"classes\.txt: expected one name a line"):
        open_source(store.uri, CONFIG, split="train")


def torch_files(bird: bytes, canary: Canary) -> dict[str, bytes]:
    def saved(content: object, **options: Any) -> bytes:
        sink = io.BytesIO()
        torch.save(content, sink, **options)
        return sink.getvalue()

    def zipped(**records: bytes) -> bytes:
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            for name, content in {"data": bird, **records}.items():
                archive.writestr(f"x/{name}.pkl", content)
            archive.writestr("x/version", b"3\n")
        return sink.getvalue()

    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), scripted)
    return {
        "pickle": bird,
        "zip": saved({"state_dict": {"a": torch.ones(1)}, "extra": canary}),
        "old": saved({"a": torch.ones(1), "extra": canary}, _use_new_zipfile_serialization=False),
        "records": zipped(constants=bird),
        "module": saved(torch.nn.Linear(2, 2)),
        "script": scripted.getvalue(),
        "npy": object_array(bird),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_teachers_that_bring_code_are_refused(bird: bytes, tmp_path: Path) -> None:
    for kind, content in torch_files(bird, Canary(tmp_path / "sung")).items():
        with pytest.raises(DataError, match=f"checkpoint {kind}.pt: expected safetensors"):
            read_checkpoint(content, f"{kind}.pt")


def test_a_checkpoint_that_unpacks_to_more_than_it_holds_is_refused() -> None:
    sink, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(2_000_000)}, sink)
    with (
        zipfile.ZipFile(sink) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in archive.namelist():
            target.writestr(name, archive.read(name))
    assert len(packed.getvalue()) < 20_000
    assert read_checkpoint(sink.getvalue(), "whole.pt")["a"].shape == (2_000_000,)
    with pytest.raises(DataError, match=r"bomb\.pt.*unpack to 80\d+ bytes"):
        read_checkpoint(packed.getvalue(), "bomb.pt")


def with_metadata(metadata: str) -> bytes:
    """A safetensors file with one tensor, and this text as its `__metadata__`."""
    header = (
        f'{{"__metadata__":{metadata},"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


def test_metadata_of_safetensors_is_text_and_nothing_in_it_is_obeyed(bird: bytes) -> None:
    text = base64.b64encode(bird).decode()
    harmless = with_metadata(json.dumps({"format": "pt", "__reduce__": text, "json": text}))
    assert list(read_checkpoint(harmless, "x")) == ["a"]
    assert list(safetensors.numpy.load(harmless)) == ["a"]
    for metadata in (
        json.dumps({"json": text}),
        json.dumps({"json": '{"py/object": "os.system"}'}),
        '{"json":"{}","json":"{}"}',
        '{"json": {"a": 1}}',
        "[" * 50_000,
        "1",
    ):
        with pytest.raises(ArtifactError):
            codecs.decode_state(with_metadata(metadata))
    for metadata in ('{"a": {"b": 1}}', "[" * 50_000, "1"):
        with pytest.raises(DataError):
            read_checkpoint(with_metadata(metadata), "x")


@pytest.mark.parametrize("text", ["[1]", "NaN", "[" * 100_000])
def test_metadata_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError):
        codecs.decode_state(with_metadata(json.dumps({"json": text})))


# Paths -----------------------------------------------------------------------------------------

PARTS = st.one_of(
    st.sampled_from(
        [
            *("..", ".", "", "~", "C:", "\\", "\\\\host\\share", "\0", "con", "%2e%2e", "\n", "\u202e"),
            *("\uff0e\uff0e", "\u2024\u2024", "\u2215etc", "/etc", "etc", "x" * 300, "a" * 5000, "-rf", "$HOME"),
        ]
    ),
    st.text(max_size=8),
)  # fmt: skip
PATHS = st.lists(PARTS, min_size=1, max_size=5).map("/".join)
SECRET = encode_png(np.full((8, 8, 1), 99, np.uint8))
MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder with an image that nobody may read; afterwards nothing is there that was not there before."""
    secret = tmp_path / "secret"
    (secret / "ant").mkdir(parents=True)
    (secret / "ant/0.png").write_bytes(SECRET)
    (secret / "train-000.tar").write_bytes(tar_of([("0.png", SECRET), ("0.cls", b"0")]))
    (secret / "x.parquet").write_bytes(parquet_of([SECRET], [0], NAMES))
    (tmp_path / "data").mkdir()

    def everything() -> set[Path]:
        return {p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "data")}

    before = everything()
    yield secret
    assert everything() == before


@MANY
@given(names=st.lists(PATHS, min_size=1, max_size=4))
def test_member_names_are_never_places(store: Store, outside: Path, names: list[str]) -> None:
    links = []
    for i, (name, kind) in enumerate(
        itertools.product(names, (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE))
    ):
        member = tarfile.TarInfo(f"{name}/{i}.png".replace("\0", "") if i % 2 else f"{i}.png")
        member.type, member.linkname = kind, str(outside / "ant/0.png")
        links.append((member, PNGS[0] if kind == tarfile.REGTYPE else b""))
        links.append((tarfile.TarInfo(f"{member.name[:-4]}.cls"), b"0"))
    store.put("classes.txt", b"ant\n")
    members = [(member, content) for member, content in links if _encodable(member.name)]
    store.put("x.tar", tar_of(members))
    for chunk in read_all(store):
        for key, image_HWC in zip(chunk.keys, chunk.images_NHWC, strict=True):
            assert key.startswith("x.tar#")
            assert not (image_HWC == 99).all()
        assert all(len(reason) < 600 and reason.isprintable() for reason in chunk.bad)


def _encodable(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


@pytest.mark.parametrize("format", WRITERS)
def test_keys_lead_to_images_of_the_source_or_nowhere(
    format: str, store: Store, outside: Path
) -> None:
    WRITERS[format](store)
    source = open_source(store.uri, CONFIG, split="train")
    place = {"webdataset": "train-000.tar#1536:75:0", "parquet": "x.parquet#0"}
    file = place.get(format, "ant/0.png")

    @settings(max_examples=100)
    @given(path=PATHS)
    def lead_nowhere(path: str) -> None:
        for key in (
            path, f"{path}#0", f"{path}#0:1:0", f"{path}/{file}", f"{path}/../secret/{file}",
            f"train/../../secret/{path}/{file}", f"{outside}/{file}#{path}",
        ):  # fmt: skip
            with contextlib.suppress(DataError, ArtifactError):
                (raw,) = source.read_keys([key])
                assert raw.content != SECRET

    lead_nowhere()
    for key in (
        f"../secret/{file}", f"train/../../secret/{file}", f"{outside}/{file}", f"../data/../secret/{file}",
        f"train/ant/../../../secret/{file}",
        f"x.tar#{10**30}:1:0", f"x.parquet#{10**30}", "9" * 5000, "x.tar#" + "9" * 5000 + ":0:0",
    ):  # fmt: skip
        with pytest.raises((DataError, ArtifactError)):
            source.read_keys([key])


@MANY
@given(path=PATHS)
def test_paths_in_parquet_rows_are_not_followed(store: Store, outside: Path, path: str) -> None:
    rows = [
        {"bytes": None, "path": str(outside / "ant/0.png")},
        {"bytes": None, "path": "../secret/ant/0.png"},
        {"bytes": None, "path": path if _encodable(path) else "x"},
        {"bytes": PNGS[0], "path": str(outside / "ant/0.png")},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": [0] * 4}), sink)
    store.put("x.parquet", sink.getvalue())
    (chunk,) = read_all(store)
    assert [reason.partition(": ")[0] for reason in chunk.bad] == [
        f"x.parquet#{i}" for i in range(3)
    ]
    assert (chunk.images_NHWC == IMAGES_NHWC[0]).all()


@given(path=PATHS)
def test_files_of_a_document_lie_below_its_folder(path: str) -> None:
    root = Path("/room")
    try:
        entry = documents.FileEntry(key=path, size_bytes=1, sha256="")
    except ArtifactError:
        return
    assert Path(os.path.normpath(root / entry.key)).is_relative_to(root)
    assert not set("\\:\0") & set(path)


@pytest.mark.parametrize(
    "key", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "a\0b", "", ".", "a//b"]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(store: Store, key: str) -> None:
    entry = {"key": key, "size_bytes": 1, "sha256": "0" * 64}
    store.put("manifest.json", documents.seal({"format_version": 1, "files": [entry]}))
    with pytest.raises(ArtifactError, match="expected a relative key below its folder"):
        documents.read_manifest(store)


def link(data: Path, name: str, target: str | Path, **options: Any) -> None:
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    (data / name).symlink_to(target, **options)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("train/ant/9.png", "ant/0.png"),
        ("train/dog", "ant"),
        ("train/ant/deep/er", "."),
        ("train-001.tar", "train-000.tar"),
        ("b.parquet", "x.parquet"),
    ],
)
def test_links_out_of_the_folder_are_refused_by_name_or_followed_when_told(
    store: Store, outside: Path, name: str, target: str
) -> None:
    (outside.parent / "data/train/ant").mkdir(parents=True)
    store.put("train/ant/0.png", PNGS[0])
    link(outside.parent / "data", name, outside / target)
    with pytest.raises(DataError, match=rf"1 links that lead elsewhere: '{name}'.*follow-links"):
        open_source(store.uri, CONFIG, split="train")
    _, files, _ = list_files(store.uri, replace(CONFIG, follow_links=True))
    assert any(file.startswith(name) for file in files)
    if name.startswith("train/") and target != ".":
        mine = replace(CONFIG, follow_links=True, layout="train/{class}")
        assert open_source(store.uri, mine, split="train").num_images == 2


def test_links_of_a_pattern_and_of_lists_of_classes_stay_inside_too(
    store: Store, outside: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = outside.parent / "data"
    store.put("a-000.tar", tar_of([("0.png", PNGS[0]), ("0.cls", b"0")]))
    link(data, "a-001.tar", outside / "train-000.tar")
    pattern = store.url("a-{000..001}.tar")
    with pytest.raises(DataError, match=r"1 links that lead elsewhere: 'a-001\.tar'.*follow-links"):
        open_source(pattern, CONFIG, split="train")
    mine = replace(CONFIG, follow_links=True)
    assert len(open_source(pattern, mine, split="train").files) == 2
    (data / "a-001.tar").unlink()
    theirs = tmp_path_factory.mktemp("theirs") / "classes.txt"
    theirs.write_text("theirs\n")
    # Beside one file that is named, and a pattern: what else lies there is not listed.
    link(data, "classes.txt", theirs)
    for uri in (store.url("a-000.tar"), store.url("a-{000..000}.tar")):
        with pytest.raises(DataError, match=r"1 links that lead elsewhere: 'classes\.txt'"):
            open_source(uri, CONFIG, split="train")
    assert open_source(pattern.replace("001", "000"), mine, split="train").class_names == (
        "theirs",
    )


def test_an_image_folder_of_a_table_that_is_a_link_is_refused(store: Store, outside: Path) -> None:
    link(outside.parent / "data", "images", outside / "ant")
    store.put("labels.csv", b"path,label\nimages/0.png,ant\n")
    with pytest.raises(DataError, match="1 links that lead elsewhere: 'images'"):
        open_source(store.url("labels.csv"), CONFIG, split="train")
    mine = replace(CONFIG, follow_links=True)
    assert open_source(store.url("labels.csv"), mine, split="train").num_images == 1


def test_links_inside_the_folder_are_read_once_and_circles_end(
    store: Store, outside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = outside.parent / "data"
    store.put("train/ant/0.png", PNGS[0])
    store.put("train/bee/0.png", PNGS[1])
    link(data, "train/bee/1.png", "../ant/0.png")
    for i in range(3):
        link(data, f"train/ant/up{i}", "..")
        link(data, f"train/bee/top{i}", data)
    source = open_source(store.uri, CONFIG, split="train")
    assert list(source.files) == ["train/ant/0.png", "train/bee/0.png", "train/bee/1.png"]
    assert "leads to a folder that is read already" in caplog.text
    link(data, "train/bee/2.png", "nowhere.png")
    with pytest.raises(ArtifactError, match=r"cannot read .*train/bee/2\.png"):
        read_all(store)


def test_pipes_are_passed_over_and_names_that_are_no_text_are_refused(
    store: Store, tmp_path: Path
) -> None:
    store.put("train/ant/0.png", PNGS[0])
    os.mkfifo(tmp_path / "data/train/ant/1.png")
    one_class = replace(CONFIG, layout="train/{class}")
    assert open_source(store.uri, one_class, split="train").num_images == 1
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/train/ant/\xff.png")).write_bytes(PNGS[0])
    with pytest.raises(DataError, match=r"file names in UTF-8, found 1 others: .*xff\.png"):
        open_source(store.uri, CONFIG, split="train")
