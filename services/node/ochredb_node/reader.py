"""A reader process: answers reads over connections that its server hands it, and nothing else.

It has the frontend's and the query role on the server's own catalog and files, so what it answers
is what the server would (I4, I5). See `ochredb_frontend.sharing` and decision 0062.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from ochredb.clock import SystemClock
from ochredb.errors import OchreError, Unavailable
from ochredb_frontend.app import App
from ochredb_frontend.channel import Channel
from ochredb_frontend.reading import ReaderProtocol, Reading
from ochredb_frontend.server import Server, serve
from ochredb_node.cli_common import start_failed
from ochredb_node.config import NodeConfig
from ochredb_node.memory import ShortCollections
from ochredb_node.node import Node
from ochredb_node.peers import Peers
from ochredb_node.roles import Role
from ochredb_node.settings import READER_VARIABLE
from ochredb_query.prefetch import Prefetcher


class _NoLog:
    """What writes would go to: connections with a write go back to the server before that."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise Unavailable("a reader process takes no writes")

    append = submit = append_evaluated = record_nothing = repeated = _refuse


class _Mender:
    """The compactor, which is the server's: it is told what this process found damaged."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def compact_now(self, collection_id: str) -> None:
        raise Unavailable(f"a reader process does not compact collection {collection_id}")

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        """False: it is rebuilt, or was, by the server."""
        del step
        self._tell(part_id)
        return False

    def hint(self, _collection_id: str, _last_offset: int, /) -> None:
        """The server hears of its own writes."""


def read(config: NodeConfig, log_level: str, likeness: str) -> int:
    """Serve reads until the server's channel ends. Returns the exit status.

    likeness: see `readers`; another one than the server's is a failed start.
    """
    number, _, wanted = os.environ.pop(READER_VARIABLE).partition(":")
    sock = socket.socket(fileno=int(number))
    sock.set_inheritable(False)
    if likeness != wanted:
        return start_failed(Unavailable("settings or packages have changed since the server began"))
    end = Channel(sock)
    clock = SystemClock()
    collections = ShortCollections(clock)
    mender = _Mender(lambda part_id: reading.damaged(part_id))
    node = Node(
        replace(config, roles=frozenset({Role.FRONTEND, Role.QUERY})),
        clock=clock,
        peers=Peers(log=_NoLog(), compactor=mender),
        tidy=lambda idle: collections.tidy(idle=idle),
    )
    try:
        node.start()
    except (OchreError, OSError) as error:
        return start_failed(error)
    collections.start()
    app = App(node.frontend)
    follower = Prefetcher(node.query.follow, "operation {number} of collection {name}")
    reading = Reading(
        end, app.metrics, clock, on_append=follower.add, open_collection=node.query.open
    )
    try:
        serve(
            Server(
                app,
                None,
                on_ready=_say_nothing,
                log_level=log_level,
                companion=reading,
                protocol=partial(ReaderProtocol, end),
            )
        )
    finally:
        follower.close()
        node.close()
    return 0


def _say_nothing(_url: str) -> None:
    """It has no address of its own."""
