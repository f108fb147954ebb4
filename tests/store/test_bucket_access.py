"""Buckets that are not reached as the output is: public, paid by the reader, elsewhere, of another account; other servers."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs
from numpy.testing import assert_array_equal

from tests.conftest import S3Uri, free_port
from tests.store.faulty_s3 import FaultyS3
from tests.store.written_sources import CONFIG, LABELS_N, PNGS, WRITERS
from wmdd_ray.config import BucketAccess, SourceConfig
from wmdd_ray.errors import ArtifactError, ConfigError, DataError
from wmdd_ray.store import retries
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import load_images, open_source
from wmdd_ray.store.sources.listing import list_files
from wmdd_ray.store.uris import arrow_filesystem


class Strange(FaultyS3):
    """A server that does not know AWS's checksums, and says so."""

    refuses_checksums = False

    def fault_of(self, method: str, path: str, headers: dict[str, str]) -> int | str:
        named = [name for name in headers if name.lower().startswith("x-amz-checksum")]
        if self.refuses_checksums and named:
            return 501
        return super().fault_of(method, path, headers)

    def refusal(self, status: int) -> tuple[str, bytes]:
        kind, page = super().refusal(status)
        return kind, page.replace(b"planted", b"Unsupported header 'x-amz-checksum-crc32'")


@pytest.fixture
def elsewhere(
    s3_server: S3Uri, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Strange]:
    """A way to the same server that is not the environment's."""
    monkeypatch.setattr(retries, "WAITS_S", (0.0,) * len(retries.WAITS_S))
    s3fs.S3FileSystem.clear_instance_cache()
    with Strange(s3_endpoint) as server:
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


def read_by(elsewhere: Strange, uri: str, **access: object) -> list[dict[str, str]]:
    """Write images by the environment's way, read them by the other, and return the headers that it was sent."""
    WRITERS["parquet"](Store(uri))
    fs, root = fsspec.core.url_to_fs(uri)
    for path in fs.find(root):
        fs.chmod(path, acl="public-read")
    bucket = BucketAccess(endpoint=elsewhere.endpoint, **access)
    config = replace(CONFIG, bucket=bucket)
    source = open_source(uri, config, split="train")
    keys, labels_N, _, _ = load_images(source, config, 1 << 20) or pytest.fail("too large")
    assert_array_equal(np.sort(labels_N), np.sort(LABELS_N))
    assert pickle.loads(pickle.dumps(source)).read_keys(keys[3:4])[0].label == labels_N[3]
    assert elsewhere.requests
    return [{k.lower(): v for k, v in asked.headers.items()} for asked in elsewhere.requests]


def test_data_may_have_another_endpoint_than_the_output(
    elsewhere: Strange, s3_server: S3Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3_server()
    assert "authorization" in read_by(elsewhere, uri)[0]
    tiny = Store(s3_server())
    # Without an ending, a file is an image by its first bytes; held-out images by a list beside them.
    for key, content in {
        "train/ant/0": PNGS[0],
        "train/bee/1.png": PNGS[1],
        "val/images/2.png": PNGS[2],
        "val/val_annotations.txt": b"2.png\tbee\t0\t0\t1\t1\n",
    }.items():
        tiny.put(key, content)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    config = replace(CONFIG, bucket=BucketAccess(endpoint=elsewhere.endpoint))
    assert open_source(uri, config, split="train").num_images == 24
    train = open_source(tiny.uri, config, split="train")
    val = open_source(tiny.uri, config, split="val", class_names=train.class_names)
    assert (train.num_images, val.num_images) == (2, 1)


def test_a_public_bucket_is_asked_without_credentials(elsewhere: Strange, s3_server: S3Uri) -> None:
    assert not any(
        "authorization" in sent for sent in read_by(elsewhere, s3_server(), anonymous=True)
    )


def test_every_request_to_a_bucket_whose_readers_pay_agrees_to_it(
    elsewhere: Strange, s3_server: S3Uri
) -> None:
    for sent in read_by(elsewhere, s3_server(), requester_pays=True):
        assert sent.get("x-amz-request-payer") == "requester"


def test_data_may_have_another_profile_and_region(
    elsewhere: Strange, s3_server: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    keys.write_text("[other]\naws_access_key_id=theirs\naws_secret_access_key=secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for access, scope in (
        ({"profile": "other"}, r"Credential=theirs/"),
        ({"region": "eu-west-1"}, r"Credential=test/\d+/eu-west-1/"),
    ):
        elsewhere.requests = []
        for sent in read_by(elsewhere, s3_server(), **access):
            assert re.search(scope, sent["authorization"])


def test_wrapped_reads_wait_for_what_passes(elsewhere: Strange, s3_server: S3Uri) -> None:
    elsewhere.break_down(503, times=2)
    read_by(elsewhere, s3_server(), requester_pays=True)
    assert elsewhere.left == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (301, r"another region: pass --source\.bucket\.region"),
        (403, r"--source\.bucket\.anonymous, .*--source\.bucket\.requester-pays"),
    ],
)
def test_a_refusal_says_the_option_that_helps(
    elsewhere: Strange, s3_server: S3Uri, status: int, message: str
) -> None:
    elsewhere.break_down(status, times=1000)
    with pytest.raises(ArtifactError, match=message):
        list_files(s3_server(), SourceConfig(bucket=BucketAccess(endpoint=elsewhere.endpoint)))


def test_contradicting_and_secret_access_is_refused() -> None:
    with pytest.raises(ConfigError, match="both need credentials"):
        BucketAccess(anonymous=True, profile="other")
    with pytest.raises(ConfigError, match="without a password") as refused:
        BucketAccess(endpoint="https://me:hunter2@s3.example.org")
    assert "hunter2" not in str(refused.value)


def test_keys_with_empty_parts_are_told_and_the_folder_behind_is_read(s3_server: S3Uri) -> None:
    uri = s3_server()
    bucket = uri.removesuffix("/run")
    fs: fsspec.AbstractFileSystem = fsspec.core.url_to_fs(bucket)[0]
    for key in ("run//ant/0.png", "run//bee/1.png"):
        fs.pipe_file(f"{bucket}/{key}", b"content")
    with pytest.raises(DataError, match="2 with a doubled slash: '/ant/0.png'"):
        list_files(uri, SourceConfig())
    assert list_files(f"{uri}//ant", SourceConfig()) == (f"{uri}//ant", {"0.png": 7}, ())


def test_a_store_without_checksums_says_which_variables_help(
    elsewhere: Strange, s3_server: S3Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.refuses_checksums = True
    monkeypatch.setenv("AWS_ENDPOINT_URL", elsewhere.endpoint)
    uri = s3_server()
    for write in (lambda: Store(uri).put("x", b"1"), lambda: Store(uri).create("y", b"2")):
        with pytest.raises(
            ArtifactError, match="AWS_REQUEST_CHECKSUM_CALCULATION .* when_required"
        ):
            write()
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.setenv(name, "when_required")
    s3fs.S3FileSystem.clear_instance_cache()
    store = Store(uri)
    store.put("x", b"1")
    assert store.create("y", b"2") and not store.create("y", b"3")
    assert (store.get("x"), store.get("y")) == (b"1", b"2")


def test_ranges_are_read_from_a_store_that_sends_the_whole_object_s_checksum(
    elsewhere: Strange, s3_server: S3Uri
) -> None:
    """Arrow would compare it with the range's; and the environment is as it was after it was told not to."""
    assert not any("x-amz-checksum-mode" in sent for sent in read_by(elsewhere, s3_server()))
    assert "AWS_RESPONSE_CHECKSUM_VALIDATION" not in os.environ


def test_buckets_of_google_are_reached_the_same_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    from gcsfs.core import GCSFileSystem

    from wmdd_ray.store.gcs import _RepeatingGcs

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    made: list[dict[str, object]] = []
    _RepeatingGcs.clear_instance_cache()  # of other tests
    monkeypatch.setattr(GCSFileSystem, "__init__", lambda self, **said: made.append(said))
    for access in (BucketAccess(anonymous=True), BucketAccess(requester_pays=True), None):
        arrow_filesystem("gs://b/x", access)[0].handler.fs.clear_instance_cache()
    assert [(said["token"], said["requester_pays"]) for said in made] == [
        ("anon", False),
        (None, True),
        (None, False),
    ]
