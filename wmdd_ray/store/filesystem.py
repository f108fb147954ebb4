"""Objects under one root URI: whole or absent, never half.

A `with open(...)` block that raises leaves a half object on S3 with s3fs and pyarrow alike, so nothing here streams
a write: content is serialized by the caller and put by one request. Publishing uses `create`, a conditional write
(`If-None-Match: *` on S3, `ifGenerationMatch=0` on GCS, a hard link on a local disk), which one of several writers wins.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.retries import NO_SUCH_BUCKET, client_errors, remedy, retried, status_of
from wmdd_ray.store.schemes import is_gcs
from wmdd_ray.store.uris import check_uri, fsspec_filesystem, local_path

# What a file system without hard links says: exFAT, many network and FUSE mounts.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_PLACINGS = 5
_DELETERS = 32
# How `_staged` names a file: what somebody else calls so is left alone.
_STAGED = re.compile(r"\..+\.[0-9a-f]{32}\.part")
_memory_lock = threading.Lock()


def check_key(key: str) -> None:
    """Raise an ArtifactError of a key that would lead out of its root, or that some store or disk takes for something else."""
    parts = key.split("/")
    safe = not ({"", ".", ".."} & {*parts} or any(c in key for c in "\\:\0"))
    # Half a character has no bytes to be stored as.
    if not safe or any("\ud800" <= c <= "\udfff" for c in key):
        raise _outside(key)


def _check_inside(prefix: str) -> None:
    """Raise an ArtifactError of a prefix that leads out of its root; what others stored below it may have any name."""
    if prefix.startswith("/") or ".." in prefix.split("/") or "\0" in prefix:
        raise _outside(prefix)


def _outside(key: str) -> ArtifactError:
    return ArtifactError(
        f"{key!r}: expected a relative key below its folder; the data or the document that names it is not of this project"
    )


class Store:
    """A tree of objects under one root URI; keys are relative, with `/` between the parts (`check_key`)."""

    def __init__(self, uri: str) -> None:
        check_uri(uri)
        path = local_path(uri)
        self.uri = (str(path) if path is not None else uri).rstrip("/")
        self._path = path
        self._remote: tuple[fsspec.AbstractFileSystem, str] | None = None

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        """Travel between processes as a URI: connections and credentials stay where they were made."""
        return Store, (self.uri,)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def child(self, key: str) -> Store:
        """Return the store whose root is `key` inside this one."""
        return Store(self.url(key))

    def url(self, key: str) -> str:
        """Return the full URI of `key`."""
        return f"{self.uri}/{key}" if key else self.uri

    def get(self, key: str) -> bytes:
        """Return the content of `key`, read by one request.

        S3 clients verify the checksum that an object was stored with, and a wrong one is read again. An object without
        one (written in parts, or by an old client), another kind of store and a local disk are taken at their word:
        what is read from them is to be checked against a committed size and SHA-256 (`documents.read_verified`).

        Raises:
            FileNotFoundError: There is no such object.
            ArtifactError: The store did not answer, or refused.
        """
        check_key(key)
        with self._named("read", key):
            if self._path is not None:
                try:
                    return (self._path / key).read_bytes()
                except NotADirectoryError as error:  # the store's root is a file itself
                    raise FileNotFoundError(str(self._path / key)) from error
            return self._ask("cat_file", self._inside(key))

    def put(self, key: str, content: bytes) -> None:
        """Write `content` to `key` in one piece, replacing what was there.

        Raises:
            ArtifactError: The store refused, or the key leads out of its root; nothing was written.
        """
        check_key(key)
        with self._named("write", key):
            if self._path is not None:
                _placed(self._path / key, content, _replaced)
            else:
                self._ask("pipe_file", self._inside(key), content, **self._whole())

    def create(self, key: str, content: bytes) -> bool:
        """Write `content` to `key` unless an object is there already.

        A client whose reply got lost repeats its request and is told that the object exists, so the object is read
        back: contents must carry something of their writer for the answer to be right.

        Args:
            key: Relative key.
            content: Non-empty bytes (an empty conditional write overwrites silently in s3fs).

        Returns:
            True when `content` is now at `key`, False when another content is.
        """
        assert content, "a conditional write needs content"
        check_key(key)
        with self._named("create", key):
            created = (
                self._create_remote(key, content)
                if self._path is None
                else _placed(self._path / key, content, _linked)
            )
        if created:
            return True
        try:
            return self.get(key) == content
        except FileNotFoundError:  # deleted since
            return False

    def _create_remote(self, key: str, content: bytes) -> bool:
        if self.uri.startswith("memory://"):
            fs, _ = self._fs()
            with _memory_lock:
                if fs.exists(self._inside(key)):
                    return False
                fs.pipe_file(self._inside(key), content)
                return True
        try:
            self._ask("pipe_file", self._inside(key), content, mode="create", **self._whole())
            return True
        except FileExistsError:
            return False
        except OSError as error:
            # s3fs knows the 412 of AWS; that of other servers, which do not name the condition, is a plain OSError.
            if status_of(error)[0] != 412:
                raise
            return False

    def probe(self) -> None:
        """Find out whether the second of two writers of one key is refused, by a few requests on a key of its own.

        Raises:
            ArtifactError: It is not, or the store cannot be written.
        """
        key = f"probe-{uuid.uuid4().hex}"
        first, second = b"the first writer", b"the second writer"
        won = [self.create(key, content) for content in (first, second)]
        kept = self.get(key)
        self.delete(key)
        if won != [True, False] or kept != first:
            raise ArtifactError(
                f"{self.uri} does not keep conditional writes: two writers created {self.url(key)} with different content, "
                f"and it held {kept.decode(errors='replace')!r} after the second. Two drivers on this output could both "
                "publish, and mix their results. Use a store with If-None-Match (AWS S3, GCS and most others have it), or, when "
                "you are sure that only one driver ever writes here, pass --allow-unsafe-commits"
            )

    def exists(self, key: str) -> bool:
        """Return whether there is an object at `key`."""
        _check_inside(key)
        with self._named("look for", key):
            if self._path is not None:
                return (self._path / key).is_file()
            try:
                # Not `isfile`, which answers no when the store does not answer.
                return self._ask("info", self._inside(key))["type"] == "file"
            except FileNotFoundError as error:
                if status_of(error)[1] == NO_SUCH_BUCKET:
                    raise
                return False

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return key -> bytes of every object under the folder `prefix`, sorted by key."""
        _check_inside(prefix)
        with self._named("list", prefix):
            if self._path is not None:
                sizes = dict(_files_below(self._path / prefix, self._path))
            else:
                fs, root = self._fs()
                fs.invalidate_cache()
                under = self._ask("find", self._inside(prefix).rstrip("/"), detail=True)
                # Object stores name keys without the leading slash that a root such as memory's has.
                sizes = {
                    name.lstrip("/").removeprefix(root.lstrip("/") + "/"): int(info["size"] or 0)
                    for name, info in under.items()
                    # Arrow and web consoles leave empty objects named like folders.
                    if info["type"] == "file" and not name.endswith("/")
                }
        return dict(sorted(sizes.items()))

    def delete(self, prefix: str) -> None:
        """Remove the object `prefix`, or every object under the folder of that name; removing nothing is fine."""
        _check_inside(prefix)
        with self._named("delete", prefix):
            if self._path is not None:
                if (self._path / prefix).is_file():
                    (self._path / prefix).unlink(missing_ok=True)
                for key in self.list(prefix):
                    (self._path / key).unlink(missing_ok=True)
                # What is left is empty, or an unfinished write of somebody who is still at it.
                shutil.rmtree(self._path / prefix, ignore_errors=True)
                return
            keys = [self._inside(key) for key in self.list(prefix)]
            if self.uri.startswith("s3://"):
                # One by one: some stores ask for a Content-MD5 with a list of them, and s3fs drops the errors of such a list.
                with ThreadPoolExecutor(_DELETERS) as pool:
                    list(pool.map(lambda key: self._ask("rm_file", key), keys))
            elif keys:
                # gcsfs says so when all are gone by now, which a first request whose reply got lost may have done.
                with contextlib.suppress(FileNotFoundError):
                    self._ask("rm", keys)

    def sweep(self, before: float) -> None:
        """Remove what processes that were killed while they wrote left on a disk before a time (seconds since 1970)."""
        if self._path is None:
            return
        with self._named("list", ""):
            for path in self._path.rglob(".*.part"):
                if not _STAGED.fullmatch(path.name):  # somebody else's
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        path.unlink()

    def _whole(self) -> dict[str, int]:
        """Return the option by which an object is one request up to S3's limit of 5 GiB.

        In parts it would have no checksum of its own, and a killed writer would leave parts that are paid for. On GCS it
        would be a session of several requests from 50 MiB on, of which one that fails loses them all.
        """
        one_request = self.uri.startswith("s3://") or is_gcs(self.uri)
        return {"chunksize": 5 << 30} if one_request else {}

    def _inside(self, key: str) -> str:
        """Return the path of `key` inside the remote filesystem."""
        return f"{self._fs()[1]}/{key}"

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the remote filesystem, again where that may help."""
        fs, _ = self._fs()
        do = getattr(fs, method)

        def once(left_s: float) -> Any:
            timed = {"timeout": left_s} if fs.async_impl else {}
            return do(*arguments, **timed, **options)

        return retried(once, renew=lambda: fs.connect(refresh=True, timeout=30))

    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._remote is None:
            self._remote = fsspec_filesystem(self.uri)
        return self._remote

    @contextlib.contextmanager
    def _named(self, verb: str, key: str) -> Iterator[None]:
        """Turn whatever a storage client raises into one error that names the object."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, (OSError, *client_errors())):
                raise
            if self._path is not None:
                if verb == "read" and isinstance(error, FileNotFoundError):
                    raise
                what = (
                    f"{error}; check the free space, the permissions and the mount of this disk, then run the same command again: "
                    "finished units are kept"
                )
            elif isinstance(error, FileNotFoundError) and status_of(error)[1] != NO_SUCH_BUCKET:
                if verb == "read":
                    raise
                what = f"{error}; check that the bucket or folder exists"
            else:
                what = remedy(error, self.uri)
            raise ArtifactError(f"cannot {verb} {self.url(key)}: {what}") from error


def file_at(uri: str) -> tuple[Store, str]:
    """Return the store and the key of one file."""
    folder, _, name = uri.rpartition("/")
    return Store(folder or ("/" if uri.startswith("/") else ".")), name


def _placed(target: Path, content: bytes, place: Callable[[Path, Path], bool]) -> bool:
    """Stage content beside its target and place it there; again when somebody has swept the room or emptied it meanwhile."""
    for attempt in range(_PLACINGS):
        try:
            with _staged(target, content) as staged:
                return place(staged, target)
        except FileNotFoundError:
            if attempt == _PLACINGS - 1:
                raise
    raise AssertionError("the last one returns or raises")


def _replaced(staged: Path, target: Path) -> bool:
    os.replace(staged, target)
    return True


def _linked(staged: Path, target: Path) -> bool:
    """Give a staged file its name; False when that name is taken."""
    try:
        os.link(staged, target)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise ArtifactError(
            f"cannot create {target}: its file system has no hard links ({error.strerror}), without which two drivers "
            "could both publish; put --out on another disk or an object store"
        ) from error


def _files_below(folder: Path, root: Path) -> Iterator[tuple[str, int]]:
    """Yield (name below `root`, bytes) of whole files; what somebody removes meanwhile is not there."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                if stat.S_ISREG(about.st_mode) and not name.endswith(".part"):
                    yield path.relative_to(root).as_posix(), about.st_size


@contextlib.contextmanager
def _staged(target: Path, content: bytes) -> Iterator[Path]:
    """Yield a flushed file with `content` beside `target`, on the same disk; it is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with open(staged, "wb") as file:
            file.write(content)
            file.flush()
            # All three of a unit need it: after a crash of the machine ext4 and XFS keep names of files whose bytes they lost, a
            # marker would name a payload that is gone, and an empty marker or attempt would end the next run.
            os.fsync(file.fileno())
        yield staged
    finally:
        staged.unlink(missing_ok=True)
