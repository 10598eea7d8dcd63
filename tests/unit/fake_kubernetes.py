"""A stand-in for the Kubernetes API: lists, watches and changes EndpointSlices, nothing else.

It has resource versions, bookmarks and 410 Gone, and forgets its history when told. It is not
Kubernetes: what is tested against it alone is not tested on Kubernetes. The same tests run against
a real kube-apiserver where there is one (`tests/distributed/test_kubernetes.py`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

_GONE = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired"}


class FakeKubernetes:
    """One group, one namespace. `url` is where it listens."""

    def __init__(self, version: str = "v1") -> None:
        self.version = version
        self.lists = self.watches = 0
        self.fails = False
        self._changed = threading.Condition()
        self._objects: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[int, str, dict[str, Any]]] = []
        self._now = 1
        self._forgotten = 0  # Up to this version.
        self._cuts = 0
        self._silenced = 0  # So many of the first watches.
        self._closed = False
        self._answering = threading.Event()
        self._answering.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.fake = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- faults

    def forget_history(self, *, quietly: bool = False) -> None:
        """Watches from an older version get 410. quietly: running watches get no event for it."""
        with self._changed:
            self._now += 1
            self._forgotten = self._now
            self._events.clear()
            if not quietly:
                self._cuts += 1
            self._changed.notify_all()

    def cut_watches(self) -> None:
        """End every watch in the middle of a line."""
        with self._changed:
            self._cuts += 1
            self._changed.notify_all()

    def silence_watches(self) -> None:
        """Running watches stay open and hear nothing any more, as behind a host that is gone."""
        with self._changed:
            self._silenced = self.watches

    @contextlib.contextmanager
    def lists_held(self) -> Iterator[None]:
        """Lists show the state of when they were asked for, but are not answered until the end."""
        self._answering.clear()
        try:
            yield
        finally:
            self._answering.set()

    # -- what the handler asks

    def change(self, kind: str, name: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self._changed:
            self._now += 1
            item = dict(body or self._objects[name])
            item["metadata"] = {**item["metadata"], "resourceVersion": str(self._now)}
            if kind == "DELETED":
                del self._objects[name]
            else:
                self._objects[name] = item
            self._events.append((self._now, kind, item))
            self._changed.notify_all()
            return item

    def has(self, name: str) -> bool:
        return name in self._objects

    def listed(self, service: str) -> dict[str, Any]:
        with self._changed:
            self.lists += 1
            items = [item for item in self._objects.values() if _service_of(item) == service]
            listed = {"items": items, "metadata": {"resourceVersion": str(self._now)}}
        self._answering.wait()
        return listed

    def watched(self, service: str, since: int, seconds: float) -> Iterator[dict[str, Any] | None]:
        """Events; None cuts the connection."""
        until_s = time.monotonic() + seconds
        with self._changed:
            self.watches += 1
            number, cuts = self.watches, self._cuts
        while True:
            with self._changed:
                if since < self._forgotten and cuts == self._cuts:
                    found: list[tuple[int, str, dict[str, Any]]] = [(since, "ERROR", _GONE)]
                else:
                    found = [event for event in self._events if event[0] > since]
                if not found:
                    self._changed.wait(min(0.5, max(0.0, until_s - time.monotonic())))
                if self._closed or cuts != self._cuts or self.fails:
                    yield None
                    return
                if number <= self._silenced:
                    self._changed.wait(0.5)  # For the end.
                    continue
            for at, kind, item in found:
                since = max(since, at)
                if kind == "ERROR" or _service_of(item) == service:
                    yield {"type": kind, "object": item}
                if kind == "ERROR":
                    return
            if not found:
                bookmark = {"metadata": {"resourceVersion": str(since)}}
                yield {"type": "BOOKMARK", "object": bookmark}
                if time.monotonic() >= until_s:
                    return

    def is_gone(self, since: int) -> bool:
        return since < self._forgotten


def _service_of(item: dict[str, Any]) -> str:
    return str(item["metadata"]["labels"]["kubernetes.io/service-name"])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> FakeKubernetes:
        return cast(FakeKubernetes, self.server.fake)  # type: ignore[attr-defined]

    def log_message(self, *_args: object) -> None:
        """Quiet."""

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _name(self) -> str | None:
        """The object's name in the path, "" for the collection; None if that is not here."""
        parts = urlsplit(self.path).path.strip("/").split("/")
        prefix = ["apis", "discovery.k8s.io", self.fake.version, "namespaces"]
        if parts[:4] != prefix or parts[5:6] != ["endpointslices"]:
            return None
        return parts[6] if len(parts) > 6 else ""

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return body

    def do_GET(self) -> None:
        fake, name = self.fake, self._name()
        if fake.fails:
            self._answer(503, {"code": 503})
            return
        if name is None:
            self._answer(404, {"code": 404})
            return
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        service = query["labelSelector"].partition("=")[2]
        if query.get("watch", "false").lower() != "true":
            self._answer(200, fake.listed(service))
            return
        since = int(query["resourceVersion"])
        if fake.is_gone(since):
            self._answer(410, _GONE)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in fake.watched(service, since, float(query["timeoutSeconds"])):
                if event is None:
                    self._chunk(b'{"type": "MODIF')
                    self.close_connection = True
                    return
                line = json.dumps(event).encode() + b"\n"
                self._chunk(line[:7])  # Lines do not end where chunks do.
                self._chunk(line[7:])
            self._chunk(b"")
        except OSError:
            self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def do_POST(self) -> None:
        body = self._body()
        self._answer(201, self.fake.change("ADDED", body["metadata"]["name"], body))

    def do_PUT(self) -> None:
        body = self._body()
        self._answer(200, self.fake.change("MODIFIED", body["metadata"]["name"], body))

    def do_DELETE(self) -> None:
        self._answer(200, self.fake.change("DELETED", str(self._name()), None))
