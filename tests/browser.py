"""A headless Chromium for tests, driven by the W3C WebDriver protocol over chromedriver: no library is needed for six calls."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port

_START_S = 60
_CALL_S = 120
# What chromedriver logs at this level: uncaught errors, failed loads, refusals by the page's own policy.
_BAD = ("SEVERE", "WARNING")


class Browser:
    """One window."""

    def __init__(self, base: str) -> None:
        self._base = base

    def call(self, method: str, path: str, **body: Any) -> Any:
        """Send a command and return its value."""
        request = urllib.request.Request(
            f"{self._base}/{path}".rstrip("/"),
            method=method,
            data=json.dumps(body).encode() if method == "POST" else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_CALL_S) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path}: {error.read().decode()[:2000]}") from None

    def resize(self, width: int, height: int) -> None:
        """Make the page's viewport so many pixels wide and high: a window cannot be as narrow as a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer(self, scheme: str) -> None:
        """Say that the user's desktop is `light` or `dark`, and wants nothing to glide: a click would miss it."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def devtools(self, command: str, **params: Any) -> Any:
        """Send a command of Chromium's own protocol."""
        return self.call("POST", "goog/cdp/execute", cmd=command, params=params)

    def open(self, path: Path) -> None:
        """Open a page and wait until its script says that it is drawn."""
        self.call("POST", "url", url=path.absolute().as_uri())
        deadline = time.monotonic() + _CALL_S
        while not self.ask("document.documentElement.dataset.ready === 'yes'"):
            assert time.monotonic() < deadline, f"not drawn; the console says {self.complaints()}"
            time.sleep(0.05)

    def ask(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression."""
        return self.call("POST", "execute/sync", script=f"return {expression}", args=[])

    def do(self, script: str) -> Any:
        """Run statements."""
        return self.call("POST", "execute/sync", script=script, args=[])

    def click(self, selector: str) -> None:
        """Scroll to an element and click on it, as a person would: what is covered or absent fails."""
        self.do(
            f"document.querySelector({json.dumps(selector)})?.scrollIntoView({{block: 'center'}})"
        )
        element = self.call("POST", "element", using="css selector", value=selector)
        self.call("POST", f"element/{next(iter(element.values()))}/click")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """Return what is seen, or the whole page, as a PNG."""
        if whole:
            shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
            return base64.b64decode(shot["data"])
        return base64.b64decode(self.call("GET", "screenshot"))

    def complaints(self) -> list[str]:
        """Return errors and warnings of the console since the last call."""
        entries = self.call("POST", "se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in _BAD]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a Chromium without network. Where there is none the test is skipped, and in CI it fails."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        told = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    port = free_port()
    log = folder / "chromedriver.log"
    with open(log, "wb") as sink:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=sink, stderr=sink)
    options = {
        "binary": chromium,
        "args": [
            "--headless=new",
            "--no-sandbox",  # CI is root, which Chromium's sandbox refuses
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
        ],
    }
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    server = Browser(f"http://127.0.0.1:{port}")
    try:
        _wait(server, process, log)
        session = server.call("POST", "session", capabilities={"alwaysMatch": wanted})
        window = Browser(f"http://127.0.0.1:{port}/session/{session['sessionId']}")
        try:
            yield window
        finally:  # else Chromium outlives its driver
            window.call("DELETE", "")
    finally:
        process.terminate()
        process.wait()


def _wait(server: Browser, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            if server.call("GET", "status")["ready"]:
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"chromedriver does not answer: {log.read_text()}") from error
        time.sleep(0.05)
