from __future__ import annotations

import logging
import pickle
import string
from urllib.parse import quote

import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st

from wmdd_ray.config import DistillConfig, Reporting
from wmdd_ray.errors import ArtifactError, ConfigError, WmddError
from wmdd_ray.redaction import PlainFormatter, printable, redacted, uri_fault
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import arrow_filesystem, fsspec_filesystem

# A secret as AWS makes them, `/` and `+` included; CANARY tells that it was repeated whatever was cut.
SECRETS = st.text(string.ascii_letters + string.digits + "/+", min_size=8, max_size=40).map(
    lambda text: f"CANARY{text}CANARY"
)
TOKENS = SECRETS.map(lambda text: text.replace("/", "+"))
FORMS = {
    "user and secret": "s3://AKIACANARY:{}@bucket/run",
    "chained": "simplecache::s3://AKIACANARY:{}@bucket/run",
    "inside another": "zip://CANARY.zip::s3://AKIACANARY:{}@bucket/run",
    "of a web server": "https://me:{}@example.com/run",
    "query": "s3://bucket/run?token={}",
    "fragment": "s3://bucket/run#token={}",
    "signed": "https://bucket.s3.amazonaws.com/run?X-Amz-Credential=CANARY&X-Amz-Signature={}",
    "Azure": "abfs://container:{}@account/run",
}


def refusals(uri: str) -> list[str]:
    """Return what is said, and that something is, wherever a URI comes in."""
    said = []
    for enter in (
        Store,
        arrow_filesystem,
        fsspec_filesystem,
        lambda uri: DistillConfig(data=uri),
        lambda uri: DistillConfig(val_data=uri),
        lambda uri: DistillConfig(teacher=uri),
        lambda uri: Reporting(tensorboard=uri),
    ):
        with pytest.raises(ConfigError) as refused:
            enter(uri)
        said.append(str(refused.value))
    return said


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@given(secret=SECRETS)
def test_no_form_of_a_secret_in_a_uri_is_taken_or_repeated(form: str, secret: str) -> None:
    uri = form.format(secret)
    assert not any("CANARY" in text for text in refusals(uri))
    assert "CANARY" not in redacted(f"cannot open {uri}: no such bucket")
    assert "CANARY" not in str(ArtifactError(f'could not connect to "{uri}"'))


@given(secret=TOKENS)
def test_a_token_before_the_bucket_is_a_secret_too(secret: str) -> None:
    uri = f"gs://{secret}@bucket/run"
    assert not any("CANARY" in text for text in refusals(uri))
    assert "CANARY" not in redacted(f"{uri}: no")


@given(secret=SECRETS, encoded=st.sets(st.sampled_from(":@/?#="), min_size=1), twice=st.booleans())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_percent_encoding_hides_no_secret(
    form: str, secret: str, encoded: set[str], twice: bool
) -> None:
    uri = form.format(secret)
    for character in encoded:
        uri = uri.replace(
            character, quote(quote(character, safe="")) if twice else quote(character, safe="")
        )
    assert uri_fault(uri) is not None
    assert "CANARY" not in redacted(f"cannot open {uri}: no such bucket").replace(
        "zip://CANARY", ""
    )


@pytest.mark.parametrize("uri", ["s3:/AKIACANARY:CANARY/x@bucket", "gs:CANARY@bucket/run"])
def test_a_slash_that_is_missing_makes_no_local_path_of_a_secret(uri: str) -> None:
    assert all("two slashes" in text and "CANARY" not in text for text in refusals(uri))


@pytest.mark.parametrize(
    "uri",
    [
        "/data/a:b@c?d#e",
        "runs/x::y",
        "s3://bucket/models@v1/x",
        "file:///home/me@work/x",
        "abfs://container@account.dfs.core.windows.net/images",
        "gs://bucket/train-{000..012}.tar",
    ],
)
def test_what_is_no_secret_is_left_as_it_is(uri: str) -> None:
    assert uri_fault(uri) is None
    assert redacted(f"cannot open {uri}: no") == f"cannot open {uri}: no"


def test_names_of_images_in_shards_stay_readable() -> None:
    text = "s3://b/train-000.tar#deep/0.png: truncated"
    assert redacted(text) == text


def test_a_password_of_the_environment_s_endpoint_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:SECRETCANARY/x@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr("wmdd_ray.store.retries.WAITS_S", ())
    s3fs.S3FileSystem.clear_instance_cache()  # clients are kept by their options, which the endpoint is none of
    try:
        with pytest.raises(WmddError) as refused:
            Store("s3://bucket/run").get("x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert "CANARY" not in str(refused.value)


def test_errors_and_log_lines_show_escapes_and_hide_secrets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = "cat\x1b]0;owned\x07\x9b2J\u202egnp.exe\r\ud800 Žluťoučký 猫 🐈\n\tx"
    shown = r"cat\x1b]0;owned\x07\x9b2J\u202egnp.exe\r\ud800 Žluťoučký 猫 🐈" + "\n\tx"
    assert printable(name) == shown and printable(shown) == shown
    error = WmddError(name)
    assert str(error) == shown and str(pickle.loads(pickle.dumps(error))) == shown
    record = logging.LogRecord("a", 30, "f", 1, f"{name} %s", ("s3://u:SECRET@b",), None)
    assert PlainFormatter("%(message)s").format(record) == f"{shown} s3://***@b"
