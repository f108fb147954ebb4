"""JSON documents that say what is finished: plans, markers, commits, the manifest of a data set, and the files they name.

A document is *sealed*: it carries a checksum over the rest of it, so that a changed byte is an error and never another
number. What it names is verified by size and SHA-256 when it is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wmdd_ray.config import READING, SourceConfig
from wmdd_ray.errors import ArtifactError, ConfigError
from wmdd_ray.redaction import public
from wmdd_ray.store.filesystem import Store, check_key
from wmdd_ray.store.schemas import check
from wmdd_ray.store.uris import check_named

FORMAT_VERSION = 2
FLOAT_VIEWS_VERSION = 1
"""Of sets whose views are resampled in float32; they are still read."""
MANIFEST_KEY = "manifest.json"
_CHECKSUM = "checksum"
# An escape of one half of a character beyond the first 65,536; both halves together are one.
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One object of a committed set: relative key, size in bytes, SHA-256 in hex.

    `at` is the key that it lies at where that is another one, because somebody else's content was at `key` before.

    Raises:
        ArtifactError: A key would lead out of its folder.
    """

    key: str
    size_bytes: int
    sha256: str
    at: str = ""

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.at:
            check_key(self.at)

    def document(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value != ""}


def entry_of(key: str, content: bytes) -> FileEntry:
    """Return the entry that describes `content` at `key`."""
    return FileEntry(key=key, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def entries_of(entries: Any, where: str) -> list[FileEntry]:
    """Return the entries that a document lists; an ArtifactError names it when they are something else."""
    check(entries, "the files of a set", where)
    return [FileEntry(**entry) for entry in entries]


def read_verified(store: Store, entry: FileEntry) -> bytes:
    """Return the content of `entry`, verified.

    Raises:
        ArtifactError: The object is missing, cut, or holds other bytes than were committed. One second read is
            made first, because a connection can corrupt what the disk holds right.
    """
    fault = ""
    for _ in range(2):
        try:
            content = store.get(entry.at or entry.key)
        except FileNotFoundError:
            fault = "no object"
            continue
        here = entry_of(entry.key, content)
        if (here.size_bytes, here.sha256) == (entry.size_bytes, entry.sha256):
            return content
        fault = f"{len(content)} bytes with another checksum"
    raise ArtifactError(
        f"{store.url(entry.at or entry.key)}: expected {entry.size_bytes} bytes with SHA-256 {entry.sha256[:12]}..., found "
        f"{fault}; restore the object, or delete the room that holds it and run the stage again"
    )


def dump_json(value: Any) -> bytes:
    """Return canonical, readable JSON: sorted keys, two spaces, newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def load_json(content: bytes, where: str) -> Any:
    """Parse JSON; an ArtifactError names `where` when it is none, or names half a character, which nobody can write."""
    try:
        value = json.loads(content)
        if _HALF.search(content):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: expected JSON, found {content[:40]!r} ({error})") from error


def seal(document: dict[str, Any]) -> bytes:
    """Return the document as JSON with a checksum over the rest of it."""
    plain = json.loads(json.dumps(document))  # keys and tuples as they will be read
    return dump_json({**plain, _CHECKSUM: _checksum(plain)})


def unseal(content: bytes, where: str) -> dict[str, Any]:
    """Return the document that `seal` made of it; an ArtifactError names `where` when it was changed."""
    document = load_json(content, where)
    expected = document.pop(_CHECKSUM, None) if isinstance(document, dict) else None
    if expected is None or expected != _checksum(document):
        raise ArtifactError(
            f"{where}: expected a document with the checksum of its content, found "
            f"{'none' if expected is None else 'another content'}; restore the object, or delete the folder that holds "
            "it and run the stage again"
        )
    return dict(document)


def read_sealed(store: Store, key: str) -> dict[str, Any]:
    """Return a sealed document, read a second time when the first reading was not what was written.

    Raises:
        FileNotFoundError: There is no such object.
        ArtifactError: It was changed.
    """
    content = store.get(key)
    try:
        return unseal(content, store.url(key))
    except ArtifactError:
        return unseal(store.get(key), store.url(key))


def find_sealed(store: Store, key: str) -> dict[str, Any] | None:
    """Return a sealed document as `read_sealed` does, or None when there is no such object."""
    try:
        return read_sealed(store, key)
    except FileNotFoundError:
        return None


def _checksum(plain: dict[str, Any]) -> str:
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def encode_manifest(meta: dict[str, Any], files: list[FileEntry]) -> bytes:
    """Return the manifest of a data set: `meta`, the format version, and every file with size and checksum."""
    return seal({"format_version": FORMAT_VERSION, **meta, "files": [f.document() for f in files]})


def read_manifest(store: Store) -> tuple[dict[str, Any], list[FileEntry]]:
    """Return (metadata, files) of the data set under `store`.

    Raises:
        ArtifactError: There is no manifest, it was changed, it has a format that this version does not know, or an entry
            that cannot be.
    """
    try:
        manifest = read_sealed(store, MANIFEST_KEY)
    except FileNotFoundError:
        inside = store.child("dataset")
        raise ArtifactError(
            f"no distilled data set at {store.uri}: expected {MANIFEST_KEY} there; pass "
            + (
                f"{inside.uri}, which is the one of this run"
                if inside.exists(MANIFEST_KEY)
                else "the dataset/ folder of a finished run"
            )
        ) from None
    if manifest.get("format_version") not in (FORMAT_VERSION, FLOAT_VIEWS_VERSION):
        raise ArtifactError(
            f"{store.url(MANIFEST_KEY)}: expected format version {FORMAT_VERSION} or {FLOAT_VIEWS_VERSION}, found "
            f"{manifest.get('format_version')!r}; install the wmdd_ray version that wrote it"
        )
    where = store.url(MANIFEST_KEY)
    entries = entries_of(manifest.pop("files", None), where)
    check(manifest, "the manifest of a data set", where)
    channels = {manifest["channels"], len(manifest["mean"]), len(manifest["std"])}
    if len(channels) > 1 or manifest["image_size"] % manifest["tiles"]:
        raise ArtifactError(
            f"{where}: expected a mean and a std a channel, and tiles that divide the image size, found others; it was written by "
            "somebody else"
        )
    return manifest, entries


def set_id(entries: Sequence[FileEntry]) -> str:
    """Return the SHA-256 of a data set: over the names and checksums of its files."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: entry.key):
        digest.update(f"{entry.key} {entry.sha256}\n".encode())
    return digest.hexdigest()


def real_images_of(uri: str, manifest: dict[str, Any]) -> str:
    """Return where the real images of a set are, of which its manifest has a folder's name only, for somebody who follows it.

    The path stands in the record of the run that the set lies in, which is not published with it.

    Raises:
        ConfigError: It is a place that no set may name (`check_named`).
    """
    named = str(manifest["source"]["uri"])
    run = Store(uri.rstrip("/").rpartition("/")[0])
    try:
        data = str(load_json(run.get("run.json"), run.url("run.json"))["config"]["data"])
    except (FileNotFoundError, ArtifactError, KeyError, TypeError):
        data = named
    place = data if public(data) == named else named
    check_named(place, uri)
    return place


def read_alike(
    uri: str,
    manifest: dict[str, Any],
    source: SourceConfig,
    *,
    given: str = "",
    typed: Collection[str] = (),
) -> SourceConfig:
    """Return `source` with the options by which labels are found (`READING`) as a set's own real images need them.

    Other images, which the option `given` names, may be labelled otherwise: of them nothing is assumed, and what is not at its
    default for the set's has to be among the `typed` options.

    Raises:
        ConfigError: Other images are given, and options of the set are not typed.
    """
    stored = manifest["provenance"].get("options", {}).get("source", {})
    own = replace(source, **{name: stored[name] for name in READING if name in stored})
    if not given:
        return own
    default = SourceConfig()
    missing = [
        f"--source.{name.replace('_', '-')} {getattr(own, name)!r} (in Python {name}=)"
        for name in READING[1:]
        if name not in typed and getattr(own, name) != getattr(default, name)
    ]
    if missing:
        raise ConfigError(
            f"{given}: expected {' and '.join(missing)} or another value beside it: so the labels of {uri}'s own real images were "
            "found, and nothing says whether those of other images are; type what holds for these"
        )
    return source
