"""One Slurm for all tests that need one, and a server that gets alerts."""

from __future__ import annotations

import json
import subprocess
import threading
import warnings
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.launch.slurm_cluster import SlurmCluster, Unavailable, install

NODES = 16
"""Twelve for the paper's run; the others for nodes that tests break."""


@pytest.fixture(scope="session")
def slurm():
    """A real Slurm of virtual nodes; where there can be none the tests are skipped, with the reason in capitals."""
    with ExitStack() as stack:
        try:
            install()
            try:
                cluster = stack.enter_context(SlurmCluster(NODES))
            except AssertionError:  # somebody took a port meanwhile
                cluster = stack.enter_context(SlurmCluster(NODES))
        except (Unavailable, AssertionError, OSError, subprocess.SubprocessError) as reason:
            warnings.warn(f"NOTHING IS TESTED ON SLURM: {reason}", stacklevel=1)
            pytest.skip(f"NOTHING IS TESTED ON SLURM: {reason}")
        yield cluster


@pytest.fixture
def webhook():
    """A server on this machine: (its URL, the messages that it got)."""
    messages: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook?a=1&b=2", messages
    server.shutdown()
