"""A server that is busy with reads shares its clients' connections with reader processes.

One interpreter keeps hardly more than one processor busy. So while several clients are served and
this process is as busy as it can be, connections over which nothing but reads came lately go on in
another process, which has the same catalog and files open and answers from them (I4). Anything but
a small read is given back, connection and all, before it is begun (`reading`): every write, and
all that is said about the server, is this process's.

Decision 0062 has the measurements behind these figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from ochredb.clock import Clock
from ochredb.metrics import Metrics
from ochredb_frontend import channel
from ochredb_frontend.channel import Channel
from ochredb_frontend.protocol import READS_IN_A_ROW, Protocol
from ochredb_frontend.server import Connections

log = logging.getLogger("ochredb.frontend")

TURN_S = 0.5
_READS_PER_TURN_MIN = 25  # Of all connections that only read: fewer are no crowd.
_BUSY, _CALM = 0.8, 0.6  # Shares of one processor: of this process, and of all of them.
_GAP_MIN = 0.3  # Between two processes' shares, to move a connection.
_CROWDED_TURNS = 2  # Until a process is started ...
_CROWD_S = 10.0  # ... if no two are further apart.
_SETTLED_S = 1.5  # After connections were moved, until their effect is known.
_CALM_S = 30.0  # Then readers are to give back what they have ...
_LEAVING_S, _LEAVING_MAX_S = 2.0, 60.0  # ... and to end, when that has come, and at last.
_SILENT_S = 3.0  # Without a report: nothing more is sent there ...
_LOST_S = 30.0  # ... and it is given up. It may also take so long to begin.
_IDLE = 0.4  # The share of this process below which it takes connections back from a busy one.
_AGAIN_S = 30.0  # After one that could not be started or ended by itself.


@dataclass(slots=True, eq=False)
class _Reader:
    """One reader process.

    share: of a processor. connections: that it has; active: those of them that are used. All as it
    last said; active with what was moved since.
    """

    channel: Channel
    is_ready: bool = False
    share: float = 0.0
    connections: int = 0
    active: int = 0
    heard_s: float = 0.0  # When it was started, or last said something.
    used_s: float = 0.0  # When it was last known to be asked.
    leaving_since_s: float = math.inf


def to_move(movable: int, own: float, other: float) -> int:
    """How many of a busy process's `movable` connections make two processes equally busy."""
    if own < _BUSY or own - other < _GAP_MIN:
        return 0
    return max(0, math.ceil(movable * (own - other) / (2 * own)))


class ProcessorShare:
    """How busy this process keeps processors; 1.0 is one of them."""

    def __init__(self, clock: Clock, processor_s: Callable[[], float] = time.process_time) -> None:
        self._clock, self._processor_s = clock, processor_s
        self._wall_s, self._used_s = clock.monotonic_s(), processor_s()

    def since_last(self) -> float:
        """The share since the last call, or since the beginning."""
        wall_s, used_s = self._clock.monotonic_s(), self._processor_s()
        share = (used_s - self._used_s) / max(1e-3, wall_s - self._wall_s)
        self._wall_s, self._used_s = wall_s, used_s
        return share


class Sharing:
    """The server's `Companion`: all reader processes it may have. Of its event loop's thread."""

    def __init__(
        self,
        start: Callable[[socket.socket], None],
        *,
        readers_max: int,
        metrics: Metrics,
        clock: Clock,
        on_damaged: Callable[[str], None],
        read_lately: Callable[[], list[str]],
        processor_s: Callable[[], float] = time.process_time,
    ) -> None:
        """start: a process at the other end of this socket, in a thread; may raise OSError.

        on_damaged: told the id of a part that a reader found damaged. read_lately: ids of
        collections, some hundred at most. processor_s: what this process has used.
        """
        self._start, self._readers_max = start, readers_max
        self._metrics, self._clock, self._on_damaged = metrics, clock, on_damaged
        self._read_lately = read_lately
        self._share = ProcessorShare(clock, processor_s)
        self._connections: Connections | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: tuple[_Reader, ...] = ()
        self._is_starting = False
        self._reading = 0  # Connections that only read, as of the last turn, and since.
        self._crowded, self._crowded_s = 0, 0.0
        self._calm_since_s = self._not_before_s = self._settled_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        metrics.gauge("ochredb_reader_processes", "Reader processes.", lambda: len(self._readers))
        metrics.gauge(
            "ochredb_reader_connections",
            "Connections that reader processes have.",
            lambda: sum(reader.connections for reader in self._readers),
        )

    # -- Companion

    def begin(self, connections: Connections) -> None:
        self._connections, self._loop = connections, asyncio.get_running_loop()
        if self._readers_max:
            self._timer = self._loop.call_later(TURN_S, self.turn)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._connections = None
        for reader in self._readers:
            reader.channel.close()
        self._readers = ()

    # -- other threads

    @property
    def reads(self) -> bool:
        """Whether readers are asked anything, or were some seconds ago."""
        since_s = self._clock.monotonic_s() - _SILENT_S
        return any(reader.used_s > since_s for reader in self._readers)

    def appended(self, collection_id: str, last_offset: int) -> None:
        """Tell readers of a write, so that whoever reads it, or soon will, need not wait for it."""
        for reader in self._readers:
            if reader.channel.takes or reader.connections or reader.active:
                reader.channel.tell(channel.APPENDED, f"{collection_id} {last_offset}".encode())

    # -- connections

    def consider(self, protocol: Protocol) -> None:
        """A connection has shown that it reads: a reader that has fewer of these gets it."""
        self._reading += 1
        ready = self._ready()
        if ready:
            target = min(ready, key=lambda reader: reader.active)
            if self._reading - target.active > 1:
                self._move(protocol, target)

    def _ready(self) -> list[_Reader]:
        since_s = self._clock.monotonic_s() - _SILENT_S
        return [
            reader
            for reader in self._readers
            if reader.is_ready and reader.channel.takes and reader.heard_s > since_s
        ]

    def _move(self, protocol: Protocol, target: _Reader) -> None:
        protocol.leave(target.channel)
        target.active += 1
        self._reading -= 1

    # -- turns

    def turn(self) -> None:
        """Look at how busy everybody is; called by itself each `TURN_S`."""
        assert self._loop is not None and self._connections is not None
        self._timer = self._loop.call_later(TURN_S, self.turn)
        now_s, own = self._clock.monotonic_s(), self._share.since_last()
        active, reads = 0, 0
        movable: list[Protocol] = []
        for protocol in self._connections.connections:
            if protocol.requests:
                active += 1
                if protocol.reads_in_a_row >= READS_IN_A_ROW:
                    movable.append(protocol)
                    reads += protocol.requests
                protocol.requests = 0
        self._reading = len(movable)
        self._retire(now_s, own)
        self._take_back(now_s, own)
        if own < _BUSY or active < 2 or reads < _READS_PER_TURN_MIN:
            return
        self._crowded = self._crowded + 1 if now_s - self._crowded_s < _CROWD_S else 1
        self._crowded_s = now_s
        if now_s < self._settled_s:
            return
        ready = self._ready()
        if ready:
            target = min(ready, key=lambda reader: reader.share)
            count = to_move(len(movable), own, target.share)
            if count:
                for protocol in movable[:count]:
                    self._move(protocol, target)
                self._settled_s = now_s + _SETTLED_S
                return
        if self._crowded >= _CROWDED_TURNS and now_s >= self._not_before_s:
            self._start_one()

    def _retire(self, now_s: float, own: float) -> None:
        """Ask readers to end that are not needed, and let those go that have nothing left."""
        if own + sum(reader.share for reader in self._readers) >= _CALM:
            self._calm_since_s = now_s
        is_calm = now_s - self._calm_since_s >= _CALM_S
        for reader in self._readers:
            if reader.active:
                reader.used_s = now_s
            leaving_s = now_s - reader.leaving_since_s  # Negative if it is not.
            is_empty = reader.connections == 0 and leaving_s > _LEAVING_S
            if now_s - reader.heard_s > _LOST_S:
                log.warning("a reader process says nothing: it is given up")
                self._let_go(reader)
                self._not_before_s = now_s + _AGAIN_S
            elif is_empty or leaving_s > _LEAVING_MAX_S:
                log.info("a reader process is not needed any more")
                self._let_go(reader)
            elif (is_calm or now_s - reader.used_s >= _CALM_S) and reader in self._ready():
                reader.leaving_since_s = now_s
                reader.channel.takes = False
                reader.channel.send(channel.GIVE_BACK)

    def _take_back(self, now_s: float, own: float) -> None:
        """Ask a busy reader for some of its connections if this process has little to do."""
        ready = self._ready()
        if own > _IDLE or now_s < self._settled_s or not ready:
            return
        busiest = max(ready, key=lambda reader: reader.share)
        count = to_move(busiest.active, busiest.share, own)
        if count and busiest.active > 1:
            busiest.channel.send(channel.GIVE_BACK, b"%d" % count)
            self._settled_s = now_s + _SETTLED_S

    def _let_go(self, reader: _Reader) -> None:
        """It ends when it has answered what it is asked."""
        reader.channel.close()
        self._forget(reader)

    # -- processes

    def _start_one(self) -> None:
        """If there may be one more, and all that take connections are at work."""
        readers = [reader for reader in self._readers if reader.channel.takes]
        if (
            self._is_starting
            or len(readers) >= self._readers_max
            or not all(reader.is_ready for reader in readers)
        ):
            return
        self._is_starting = True
        threading.Thread(target=self._start_in_thread, name="start-reader", daemon=True).start()

    def _start_in_thread(self) -> None:
        assert self._loop is not None
        sock: socket.socket | None = None
        try:
            sock, theirs = channel.pair()
            with theirs:
                self._start(theirs)
        except OSError as error:
            log.warning("a reader process cannot be started: %s", error)
            if sock is not None:
                sock.close()
                sock = None
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._started, sock)

    def _started(self, sock: socket.socket | None) -> None:
        self._is_starting = False
        if sock is None:
            self._not_before_s = self._clock.monotonic_s() + _AGAIN_S
        elif self._connections is None:  # The server ends.
            sock.close()
        else:
            now_s = self._clock.monotonic_s()
            reader = _Reader(Channel(sock), heard_s=now_s, used_s=now_s)
            reader.channel.attach(
                self._connections.adopt,
                lambda kind, data: self._heard(reader, kind, data),
                lambda: self._ended(reader),
            )
            reader.channel.send(channel.OPEN, orjson.dumps(self._read_lately()))
            self._readers = (*self._readers, reader)
            log.info("many reads: a reader process was started")

    def _heard(self, reader: _Reader, kind: bytes, data: bytes) -> None:
        reader.heard_s = self._clock.monotonic_s()
        if kind == channel.REPORT:
            report = orjson.loads(data)
            if report["ready"] and not reader.is_ready:
                reader.is_ready, reader.used_s = True, reader.heard_s
                report["share"] = 0.0  # It was busy with opening what it was told to.
            reader.share, reader.connections = report["share"], report["connections"]
            reader.active = report["active"]
            self._metrics.add(report["metrics"])
        elif kind == channel.DAMAGED:
            self._on_damaged(data.decode())

    def _ended(self, reader: _Reader) -> None:
        """It ended by itself: was killed, or could not begin."""
        log.warning("a reader process with %d connections has ended", reader.connections)
        self._not_before_s = self._clock.monotonic_s() + _AGAIN_S
        self._forget(reader)

    def _forget(self, reader: _Reader) -> None:
        self._readers = tuple(other for other in self._readers if other is not reader)
