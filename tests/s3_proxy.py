"""An S3 endpoint, and an HTTP proxy before it that spoils requests as told, and counts them.

    with S3Proxy("http://127.0.0.1:5000") as proxy:
        proxy.faults = [Fault("503", method="GET", path="clip", times=2)]
        ...
        assert [request.status for request in proxy.requests] == [503, 503, 206]

Kinds of faults:
    <status>   answers with this HTTP status and `body`, by default an error of S3 in XML;
               nothing is passed on
    refuse     closes the connection without a word
    reset      sends half of the reply's body, then resets the connection (RST)
    truncate   sends half of the reply's body, then closes the connection in good order
    stall      sends half of the reply's body, then nothing until the client gives up
    silent     reads the request, then nothing until the client gives up; nothing is passed on
    cut        reads half of the request's body and closes; nothing is passed on
    forget     passes the request on and closes without giving the reply
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

CODES = {
    400: "RequestTimeout",
    403: "AccessDenied",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
    507: "InsufficientStorage",
}
# Another endpoint than moto's, e.g. a Ceph gateway, with these keys; see infra/test_s3.sh
ENDPOINT = os.environ.get("FOURDH_TEST_S3")
ACCESS_KEY, SECRET_KEY = "test", "testtest"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

PIECE_BYTES = 64 * 1024
_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


def has_endpoint() -> bool:
    """Whether `s3_endpoint` can work here."""
    needed = ("s3fs", "moto", "flask", "flask_cors")
    return ENDPOINT is not None or all(map(importlib.util.find_spec, needed))


@cache
def s3_endpoint() -> str:
    """Address of the endpoint that FOURDH_TEST_S3 names, or of a moto server of this process."""
    if ENDPOINT is not None:
        return ENDPOINT
    folder = tempfile.TemporaryDirectory()
    log = Path(folder.name) / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=out,
            stderr=subprocess.STDOUT,
        )

    def stop() -> None:
        server.terminate()
        server.wait(10)
        folder.cleanup()

    atexit.register(stop)
    deadline = time.monotonic() + 120
    while "Running on http://" not in log.read_text():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return "http://" + log.read_text().split("Running on http://")[1].split()[0]


@dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        kind: see the module.
        method: of the requests concerned, any where empty.
        path: pattern searched in their path and query, percent-decoded.
        skip: so many of them pass first.
        times: then so many are spoilt; None for all.
        share: chance of each of them to be spoilt at all.
        body: of the answer instead of an error of S3.
    """

    kind: str
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int | None = 1
    share: float = 1.0
    body: bytes | None = None

    def strikes(self, method: str, path: str, dice: random.Random) -> bool:
        if self.times == 0 or (self.method and self.method != method):
            return False
        if not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.share < 1 and dice.random() >= self.share:
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Request:
    """A request that was seen; `status` 0 where no whole reply was given."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    num_bytes: int = 0
    fault: str = ""


class S3Proxy(ThreadingHTTPServer):
    """See the module.

    Args:
        upstream: the endpoint, ``http://host:port``.
        latency_s: from each request to the first byte of its reply, at least.
        bytes_per_s: rate of each reply's body, at most; None for as fast as it goes. What the
            endpoint takes itself counts towards both.
        seed: of the dice for faults with a share.
    """

    daemon_threads = True

    def __init__(
        self,
        upstream: str,
        *,
        latency_s: float = 0.0,
        bytes_per_s: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        address = urlsplit(upstream)
        assert address.hostname is not None
        self.upstream = (address.hostname, address.port or 80)
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.dice = random.Random(seed)
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def reset(self) -> None:
        """No faults, and nothing seen so far."""
        with self.lock:
            self.faults, self.requests = [], []

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that a client gave up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: S3Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def handle_one(self) -> None:
        server = self.server
        path = unquote(self.path)
        seen = Request(self.command, path, {k.lower(): v for k, v in self.headers.items()})
        with server.lock:
            strikes = (f for f in server.faults if f.strikes(self.command, path, server.dice))
            fault = next(strikes, Fault(""))
            seen.fault = fault.kind
            server.requests.append(seen)
        self.began = time.monotonic()
        size = int(self.headers.get("Content-Length") or 0)
        if seen.fault == "cut":
            self.rfile.read(size // 2)
            self._drop()
            return
        body = self.rfile.read(size)
        if seen.fault == "refuse":
            self._drop()
        elif seen.fault == "silent":
            self._wait_for_the_client()
        elif seen.fault.isdigit():
            status = int(seen.fault)
            code = CODES.get(status, "Unknown")
            text = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
            told = text if fault.body is None else fault.body
            self._answer(seen, status, {}, b"" if self.command == "HEAD" else told)
        else:
            self._pass_on(seen, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815

    def _pass_on(self, seen: Request, body: bytes) -> None:
        # The signature covers the host that the client named.
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        connection = HTTPConnection(*self.server.upstream, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            data = reply.read()
            told = {k: v for k, v in reply.getheaders() if k.lower() not in _HOP}
        finally:
            connection.close()
        if seen.fault == "forget":
            self._drop()
            return
        self._answer(seen, reply.status, told, data)

    def _answer(self, seen: Request, status: int, headers: dict[str, str], data: bytes) -> None:
        first_byte = self.began + self.server.latency_s
        time.sleep(max(0.0, first_byte - time.monotonic()))
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(data)))
        part = data
        if seen.fault in ("reset", "truncate", "stall"):
            part = data[: len(data) // 2]
        else:
            seen.status = status  # before the client can see the end of the reply
        self.end_headers()
        for start in range(0, len(part), PIECE_BYTES):
            seen.num_bytes = min(start + PIECE_BYTES, len(part))
            self.wfile.write(part[start : start + PIECE_BYTES])
            if self.server.bytes_per_s is not None:
                due_s = first_byte + seen.num_bytes / self.server.bytes_per_s
                time.sleep(max(0.0, due_s - time.monotonic()))
        if seen.fault == "reset":
            # With a linger of zero seconds the kernel sends RST instead of FIN
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())
            self._drop()
        elif seen.fault == "truncate":
            self._drop()
        elif seen.fault == "stall":
            self._wait_for_the_client()

    def _drop(self) -> None:
        self.close_connection = True

    def _wait_for_the_client(self) -> None:
        self.wfile.flush()
        select.select([self.connection], [], [], 60)
        self._drop()
