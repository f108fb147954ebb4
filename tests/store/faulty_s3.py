"""A proxy in front of the S3 server that answers wrongly on purpose, and counts what it was asked."""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

CODES = {
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    500: "InternalError",
    501: "NotImplemented",
    503: "ServiceUnavailable",
}


class FaultyS3(ThreadingHTTPServer):
    """Passes requests on to `endpoint`; the next `left` requests of `method` meet `fault` instead.

    Faults are a status of `CODES`, or: `refuse` closes the connection unheard, `drop` does what was asked and closes it
    without a reply, `cut` breaks off in the middle of the body, `hang` does not answer for `hang_s`.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(endpoint).netloc
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.fault: int | str = ""
        self.left = 0
        self.method = ""
        self.hang_s = 1.0
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def break_down(self, fault: int | str, *, times: int, method: str = "") -> None:
        """Meet the next `times` requests (of one method) with a fault, and forget those counted so far."""
        self.requests.clear()
        self.fault, self.left, self.method = fault, times, method

    def asked(self, method: str) -> int:
        return sum(found == method for found, _, _ in self.requests)

    def fault_of(self, method: str) -> int | str:
        with self._lock:
            if self.left <= 0 or self.method not in ("", method):
                return ""
            self.left -= 1
            return self.fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        fault = self.server.fault_of(self.command)
        if isinstance(fault, int):
            self._reply(
                fault,
                {},
                f"<Error><Code>{CODES[fault]}</Code><Message>-</Message></Error>".encode(),
            )
            return
        if fault == "hang":
            time.sleep(self.server.hang_s)
        if fault in ("hang", "refuse"):
            self._close()
            return
        status, headers, content = self._pass_on(body)
        if fault == "drop":
            self._close()
            return
        self._reply(status, headers, content, cut=fault == "cut")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        behind = http.client.HTTPConnection(self.server.behind, timeout=60)
        try:
            behind.request(self.command, self.path, body, dict(self.headers))
            reply = behind.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            behind.close()

    def _reply(
        self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False
    ) -> None:
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(content)
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._close()

    def _close(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass
