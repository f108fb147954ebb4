"""MATLAB files: what SciPy writes is read back, and what is damaged is refused, whatever comes in."""

from __future__ import annotations

import io
import random
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from wmdd_ray.store.sources.matfile import read_structs

FIELDS = ("ILSVRC2012_ID", "WNID", "num_children")
ROWS = [
    {"ILSVRC2012_ID": 490.0, "WNID": "n02119789", "num_children": 0.0},
    {"ILSVRC2012_ID": 1001.0, "WNID": "n00001740", "num_children": 3.0},
    {"ILSVRC2012_ID": 2.0, "WNID": "n", "num_children": 0.0},
]


def written(*, compressed: bool, kind: str = "float64", name: str = "synsets") -> bytes:
    names = ("ILSVRC2012_ID", "WNID", "gloss", "children", "num_children")
    rows = [
        (
            np.array(row["ILSVRC2012_ID"], kind), row["WNID"], "Käfer, 蜂", np.arange(5),
            np.array(row["num_children"], kind),
        )
        for row in ROWS
    ]  # fmt: skip
    sink = io.BytesIO()
    others = {"a": np.ones((9, 9)), name: np.array(rows, dtype=[(n, "O") for n in names])}
    savemat(sink, others, do_compression=compressed)
    return sink.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["float64", "float32", "int16", "uint16", "int32"])
def test_fields_are_what_was_written(compressed: bool, kind: str) -> None:
    assert read_structs(written(compressed=compressed, kind=kind), "synsets", FIELDS) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no little-endian MATLAB 5 file"),
        (b"MATLAB 7.3 MAT-file, HDF5" + bytes(200), "no little-endian"),
        (written(compressed=False, name="others"), "no array of structs 'synsets'"),
        (written(compressed=False)[:-9], "an element of [0-9]+ bytes"),
    ],
)
def test_others_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_structs(content, "synsets", FIELDS)
    with pytest.raises(ValueError, match="fields"):
        read_structs(written(compressed=True), "synsets", ("no such field",))


def test_damage_is_read_or_refused_and_nothing_else() -> None:
    generator = random.Random(0)
    whole = [written(compressed=compressed) for compressed in (False, True)]
    refused = 0
    for _ in range(3000):
        content = bytearray(generator.choice(whole))
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(128, len(content))
            content[at : at + generator.randrange(5)] = generator.randbytes(generator.randrange(5))
        try:
            read_structs(bytes(content), "synsets", FIELDS)
        except (ValueError, zlib.error):
            refused += 1
    assert refused > 1000
