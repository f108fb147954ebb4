"""Numbers and strings of an array of structs in a MATLAB 5 file, which is how ILSVRC tells what its ids are.

SciPy's reader ends the whole process (SIGSEGV) at some malformed files; here what a file declares is bounded by its bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator

import numpy as np

# A file of ILSVRC has a megabyte.
_MAX_BYTES = 64 << 20
_NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_COMPRESSED, _MATRIX = 15, 14
_STRUCTS, _CHARS = 2, 4
_HEADER_BYTES = 128


def read_structs(content: bytes, variable: str, fields: Collection[str]) -> list[dict[str, object]]:
    """Return these fields of each element of an array of structs: a float, or a string.

    Raises:
        ValueError: It is no such file, or has no such variable or fields.
    """
    if content[126:128] != b"IM":
        raise ValueError("no little-endian MATLAB 5 file")
    for kind, element in _elements(content[_HEADER_BYTES:]):
        if kind == _COMPRESSED:
            inflater = zlib.decompressobj()
            element = inflater.decompress(element, _MAX_BYTES)
            kind, element = next(_elements(element), (0, b""))
        if kind != _MATRIX:
            continue
        parts = _elements(element)
        flags, _, name = (next(parts, (0, b""))[1] for _ in range(3))
        if flags[:1] == bytes([_STRUCTS]) and name.decode("latin-1") == variable:
            return list(_structs(parts, fields))
    raise ValueError(f"no array of structs {variable!r}")


def _structs(
    parts: Iterator[tuple[int, bytes]], fields: Collection[str]
) -> Iterator[dict[str, object]]:
    _, length = next(parts, (0, b""))
    _, joined = next(parts, (0, b""))
    width = int.from_bytes(length[:4], "little")
    if not 1 <= width <= 64:
        raise ValueError(f"field names of {width} bytes")
    names = [
        joined[start : start + width].split(b"\0")[0].decode("latin-1")
        for start in range(0, len(joined), width)
    ]
    if not {*fields} <= {*names}:
        raise ValueError(f"fields {names}")
    row: dict[str, object] = {}
    for place, (_, element) in enumerate(parts):
        name = names[place % len(names)]
        if name in fields:
            row[name] = _value(element)
        if place % len(names) == len(names) - 1:
            yield row
            row = {}


def _value(matrix: bytes) -> object:
    """Return a scalar as a float, and characters as a string."""
    parts = list(_elements(matrix))
    if len(parts) < 4:
        raise ValueError("an empty field")
    flags, (kind, values) = parts[0][1], parts[3]
    if flags[:1] == bytes([_CHARS]):
        return values.decode("utf-16-le" if kind == 4 else "utf-8")
    if kind not in _NUMBERS:
        raise ValueError(f"numbers of type {kind}")
    numbers = np.frombuffer(values, _NUMBERS[kind])
    if len(numbers) != 1:
        raise ValueError(f"{len(numbers)} numbers")
    return float(numbers[0])


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, bytes) of the elements that lie one after another; short ones hold their size beside their type."""
    at = 0
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, at)
        if kind >> 16:
            size, kind, start, end = kind >> 16, kind & 0xFFFF, at + 4, at + 8
        else:
            start = at + 8
            end = start + size + (-size % 8 if kind != _COMPRESSED else 0)
        if start + size > len(content) or (start == at + 4 and size > 4):
            raise ValueError(f"an element of {size} bytes at {at} of {len(content)}")
        yield kind, content[start : start + size]
        at = end
