"""A real S3 server on loopback (moto's), and a proxy of ours before it that spoils answers."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Proxy:
    """Passes requests on to the server at `port`, and spoils answers where ``fault`` says so.

    Attributes:
        fault: a function of the object's path, asked for each GET of an object; None, "503", "reset", "truncated",
            "slow" or "corrupt".
        direct: the server's own address.
        seen: how many GETs of each path were answered in full.
    """

    def __init__(self, port: int) -> None:
        self.fault: Callable[[str], str | None] = lambda path: None
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.direct = f"http://127.0.0.1:{port}"
        handler = type("Handler", (_Handler,), {"proxy": self, "target": port})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def heal(self) -> None:
        """No faults, nothing seen."""
        self.fault = lambda path: None
        self.seen.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def in_turns(*faults: str | None, path: str = "") -> Callable[[str], str | None]:
    """Those faults, one after another, for objects whose path has `path` in it; then none."""
    left, lock = list(faults), threading.Lock()

    def fault(asked: str) -> str | None:
        with lock:
            return left.pop(0) if left and path in asked else None

    return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    target: int

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        is_object = "list-type" not in self.path
        fault = self.proxy.fault(self.path.partition("?")[0]) if is_object else None
        if fault == "503":
            body = b"<Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>"
            self._send(503, {"Content-Type": "application/xml", "Content-Length": str(len(body))}, body)
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.target, timeout=30)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        headers = {
            k: v
            for k, v in answer.getheaders()
            if k.lower() not in ("transfer-encoding", "connection", "content-length")
        }
        headers["Content-Length"] = str(len(body))
        upstream.close()
        if fault == "truncated":
            self._send(answer.status, headers, body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            self._send(answer.status, headers, body[:1])
            for byte in body[1:40]:
                time.sleep(0.1)
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:
                    break
            self.close_connection = True
        else:
            if fault == "corrupt":
                body = bytes([body[0] ^ 1]) + body[1:]
            elif is_object:
                with self.proxy.lock:
                    self.proxy.seen[self.path] += 1
            self._send(answer.status, headers, body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
