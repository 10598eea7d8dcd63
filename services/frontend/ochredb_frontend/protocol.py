"""HTTP over a connection: uvicorn's protocol, with a short way for what is most of the work.

A request that comes alone, is sent simply and has a megabyte of body at most is collected and
offered to the application in one piece, without ASGI's scope, messages and coroutine (`Exchange`).
What the application does not take that way, and every other request, goes uvicorn's.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Coroutine, Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from ochredb_frontend.messages import error_body

if TYPE_CHECKING:
    from ochredb_frontend.channel import Channel

_HEAD_BYTES_MAX = 64 << 10  # Request line and headers, beyond what arrived with them.
_WHOLE_BODY_BYTES_MAX = 1 << 20  # Of a request that is collected; nothing slows its sender down.
_STRANGER_BODY_BYTES_MAX = 64 << 10  # The same before it is known that the request is let in.
_PIECE_BYTES_MIN = 4 << 10  # Of a body, as it is kept until it is complete.
_ONE_WRITE_BYTES_MAX = 64 << 10
_EXCHANGES_PER_TURN = 16  # Of one connection that does not wait for answers.
logger = logging.getLogger("ochredb.frontend")

READS_IN_A_ROW = 4  # Then a connection may be one that only reads.
_REFUSED_MAX, _REFUSED_WAIT_S = 16, 5.0
_CONNECTION_TOKENS = (b"close", b"keep-alive")
_TOO_MANY_BODY = error_body("ChromaError", "too many connections; retry later")
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TOO_MANY_BODY), _TOO_MANY_BODY)
)
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)


class Exchange:
    """A request that is answered without ASGI. To uvicorn's protocol it is the current cycle.

    fields: the headers, by lower-case name; of one that is repeated, the last.
    """

    __slots__ = (
        "body", "disconnected", "fields", "keep_alive", "method", "path", "pieces", "protocol",
        "query_string", "response_complete",
    )  # fmt: skip

    def __init__(self, protocol: Protocol, fields: Mapping[bytes, bytes]) -> None:
        parser = protocol.parser
        self.protocol, self.fields = protocol, fields
        self.method: bytes = parser.get_method()
        self.path, _, self.query_string = protocol.url.partition(b"?")
        self.body = b""
        self.pieces: list[bytes] = []  # Of the body, until it is complete.
        self.keep_alive = parser.get_http_version() == "1.1" and parser.should_keep_alive()
        self.response_complete = self.disconnected = False

    def note_read(self, is_read: bool) -> None:
        """Whether it is a read or a write, for who decides where its connection goes on."""
        protocol = self.protocol
        protocol.reads_in_a_row = protocol.reads_in_a_row + 1 if is_read else 0
        if protocol.reads_in_a_row == READS_IN_A_ROW:
            protocol.app.on_reading(protocol)

    def respond(self, status: int, head: bytes, body: bytes) -> None:
        """Write the whole answer; nothing if the client is gone or was answered already.

        head: complete header lines, content-length among them.
        """
        if self.response_complete:
            return
        self.response_complete = True
        self.body = b""
        protocol = self.protocol
        transport = protocol.transport
        if self.is_lost:
            return
        close = b"" if self.keep_alive else b"connection: close\r\n"
        lines = (STATUS_LINE[status], protocol.default_lines(), close, head, b"\r\n")
        if len(body) <= _ONE_WRITE_BYTES_MAX:  # So that the client wakes up once.
            transport.write(b"".join((*lines, body)))
        else:
            transport.write(b"".join(lines))
            transport.write(body)
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the rest of the answer as a task, which a graceful end waits for.

        Begun at once: what does not wait at all ends here.
        """
        self.protocol.begin(work)

    @property
    def is_lost(self) -> bool:
        """Whether nobody would read an answer."""
        return self.disconnected or bool(self.protocol.transport.is_closing())

    @property
    def message_event(self) -> Exchange:
        """What uvicorn sets when the connection is lost."""
        return self

    def set(self) -> None:
        """Nobody waits: who works on the answer looks at `disconnected`."""


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with exchanges, and with a bound for heads, which it would buffer.

    A connection may go on in another process (`sharing`): between two requests it leaves.

    requests: begun since somebody set it to 0. reads_in_a_row: the last requests that were whole
    reads of hot routes.
    """

    cycle: Any  # uvicorn's RequestResponseCycle, an Exchange, or None.
    requests = reads_in_a_row = 0
    read_before: bytes | None = None  # By the process that the connection comes from.
    _leaves_by: Channel | None = None
    _is_between = True  # Two requests, or before the first.
    _in_head = True
    _is_too_many = False
    _turn_left = 0
    _data = _again = b""  # What is being parsed, and what is to be parsed after it.
    _offered: bytes | None = None  # The head of a request that offers another protocol, without.
    _head_bytes = 0
    _whole: Exchange | None = None  # It becomes a cycle.
    _default_headers: list[tuple[bytes, bytes]] | None = None
    _default_lines = b""

    def default_lines(self) -> bytes:
        """The header lines of every answer; uvicorn makes a new list of them each second."""
        headers = self.server_state.default_headers
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._default_lines

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        excess = len(self.connections) - self.app.connections_max
        if excess > 0 and self.read_before is None:  # Descriptors are needed for files, too.
            self._is_too_many = True
            # A few are answered when they ask: closed before that, they would not read why.
            wait_s = _REFUSED_WAIT_S if excess <= _REFUSED_MAX else 0
            self.loop.call_later(wait_s, transport.close)
        read, self.read_before = self.read_before, None
        if read is not None:
            self._set_keep_alive()  # It has had requests: not a new one, which may take its time.
            if read:  # Before anything else is.
                self.data_received(read)

    def data_received(self, data: bytes) -> None:
        if self._is_too_many:
            self.transport.write(_TOO_MANY)
            self.transport.close()
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES_MAX + len(data):
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()
                return
        self._turn_left = _EXCHANGES_PER_TURN
        while data:
            self._data, self._again = data, b""
            super().data_received(data)
            data = self._again
        self._data = b""

    def _unsupported_upgrade_warning(self) -> None:
        """The parser stopped behind a head that offers another protocol: go on without the offer.

        It takes what follows for that protocol, and the request for one without a body.
        """
        upgrade = sys.exception()
        assert isinstance(upgrade, HttpParserUpgrade)
        offered, self._offered = self._offered, None
        if offered is None:  # CONNECT: what follows is for nobody.
            return
        self._again = offered + self._data[upgrade.args[0] :]
        self.parser = HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # As uvicorn does: older ones have it not.
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.cycle = None  # It refers to this protocol, and cycles are collected late.

    def on_message_begin(self) -> None:
        self._is_between = False
        self.requests += 1
        # What ASGI needs besides is made when it is needed.
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offered = self._head_without_upgrade()
            return
        self._in_head, self._head_bytes = False, 0
        fields = dict(self.headers)
        if self._is_simple(fields):
            self.cycle = Exchange(self, fields)
        else:
            self._begin_cycle()

    def _head_without_upgrade(self) -> bytes:
        """The head that is complete, as of a client that offers no other protocol."""
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.lower().split(b",")]
                value = b", ".join(token for token in tokens if token in _CONNECTION_TOKENS)
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def _is_simple(self, fields: Mapping[bytes, bytes]) -> bool:
        """Whether the request comes alone, with a body that is simply sent and may be collected."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            return False  # Pipelined: it waits for its turn.
        if self.expect_100_continue or self.flow.write_paused:
            return False
        self._turn_left -= 1
        if self._turn_left < 0:
            return False  # Others want the loop: as tasks the rest take turns with them.
        if b"transfer-encoding" in fields or b"upgrade" in fields:
            return False
        length = fields.get(b"content-length")
        if length is None:
            return True
        if len(length) >= 10 or not length.isdigit():
            return False
        size_bytes = int(length)
        if size_bytes > min(_WHOLE_BODY_BYTES_MAX, self.app.body_bytes_max):
            return False
        return size_bytes <= _STRANGER_BODY_BYTES_MAX or bool(self.app.lets_in(fields))

    def _begin_cycle(self) -> None:
        """Go uvicorn's way with the request whose head is complete."""
        self.reads_in_a_row = 0
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers = self.scope["headers"] = headers
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if type(self.cycle) is Exchange:
            pieces = self.cycle.pieces
            if pieces and len(pieces[-1]) < _PIECE_BYTES_MIN:
                pieces[-1] += body  # Many tiny ones would take many times their bytes.
            else:
                pieces.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offered is not None:
            return  # It begins anew, without the offer.
        self._in_head = self._is_between = True
        exchange = self.cycle
        if type(exchange) is not Exchange:
            super().on_message_complete()
        elif self.transport.is_closing():
            exchange.response_complete = True  # It came behind a request that was the last.
        else:
            exchange.body = b"".join(exchange.pieces)
            exchange.pieces.clear()
            if not self.app.exchange(exchange):
                self.cycle = None  # As before the first request.
                self._whole = exchange
                self._begin_cycle()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        exchange, self._whole = self._whole, None
        if exchange is None:
            super()._start_asgi_task(cycle, app)
            return
        cycle.keep_alive = cycle.keep_alive and exchange.keep_alive  # The server may be ending.
        cycle.body += exchange.body
        cycle.more_body = False
        cycle.message_event.set()
        self.begin(cycle.run_asgi(app))

    # -- going on elsewhere

    @property
    def rests(self) -> bool:
        """Whether nothing of a request was read that was not answered, and all answers are sent."""
        return (
            self._is_between
            and (self.cycle is None or self.cycle.response_complete)
            and not self.pipeline
            and not self.transport.is_closing()
            and self.transport.get_write_buffer_size() == 0
        )

    def leave(self, channel: Channel) -> None:
        """Have another process go on with the connection, now or after the answer that is due."""
        self._leaves_by = channel
        self._leave_if_resting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._leaves_by is not None:  # Not here: what was read may go on behind this request.
            self.loop.call_soon(self._leave_if_resting)

    def _set_keep_alive(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _leave_if_resting(self) -> None:
        channel = self._leaves_by
        if channel is None or not self.rests:
            return
        if channel.takes:
            self.hand_over(channel, b"")
        else:
            self._leaves_by = None

    def hand_over(self, channel: Channel, read: bytes) -> None:
        """Give the connection away. read: what was read and neither parsed nor answered."""
        self._leaves_by = None
        try:
            channel.send_connection(self.transport.get_extra_info("socket").fileno(), read)
        except OSError as error:  # No descriptor is left.
            logger.warning("a connection cannot go on in another process: %s", error)
            if not read:
                return
        self.flow.pause_reading()
        self.transport.close()  # This process's descriptor of it; the connection lives on.

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine up to where it first waits, and the rest of it as a task."""
        try:
            waiting = work.send(None)
        except StopIteration:
            return
        task = self.loop.create_task(_go_on(work, waiting))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)


async def _go_on(running: Coroutine[Any, Any, None], waiting: Any) -> None:
    """The rest of a coroutine that was begun and waits for `waiting`."""
    await _rest(running, waiting)


@types.coroutine
def _rest(running: Coroutine[Any, Any, None], waiting: Any) -> Generator[Any, Any, None]:
    while True:
        try:
            sent = yield waiting
        except BaseException as error:
            advance = partial(running.throw, error)
        else:
            advance = partial(running.send, sent)
        try:
            waiting = advance()
        except StopIteration:
            return
