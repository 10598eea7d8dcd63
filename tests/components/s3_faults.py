"""A proxy in front of an S3 endpoint that fails on purpose, as a seed and its attributes decide.

    faults = S3Faults.start(ceph.url, seed=7)
    faults.fail_after = 0.05           # at any time; from now on 5 % of the replies are lost
    ... S3Config(endpoint_url=faults.url, ...)
    faults.counts["after"], faults.stop()

By itself, controlled by lines `fail_after=0.1` on its standard input, whose end ends it:

    python -m tests.components.s3_faults http://127.0.0.1:7480 --port 7481 --fail-before 0.025
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

HOST = "127.0.0.1"
SHARES = ("fail_before", "fail_after", "reset_body", "delay_share")
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "content-length"}
_CHUNK_BYTES = 64 << 10
_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'


class Plan(NamedTuple):
    """What goes wrong with one request; `seconds` before anything else."""

    fault: str
    status: int
    seconds: float


class S3Faults:
    """Every attribute may be set while it runs.

    fail_before: share of the requests answered with 500 or 503 that never reach the endpoint.
    fail_after: share that reach it, and whose reply is lost: dropped, or replaced by a 500.
    reset_body: share whose body, sent or received, breaks off in the middle.
    delay_s: up to so long before a request, for `delay_share` of them.
    bytes_per_s: of each connection's answers; None is as fast as it can.
    methods: what may fail; others are only handed on.
    counts: what was done: `before`, `after`, `reset`, `delayed`, `passed`.
    """

    def __init__(self, target_url: str, seed: int, port: int = 0) -> None:
        parts = urlsplit(target_url)
        assert parts.hostname is not None
        self.target = (parts.hostname, parts.port or 80)
        self.fail_before = self.fail_after = self.reset_body = 0.0
        self.delay_s, self.delay_share = 0.0, 1.0
        self.bytes_per_s: float | None = None
        self.methods = frozenset({"GET", "HEAD", "PUT", "DELETE", "POST"})
        self.counts: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self._server = _Server((HOST, port), self)
        self.port: int = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @classmethod
    def start(cls, target_url: str, seed: int = 0, *, port: int = 0) -> S3Faults:
        proxy = cls(target_url, seed, port)
        proxy._thread.start()
        return proxy

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def calm(self) -> None:
        """No more faults."""
        self.fail_before = self.fail_after = self.reset_body = self.delay_s = 0.0
        self.bytes_per_s = None

    def plan(self, method: str) -> Plan:
        """Draw for one request."""
        with self._lock:
            drawn, kind = self._rng.random(), self._rng.random()
            delayed, length = self._rng.random() < self.delay_share, self._rng.random()
            fault, status = "passed", 0
            if method in self.methods:
                before = self.fail_before
                after = before + self.fail_after
                if drawn < before:
                    fault, status = "before", 503 if kind < 0.5 else 500
                elif drawn < after:
                    fault, status = "after", 500 if kind < 0.3 else 0
                elif drawn < after + self.reset_body:
                    fault = "reset"
            self.counts[fault] += 1
            seconds = self.delay_s * length if delayed else 0.0
            self.counts["delayed"] += seconds > 0
            return Plan(fault, status, seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], faults: S3Faults) -> None:
        self.faults = faults
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that ended early is what this is for; anything else is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Reset(Exception):
    """End the connection by a reset."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, and one of its own to the endpoint."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Quiet."""

    def _handle(self) -> None:
        try:
            self._serve()
        except _Reset:
            self.close_connection = True
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _handle  # noqa: N815

    def _serve(self) -> None:
        plan = self.server.faults.plan(self.command)
        if plan.seconds:
            time.sleep(plan.seconds)
        length = int(self.headers.get("Content-Length") or 0)
        if plan.fault == "reset" and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            raise _Reset
        body = self.rfile.read(length)
        if len(body) < length:
            raise _Reset  # The client broke off: the endpoint must not see a whole request.
        if plan.fault == "before":
            self._fail(plan.status)
            return
        try:
            answer = self._forward(body)
        except (OSError, http.client.HTTPException):
            raise _Reset from None
        if plan.fault == "after":
            answer.read()
            if not plan.status:
                raise _Reset
            self._fail(plan.status)
            return
        self._answer(answer, breaks_off=plan.fault == "reset")

    def _fail(self, status: int) -> None:
        code = "SlowDown" if status == 503 else "InternalError"
        text = b"" if self.command == "HEAD" else _ERROR.format(code=code).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _forward(self, body: bytes) -> http.client.HTTPResponse:
        fresh = self._upstream is None
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(*self.server.faults.target, timeout=60)
        try:
            return self._exchange(self._upstream, body)
        except (OSError, http.client.HTTPException):
            self._upstream.close()
            self._upstream = None
            # An idle connection that the endpoint had closed; of others nobody knows what happened.
            if fresh or self.command not in ("GET", "HEAD"):
                raise
        return self._forward(body)

    def _exchange(
        self, upstream: http.client.HTTPConnection, body: bytes
    ) -> http.client.HTTPResponse:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        if body or self.command in ("PUT", "POST"):
            upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        return upstream.getresponse()

    def _answer(self, answer: http.client.HTTPResponse, *, breaks_off: bool) -> None:
        length = answer.length  # None: chunked, as listings are.
        content = b"" if length is not None else answer.read()
        size = len(content) if length is None else length
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        shown = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", shown or str(size))
        self.end_headers()
        left = size // 2 if breaks_off else size
        while left:
            piece = content[:left] if length is None else answer.read(min(left, _CHUNK_BYTES))
            if not piece:
                raise _Reset
            self.wfile.write(piece)
            left -= len(piece)
            rate = self.server.faults.bytes_per_s
            if rate is not None:
                time.sleep(len(piece) / rate)
        if breaks_off:
            raise _Reset
        if length == 0:
            answer.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    for name in (*SHARES[:3], "delay_s"):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=0.0)
    arguments = parser.parse_args()
    faults = S3Faults.start(arguments.target, arguments.seed, port=arguments.port)
    for name in (*SHARES[:3], "delay_s"):
        setattr(faults, name, getattr(arguments, name))
    print(faults.url, flush=True)
    for line in sys.stdin:
        name, _, value = line.strip().partition("=")
        if name in (*SHARES, "delay_s"):
            setattr(faults, name, float(value))
        elif name == "calm":
            faults.calm()
        elif name:
            print(f"unknown: {name}", file=sys.stderr)
        print(dict(faults.counts), flush=True)
    faults.stop()


if __name__ == "__main__":
    main()
