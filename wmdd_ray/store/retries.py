"""Which failures of an object store pass by themselves, how long they are waited for, and what to do about the others.

The only layer that retries. Clients that retry inside each other multiply: botocore's 5 attempts in s3fs's 5 in another
5 around a read kept a hanging server for half an hour. And each alone leaves something out: s3fs gives up at the first
500, 503 and refused connection, botocore at a body that breaks off and at the 409 of two conditional writes at once.
(aiohttp repeats a GET, HEAD, PUT or DELETE once by itself when the connection is closed without a reply.) How gcsfs is
kept from it stands in `gcs.py`.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from wmdd_ray.store.schemes import is_gcs

T = TypeVar("T")

WAITS_S = (0.2, 2.0, 20.0)
"""Pauses between the attempts, each shortened by up to half so that workers which failed together come back apart."""

DEADLINE_S = 120.0
"""The longest that one operation lasts, with all its attempts and pauses.

An attempt gets half of what is left, the last one all of it: 100 MB arrive in the first at 1.7 MB/s. Without it a
server that drips a byte a second, which no read timeout notices, would keep a worker for ever.
"""

# Read timeout, conflict of conditional writes, too many requests. 501 says that it will never work.
_PASSING = {408, 409, 429}
_LASTING = {501}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "PermanentRedirect"}
# authError is Google's; the last is all that S3's reply to a HEAD tells, which has no body.
_EXPIRED = {
    "ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "authError", "400",
}  # fmt: skip
# S3's bound is 15 minutes. Arrow has its own names for S3's.
_SKEWED = re.compile("RequestTimeTooSkewed|REQUEST_TIME_TOO_SKEWED|RequestExpired|REQUEST_EXPIRED")
_MOST_SKEW_S = 900
SET_THE_CLOCK = (
    "this machine's clock and the store's are too far apart; set the clock (`timedatectl set-ntp true`; of a pod, its node's) and "
    "run the same command again"
)
# What stores answer to x-amz-checksum-* and aws-chunked when they do not know them, in many words.
_UNKNOWN = {400, 411, 501}
_CHECKSUMS = re.compile("checksum|chunked|trailer|x-amz-content-sha256", re.IGNORECASE)
NO_SUCH_BUCKET = "NoSuchBucket"
NO_CREDENTIALS = "NoCredentials"


def retried(do: Callable[[float], T], renew: Callable[[], object]) -> T:
    """Return what `do` returns, called again after a failure that may pass, four times and `DEADLINE_S` at most.

    Args:
        do: The operation, safe to repeat; it is given the seconds that it may take.
        renew: Makes the client read its credentials again; called once, when they have expired.
    """
    ends = time.monotonic() + DEADLINE_S
    renewed = False
    for wait_s in WAITS_S:
        try:
            return do((ends - time.monotonic()) / 2)
        except Exception as error:
            if has_expired(error) and not renewed:
                renew()
                renewed = True
                continue
            left_s = ends - time.monotonic()
            if left_s <= 0 or not passes(error):
                raise
            time.sleep(min(wait_s * random.uniform(0.5, 1.0), left_s / 2))
    return do(ends - time.monotonic())


def is_skewed(error: BaseException) -> bool:
    """Return whether a request was refused for its time; where only a status came, as for a HEAD, by the time of the reply."""
    status, code = status_of(error)
    if _SKEWED.search(f"{code} {error}"):
        return True
    headers = _response_of(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        told_s = parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return False
    return status == 403 and abs(told_s - time.time()) > _MOST_SKEW_S


def status_of(error: BaseException) -> tuple[int, str]:
    """Return the HTTP status and the store's code of the reply behind an error, (0, "") when there was none."""
    response = _response_of(error)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def _response_of(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


def has_expired(error: BaseException) -> bool:
    """Return whether the store refused credentials for their age."""
    return status_of(error)[1] in _EXPIRED


def client_errors() -> tuple[type[Exception], ...]:
    """Return what S3 clients raise that is no OSError; empty when they are not loaded."""
    return (*_of("botocore.exceptions", "BotoCoreError", "ClientError"), *_connection_errors())


def remedy(error: BaseException, uri: str) -> str:
    """Return what came from the object store of `uri`, in words, and what the user can do about it."""
    status, code = status_of(error)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if is_skewed(error):
        return f"{SET_THE_CLOCK} ({code or status})"
    if has_expired(error):
        return (
            f"the credentials have expired or are not valid ({code}: {error}); renew what the provider chain reads (a role, or a "
            "credentials file that the workers see) and run the same command again: finished units are kept"
        )
    if code == NO_CREDENTIALS:
        return (
            f"no credentials were found ({error}); set GOOGLE_APPLICATION_CREDENTIALS to a file that the workers see, or "
            "give the machines a service account, or type `gcloud auth application-default login`"
        )
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return (
            f"no credentials were found ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give "
            "this machine a role"
        )
    if code == NO_SUCH_BUCKET:
        return f"there is no such bucket ({error}); create it or correct the URI"
    if status in _UNKNOWN and _CHECKSUMS.search(str(error)):
        return (
            f"the store does not take the checksums that AWS's own takes ({error}); set AWS_REQUEST_CHECKSUM_CALCULATION and "
            "AWS_RESPONSE_CHECKSUM_VALIDATION to when_required, for the driver and all workers"
        )
    if code in _ELSEWHERE:
        return f"the bucket is in another region ({error}); set AWS_REGION to the bucket's, and AWS_ENDPOINT_URL if it has one"
    if isinstance(error, PermissionError):
        role, listing = (
            ("give the account roles/storage.objectAdmin on the bucket", "storage.objects.list GCS")
            if is_gcs(uri)
            else ("check the credentials and the permissions on this path", "s3:ListBucket S3")
        )
        return f"access denied ({error}); {role} (without {listing} denies a missing object too)"
    if status in _LASTING:
        condition = "ifGenerationMatch" if is_gcs(uri) else "If-None-Match"
        return f"the store does not know this kind of request ({error}); use one with conditional writes ({condition})"
    if status in (429, 503):
        return (
            f"the store asks for fewer requests, and did so for {len(WAITS_S) + 1} attempts ({said}); run the same "
            "command again later, or with a lower --max-actors: finished units are kept"
        )
    if isinstance(error, TimeoutError):
        said = f"no whole answer in time (at most {DEADLINE_S:g} s in all; {said})"
    where = (
        "the network lets storage.googleapis.com through (or STORAGE_EMULATOR_HOST is right, where it is set)"
        if is_gcs(uri)
        else "the endpoint and region are right (AWS_ENDPOINT_URL, AWS_REGION)"
    )
    return (
        f"{said}; check that the bucket exists, {where} and the store answers, then run the same command again: "
        "finished units are kept"
    )


def passes(error: Exception) -> bool:
    """Return whether the same request may go well later."""
    status, _ = status_of(error)
    if status:
        return status in _PASSING or (status >= 500 and status not in _LASTING)
    return isinstance(error, (TimeoutError, ConnectionError, *_connection_errors()))


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return what says that a connection failed or carried other bytes than were sent."""
    names = ("ConnectionError", "HTTPClientError", "IncompleteReadError", "FlexibleChecksumError")
    return (*_of("botocore.exceptions", *names), *_of("aiohttp", "ClientError"))


def _of(module: str, *names: str) -> tuple[type[Exception], ...]:
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded else ()
