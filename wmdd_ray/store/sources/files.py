"""Files that real images lie in: listed, opened, and whether what came is what the listing told.

Links are followed only as far as the root: an archive that somebody else packed can hold a link to any file of this
machine, and two links to a folder above them never end (Arrow's own listing runs for ever).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from wmdd_ray.errors import ArtifactError, DataError
from wmdd_ray.store.retries import SET_THE_CLOCK, is_skewed, passes, remedy, status_of
from wmdd_ray.store.schemes import is_gcs
from wmdd_ray.store.sources.classes import shown
from wmdd_ray.store.sources.endings import is_system_name
from wmdd_ray.store.uris import local_path

logger = logging.getLogger(__name__)

_STREAM_BYTES = 1 << 20
_MARKS = (0xA5, 0x5A, 0xA5, 0x5A)
# A read from an object store takes tens of milliseconds of waiting.
_READ_THREADS = 8
_READS_AHEAD = 16

Place = TypeVar("Place")
Content = TypeVar("Content")


@contextlib.contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Turn what Arrow raises into the user's errors: storage failed, or content is not `what`."""
    try:
        yield
    except (OSError, EOFError, UnicodeError, zlib.error, pa.ArrowException) as error:
        if is_gcs(where) and (status_of(error)[0] or passes(error)):
            raise ArtifactError(f"cannot read {where}: {remedy(error, where)}") from error
        if _is_storage_fault(error):
            raise ArtifactError(f"cannot read {where}: {error}; {_remedy(error)}") from error
        if isinstance(error, UnicodeError):
            raise DataError(
                f"{where}: expected {what}, found text in another encoding ({error}); save it as UTF-8"
            ) from error
        raise DataError(
            f"{where}: expected {what}, found cut or malformed content ({type(error).__name__}: "
            f"{error}); restore the file from its origin"
        ) from error


def _remedy(error: Exception) -> str:
    """Return what to do about a failure of a store, by the names that Arrow has for S3's."""
    said = str(error)
    if is_skewed(error):
        return SET_THE_CLOCK
    if "AWS Error NO_SUCH_BUCKET" in said:
        return "create the bucket or correct the URI"
    if "HTTP status 301" in said:
        located = re.search("located in '([^']+)'", said)
        region = located[1] if located else "REGION"
        return f"the bucket is in another region: pass --source.bucket.region {region} (or set AWS_REGION)"
    if "AWS Error ACCESS_DENIED" in said or "AWS Error INVALID_ACCESS_KEY_ID" in said:
        return (
            "check the credentials, the permissions on this path and this machine's clock; a public bucket is read with "
            "--source.bucket.anonymous, one whose readers pay with --source.bucket.requester-pays, one of another account with "
            "--source.bucket.profile"
        )
    if "AWS Error" in said:
        return (
            "check that the endpoint and region are right (AWS_ENDPOINT_URL, AWS_REGION) and that the store answers, then run the "
            "same command again"
        )
    return "check that the file is still there and that the store answers"


def _is_storage_fault(error: Exception) -> bool:
    # Arrow reports malformed Parquet as a plain OSError, without errno; the system's errors have
    # one, S3's a name.
    return isinstance(error, OSError) and (
        isinstance(error, FileNotFoundError | PermissionError)
        or error.errno is not None
        or "AWS Error" in str(error)
    )


def open_whole(
    filesystem: pafs.FileSystem, path: str, where: str, size_bytes: int | None
) -> pa.NativeFile:
    """Open a file for reads anywhere in it; `size_bytes` is what the listing told, or None when nothing did.

    Raises:
        ArtifactError: It has another size than that. Reads raise it too, where a reply is shorter than was asked.
    """
    if isinstance(filesystem, pafs.PyFileSystem):
        # All who open a file of fsspec's memory share one position in it, threads included.
        fs = filesystem.handler.fs
        handle = (
            pa.BufferReader(fs.cat_file(path))
            if fs.protocol == "memory"
            else filesystem.open_input_file(path)
        )
    else:
        handle = filesystem.open_input_file(path)
    if size_bytes is not None and handle.size() != size_bytes:
        raise ArtifactError(
            f"{where}: expected {size_bytes} bytes as the listing told, found {handle.size()}; it was changed after it "
            "was listed, or the store cuts it: restore it and run again"
        )
    if isinstance(filesystem, pafs.S3FileSystem):
        return pa.PythonFile(_WholeReads(handle, where), mode="r")
    return handle


def streamed(handle: pa.NativeFile) -> pa.NativeFile:
    """Return a file for one pass from its start, read in pieces of a mebibyte."""
    return pa.BufferedInputStream(handle, _STREAM_BYTES)


def read_ahead(read: Callable[[Place], Content], places: Iterable[Place]) -> Iterator[Content]:
    """Yield what `read` returns for each place, in order, with a few reads under way ahead of the consumer."""
    pending: deque[Future[Content]] = deque()
    executor = ThreadPoolExecutor(_READ_THREADS)
    try:
        for place in places:
            if len(pending) == _READS_AHEAD:
                yield pending.popleft().result()
            pending.append(executor.submit(read, place))
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


class _WholeReads(io.RawIOBase):
    """Notices replies of an object store that are shorter than was asked.

    Arrow's S3 client takes the length that it asked for as the length that came: behind a shorter body the caller
    finds whatever was in the memory before. So the last byte is marked, and has to change.
    """

    def __init__(self, handle: pa.NativeFile, where: str) -> None:
        super().__init__()
        self._handle = handle
        self._where = where
        self._size_bytes = handle.size()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: self._size_bytes,
        }[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size_bytes - self._position)
        count = left if size < 0 else min(size, left)
        if not count:
            return b""
        buffer = bytearray(count)
        for mark in _MARKS:
            # A whole reply that ends in one mark does not end in the next.
            buffer[-1] = mark
            self._handle.seek(self._position)
            if self._handle.readinto(buffer) == count and buffer[-1] != mark:
                self._position += count
                return bytes(buffer)
        raise ArtifactError(
            f"{self._where}: expected {count} bytes at {self._position}, the store answered with fewer, "
            f"{len(_MARKS)} times; check what lies between this machine and the store"
        )

    def close(self) -> None:
        self._handle.close()
        super().close()


def walk_local(root: str, *, follow_links: bool) -> tuple[dict[str, int], list[str]]:
    """Return relative name -> bytes of every file under a folder of the local disk, and the names that are hidden or a system's.

    A folder is read once, by whatever names it can be reached; what is neither file nor folder (pipes, devices) is left out.
    A link that leads nowhere counts as a file of 0 bytes, so that it is missed when it is read.

    Raises:
        DataError: Links lead out of `root` and are not to be followed, or names are not UTF-8.
    """
    top = os.path.realpath(root)
    files: dict[str, int] = {}
    hidden: list[str] = []
    folders, links = deque([(root, "")]), deque[tuple[str, str]]()
    outside: list[str] = []
    undecodable: list[str] = []
    empty: list[str] = []
    seen: set[tuple[int, int]] = set()
    while folders or links:
        # Linked folders come last, so that a folder goes by its own name where it has one.
        folder, prefix = folders.popleft() if folders else links.popleft()
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            logger.warning("%s: leads to a folder that is read already, and is left out", folder)
            continue
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda e: e.name)
        visible = 0
        for entry in entries:
            name = prefix + entry.name
            if is_system_name(entry.name):
                hidden += _names_below(entry, name)
                continue
            visible += 1
            if not _is_utf8(entry.name):
                undecodable.append(repr(os.fsencode(name)))
            elif entry.is_symlink() and not (follow_links or is_inside(entry.path, top)):
                outside.append(name)
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append((entry.path, name + "/"))
            elif entry.is_file():
                files[name] = entry.stat().st_size
            elif entry.is_symlink():
                files[name] = 0
        if prefix and not visible:
            empty.append(prefix.rstrip("/"))
    if outside:
        raise leads_outside(root, outside)
    if undecodable:
        raise DataError(
            f"{root}: expected file names in UTF-8, found {len(undecodable)} others: {', '.join(undecodable[:5])}; "
            "rename them"
        )
    if empty:
        logger.warning(
            "%s: %d folders are empty and make no class: %s", root, len(empty), shown(empty)
        )
    return files, hidden


def _names_below(entry: os.DirEntry[str], name: str) -> list[str]:
    """Return a name that is not read, or the names of all files in the folder that it is."""
    if not entry.is_dir(follow_symlinks=False):
        return [name]
    return [
        os.path.join(name, os.path.relpath(folder, entry.path), file).replace("/./", "/")
        for folder, _, files in os.walk(entry.path)
        for file in files
    ]


def refuse_outside(root: str, names: Sequence[str]) -> None:
    """Refuse names below a root on the local disk that lead out of it by a link; on another store there are none.

    Raises:
        DataError: Some do.
    """
    folder = local_path(root)
    if folder is not None:
        top = os.path.realpath(folder)
        outside = [name for name in names if not is_inside(f"{folder}/{name}", top)]
        if outside:
            raise leads_outside(root, outside)


def leads_outside(root: str, names: Sequence[str]) -> DataError:
    """Return the error that links lead out of a folder."""
    return DataError(
        f"{root}: expected files below it, found {len(names)} links that lead elsewhere: {shown(names)}; copy "
        "what they lead to, or pass --source.follow-links if these links are your own"
    )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_inside(link: str, top: str) -> bool:
    """Return whether a path leads to a place in a folder, links followed; `top` is the folder's own real path."""
    target = os.path.realpath(link)
    return target == top or target.startswith(top.rstrip(os.sep) + os.sep)
