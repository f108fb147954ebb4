"""What a URI means: a path of this machine, a filesystem of Arrow's, or one of fsspec's.

Artifacts go through fsspec (s3fs and gcsfs have conditional writes); real images are read through Arrow's own filesystems, which
take 2 to 6 times less CPU and whose errors Ray Data knows how to retry.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs as pafs

from wmdd_ray.config import BucketAccess
from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.redaction import uri_fault
from wmdd_ray.store.schemes import is_gcs

_CHECKSUMS = "AWS_RESPONSE_CHECKSUM_VALIDATION"
_environment_lock = threading.Lock()


# What an artefact may name to be read: nothing that contacts another host than a store of the user's.
_NAMED_SCHEMES = ("file", "local", "s3", "gs", "gcs", "memory")


def check_uri(uri: str) -> None:
    """Raise a ConfigError, which does not repeat it, of a URI that may carry a secret or opens others inside of it."""
    fault = uri_fault(uri)
    if fault is not None:
        raise ConfigError(fault)


def check_named(uri: str, where: str, remedy: str = "pass --data with where they are") -> None:
    """Raise a ConfigError when a URI that the artefact `where` names may not be opened, although the user said so.

    A path, or a URI of a store that credentials of the user's lead to: with any other scheme of fsspec's the artefact
    would choose which code runs and which host is contacted.
    """
    check_uri(uri)
    scheme, is_uri, _ = uri.partition("://")
    if is_uri and scheme not in _NAMED_SCHEMES:
        raise ConfigError(
            f"{where} names {uri!r} as where it is from: expected a path, s3:// or gs://; {remedy}"
        )


def local_path(uri: str) -> Path | None:
    """Return the path of a URI on the local disk, or None for any other URI."""
    if "://" not in uri:
        return Path(uri).expanduser().absolute()
    scheme, _, rest = uri.partition("://")
    return Path(rest).absolute() if scheme in ("file", "local") else None


def arrow_filesystem(uri: str, access: BucketAccess | None = None) -> tuple[pafs.FileSystem, str]:
    """Return an Arrow filesystem for `uri` and the path inside it, without scheme.

    Local disk and `s3://` are native; S3 takes endpoint, region and credentials from `access`, else from the usual AWS variables or
    the instance's role. Every other URI is opened by fsspec and wrapped, and so is S3 where Arrow's client cannot do what is
    asked; what is wrapped for `gs://` and `s3://` repeats requests as the two layers of S3 do.

    Arrow verifies no checksum of S3's: a reply that is shorter than asked for, or has a changed bit, is content to it.
    So real images rest on what their formats verify (Parquet's page checksums, PNG's CRCs) and on TLS.

    Raises:
        ArtifactError: No filesystem is installed for the scheme.
    """
    check_uri(uri)
    path = local_path(uri)
    if path is not None:
        return pafs.LocalFileSystem(), str(path)
    access = access or BucketAccess()
    inside = uri.partition("://")[2].rstrip("/")
    # Arrow refuses a path with an empty part, which keys of S3 may have.
    if uri.startswith("s3://") and not (access.profile or access.requester_pays or "//" in inside):
        with _ranges_unverified():
            filesystem = pafs.S3FileSystem(
                anonymous=access.anonymous,
                region=access.region,
                # The constructor, unlike from_uri, does not look for an endpoint in the environment.
                endpoint_override=access.endpoint
                or os.environ.get("AWS_ENDPOINT_URL_S3")
                or os.environ.get("AWS_ENDPOINT_URL"),
                connect_timeout=10,
                # Four times is as long as `retries.DEADLINE_S`: without a byte, for a byte a second is fast enough for Arrow.
                request_timeout=25,
                retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=4),
            )
        return filesystem, inside
    fs, root = fsspec_filesystem(uri, repeats=True, access=access)
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), root


@contextlib.contextmanager
def _ranges_unverified() -> Iterator[None]:
    """Let a client that is made inside compare no checksums unless the user wants it to.

    Arrow reads ranges, and some stores (rclone's) send the checksum of the whole object with one, which never fits. Only the
    environment can say so, which the other client, of whole objects, must not hear.
    """
    with _environment_lock:
        unset = _CHECKSUMS not in os.environ
        os.environ.setdefault(_CHECKSUMS, "when_required")
        try:
            yield
        finally:
            if unset:
                del os.environ[_CHECKSUMS]


def fsspec_filesystem(
    uri: str, *, repeats: bool = False, access: BucketAccess | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return an fsspec filesystem for `uri` and the path inside it.

    Args:
        uri: Any URI that fsspec has a package for.
        repeats: Whether a client of `gs://` or `s3://` asks again by itself, for who does not.
        access: How the bucket is reached.

    Raises:
        ArtifactError: There is none for the scheme.
        ConfigError: It may carry a secret, or names another one inside of it.
    """
    check_uri(uri)
    access = access or BucketAccess()
    try:
        if is_gcs(uri):
            from wmdd_ray.store.gcs import gcs_filesystem

            return gcs_filesystem(access, repeats=repeats), uri.partition("://")[2].rstrip("/")
        options = _s3_options(repeats, access) if uri.startswith("s3://") else {}
        fs, root = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError, TypeError) as error:  # TypeError: of a kind that needs options
        install = " on every node; for this one: pip install gcsfs" if is_gcs(uri) else ""
        raise ArtifactError(
            f"cannot open {uri}: {error}; expected a local path or a URI such as s3://bucket/prefix whose "
            f"fsspec package is installed{install}"
        ) from error
    if uri.startswith("s3://"):
        fs.retries = 1
    return fs, root.rstrip("/")


def _s3_options(repeats: bool, access: BucketAccess) -> dict[str, Any]:
    """Return what s3fs is made with."""
    options = {
        "anon": access.anonymous,
        "requester_pays": access.requester_pays,
        "endpoint_url": access.endpoint,
        "profile": access.profile,
        "client_kwargs": {"region_name": access.region} if access.region else None,
        # Reads what it is asked for, as Arrow does.
        "default_cache_type": "none" if repeats else None,
    }
    return {
        "config_kwargs": {
            # `retries.py` repeats, and no other layer, where a `Store` is in between.
            "retries": {"mode": "standard", "total_max_attempts": 4 if repeats else 1},
            "read_timeout": 30,
            "connect_timeout": 10,
        },
        # An object is read by one request: side by side s3fs reads ranges, which no checksum is verified for and of which
        # a short one leaves zeros.
        "max_concurrency": 1,
        "use_listings_cache": False,
    } | {name: value for name, value in options.items() if value}
