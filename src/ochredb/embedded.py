"""A node inside this process behind the client's transport.

The only way from the library up to the services that run in a node: one import, made when the first
embedded client is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ochredb.api.exceptions import ChromaError, error_types
from ochredb.api.transport import API_PREFIX, Response
from ochredb.errors import OchreError

if TYPE_CHECKING:
    from ochredb_node.shared import SharedNode

_HEADERS = {"content-type": "application/json"}
_NO_RESET = Response(
    403, _HEADERS, b'{"error":"ChromaError","message":"Reset is disabled by config"}'
)


class EmbeddedTransport:
    """Calls the node's request handler: the answers a server gives, without sockets or copies."""

    def __init__(self, node: SharedNode, *, allow_reset: bool) -> None:
        self._node = node
        self._allow_reset = allow_reset

    def send(self, method: str, path: str, body: bytes | None = None, query: str = "") -> Response:
        # The node is shared; each client has its own permission.
        if not self._allow_reset and path == f"{API_PREFIX}/reset":
            return _NO_RESET
        try:
            return Response(*self._node.handle(method, path, query, _HEADERS, body or b""))
        except OchreError as error:
            raise _for_users(error) from error

    def close(self) -> None:
        self._node.close()


def open_transport(path: str | None, *, allow_reset: bool = False) -> EmbeddedTransport:
    """Open the node of a directory, or, for None, the process's node in memory.

    There is one node per directory and process, shared and counted: it stops when its last
    transport is closed, or by itself when the process ends. What is in memory lives as long as the
    process.

    Raises InvalidArgumentError for a directory that holds something else, ChromaError for one that
    cannot be used now.
    """
    from ochredb_node.shared import open_shared

    try:
        node = open_shared(path, allow_reset=True)
    except OchreError as error:
        raise _for_users(error) from error
    return EmbeddedTransport(node, allow_reset=allow_reset)


def _for_users(error: OchreError) -> ChromaError:
    """The exception that a client of a server would get."""
    return error_types.get(error.kind.chroma_name, ChromaError)(str(error))
