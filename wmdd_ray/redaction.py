"""What must not be repeated: secrets in URIs, where paths of this machine lead, and characters that a terminal takes for commands.

Credentials come by a role, AWS_PROFILE or the environment, never in a URI. A URI that may carry a secret is refused; in
somebody else's text (a client's error, an endpoint of the environment) it is shown without.
"""

from __future__ import annotations

import logging
import re
from typing import Any
from urllib.parse import unquote


def _written(character: str) -> str:
    """Return a pattern of a character as it is, or percent-encoded once or more often."""
    return rf"(?:{re.escape(character)}|%(?:25)*{ord(character):x})"


_URI = re.compile(rf"(?i)(abfss?)?({_written(':')}{_written('/')}{{2}})(\S*)")
_AT = re.compile(_written("@"), re.I)
# A query, or a fragment that gives a name a value; quotes and stops that close around the URI stay.
_TAIL = re.compile(
    rf"(?i)({_written('?')}|{_written('#')}(?=[\w.-]+{_written('=')})).*?(?=[\"'>).,:;]*$)"
)
# URIs that mean the same to everybody, and names with a prefix as `timm:resnet18`; a drive's is one letter.
_SHARED = re.compile(r"(?i)(?:s3|gs|gcs|hf|az|abfss?)://|[a-z][\w.+-]+:(?![/\\])")
_ONE_SLASH = re.compile(r"(?i)(s3|gs|gcs|https?):(?!//)")


def uri_fault(uri: str) -> str | None:
    """Return why a URI is neither opened nor repeated, without repeating it; None when it is fit for both."""
    plain = _decoded(uri)
    scheme, is_uri, rest = plain.partition("://")
    if is_uri and ("?" in rest or "#" in rest or has_user(uri)):
        return (
            "expected a URI without a password or a query, which would be repeated in logs and files; pass "
            f"{scheme.rpartition(':')[2]}://bucket/prefix, and credentials by a role, AWS_PROFILE or the environment"
        )
    if is_uri and "::" in plain:
        return "expected a URI of one place, got one with :: that opens another inside of it; pass that one, as s3://bucket/prefix"
    if one_slash := _ONE_SLASH.match(plain):
        return f"expected two slashes in a URI, as {one_slash[1]}://bucket/prefix"
    return None


def has_user(uri: str) -> bool:
    """Return whether a URI has a user, with or without a password.

    A secret may hold `/` (half of all keys of AWS do), so that what stands before an @ is a part of a path only without
    a colon, as in `s3://bucket/models@v1`. What Azure's URIs have there is a container.
    """
    scheme, _, rest = _decoded(uri).partition("://")
    user, at, _ = rest.rpartition("@")
    if scheme.lower() in ("abfs", "abfss") and ":" not in user:
        return False
    return bool(at) and ("/" not in user or ":" in user)


def redacted(text: str) -> str:
    """Return a text in which no URI has a user, a password, a query, or a fragment that gives a name a value."""
    return _URI.sub(_without_secrets, text)


def printable(text: str) -> str:
    r"""Return a text that a terminal only shows: escapes, bells and what turns or hides other characters stand as `\x1b`."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def plain(text: str) -> str:
    """Return a text for people: printable, and without secrets."""
    return printable(redacted(text))


def public(value: Any) -> Any:
    """Return what may be published of places, and of records that hold some: of a path its last part.

    What stands above it names people and machines. URIs of object stores stay whole.
    """
    if isinstance(value, dict):
        return {name: public(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, str) and not _SHARED.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


class PlainFormatter(logging.Formatter):
    """Log lines and tracebacks, made plain."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _decoded(uri: str) -> str:
    while (decoded := unquote(uri)) != uri:
        uri = decoded
    return uri


def _without_secrets(match: re.Match[str]) -> str:
    scheme, slashes, rest = match[1] or "", match[2], match[3]
    ends = [at.end() for at in _AT.finditer(rest)]
    if ends and has_user(f"{scheme}://{rest[: ends[-1]]}"):
        rest = f"***@{rest[ends[-1] :]}"
    return scheme + slashes + _TAIL.sub(lambda tail: f"{tail[1][0]}***", rest)
