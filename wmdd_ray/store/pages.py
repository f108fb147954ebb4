"""What the pages of a Parquet file declare, read off their headers before a reader allocates it.

The footer tells what its writer liked: a page of 200 KB decompresses to 2 GB under a footer that says nothing of it. Both are read
here and not by Arrow, whose accessors end the process at a column that lacks its description.

References:
    Apache Parquet, parquet.thrift: FileMetaData, RowGroup, ColumnChunk, PageHeader. Apache Thrift, compact protocol.
"""

from __future__ import annotations

from typing import Any

_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (
    (1, 2),
    3,
    (4, 5, 6),
    7,
    8,
    (9, 10),
    12,
)
_DEEPEST = 8
# Field ids.
_ROW_GROUPS, _COLUMNS, _COLUMN_META = 4, 1, 3
_STORED, _FIRST_PAGE, _DICTIONARY = 7, 9, 11
_PAGE_TYPE, _PAGE_BYTES, _PAGE_STORED = 1, 2, 3
_DICTIONARY_PAGE = 2


def declared_bytes(content: bytes) -> tuple[int, int]:
    """Return the bytes that all pages decompress to, and those of the largest dictionary, one value of which any row may repeat.

    Raises:
        ValueError, LookupError, TypeError: There is something else where the footer or a page's header should be.
    """
    footer_bytes = int.from_bytes(content[-8:-4], "little")
    if content[-4:] != b"PAR1" or footer_bytes > len(content) - 8:
        raise ValueError("no footer at the end")
    footer, _ = _struct(content, len(content) - 8 - footer_bytes)
    total = largest = 0
    for column in (c for group in footer[_ROW_GROUPS] for c in group[_COLUMNS]):
        meta = column[_COLUMN_META]
        at = min(meta[_FIRST_PAGE], meta.get(_DICTIONARY) or meta[_FIRST_PAGE])
        stop = at + meta[_STORED]
        while at < stop:
            header, at = _struct(content, at)
            size, stored = header[_PAGE_BYTES], header[_PAGE_STORED]
            if min(at, size, stored) < 0:
                raise ValueError(f"a page of {size} bytes in {stored}")
            total += size
            if header[_PAGE_TYPE] == _DICTIONARY_PAGE:
                largest = max(largest, size)
            at += stored
    return total, largest


def _struct(content: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return (field id -> value, where the next byte is) of a struct in the compact protocol."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := content[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(content, at)
        fields[number], at = _value(content, at, head & 15, depth)
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in _BOOLEANS:
        return None, at
    if kind == _BYTE:
        return None, at + 1
    if kind in _INTEGERS:
        return _integer(content, at)
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        size, at = _varint(content, at)
        return None, at + size
    if kind in _LISTS and depth < _DEEPEST:
        head = content[at]
        size, at = (head >> 4, at + 1) if head >> 4 < 15 else _varint(content, at + 1)
        values = []
        for _ in range(size):
            value, at = _value(content, at, head & 15, depth + 1)
            at += (head & 15) in _BOOLEANS  # which are a byte in a list
            values.append(value)
        return values, at
    if kind == _STRUCT and depth < _DEEPEST:
        return _struct(content, at, depth + 1)
    raise ValueError(f"a header with a field of kind {kind}")


def _integer(content: bytes, at: int) -> tuple[int, int]:
    """Return a number whose sign is its last bit."""
    value, at = _varint(content, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
