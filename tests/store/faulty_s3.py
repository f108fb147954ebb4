"""A proxy in front of the S3 server that answers wrongly on purpose, and counts what it was asked."""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

CODES = {
    301: "PermanentRedirect",
    400: "ExpiredToken",
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    429: "TooManyRequests",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}
PASSING: tuple[int | str, ...] = (
    500, 503, "503 html", 429, "refuse", "reset", "hang", "slow", "cut", "drop",
)  # fmt: skip
"""Faults after which the same request may go well."""
CONDITIONS = ("if-none-match", "if-match")


@dataclass(frozen=True)
class Asked:
    """A request that the proxy was sent, and the fault that it met."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    fault: int | str


class FaultyS3(ThreadingHTTPServer):
    """Passes requests on to `endpoint`, and meets some of them with a fault.

    Faults are a status of `CODES` (400 is an expired token), or
        503 html    a page of a load balancer instead of S3's XML
        refuse      closes the connection unheard
        reset       the same by RST
        hang        does not answer for `hang_s`, then closes
        slow        answers rightly, in 200 pieces with `drip_s` between them
        drop        does what was asked and closes without a reply
        cut         breaks off in the middle of the body
        short       sends half of the body, whose length it says to be that
        flip        changes one bit of the body

    `choose` says which fault the request of a number, method and path meets. Requests signed with a key of `expired`
    meet 400 in any case, and with `ignores_conditions` no server behind ever hears If-None-Match or If-Match.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(endpoint).netloc
        self.requests: list[Asked] = []
        self.choose: Callable[[int, str, str], int | str] = lambda number, method, path: ""
        self.left = 0
        self.hang_s = 1.0
        self.drip_s = 0.5
        self.expired: set[str] = set()
        self.ignores_conditions = False
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def break_down(self, fault: int | str, *, times: int, method: str = "") -> None:
        """Meet the next `times` requests (of one method) with a fault, and forget those counted so far."""

        def choose(number: int, asked: str, path: str) -> int | str:
            if self.left <= 0 or method not in ("", asked):
                return ""
            self.left -= 1
            return fault

        self.requests, self.left, self.choose = [], times, choose

    def break_down_at_random(
        self, share: float, faults: tuple[int | str, ...], *, seed: int
    ) -> None:
        """Meet every request with a fault by chance, and forget those counted so far."""

        def choose(number: int, method: str, path: str) -> int | str:
            draw = random.Random(f"{seed}/{number}")
            return draw.choice(faults) if draw.random() < share else ""

        self.requests, self.choose = [], choose

    def asked(self, method: str) -> int:
        return sum(found.method == method for found in self.requests)

    def refusal(self, status: int) -> tuple[str, bytes]:
        """Return the kind and the content of the page that comes with a status of `CODES`."""
        page = f"<Error><Code>{CODES[status]}</Code><Message>planted</Message></Error>"
        return "application/xml", page.encode()

    def fault_of(self, method: str, path: str, headers: dict[str, str]) -> int | str:
        with self._lock:
            signed_by = re.search("Credential=([^/]+)/", headers.get("Authorization", ""))
            if signed_by and signed_by[1] in self.expired:
                fault: int | str = 400
            else:
                fault = self.choose(len(self.requests), method, path)
            self.requests.append(Asked(method, path, headers, fault))
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that does not wait for the end of a slow answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault_of(self.command, self.path, dict(self.headers))
        if isinstance(fault, int):
            kind, page = self.server.refusal(fault)
            self._reply(fault, {"Content-Type": kind, "Date": formatdate(usegmt=True)}, page)
        elif fault == "503 html":
            page = b"<html><body>Service <b>unavailable</body></html>"
            self._reply(503, {"Content-Type": "text/html"}, page)
        elif fault in ("refuse", "reset", "hang"):
            time.sleep(self.server.hang_s if fault == "hang" else 0)
            self._close(reset=fault == "reset")
        else:
            status, headers, content = self._pass_on(body)
            if fault == "drop":
                self._close()
            else:
                self._reply(status, headers, content, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = dict(self.headers)
        if self.server.ignores_conditions:
            headers = {k: v for k, v in headers.items() if k.lower() not in CONDITIONS}
        behind = http.client.HTTPConnection(self.server.behind, timeout=60)
        try:
            behind.request(self.command, self.path, body, headers)
            reply = behind.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            behind.close()

    def _reply(self, status: int, headers: dict[str, str], content: bytes, fault: str = "") -> None:
        half = len(content) // 2
        if fault == "short":
            content = content[:half]
        if fault == "flip" and content:
            content = content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :]
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(content)
        lines = [f"HTTP/1.1 {status} -"]
        lines += [
            f"{name}: {value}"
            for name, value in headers.items()
            if name.lower() not in ("connection", "content-length", "transfer-encoding")
        ]
        sent = "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode("latin-1")
        if self.command != "HEAD":
            sent += content[:half] if fault == "cut" else content
        if fault == "slow":
            piece = -(-len(sent) // 200)
            for i in range(0, len(sent), piece):
                self.wfile.write(sent[i : i + piece])
                time.sleep(self.server.drip_s)
        else:
            self.wfile.write(sent)
        if fault == "cut":
            self._close()

    def _close(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.wfile.close()
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass
