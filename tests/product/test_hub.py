"""Publishing, by the hub's own client, against a server on this machine that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from jobs import export as job
from tests.jobs.test_export import write_set

TOKEN = "hf_a_token_of_nobody"


class Hub(ThreadingHTTPServer):
    """What the client asks of the hub to publish files: repositories by name, each with its files and whether it is private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, tuple[dict[str, bytes], bool]] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer("")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def answer(self, body: str) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, ({}, asked.get("visibility") == "private"))
            return self.reply(409 if known else 200, {"url": f"{hub.address}/datasets/{name}"})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        files, private = hub.repositories[name]
        if path.endswith("/preupload/main"):
            told = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.reply(200, {"files": [{**f, "shouldIgnore": False} for f in told]})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{hub.address}/datasets/{name}/commit/0"
            return self.reply(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        siblings = [{"rfilename": file} for file in [".gitattributes", *files]]
        about = {"id": name, "private": private, "sha": "0" * 40, "siblings": siblings}
        return self.reply(200, about)

    def reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def stored(tmp_path: Path) -> str:
    return write_set(str(tmp_path / "dataset"))


@pytest.fixture
def typed(
    hub: Hub, stored: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Return what runs the command with a format and options, and gives its exit code and what it said."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)  # HF_ENDPOINT, read at import
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(layout: str, *options: str) -> tuple[int, str]:
        code = job.main([stored, "--out", f"{stored}-out", "--format", layout, *options])
        said = "".join(capfd.readouterr())
        assert TOKEN not in said
        return code, said

    return run


def test_an_export_is_published_whole_in_a_repository_of_its_own_and_again(
    hub: Hub, stored: str, typed: Callable[..., tuple[int, str]]
) -> None:
    for _ in range(2):
        code, said = typed("huggingface", "--push-to-hub", "me/flowers", "--private")
        assert code == 0 and "uploaded        5 files, " in said
        assert f"{hub.address}/datasets/me/flowers (private)\n" in said
    files, private = hub.repositories["me/flowers"]
    out = Path(f"{stored}-out")
    assert private and files == {
        file.relative_to(out).as_posix(): file.read_bytes()
        for file in out.rglob("*")
        if file.is_file()
    }


def test_a_dry_run_says_what_would_be_uploaded_where_and_asks_nobody(
    hub: Hub, typed: Callable[..., tuple[int, str]]
) -> None:
    code, said = typed("webdataset", "--push-to-hub", "me/flowers", "--dry-run")
    assert code == 0 and "would upload    7 files, " in said
    assert f"to {hub.address}/datasets/me/flowers\n" in said
    assert "\n                train-000000.tar  " in said
    assert hub.asked == []


def test_what_must_not_be_published_there_is_refused(
    hub: Hub, stored: str, typed: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories |= {"me/mine": ({"photo.jpg": b"mine"}, False), "me/open": ({}, False)}

    def refusal(*options: str) -> tuple[int, str]:
        return typed("huggingface", "--push-to-hub", *options)

    code, said = refusal("me/mine")
    assert code == 2 and "found 1 other files, such as photo.jpg" in said
    code, said = refusal("me/open", "--private")
    assert code == 2 and "datasets/me/open is public already" in said
    note = Path(f"{stored}-out", "notes.txt")
    note.write_text("mine")
    code, said = refusal("me/open")
    assert code == 2 and "found 1 others that would be published" in said
    note.unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    code, said = refusal("me/open")
    assert code == 2 and "expected a token that may write there" in said
    assert hub.repositories["me/mine"] == ({"photo.jpg": b"mine"}, False)
    assert hub.repositories["me/open"] == ({}, False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, said = refusal("me/open")
    assert code == 5 and "did not take the export" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push-to-hub", "a/b/c"], "--push-to-hub: expected NAME or USER/NAME, got 'a/b/c'"),
        (["--push-to-hub", "a/b", "--out", "s3://b/x"], "takes an export on a disk, got --out s3"),
        (["--private"], "--private: expected off without --push-to-hub"),
        (["--dry-run"], "--dry-run: expected off without --push-to-hub"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_written(
    options: list[str], message: str, stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"{stored}-out"
    assert job.main([stored, "--out", out, "--format", "imagefolder", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path(out).exists()
