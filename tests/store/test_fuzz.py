"""Thousands of damaged files: each gives images, or is counted and named, or is refused with its name; nothing else.

The examples run in a process of their own, because what fails in them may be a native decoder: it ends with a signal
when it crashes, when an example takes 2 s of processor time, or when it asks for more memory than there is. An example is
made from its number alone, so that `python -m tests.store.test_fuzz png 1 17` runs number 17 again.
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.manifests import manifest_of
from tests.store.hostile import read_odd_sets
from tests.store.test_codecs import PAIRS
from tests.store.written_sources import (
    CONFIG,
    IMAGES_NHWC,
    LABELS_N,
    NAMES,
    PNGS,
    idx_of,
    parquet_of,
    tar_of,
)
from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import BadImageError, DataError, WmddError
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store import codecs, documents
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import decode_image, decode_png
from wmdd_ray.store.packing import BUDGET_BYTES
from wmdd_ray.store.sources import load_images, open_source

COUNT = int(os.environ.get("WMDD_FUZZ_MUTANTS", 300))
"""Examples of a kind; `make fuzz` tries 3000."""
LIMIT_S = 2.0
MORE_MEMORY_BYTES = 512 << 20
RGB = SourceConfig(image_size=8, resize=8)

Target = Callable[[bytes], str]
"""Reads one example; returns what came of it, or raises what a user may see."""


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """Return a damaged copy: bits and bytes changed, spans taken out, doubled, zeroed, exchanged; cut, or garbage behind."""
    content = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 5))):
        size = max(1, len(content))
        # Headers and footers decide most.
        start = rng.choice((rng.randrange(size), rng.randrange(min(size, 200))))
        if rng.random() < 0.25:
            start = max(0, size - 1 - rng.randrange(900))
        span = min(rng.choice((1, 2, 8, 64, 600)), size - start)
        other = rng.randrange(size)
        match rng.randrange(9):
            case 0 | 1 if content:
                content[start] ^= 1 << rng.randrange(8)
            case 2 if content:
                content[start] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 3:
                del content[start : start + span]
            case 4:
                content[start:start] = content[start : start + span]
            case 5:
                content[start : start + span] = bytes(len(content[start : start + span]))
            case 6:
                one, two = content[start : start + span], content[other : other + span]
                content[start : start + span], content[other : other + span] = two, one
            case 7:
                content += rng.randbytes(rng.choice((1, 8, 600)))
            case 8:
                del content[start:]
    return bytes(content)


def check_named(error: Exception, name: str) -> None:
    assert name in str(error), f"does not name the file: {error}"


# Images ----------------------------------------------------------------------------------------


def written(picture: Image.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format=format, **options)
    return sink.getvalue()


def pictures(format: str) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels_HWC)
    options: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "JPEG": [
            (rgb, {"exif": exif}),
            (rgb, {"progressive": True, "icc_profile": bytes(3000)}),
            (rgb.convert("CMYK"), {}),
            (rgb.convert("L"), {"quality": 30, "comment": b"text"}),
        ],
        "PNG": [
            (rgb, {"exif": exif, "transparency": (1, 2, 3)}),
            (rgb.convert("P"), {"transparency": 3}),
            (rgb.convert("RGBA"), {"icc_profile": bytes(3000)}),
            (Image.fromarray(pixels_HWC[:, :, 0].astype(np.uint16) << 8), {}),
            (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ],
        "WEBP": [
            (rgb, {"exif": exif}),
            (rgb.convert("RGBA"), {"lossless": True, "icc_profile": bytes(300)}),
            (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ],
    }
    return [written(picture, format, **chosen) for picture, chosen in options[format]]


def decode(content: bytes) -> str:
    try:
        pixels_HWC = decode_image(content, RGB, "train/ant/0.png")
    except BadImageError as error:
        check_named(error, "train/ant/0.png: ")
        return "bad"
    assert pixels_HWC.shape == (8, 8, 3) and pixels_HWC.dtype == np.uint8
    return "good"


# Sources ---------------------------------------------------------------------------------------


def source_of(name: str, others: dict[str, bytes]) -> Target:
    store = Store(f"memory://{uuid.uuid4().hex}")
    for key, content in others.items():
        store.put(key, content)

    def read(content: bytes) -> str:
        store.put(name, content)
        try:
            source = open_source(store.uri, CONFIG, split="train")
            found = load_images(source, CONFIG, 1 << 20)
        except DataError as error:
            check_named(error, name)
            raise
        if found is None:
            return "too many"
        keys, labels_N, images_NHWC, bad = found
        assert len(keys) == len(images_NHWC) == len(labels_N)
        assert [raw.key for raw in source.read_keys(keys)] == list(keys)
        # Shard, key and reason of each.
        assert all(reason.startswith(f"{name}#") and ": " in reason for reason in bad), bad
        return "bad" if bad else "good"

    return read


def tars() -> list[bytes]:
    rows = [
        (f"{'deep/' * 30}{i}.{ending}", content)
        for i in range(6)
        for ending, content in (("png", PNGS[i]), ("cls", b"%d" % (i % 3)))
    ]
    return [tar_of(rows), tar_of(rows, format=1)]


def parquets() -> list[bytes]:
    labels = [0, 1, 2] * 2
    return [parquet_of(PNGS[:6], labels, NAMES), parquet_of(PNGS[:6], labels)]


# Our own records -------------------------------------------------------------------------------


def records() -> tuple[Target, list[bytes]]:
    """Read without the checksum that a marker holds: what the decoders alone make of damage.

    The first byte of an example says which decoder reads it, so that one sees the records of others too.
    """
    pixels = codecs.encode_images(
        np.zeros((3, 8, 8, 3), np.uint8), np.arange(3), np.ones((3, 1)), NAMES
    )
    kinds = [(encode(value), read) for encode, read, value in PAIRS.values()]
    kinds.append(
        (pixels, lambda c: [decode_png(p, (8, 8, 3)) for p in codecs.decode_png_rows(c)[0]])
    )
    kinds.append((codecs.encode_state({"a": np.arange(9.0)}), codecs.decode_state))

    def target(content: bytes) -> str:
        read = kinds[content[0] % len(kinds)][1] if content else codecs.decode_state
        read(content[1:])
        return "good"

    return target, [bytes([i]) + content for i, (content, _) in enumerate(kinds)]


def verified() -> tuple[Target, list[bytes]]:
    """Read as every stage does: by an entry with size and SHA-256."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    encode, read, value = PAIRS["chunk"]
    content = encode(value)
    entry = documents.entry_of("unit.safetensors", content)

    def target(damaged: bytes) -> str:
        store.put(entry.key, damaged or b" ")
        read(documents.read_verified(store, entry))
        assert damaged == content, "other bytes than were committed became data"
        return "good"

    return target, [content]


def document() -> tuple[Target, list[bytes]]:
    store = Store(f"memory://{uuid.uuid4().hex}")
    entry = documents.entry_of("data/x", b"x")
    content = documents.encode_manifest(manifest_of(ipc=7), [entry])

    def target(damaged: bytes) -> str:
        store.put(documents.MANIFEST_KEY, damaged or b" ")
        meta, files = documents.read_manifest(store)
        assert (meta["ipc"], files) == (7, [entry]), "a changed document became data"
        return "good"

    return target, [content]


def marker() -> tuple[Target, list[bytes]]:
    room = Room(Store(f"memory://{uuid.uuid4().hex}"), "features")
    room.commit_unit("s00000-00000", {"chunks/x.safetensors": b"x"}, metrics={}, attempt=1)
    key = "units/s00000-00000.json"
    expected = room.read_unit("s00000-00000")

    def target(damaged: bytes) -> str:
        room.store.put(key, damaged or b" ")
        assert room.read_unit("s00000-00000") == expected, "a changed marker became data"
        return "good"

    return target, [room.store.get(key)]


def checkpoint() -> tuple[Target, list[bytes]]:
    import safetensors.torch
    import torch

    from wmdd_ray.core.checkpoints import read_checkpoint

    state = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}

    def saved(content: object, **options: Any) -> bytes:
        sink = io.BytesIO()
        torch.save(content, sink, **options)
        return sink.getvalue()

    def target(content: bytes) -> str:
        try:
            read_checkpoint(content, "teacher.pt")
        except DataError as error:
            check_named(error, "teacher.pt")
            raise
        return "good"

    return target, [
        safetensors.torch.save(state, {"format": "pt"}),
        saved(state),
        saved({"model": state}, _use_new_zipfile_serialization=False),
    ]


# Faults of the program, planted to see that this finds them -------------------------------------


def planted(kind: str) -> Target:
    kept: list[bytes] = []

    def target(content: bytes) -> str:
        if kind == "crash":
            faulthandler._sigsegv()  # type: ignore[attr-defined]
        while kind == "hang":
            pass
        if kind == "leak":
            kept.append(os.urandom(200_000))
        if kind == "huge":
            bytearray(2 * MORE_MEMORY_BYTES)
        if kind == "unnamed":
            return source_of("x.tar", {"a.tar": content[:99]})(tars()[0])
        return "good"

    return target


FORMATS: dict[str, Callable[[], tuple[Target, list[bytes]]]] = {
    "jpeg": lambda: (decode, pictures("JPEG")),
    "png": lambda: (decode, pictures("PNG")),
    "webp": lambda: (decode, pictures("WEBP")),
    "tar": lambda: (source_of("x.tar", {}), tars()),
    "parquet": lambda: (source_of("x.parquet", {}), parquets()),
    "idx": lambda: (
        source_of("train-images-idx3-ubyte.gz", {"train-labels-idx1-ubyte": idx_of(LABELS_N)}),
        [gzip.compress(idx_of(IMAGES_NHWC[:, :, :, 0]), mtime=0)],
    ),
    "checkpoint": checkpoint,
    "document": document,
    "marker": marker,
    "verified": verified,
    "records": records,
    "set": read_odd_sets,
}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_examples(kind: str, count: int, first: int) -> dict[str, Any]:
    """Run examples and return how they ended; never returns when one of them ends the process."""
    if kind.startswith("planted "):
        target, seeds = planted(kind.removeprefix("planted ")), tars()
    else:
        target, seeds = FORMATS[kind]()
        for seed in seeds:
            assert target(seed) in ("good", "bad"), kind
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MORE_MEMORY_BYTES,) * 2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    outcomes, unexpected, worst_s = Counter[str](), dict[str, str](), 0.0
    resident = [resident_bytes()]
    for number in range(first, first + count):
        rng = random.Random(f"{kind}/{number}")
        content = mutated(rng.choice(seeds), rng)
        if sys.stdout.seekable():  # a file: what it says survives a crash
            os.pwrite(1, b"%-20d" % number, 0)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        started = time.process_time()
        try:
            outcomes[target(content)] += 1
        except WmddError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            unexpected.setdefault(type(error).__name__, f"example {number}: {error}")
        worst_s = max(worst_s, time.process_time() - started)
        if number == first + count // 2:
            resident.append(resident_bytes())
    signal.setitimer(signal.ITIMER_PROF, 0)
    resident.append(resident_bytes())
    return {
        "outcomes": outcomes,
        "unexpected": unexpected,
        "worst_s": worst_s,
        "resident": resident,
    }


def fuzz(kind: str, folder: Path, count: int = COUNT) -> dict[str, Any]:
    """Run the examples of a kind in a process of their own and check what holds for all kinds."""
    said = folder / "said"
    with open(said, "wb") as sink:
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __spec__.name, kind, str(count)],
            stdout=sink,
            stderr=subprocess.PIPE,
            timeout=550,  # of the clock, on a machine that others use; below the 600 s of a test
            check=False,
        )
    text = said.read_text()
    assert ended.returncode == 0, f"{kind}: ended with {ended.returncode} at example {text}"
    found: dict[str, Any] = json.loads(text[20:])
    assert found["unexpected"] == {}, kind
    assert found["worst_s"] < LIMIT_S
    # A leak of one image an example would be ten times as much; allocators keep a few mebibytes, and once what the largest took.
    start, half, end = found["resident"]
    assert end - half < 16 << 20 and end - start < BUDGET_BYTES, found["resident"]
    assert sum(found["outcomes"].values()) == count
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_named_or_refused_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    count = 3 * COUNT if kind == "records" else COUNT  # ten kinds of record
    outcomes = fuzz(kind, tmp_path, count)["outcomes"]
    if kind == "verified":  # where no damage passes: the rest is damage that changed nothing
        assert set(outcomes) <= {"ArtifactError", "good"} and outcomes["ArtifactError"] > count // 2
        return
    # The damage is neither always harmless nor always fatal, or nothing was tried.
    assert len(outcomes) >= 2 and max(outcomes.values()) < count, outcomes


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("crash", "ended with -11 at example 0"),
        ("hang", "ended with -27 at example 0"),
        ("huge", "MemoryError"),
        ("leak", "assert .* < "),
        ("unnamed", "does not name the file"),
    ],
)
def test_a_planted_fault_is_found(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        fuzz(f"planted {kind}", tmp_path, 400 if kind == "leak" else 4)


if __name__ == "__main__":
    result = run_examples(sys.argv[1], int(sys.argv[2]), int((*sys.argv[3:], "0")[0]))
    print(f"{'':20}{json.dumps(result)}")
