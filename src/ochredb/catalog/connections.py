"""Connections to a server, kept for the next who needs one.

Whoever needs a connection and finds none idle opens it in its own thread: so it learns at once why
that fails, and a server that is back is used at once. (psycopg_pool opens them in the background,
with growing pauses; its clients learn of a timeout.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ochredb.catalog.postgres_session import PostgresConnection
from ochredb.clock import Clock
from ochredb.errors import Unavailable

_IDLE_S_MAX = 300.0
_AGE_S_MAX = 3_600.0  # Connections come to a server that was added, or whose name moved on.


class Connections:
    """At most `count_max` at once. Thread-safe."""

    def __init__(
        self,
        connect: Callable[[], PostgresConnection],
        count_max: int,
        wait_timeout_s: float,
        clock: Clock,
    ) -> None:
        self._connect, self._count_max = connect, count_max
        self._wait_timeout_s, self._clock = wait_timeout_s, clock
        self._changed = threading.Condition()  # Guards all of the following.
        self._idle: list[PostgresConnection] = []  # The one used last is the last.
        self._count = 0
        self._closed = False

    def take(self) -> PostgresConnection:
        """A connection until `give`. Raises Unavailable, InvalidArgument: see `connect`."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: self._closed or self._idle or self._count < self._count_max,
                self._wait_timeout_s,
            )
            if self._closed:
                raise Unavailable("the catalog is closed")
            if not there:
                raise Unavailable(
                    f"all {self._count_max} connections to the catalog are in use; retry later"
                )
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            connection = self._connect()
        except BaseException:
            self._forget_one()
            raise
        connection.opened_s = self._clock.monotonic_s()
        return connection

    def give(self, connection: PostgresConnection) -> None:
        """Outside of a transaction, or closed."""
        now = self._clock.monotonic_s()
        with self._changed:
            if not (connection.closed or self._closed or now - connection.opened_s > _AGE_S_MAX):
                connection.used_s = now
                self._idle.append(connection)
                self._changed.notify()
                return
        connection.close()
        self._forget_one()

    def drop_idle(self, unused_s: float = 0.0) -> None:
        """Close what nobody uses, and has not used for so long."""
        since_s = self._clock.monotonic_s() - unused_s
        with self._changed:
            dropped = [item for item in self._idle if item.used_s <= since_s]
            self._idle = [item for item in self._idle if item.used_s > since_s]
            self._count -= len(dropped)
            self._changed.notify_all()
        for connection in dropped:
            connection.close()

    def tidy(self) -> None:
        """Close what was not used for some minutes."""
        self.drop_idle(_IDLE_S_MAX)

    def close(self) -> None:
        """What is in use is closed when it is given back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.drop_idle()

    def _forget_one(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify()
