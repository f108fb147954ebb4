"""Google Cloud Storage by gcsfs, told to ask once and to keep what the store said.

By itself gcsfs asks 6 times with up to 36 s of pauses, inside the attempts of `retries.py`; it drops the status or the
message of most refusals, and whatever it calls `ValueError` or `HttpError` is no OSError; it looks up by gRPC what kind of
bucket it has, with another 60 s of attempts, for each request where the account may not know; and in a zonal bucket it
writes objects that can be read before they are whole. So this is its plain JSON client, without its own repetitions.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
from typing import Any

import aiohttp
from gcsfs.core import GCSFile, GCSFileSystem
from gcsfs.retry import HttpError, NonRetryableError
from google.auth.exceptions import GoogleAuthError, TransportError

from wmdd_ray.config import BucketAccess
from wmdd_ray.store import retries

_KINDS = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    412: FileExistsError,
}
_SAID_CHARS = 300


def gcs_filesystem(access: BucketAccess, *, repeats: bool) -> Gcs:
    """Return a client with the credentials that Google's own libraries would use, none with `STORAGE_EMULATOR_HOST`.

    With `repeats` it asks again itself, as `retries.retried` does for those who go through a `Store`.
    """
    return (_RepeatingGcs if repeats else Gcs)(
        token="anon" if access.anonymous or os.environ.get("STORAGE_EMULATOR_HOST") else None,
        requester_pays=access.requester_pays,
        use_listings_cache=False,
        requests_timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30),
        session_kwargs={"raise_for_status": _refuse},
    )


class Gcs(GCSFileSystem):
    """One request for one call, and an OSError for whatever goes wrong with it.

    Where S3 clients keep the reply behind an error, in `response`, so do these.
    """

    _once = GCSFileSystem._request.__wrapped__

    async def _request(self, *arguments: Any, **options: Any) -> Any:
        if isinstance(options.get("data"), bytes):
            # Bytes are written as one piece, behind which no deadline is heard.
            options["data"] = io.BytesIO(options["data"])
        try:
            return await self._once(*arguments, **options)
        except (TransportError, aiohttp.ClientError) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        except (GoogleAuthError, HttpError, NonRetryableError) as error:
            # What comes with a reply is told by `_refuse`, so this is about credentials that could not be renewed.
            raise _refusal(401, "authError", str(error.__cause__ or error)) from error

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        """Ask for an object, and only where there is none for a folder: by itself gcsfs asks for both at the same time."""
        path = self._strip_protocol(path).rstrip("/")
        if not self.split_path(path)[1]:
            return await super()._info(path, **options)
        try:
            return await self._get_object(path)
        except FileNotFoundError:
            if not any(await self._do_list_objects(path, max_results=1)):
                raise
            return {"name": path, "size": 0, "type": "directory"}

    async def _delete_files(self, files: list[str], batchsize: int) -> list[Any]:
        """Delete by a request each, so that one that fails is told by its status: in its batches gcsfs repeats them itself."""
        return await asyncio.gather(*map(self._rm_file, files), return_exceptions=True)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> GCSFile:
        """Open a file that reads what it is asked for, as Arrow's of S3 do; by itself gcsfs reads ahead in the background."""
        return super()._open(path, mode, **{**options, "cache_type": "none"})

    async def _isdir(self, path: str) -> bool:
        return await self._is(path, "directory")

    async def _isfile(self, path: str) -> bool:
        return await self._is(path, "file")

    async def _is(self, path: str, kind: str) -> bool:
        """Answer no only where there is nothing, and not where the store does not answer or refuses."""
        try:
            return bool((await self._info(path))["type"] == kind)
        except FileNotFoundError:
            return False

    def connect(self, *, refresh: bool, timeout: float) -> None:
        """Read the credentials again; named and called as s3fs's."""
        self.credentials.connect(method=self.credentials.token)


class _RepeatingGcs(Gcs):
    async def _request(self, *arguments: Any, **options: Any) -> Any:
        async with asyncio.timeout(retries.DEADLINE_S):
            for wait_s in retries.WAITS_S:
                try:
                    return await super()._request(*arguments, **options)
                except OSError as error:
                    if not retries.passes(error):
                        raise
                    await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            return await super()._request(*arguments, **options)


async def _refuse(response: aiohttp.ClientResponse) -> None:
    """Raise what an answer that is none means, by its status and the words that came with it."""
    if response.status < 400:
        return
    said = (await response.read()).decode(errors="replace")
    reason = ""
    try:
        error = json.loads(said)["error"]
        said, reason = str(error["message"]), str(error["errors"][0]["reason"])
    except (ValueError, LookupError, TypeError):
        pass  # a text, as for the content of an object, or a page of something between
    path = response.url.raw_path
    if response.status == 401 and "nonymous caller" in said:
        reason = retries.NO_CREDENTIALS
    elif response.status == 401:
        reason = "authError"
    elif response.status == 404 and (
        # Only the path of an object can be right but for the object, and then the words tell.
        "bucket does not exist" in said or re.match(r"/upload/|/storage/v1/b/[^/]+/o$", path)
    ):
        reason = retries.NO_SUCH_BUCKET
    raise _refusal(response.status, reason, said)


def _refusal(status: int, reason: str, said: str) -> OSError:
    # A missing bucket is no missing object, which Arrow and gcsfs itself take for an answer.
    kind = OSError if reason == retries.NO_SUCH_BUCKET else _KINDS.get(status, OSError)
    error = kind(f"HTTP {status}: {' '.join(said.split())[:_SAID_CHARS]}")
    reply = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": reason}}
    error.response = reply  # type: ignore[attr-defined]
    return error
