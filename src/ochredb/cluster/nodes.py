"""The nodes of a role: a client for each, made when it is first needed, and how each is doing.

for node in nodes.ordered(collection_id):
    try:
        return node.ask(lambda client: client.count(collection_id, cancel=cancel))
    except Unavailable:
        ...

Whose answer does not come as what a call returns says so itself: first `trying`, then exactly one
of `succeeded` and `failed`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ochredb.cancel import Cancelled
from ochredb.clock import Clock
from ochredb.cluster import rendezvous
from ochredb.cluster.membership import Members, Membership
from ochredb.errors import DeadlineExceeded, Exhausted, OchreError, StorageFull, Unavailable

log = logging.getLogger("ochredb.cluster")

T = TypeVar("T")
R = TypeVar("R")

_OPEN_S, _OPEN_S_MAX = 0.2, 5.0
GONE = frozenset({"unreachable", "draining"})
"""In the detail of an error: the call has reached nobody who would work on it."""
_STRIKES_MAX, _SILENCE, _UNAVAILABLE = 5, 1, 2  # Five silences in a row, or three failures.
_ORDERS_MAX = 10_000


class Node(Generic[T]):
    """One member at one address. Thread-safe.

    Its circuit opens when it cannot be reached or is shutting down, or when several calls in a row
    were not answered in good time, or failed because of something that it depends on. For a moment
    at first, longer each time, it is then asked only if nobody else is left. When the time is over
    one call goes through, and its outcome decides.
    """

    def __init__(self, nodes: Nodes[T], name: str, address: str) -> None:
        self.name, self.address = name, address
        self._nodes = nodes
        self._lock = threading.Lock()
        self._client: T | None = None
        self._calls = 0
        self._is_gone = False
        self._failures = self._strikes = 0
        self._open_until_s = self._exhausted_until_s = 0.0

    def __repr__(self) -> str:
        return f"<node {self.name} at {self.address}>"

    @property
    def client(self) -> T:
        with self._lock:
            if self._client is None:
                self._client = self._nodes.connect(self.address)
            return self._client

    @property
    def is_open(self) -> bool:
        """Whether others are to be asked first."""
        return self._failures > 0 and self._nodes.clock.monotonic_s() < self._open_until_s

    @property
    def is_exhausted(self) -> bool:
        """Whether it said not long ago that it has too much to do."""
        return self._nodes.clock.monotonic_s() < self._exhausted_until_s

    def ask(self, call: Callable[[T], R]) -> R:
        """What `call` returns for the client; how the node does is noted."""
        self.trying()
        try:
            answer = call(self.client)
        except BaseException as error:
            self.failed(error)
            raise
        self.succeeded()
        return answer

    def trying(self) -> None:
        """A call begins. Of a node that could not be reached, it is the only one for a while."""
        with self._lock:
            self._calls += 1
            if self._failures:
                self._open_until_s = self._nodes.clock.monotonic_s() + self._pause_s()

    def succeeded(self) -> None:
        """The call was answered."""
        with self._lock:
            self._calls -= 1
            if self._failures:
                log.info("%s answers again", self)
            self._failures = self._strikes = 0
        if self._is_gone:
            self._close_if_unused()

    def failed(self, error: BaseException) -> None:
        """The call raised this."""
        now_s = self._nodes.clock.monotonic_s()
        with self._lock:
            self._calls -= 1
            if isinstance(error, OchreError) and not GONE.isdisjoint(error.detail):
                self._open(now_s, str(error))
            elif isinstance(error, DeadlineExceeded):
                self._strike(now_s, _SILENCE, "no answer in time")
            elif isinstance(error, Unavailable) and not isinstance(error, StorageFull):
                self._strike(now_s, _UNAVAILABLE, str(error))
            elif not isinstance(error, Cancelled):  # That says nothing of the node.
                self._failures = self._strikes = 0
            if isinstance(error, Exhausted):
                self._exhausted_until_s = now_s + error.retry_after_s
        if self._is_gone:
            self._close_if_unused()

    def outrun(self) -> None:
        """Another node was quicker. The call here still ends in `succeeded` or `failed`."""
        with self._lock:
            self._strike(self._nodes.clock.monotonic_s(), _SILENCE, "no answer in time")

    def leave(self) -> None:
        """No longer a member: the client is closed when its last call has ended."""
        self._is_gone = True
        self._close_if_unused()

    def _strike(self, now_s: float, weight: int, why: str) -> None:
        self._strikes += weight
        if self._strikes >= _STRIKES_MAX:
            self._open(now_s, f"several calls in a row, the last: {why}")

    def _open(self, now_s: float, why: str) -> None:
        if not self._failures:
            log.warning("%s: %s", self, why)
        self._failures += 1
        self._open_until_s = now_s + self._pause_s()

    def _pause_s(self) -> float:
        longest_s = min(_OPEN_S_MAX, _OPEN_S * 2.0 ** min(self._failures - 1, 10))
        return longest_s * self._nodes.rng.uniform(0.5, 1.0)

    def _close_if_unused(self) -> None:
        with self._lock:
            if self._calls or self._client is None:
                return
            client, self._client = self._client, None
        self._nodes.disconnect(client)


class Nodes(Generic[T]):
    """The members of one role, by collection. Thread-safe."""

    def __init__(
        self,
        membership: Membership,
        connect: Callable[[str], T],
        *,
        clock: Clock,
        rng: random.Random,
        close: Callable[[T], None] | None = None,
    ) -> None:
        """connect: makes the client of an address, without waiting for a connection.

        close: lets go of a client. The membership is closed with the nodes.
        """
        self.connect, self.clock, self.rng = connect, clock, rng
        self._close = close
        self._membership = membership
        self._lock = threading.Lock()
        self._members = Members()
        self._nodes: dict[str, Node[T]] = {}
        self._orders: dict[str, tuple[Node[T], ...]] = {}

    def ordered(self, key: str) -> Sequence[Node[T]]:
        """All nodes, the owner of the key first; those that could not be reached last.

        Cost: 1 microsecond for a key that was asked for before and few nodes.
        """
        members = self._membership.members
        if members.version != self._members.version:
            self._adopt(members)
        found = self._orders.get(key)
        if found is None:
            found = self._order(key)
        if any(node._failures for node in found):
            return sorted(found, key=lambda node: node.is_open)
        return found

    @property
    def open_circuits(self) -> int:
        """How many of the nodes have failed and not answered since."""
        with self._lock:
            return sum(node._failures > 0 for node in self._nodes.values())

    def renew(self) -> None:
        """Make all clients anew, as the certificates are others; calls that run end on the old."""
        with self._lock:
            gone = list(self._nodes.values())
            self._nodes = {node.name: Node(self, node.name, node.address) for node in gone}
            self._orders = {}
        for node in gone:
            node.leave()

    def refresh(self) -> None:
        """A request failed: have the membership look again. Returns at once."""
        self._membership.refresh()

    def close(self) -> None:
        """After the last call."""
        self._membership.close()
        with self._lock:
            gone = list(self._nodes.values())
            self._nodes, self._orders = {}, {}
        for node in gone:
            node.leave()

    def disconnect(self, client: T) -> None:
        if self._close is not None:
            self._close(client)

    def _order(self, key: str) -> tuple[Node[T], ...]:
        with self._lock:
            names = rendezvous.order(key, self._nodes)
            found = tuple(self._nodes[name] for name in names)
            if len(self._orders) >= _ORDERS_MAX:
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = found
            return found

    def _adopt(self, members: Members) -> None:
        """Nodes for what is new; those at addresses that stay are kept, with their connections."""
        with self._lock:
            if members.version <= self._members.version:
                return  # Another thread was quicker.
            gone = dict(self._nodes)
            for name, address in members.addresses.items():
                known = self._nodes.get(name)
                if known is not None and known.address == address:
                    del gone[name]
                else:
                    self._nodes[name] = Node(self, name, address)
            for name in gone:
                if name not in members.addresses:
                    del self._nodes[name]
            self._members, self._orders = members, {}
        for node in gone.values():
            node.leave()
