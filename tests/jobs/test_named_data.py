"""A set or a run that names where its real images are: a stranger's may name anything."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import evaluate, report
from tests.manifests import manifest_of
from tests.test_dataset import write_dataset
from wmdd_ray.config import DistillConfig
from wmdd_ray.errors import WmddError
from wmdd_ray.store.filesystem import Store


class Web:
    """A web server that counts what it is asked for, and answers with a reference file system that runs a command."""

    def __init__(self, planted: Path) -> None:
        web = self
        self.asked: list[str] = []
        shell = f"{{{{ cycler.__init__.__globals__.os.popen('touch {planted}').read() }}}}"
        body = json.dumps({"version": 1, "templates": {"u": shell}, "refs": {"x": ["{{u}}"]}})

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body.encode())

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    web = Web(tmp_path / "planted")
    yield web
    web.close()


def named(kind: str, web: Web, tmp_path: Path) -> str:
    (tmp_path / "private").mkdir(exist_ok=True)
    return {
        "reference": f"reference::{web.uri}/ref.json",
        "http": f"{web.uri}/images/",
        "folder": str(tmp_path / "private"),
    }[kind]


def set_that_names(uri: str, out: Path) -> str:
    source = {**manifest_of()["source"], "uri": uri}
    return write_dataset(str(out), source=source)


def run_that_names(uri: str, out: Path) -> str:
    config = json.loads(json.dumps(asdict(DistillConfig())))
    Store(str(out)).put("run.json", json.dumps({"config": {**config, "data": uri}}).encode())
    return str(out)


NAMES = [
    ("reference", ()),
    ("http", ()),
    ("folder", ()),
    ("reference", ("--follow-data",)),
    ("http", ("--follow-data",)),
]


@pytest.mark.parametrize(("kind", "options"), NAMES)
def test_a_set_does_not_choose_what_evaluate_contacts(
    kind: str,
    options: tuple[str, ...],
    web: Web,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = set_that_names(named(kind, web, tmp_path), tmp_path / "set")
    assert evaluate.main([uri, "--out", str(tmp_path / "out"), *options]) == 2
    assert web.asked == [] and not (tmp_path / "planted").exists()
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    if not options:
        assert "which is not read because a set says so: pass --data" in said


def test_a_set_of_ones_own_is_followed_to_its_images_when_its_user_says_so(tmp_path: Path) -> None:
    from jobs.evaluation.options import parse

    uri = set_that_names(str(tmp_path), tmp_path / "set")
    asked = parse([uri, "--out", "out", "--follow-data"], None)
    assert asked.config.data == str(tmp_path)
    asked = parse([uri, "--out", "out", "--val-data", "elsewhere"], None)
    assert (asked.config.data, asked.config.val_data) == (uri, "elsewhere")


@pytest.mark.parametrize(("kind", "options"), NAMES)
def test_a_run_does_not_choose_what_report_contacts(
    kind: str, options: tuple[str, ...], web: Web, tmp_path: Path
) -> None:
    run = run_that_names(named(kind, web, tmp_path), tmp_path / "run")
    code = report.main([run, *options])
    assert web.asked == [] and not (tmp_path / "planted").exists()
    # A chained URI is none of a run's; the others are told on the page.
    assert code == (5 if kind == "reference" else 0)


def test_chained_uris_are_refused_by_whoever_opens_one(web: Web) -> None:
    with pytest.raises(WmddError, match="got one with :: that opens another inside of it"):
        Store(f"reference::{web.uri}/ref.json").get("x")
    assert web.asked == []
