"""The members of a role: stable names and the addresses where they can be reached now.

membership = open_membership("static:query-0=10.0.0.1:8100,query-1=10.0.0.2:8100", ...)

Names decide who owns what, so a process that comes back at another address under its old name finds
its caches still in use. A membership may be stale or wrong at any time: whoever uses it tries the
next member, asks for a fresh look, and tries again.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from ochredb.clock import Clock
from ochredb.errors import InvalidArgument

_PERIOD_S_MIN = 0.5
_JOIN_S = 1.0
_NO_ADDRESSES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Members:
    """One view of a role. version: grows when the addresses change.

    addresses: stable name -> "host:port", an IPv6 host in brackets.
    """

    version: int = 0
    addresses: Mapping[str, str] = field(default_factory=lambda: _NO_ADDRESSES)

    def then(self, addresses: Mapping[str, str]) -> Members:
        """The next view. Nobody at all is taken for a mistake: the last that were known stay."""
        if not addresses or addresses == self.addresses:
            return self
        return Members(self.version + 1, MappingProxyType(dict(addresses)))


class Membership(Protocol):
    """Thread-safe. Never raises; what it cannot find out it logs, and goes on with what it knew."""

    @property
    def members(self) -> Members:
        """The last known; no I/O."""
        ...

    def refresh(self) -> None:
        """A request failed: look again soon. Returns at once."""
        ...

    def close(self) -> None: ...


class StaticMembership:
    """A list that never changes."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.members = Members().then(addresses)

    def refresh(self) -> None:
        """There is nothing to look at."""

    def close(self) -> None:
        """There is nothing to close."""


class Lookout:
    """A thread that looks again and again: after a time, or soon after somebody asked for it.

    look: looks, and returns the seconds until it is to look again, None: when it is asked to; it
        does not raise.
    period_s: at least, from the beginning of one look to that of the next.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[], float | None],
        clock: Clock,
        period_s: float = _PERIOD_S_MIN,
    ) -> None:
        self._look, self._clock, self._period_s = look, clock, period_s
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def start(self) -> None:
        self._thread.start()

    def hurry(self) -> None:
        """Look again soon: not twice in `period_s`, however many ask for it."""
        self._wanted.set()

    def close(self, interrupt: Callable[[], None] = lambda: None) -> None:
        """Returns when it does not look any more, or sits in a call for longer than a second.

        interrupt: ends such a call.
        """
        self._closed.set()
        self._wanted.set()
        interrupt()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._closed.is_set():
            started_s = self._clock.monotonic_s()
            pause_s = self._look()
            self._wanted.wait(pause_s)
            self._wanted.clear()
            self._closed.wait(max(0.0, self._period_s - (self._clock.monotonic_s() - started_s)))


def open_membership(setting: str, *, clock: Clock, rng: random.Random) -> Membership:
    """What a setting such as `query_nodes` names; looks for its members in a thread if it must.

    static:NAME=HOST:PORT,NAME=HOST:PORT   a list
    dns:HOST:PORT                          each address of HOST is a member, named by its address
    kubernetes:[NAMESPACE/]SERVICE:PORT    the ready pods behind a service; PORT by number or name

    Raises InvalidArgument, naming what is wrong.
    """
    kind, _, rest = setting.partition(":")
    if kind == "static":
        return StaticMembership(_static(setting, rest))
    if kind == "dns":
        from ochredb.cluster.dns import DnsMembership

        return DnsMembership(*split_address(setting, rest), clock=clock, rng=rng)
    if kind == "kubernetes":
        from ochredb.cluster.endpoint_slices import open_kubernetes

        return open_kubernetes(setting, rest, clock=clock, rng=rng)
    raise InvalidArgument(
        f"members {setting!r}: must begin with static:, dns: or kubernetes:, not {kind!r}"
    )


def _static(setting: str, text: str) -> dict[str, str]:
    addresses: dict[str, str] = {}
    for item in text.split(","):
        name, equals, address = item.strip().partition("=")
        if not equals or not name:
            raise InvalidArgument(f"members {setting!r}: {item!r} is not NAME=HOST:PORT")
        if name in addresses:
            raise InvalidArgument(f"members {setting!r}: the name {name!r} is there twice")
        addresses[name] = address_of(*split_address(setting, address))
    return addresses


def split_address(setting: str, text: str) -> tuple[str, int]:
    """Host, without brackets, and port. Raises InvalidArgument."""
    host, colon, port = text.strip().rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host):
        raise InvalidArgument(f"members {setting!r}: {text!r} is not HOST:PORT")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument(f"members {setting!r}: the port {port!r} is not 1 to 65535")
    return bare, int(port)


def address_of(host: str, port: int) -> str:
    """ "host:port", an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
