"""Objects under one root URI: whole or absent, never half.

A `with open(...)` block that raises leaves a half object on S3 with s3fs and pyarrow alike, so nothing here streams
a write: content is serialized by the caller and put by one request. Publishing uses `create`, a conditional write
(`If-None-Match: *` on object stores, a hard link on a local disk), which one of several writers wins.

Artifacts go through fsspec (s3fs has conditional writes); real images are read through Arrow's own filesystems, which
take 2 to 6 times less CPU and whose errors Ray Data knows how to retry.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.fs as pafs

from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.retries import client_errors, retried

# `retries.py` repeats, and no other layer: 4 times 30 seconds is how long a server that hangs is waited for.
_S3_OPTIONS = {
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "read_timeout": 30,
        "connect_timeout": 10,
    },
    "use_listings_cache": False,
}
_memory_lock = threading.Lock()


def is_local(uri: str) -> bool:
    """Return whether only this machine sees `uri` (a path, `file://` or `memory://`)."""
    return "://" not in uri or uri.startswith(("file://", "local://", "memory://"))


def local_path(uri: str) -> Path | None:
    """Return the path of a URI on the local disk, or None for any other URI."""
    if "://" not in uri:
        return Path(uri).expanduser().absolute()
    scheme, _, rest = uri.partition("://")
    return Path(rest).absolute() if scheme in ("file", "local") else None


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return an Arrow filesystem for `uri` and the path inside it, without scheme.

    Local disk and `s3://` are native; S3 takes endpoint, region and credentials from the usual AWS variables or the
    instance's role. Every other URI is opened by fsspec and wrapped.

    Raises:
        ArtifactError: No filesystem is installed for the scheme.
    """
    path = local_path(uri)
    if path is not None:
        return pafs.LocalFileSystem(), str(path)
    if uri.startswith("s3://"):
        filesystem = pafs.S3FileSystem(
            # The constructor, unlike from_uri, does not look for an endpoint in the environment.
            endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL"),
            connect_timeout=10,
            request_timeout=30,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=5),
        )
        return filesystem, uri.removeprefix("s3://").rstrip("/")
    fs, root = _fsspec(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), root


def _fsspec(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    options = _S3_OPTIONS if uri.startswith("s3://") else {}
    try:
        fs, root = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError) as error:
        raise ArtifactError(
            f"cannot open {uri}: {error}; expected a local path or a URI such as s3://bucket/prefix whose "
            "fsspec package is installed"
        ) from error
    if uri.startswith("s3://"):
        fs.retries = 1
    return fs, root.rstrip("/")


class Store:
    """A tree of objects under one root URI; keys are relative, with `/` between the parts."""

    def __init__(self, uri: str) -> None:
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
        """Return the content of `key`.

        Raises:
            FileNotFoundError: There is no such object.
            ArtifactError: The store did not answer, or refused.
        """
        with self._named("read", key):
            if self._path is not None:
                try:
                    return (self._path / key).read_bytes()
                except NotADirectoryError as error:  # the store's root is a file itself
                    raise FileNotFoundError(str(self._path / key)) from error
            fs, root = self._fs()
            return retried(lambda: fs.cat_file(f"{root}/{key}"))

    def put(self, key: str, content: bytes) -> None:
        """Write `content` to `key` in one piece, replacing what was there."""
        with self._named("write", key):
            if self._path is not None:
                with _staged(self._path / key, content) as staged:
                    os.replace(staged, self._path / key)
            else:
                fs, root = self._fs()
                retried(lambda: fs.pipe_file(f"{root}/{key}", content))

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
        with self._named("create", key):
            if self._path is not None:
                with (
                    _staged(self._path / key, content) as staged,
                    contextlib.suppress(FileExistsError),
                ):
                    os.link(staged, self._path / key)
                    return True
            else:
                try:
                    self._create_remote(key, content)
                    return True
                except OSError:
                    # 412 is FileExistsError from AWS and a plain OSError from other servers.
                    if not self.exists(key):
                        raise
        return self.get(key) == content

    def _create_remote(self, key: str, content: bytes) -> None:
        fs, root = self._fs()
        if self.uri.startswith("memory://"):
            with _memory_lock:
                if fs.exists(f"{root}/{key}"):
                    raise FileExistsError(key)
                fs.pipe_file(f"{root}/{key}", content)
        else:
            retried(lambda: fs.pipe_file(f"{root}/{key}", content, mode="create"))

    def exists(self, key: str) -> bool:
        """Return whether there is an object at `key`."""
        with self._named("look for", key):
            if self._path is not None:
                return (self._path / key).is_file()
            fs, root = self._fs()
            try:
                # Not `isfile`, which answers no when the store does not answer.
                return retried(lambda: fs.info(f"{root}/{key}"))["type"] == "file"
            except FileNotFoundError:
                return False

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return key -> bytes of every object under the folder `prefix`, sorted by key."""
        with self._named("list", prefix):
            if self._path is not None:
                base = self._path / prefix
                files = (p for p in base.rglob("*") if p.is_file() and not p.name.endswith(".part"))
                found = {p.relative_to(self._path).as_posix(): p.stat().st_size for p in files}
            else:
                fs, root = self._fs()
                fs.invalidate_cache()
                under = retried(lambda: fs.find(f"{root}/{prefix}".rstrip("/"), detail=True))
                # Object stores name keys without the leading slash that a root such as memory's has.
                found = {
                    name.lstrip("/").removeprefix(root.lstrip("/") + "/"): int(info["size"] or 0)
                    for name, info in under.items()
                    # Arrow and web consoles leave empty objects named like folders.
                    if info["type"] == "file" and not name.endswith("/")
                }
        return dict(sorted(found.items()))

    def delete(self, prefix: str) -> None:
        """Remove the object `prefix`, or every object under the folder of that name; removing nothing is fine."""
        with self._named("delete", prefix):
            if self._path is not None:
                if (self._path / prefix).is_file():
                    (self._path / prefix).unlink(missing_ok=True)
                for key in self.list(prefix):
                    (self._path / key).unlink(missing_ok=True)
                # What is left is empty, or an unfinished write of somebody who is still at it.
                shutil.rmtree(self._path / prefix, ignore_errors=True)
                return
            fs, root = self._fs()
            keys = [f"{root}/{key}" for key in self.list(prefix)]
            if keys:
                retried(lambda: fs.rm(keys))

    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._remote is None:
            self._remote = _fsspec(self.uri)
        return self._remote

    @contextlib.contextmanager
    def _named(self, verb: str, key: str) -> Iterator[None]:
        """Turn whatever a storage client raises into one error that names the object."""
        try:
            yield
        except ArtifactError:
            raise
        except FileNotFoundError as error:
            if verb == "read":
                raise
            raise ArtifactError(
                f"cannot {verb} {self.url(key)}: {error}; check that the bucket or folder exists"
            ) from error
        except PermissionError as error:
            raise ArtifactError(
                f"cannot {verb} {self.url(key)}: access denied ({error}); check the credentials and the permissions "
                "on this path"
            ) from error
        except Exception as error:
            if not isinstance(error, (OSError, *client_errors())):
                raise
            raise ArtifactError(
                f"cannot {verb} {self.url(key)}: {type(error).__name__}: {error}; check that the bucket exists, the "
                "endpoint and region are right (AWS_ENDPOINT_URL, AWS_REGION) and the store answers"
            ) from error


@contextlib.contextmanager
def _staged(target: Path, content: bytes) -> Iterator[Path]:
    """Yield a flushed file with `content` beside `target`, on the same disk; it is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with open(staged, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield staged
    finally:
        staged.unlink(missing_ok=True)
