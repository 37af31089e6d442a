"""An S3 of one's own: moto's server in a process, and servers that go wrong on purpose."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pyarrow import fs

SECRET = "planted-secret-of-the-bucket"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def point_to(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let pyarrow, here and in processes that are started from here, find that server."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "planted-key",
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    from latentwire import storage

    storage._system.cache_clear()


@contextlib.contextmanager
def bucket() -> Iterator[int]:
    """The port of a running S3; its bucket is called ``bucket``."""
    port = free_port()
    environment = os.environ | {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.time() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None and time.time() < end, "moto does not start"
            time.sleep(0.2)
        fs.S3FileSystem(
            endpoint_override=f"http://127.0.0.1:{port}", access_key="x", secret_key="x", region="us-east-1",
            allow_bucket_creation=True,
        ).create_dir("bucket")  # fmt: skip
        yield port
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def answering(status: int, body: bytes = b"", delay: float = 0.0) -> Iterator[int]:
    """The port of a server that answers everything with one status and body, after a while."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            time.sleep(delay)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
