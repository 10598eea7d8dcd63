"""Pins: keep everything that one state of the catalog refers to, for as long as somebody reads it.

A pin is a row with an expiry, and a reference to each object that was referred to when it was
taken. Its holder renews it; the pin of a holder that died is released when it has expired. Garbage
collection needs no rule of its own: pinned objects are referred to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ochredb.ages import Ages
from ochredb.catalog import objects as object_table
from ochredb.catalog.core import (
    BindParameter,
    Text,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)
from ochredb.catalog.database import Aborted, Database, Session, whole
from ochredb.catalog.schema import pins, references
from ochredb.catalog.statement import Statement
from ochredb.clock import Clock
from ochredb.errors import Exhausted, NotFound

KIND = "pin"
_RENEWED_WITHIN_S = 600.0  # Longer than any pin's ttl.
PINS_MAX = 8  # At once: each keeps garbage from being collected.

_pin: BindParameter[Any] = bindparam("pin", type_=Text)
_COUNT = Statement(select(func.count()).select_from(pins))
_INSERT = Statement(insert(pins))
_PIN_ALL = Statement(
    insert(references).from_select(
        ["key", "kind", "collection", "number"],
        select(references.c.key, literal(KIND), _pin, literal(0))
        .where(references.c.kind != KIND)
        .distinct(),
    )
)
_GET = Statement(select(pins.c.until_us).where(pins.c.id == _pin))
_LOCK = Statement(select(pins.c.until_us).where(pins.c.id == _pin).with_for_update())
_RENEW = Statement(update(pins).where(pins.c.id == _pin).values(until_us=bindparam("new_until")))
_DELETE = Statement(delete(pins).where(pins.c.id == _pin))
_EXPIRED = Statement(select(pins.c.id).where(pins.c.until_us <= bindparam("now_us")))
_HOLDS = Statement(
    select(references.c.number).where(
        references.c.key == bindparam("key"),
        references.c.kind == KIND,
        references.c.collection == _pin,
    )
)
_other = references.alias("other_references")
_HELD = Statement(
    select(pins.c.id, pins.c.owner, pins.c.until_us, func.count(references.c.key))
    .select_from(
        pins.outerjoin(
            references,
            (references.c.collection == pins.c.id)
            & (references.c.kind == KIND)
            & ~exists().where(_other.c.key == references.c.key, _other.c.kind != KIND),
        )
    )
    .group_by(pins.c.id)
    .order_by(pins.c.id)
)


@dataclass(frozen=True, slots=True)
class Pin:
    """Who keeps a state, until when, and how many objects that nothing but pins needs."""

    id: str
    owner: str
    until_us: int
    objects: int


class PinTable:
    """Blocking, thread-safe; each call is one transaction."""

    def __init__(self, database: Database, clock: Clock, ages: Ages | None = None) -> None:
        """ages: of this process, watched since its start."""
        self._db, self._clock = database, clock
        self._ages = ages or Ages(clock)

    @contextlib.contextmanager
    def take(self, pin: str, owner: str, ttl_s: float) -> Iterator[Session]:
        """Pin the current state; yields a session that sees exactly that state.

        The pin outlives the block. Raises Exhausted if too many are held. Cost: one transaction
        that inserts a row for each object of the store, about 2.5 microseconds each.
        """
        # Of backups that died; nobody else may be there to do it.
        self.release_expired()
        with contextlib.ExitStack() as views:
            yield self._take(pin, owner, ttl_s, views)

    @whole
    def _take(self, pin: str, owner: str, ttl_s: float, views: contextlib.ExitStack) -> Session:
        try:
            with self._db.write_beside("pin-take", views) as (session, state):
                row = session.one(_COUNT)
                if row is not None and row[0] >= PINS_MAX:
                    raise Exhausted(f"{row[0]} backups run or have not expired yet; retry later")
                now = self._clock.now_us()
                until = now + int(ttl_s * 1e6)
                session.run(_INSERT, id=pin, owner=owner, created_us=now, until_us=until)
                session.run(_PIN_ALL, pin=pin)
        except Aborted:
            views.close()
            raise
        return state

    @whole
    def renew(self, pin: str, ttl_s: float) -> None:
        """Push the expiry out. Raises NotFound for a pin that was released."""
        with self._db.write("pin-renew") as session:
            until = self._clock.now_us() + int(ttl_s * 1e6)
            if session.run(_RENEW, pin=pin, new_until=until) == 0:
                raise _not_found(pin)

    def check(self, pin: str) -> None:
        """Raises NotFound for a pin that was released."""
        with self._db.read() as session:
            if session.one(_GET, pin=pin) is None:
                raise _not_found(pin)

    def check_holds(self, pin: str, key: str) -> None:
        """Raises NotFound unless the pin keeps this object."""
        with self._db.read() as session:
            if session.one(_HOLDS, pin=pin, key=key) is None:
                raise NotFound(f"backup [{pin}] has no object {key}, or has expired")

    def held(self) -> list[Pin]:
        """The pins of now."""
        with self._db.read() as session:
            return [Pin(*row) for row in session.all(_HELD)]

    @whole
    def release(self, pin: str) -> None:
        """End a pin; what only it kept becomes garbage. One that has ended is no error."""
        with self._db.write("pin-release") as session:
            self._release(session, pin)

    def release_expired(self) -> None:
        """End the pins of holders that did not renew them in time."""
        with self._db.read() as session:
            expired = session.all(_EXPIRED, now_us=self._expired_us())
        for (pin,) in expired:  # Each for itself: the objects of all are in no order.
            self._expire(pin)

    @whole
    def _expire(self, pin: str) -> None:
        with self._db.write("pin-expire") as session:
            row = session.one(_LOCK, pin=pin)
            if row is not None and row[0] <= self._expired_us():  # Not renewed meanwhile.
                self._release(session, pin)

    def _expired_us(self) -> int:
        """Now; after the clock was set ahead as before, for as long as holders may take to renew.

        They have had no chance to say that they are still there.
        """
        return self._clock.now_us() - int(self._ages.slack_s(_RENEWED_WITHIN_S) * 1e6)

    def _release(self, session: Session, pin: str) -> None:
        session.run(_DELETE, pin=pin)
        object_table.release(
            session, kind=KIND, collection=pin, number_max=0, now_us=self._clock.now_us()
        )


def _not_found(pin: str) -> NotFound:
    return NotFound(f"backup [{pin}] does not exist, or has expired")
