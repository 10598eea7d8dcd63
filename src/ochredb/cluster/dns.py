"""Members by name service: each address that a host name has is a member.

An address is its own stable name: a process that comes back at another address is another member,
and its share of the collections moves. Where that matters, use `kubernetes:` or a list.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections.abc import Callable

from ochredb.clock import Clock
from ochredb.cluster.membership import Lookout, Members, address_of

log = logging.getLogger("ochredb.cluster")

_PERIOD_S = 5.0
_FIRST_WAIT_S = 2.0


def resolve(host: str, port: int) -> set[str]:
    """The addresses of a host, "host:port" each. Raises OSError. Blocks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {address_of(str(address[0]), port) for *_, address in found}


class DnsMembership:
    """`Membership` that resolves a name every few seconds, and when a request has failed."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        clock: Clock,
        rng: random.Random,
        resolve: Callable[[str, int], set[str]] = resolve,
    ) -> None:
        """Waits for the first answer, 2 seconds at most."""
        self._host, self._port, self._rng, self._resolve = host, port, rng, resolve
        self.members = Members()
        self._looked = threading.Event()
        self._fails = False
        self._lookout = Lookout("ochredb-dns", self._look, clock)
        self._lookout.start()
        self._looked.wait(_FIRST_WAIT_S)

    def refresh(self) -> None:
        self._lookout.hurry()

    def close(self) -> None:
        self._lookout.close()

    def _look(self) -> float:
        try:
            found = self._resolve(self._host, self._port)
        except OSError as error:
            if not self._fails:
                log.warning("%s cannot be resolved, going on with what was: %s", self._host, error)
            self._fails = True
        else:
            self._fails = False
            self.members = self.members.then({address: address for address in found})
        self._looked.set()
        return _PERIOD_S * self._rng.uniform(0.8, 1.2)
