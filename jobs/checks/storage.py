"""The doctor's look at the store: credentials, endpoint, clock, permissions, conditional writes, speed, free disk."""

from __future__ import annotations

import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from wmdd_ray.errors import ArtifactError
from wmdd_ray.product.tables import size
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.schemes import is_gcs
from wmdd_ray.store.uris import fsspec_filesystem, local_path

from ..distill import Job
from .report import Finding, Visit

_ENDPOINT_TIMEOUT_S = 10
_SKEWED_S = 60
_REFUSED_SKEW_S = 14 * 60
_LARGE_BYTES = 2 << 20
_SPEED_FREE_BYTES = 64 << 20
_SMALL_PUTS = 16
_THREADS = 4
_SLOW_BYTES_PER_S = 5e6
_SLOW_PUT_S = 0.5


def s3_uris(job: Job) -> list[str]:
    """Return the URIs of a job that need an S3 server."""
    return [uri for uri in _uris(job) if uri.startswith("s3://")]


def gcs_uris(job: Job) -> list[str]:
    """Return the URIs of a job that lie in Google Cloud Storage."""
    return [uri for uri in _uris(job) if is_gcs(uri)]


def _uris(job: Job) -> list[str]:
    config = job.config
    return [uri for uri in (job.out, config.data, config.val_data, config.teacher) if uri]


def check_credentials(visit: Visit) -> Iterator[Finding]:
    """Tell where the credentials of each store come from, and never what they are."""
    s3, gcs = s3_uris(visit.job), gcs_uris(visit.job)
    if s3:
        yield from _s3_credentials()
    if gcs:
        yield _gcs_credentials(gcs[0])
    if not s3 and not gcs:
        yield Finding("ok", "none needed: nothing of this run lies on s3://")


def _gcs_credentials(uri: str) -> Finding:
    fs, _ = fsspec_filesystem(uri)
    credentials = fs.credentials.credentials
    if credentials is not None:
        return Finding(
            "ok", f"for gs:// from {fs.credentials.method} ({type(credentials).__module__})"
        )
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        return Finding("ok", f"none are sent to STORAGE_EMULATOR_HOST={emulator}")
    return Finding(
        "warning",
        "for gs:// none found in GOOGLE_APPLICATION_CREDENTIALS, gcloud's files, or a service account of this machine",
        "give the machine a service account, or set GOOGLE_APPLICATION_CREDENTIALS, or type "
        "`gcloud auth application-default login`",
    )


def _s3_credentials() -> Iterator[Finding]:
    from botocore.session import Session

    credentials = Session().get_credentials()
    if credentials is None:
        yield Finding(
            "warning",
            "none found in the environment, the files of ~/.aws, or a role of this machine",
            "give the machine a role, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
        return
    # botocore keeps it to itself.
    expiry: datetime | None = getattr(credentials, "_expiry_time", None)
    if expiry is not None:
        minutes = (expiry - datetime.now(UTC)).total_seconds() / 60
        yield Finding("ok", f"from {credentials.method}, for {minutes:.0f} min, then renewed by it")
    elif credentials.token:
        yield Finding(
            "warning",
            f"from {credentials.method}: temporary, with a session token that nobody renews",
            "a run that outlives them ends with 5, and goes on when it is started with new ones; a role renews its own",
        )
    else:
        yield Finding("ok", f"from {credentials.method}, lasting")


def check_endpoint(visit: Visit) -> Iterator[Finding]:
    """Ask each store's server for anything: whether it answers, and what time it is there."""
    if s3_uris(visit.job):
        from botocore.session import Session

        session = Session()
        region = session.get_config_variable("region") or "us-east-1"
        url = session.create_client("s3", region_name=region).meta.endpoint_url
        advice = (
            "set AWS_ENDPOINT_URL and AWS_REGION to those of the server; look at proxy and firewall"
        )
        finding = _answer(url, advice, cafile=os.environ.get("AWS_CA_BUNDLE"))
        in_environment = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & {*os.environ}
        if finding.mark == "ok" and "amazonaws.com" not in url and not in_environment:
            finding = Finding(
                "warning",
                f"{url} is named by a file in ~/.aws, where the reader of images does not look",
                f"set AWS_ENDPOINT_URL={url} on every node",
            )
        yield finding
    if gcs := gcs_uris(visit.job):
        fs, _ = fsspec_filesystem(gcs[0])
        advice = (
            "correct STORAGE_EMULATOR_HOST, or unset it where Google's own store is meant"
            if "STORAGE_EMULATOR_HOST" in os.environ
            else "look at proxy and firewall"
        )
        yield _answer(fs.base, advice)


def _answer(url: str, advice: str, cafile: str | None = None) -> Finding:
    started = time.monotonic()
    try:
        context = ssl.create_default_context(cafile=cafile)
        with urllib.request.urlopen(url, timeout=_ENDPOINT_TIMEOUT_S, context=context) as reply:
            date = reply.headers["Date"]
    except urllib.error.HTTPError as refused:  # the usual answer to who does not sign
        date = refused.headers["Date"]
        refused.close()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        return Finding("FAIL", f"{url} does not answer: {reason}", advice)
    milliseconds = 1000 * (time.monotonic() - started)
    ahead_s = time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
    if abs(ahead_s) > _SKEWED_S:
        return Finding(
            "FAIL" if abs(ahead_s) > _REFUSED_SKEW_S else "warning",
            f"{url}: the clock here is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}",
            "set it (NTP): requests that are 15 minutes off are refused as RequestTimeTooSkewed",
        )
    return Finding("ok", f"{url} answers in {milliseconds:.0f} ms, clocks agree")


def check_storage(visit: Visit) -> Iterator[Finding]:
    """Write, read, list and delete an object under --out."""
    content = uuid.uuid4().bytes
    visit.probe.put("probe", content)
    read, listed = visit.probe.get("probe"), visit.probe.list()
    visit.probe.delete("")
    if read == content and listed == {"probe": len(content)} and not visit.probe.list():
        yield Finding("ok", f"{visit.run.store.uri}: write, read, list, delete")
    else:
        yield Finding(
            "FAIL",
            f"{visit.run.store.uri}: what was written is not what is read or listed, or is there after its deletion",
            "use a store that is consistent, as S3, GCS and POSIX file systems are",
        )


def check_commits(visit: Visit) -> Iterator[Finding]:
    """See whether the store refuses to create what is there already."""
    try:
        visit.run.store.probe()
    except ArtifactError as error:
        if not visit.run.unsafe_commits:
            raise
        yield Finding("warning", str(error), "accepted: never start a second run on this --out")
    else:
        yield Finding("ok", "conditional writes are honored: of two runs one wins")


def free_bytes(store: Store) -> int | None:
    """Return the free bytes of the disk that a local store lies on, or will; None for a remote one."""
    path = local_path(store.uri)
    if path is None:
        return None
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


@dataclass(frozen=True)
class Speed:
    """Bytes a second of large objects side by side, and seconds of a small write."""

    written: float
    read: float
    put_s: float


def check_speed(visit: Visit) -> Iterator[Finding]:
    """Measure the store from this machine."""
    free = free_bytes(visit.run.store)
    if free is not None and free < _SPEED_FREE_BYTES:
        yield Finding("skipped", f"only {size(free)} free")
        return
    yield told_speed("here", measure_speed(visit.probe.child("speed")))


def measure_speed(store: Store) -> Speed:
    """Write and read a few objects, several at a time, and delete them."""
    content = os.urandom(_LARGE_BYTES)
    keys = [f"large-{i}" for i in range(_THREADS)]

    def put_small(i: int) -> float:
        started = time.monotonic()
        store.put(f"small-{i}", b"small")
        return time.monotonic() - started

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            begun = time.monotonic()
            list(pool.map(lambda key: store.put(key, content), keys))
            written = time.monotonic()
            list(pool.map(store.get, keys))
            read = time.monotonic()
            put_s = sum(pool.map(put_small, range(_SMALL_PUTS))) / _SMALL_PUTS
    finally:
        store.delete("")
    total_bytes = len(content) * len(keys)
    return Speed(total_bytes / (written - begun), total_bytes / (read - written), put_s)


def told_speed(where: str, speed: Speed) -> Finding:
    """Return a measured speed in words."""
    slow = min(speed.written, speed.read) < _SLOW_BYTES_PER_S or speed.put_s > _SLOW_PUT_S
    return Finding(
        "warning" if slow else "ok",
        f"{where}: {size(speed.written)}/s written, {size(speed.read)}/s read, {1000 * speed.put_s:.0f} ms a small write",
        "a unit of work is a few writes: put --out into the region of the cluster" if slow else "",
    )
