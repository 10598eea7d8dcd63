"""Connections that are closed with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ochredb.testing.server_process import ServerProcess

from .support import Client

Connect = Callable[[ServerProcess], Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """A new client of a server."""
    clients: list[Client] = []

    def one(server: ServerProcess) -> Client:
        clients.append(Client(server.port))
        return clients[-1]

    yield one
    for client in clients:
        client.close()
