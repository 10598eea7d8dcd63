"""A reader process's connections: they come from its server, and go back for all but small reads.

See `sharing`, which is the other end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import orjson

from ochredb.clock import Clock
from ochredb.errors import OchreError, Unavailable
from ochredb.metrics import Metrics
from ochredb_frontend import channel
from ochredb_frontend.channel import Channel
from ochredb_frontend.protocol import Protocol
from ochredb_frontend.server import Connections
from ochredb_frontend.sharing import TURN_S, ProcessorShare

log = logging.getLogger("ochredb.frontend")

_OPENING_MAX_S = 10.0  # Then clients come, and open the rest.
_FLUSH_S = 0.005  # Between two looks at whether an answer was sent.
_READ = re.compile(
    rb"(?:POST (?=[^ ]*/(?:get|query)[? ])|GET (?=[^ ]*/count[? ]))"
    rb"/api/v2/tenants/[^/ ?]+/databases/[^/ ?]+/collections/[^/ ?]+/(?:get|query|count)"
    rb"(?:\?[^ ]*)? HTTP/1\.1\r\n"
)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,9})\r\n")
_NOT_SIMPLE = (b"\r\ntransfer-encoding:", b"\r\nexpect:", b"\r\nupgrade:")


def read_bytes(data: bytes) -> int | None:
    """How long the request is that begins with `data`, if it is one that a reader answers.

    A get, query or count whose head is there and simple; the rest of it may be on its way. None for
    any other: whoever has the server's whole routes shall parse it.
    """
    if _READ.match(data) is None:
        return None
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[: end + 2].lower()
    if any(name in head for name in _NOT_SIMPLE):
        return None
    lengths = _LENGTH.findall(head)
    if len(lengths) != head.count(b"content-length") or len(lengths) > 1:
        return None
    if not lengths:
        return end + 4 if data.startswith(b"GET") else None
    return end + 4 + int(lengths[0])


class ReaderProtocol(Protocol):
    """Parses what it will answer, one request at a time, and gives the connection back otherwise.

    server_channel: to the process that connections come from.
    """

    _missing_bytes = 0  # Of the request that is being read.
    _later = b""  # What came behind it.

    def __init__(self, server_channel: Channel, **more: Any) -> None:
        super().__init__(**more)
        self._server_channel = server_channel

    def data_received(self, data: bytes) -> None:
        if self._missing_bytes:
            part, data = data[: self._missing_bytes], data[self._missing_bytes :]
            self._missing_bytes -= len(part)
            super().data_received(part)
            if data and not self.transport.is_closing():
                self._hold(data)
        elif self._later or not self._has_answered:
            self._hold(data)
        else:
            self._begin(data)

    @property
    def _has_answered(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _begin(self, data: bytes) -> None:
        """Go on with what begins a request."""
        size = None if self._leaves_by is not None else read_bytes(data)
        if size is None:
            self._unset_keepalive_if_required()
            if self.transport.get_write_buffer_size():  # Of answers, which come first.
                self._later = data
                self.flow.pause_reading()
                self.loop.call_later(_FLUSH_S, self._go_on)
            else:
                self.hand_over(self._server_channel, data)
            return
        self._missing_bytes = max(0, size - len(data))
        super().data_received(data[:size])
        if len(data) > size and not self.transport.is_closing():
            self._hold(data[size:])

    def _hold(self, data: bytes) -> None:
        """Keep what comes behind a request until that is answered."""
        self._later += data
        self.flow.pause_reading()
        self.loop.call_soon(self._go_on)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._later:
            self.flow.pause_reading()
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._later and self._has_answered and not self.transport.is_closing():
            data, self._later = self._later, b""
            self.flow.resume_reading()
            self._begin(data)

    @property
    def rests(self) -> bool:
        return not self._missing_bytes and not self._later and super().rests


class Reading:
    """A reader's `Companion`: its server. Of the event loop's thread."""

    def __init__(
        self,
        end: Channel,
        metrics: Metrics,
        clock: Clock,
        *,
        on_append: Callable[[str, int], object],
        open_collection: Callable[[str], None],
    ) -> None:
        """on_append: told of writes of the server; must be quick. open_collection: have one, by
        its id, as ready to be read as it is on the server; may take long.
        """
        self._channel, self._metrics, self._clock = end, metrics, clock
        self._share = ProcessorShare(clock)
        self._on_append, self._open_collection = on_append, open_collection
        self._is_open = False  # What the server named, or all that there is time for.
        self._opens_until_s = math.inf
        self._connections: Connections | None = None
        self._gives_back = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, connections: Connections) -> None:
        self._connections = connections
        self._channel.attach(connections.adopt, self._heard, connections.finish)
        self._report()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._connections is not None:
            self._tell()
        self._channel.close()

    def damaged(self, part_id: str) -> None:
        """Have the server mend a part; from any thread. Raises Unavailable if it cannot hear."""
        if not self._channel.tell(channel.DAMAGED, part_id.encode()):
            raise Unavailable("the server does not hear of it")

    def _heard(self, kind: bytes, data: bytes) -> None:
        assert self._connections is not None
        if kind == channel.APPENDED:
            collection_id, _, offset = data.decode().partition(" ")
            self._on_append(collection_id, int(offset))
        elif kind == channel.OPEN:
            self._begin_opening(orjson.loads(data))
        elif kind == channel.GIVE_BACK:
            active = [one for one in self._connections.connections if one.reads_in_a_row]
            for protocol in active[: int(data or 0)]:
                protocol.leave(self._channel)
            self._gives_back = self._gives_back or not data

    def _begin_opening(self, collection_ids: list[str]) -> None:
        self._opens_until_s = self._clock.monotonic_s() + _OPENING_MAX_S
        opening = threading.Thread(  # Nobody waits for it at the end.
            target=self._open_all, args=(collection_ids,), name="open-ahead", daemon=True
        )
        try:
            opening.start()
        except RuntimeError:  # The system gives no more: whoever reads opens what he reads.
            self._is_open = True

    def _open_all(self, collection_ids: list[str]) -> None:
        """Those read last first, and once more, so that they count as used last."""
        for collection_id in (*collection_ids, *reversed(collection_ids)):
            if self._channel.is_closed or self._has_no_time:
                break
            try:
                self._open_collection(collection_id)
            except OchreError as error:  # The first read says what is wrong.
                log.warning("collection %s is not opened ahead: %s", collection_id, error)
            except Exception:
                if not self._channel.is_closed:
                    log.exception("opening collection %s ahead failed", collection_id)
        self._is_open = True

    @property
    def _has_no_time(self) -> bool:
        """Whether clients have waited long enough for what is being opened."""
        return self._clock.monotonic_s() > self._opens_until_s

    def _report(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TURN_S, self._report)
        if self._gives_back and self._connections is not None:  # Those too that came since.
            for protocol in list(self._connections.connections):
                protocol.leave(self._channel)
        self._tell()

    def _tell(self) -> None:
        assert self._connections is not None
        active = 0
        for protocol in self._connections.connections:
            active += protocol.requests > 0
            protocol.requests = 0
        report = {
            "ready": self._is_open or self._has_no_time,
            "share": self._share.since_last(),
            "active": active,
            "connections": len(self._connections.connections),
            "metrics": self._metrics.take(),
        }
        self._channel.send(channel.REPORT, orjson.dumps(report))
