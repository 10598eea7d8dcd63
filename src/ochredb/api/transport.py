"""The seam between the client and whatever answers it: one method, bytes in, bytes out.

`HttpTransport` talks to a server; `ochredb.embedded` has the transport to a node in this process; a
test passes a function in a class of its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl

    import httpx

CONNECT_TIMEOUT_S = 10.0
API_PREFIX = "/api/v2"


@dataclass(frozen=True, slots=True)
class Response:
    """An answer, whatever its status. Header names are in lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Transport(Protocol):
    """Carries one request to a server and its answer back. Usable from any thread."""

    def send(self, method: str, path: str, body: bytes | None = None, query: str = "") -> Response:
        """Send and wait.

        method: in upper case. path: percent-encoded, with the /api/v2 prefix. body: JSON.
        query: percent-encoded, without the question mark.

        Raises ConnectionError if no answer comes; any answer is returned, not raised.
        """
        ...

    def close(self) -> None:
        """Release what is held; a second call does nothing."""
        ...


class HttpTransport:
    """HTTP/1.1, connections kept alive; opens them at the first request, and anew after a fork."""

    def __init__(
        self,
        host: str = "localhost",
        port: int = 8000,
        ssl: bool = False,
        headers: Mapping[str, str] | None = None,
        *,
        verify: bool | str = True,
        keepalive_s: float | None = 40.0,
        connections_max: int | None = None,
        keepalive_connections_max: int | None = None,
    ) -> None:
        self.url = base_url(host, port, ssl)
        self._headers = {**(headers or {}), "Content-Type": "application/json"}
        self._verify = verify
        self._keepalive_s = keepalive_s
        self._connections_max = connections_max
        self._keepalive_connections_max = keepalive_connections_max
        self._client: httpx.Client | None = None
        self._finalizer: weakref.finalize[[], HttpTransport] | None = None
        self._inherited: list[httpx.Client] = []
        self._lock = threading.Lock()
        self._closed = False
        _transports.add(self)

    def send(self, method: str, path: str, body: bytes | None = None, query: str = "") -> Response:
        import httpx

        client = self._client or self._open()
        url = f"{self.url}{path}?{query}" if query else f"{self.url}{path}"
        try:
            response = client.request(method, url, content=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ConnectionError(f"cannot connect to {self.url}: {error}") from error
        except httpx.TransportError as error:
            raise ConnectionError(
                f"lost the connection to {self.url}; whether the request took effect is unknown: "
                f"{error!r}"
            ) from error
        return Response(response.status_code, response.headers, response.content)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._client = None
            finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer()

    def _open(self) -> httpx.Client:
        import httpx  # A third of a second: only those who need it pay.

        with self._lock:
            if self._closed:
                raise RuntimeError("this client was closed")
            if self._client is None:
                self._client = httpx.Client(
                    headers=self._headers,
                    # Reading certificates takes 20 ms, of no use where nothing is encrypted.
                    verify=self._tls() if self.url.startswith("https:") else False,
                    # The server has the deadline; a large answer may take its time.
                    timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
                    limits=httpx.Limits(
                        max_connections=self._connections_max,
                        max_keepalive_connections=self._keepalive_connections_max,
                        keepalive_expiry=self._keepalive_s,
                    ),
                )
                # For those who never close: when this object goes, or the process ends.
                self._finalizer = weakref.finalize(self, self._client.close)
            return self._client

    def _tls(self) -> ssl.SSLContext | bool:
        if not isinstance(self._verify, str):
            return self._verify
        from ssl import create_default_context

        return create_default_context(cafile=self._verify)

    def _after_fork_in_child(self) -> None:
        # The parent goes on using these sockets. They are kept, not closed: closing an encrypted
        # one would say goodbye in the parent's name.
        self._lock = threading.Lock()
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        if self._client is not None:
            self._inherited.append(self._client)
            self._client = None


_transports: weakref.WeakSet[HttpTransport] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for transport in list(_transports):
        transport._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def base_url(host: str, port: int, ssl: bool) -> str:
    """The address before /api/v2. `host` may be a name or a whole URL (its port wins).

    Raises ValueError if `host` is neither.
    """
    if "/" not in host:
        bracketed = f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
        return f"{'https' if ssl else 'http'}://{bracketed}:{port}"
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"host must be a name, or a URL with http:// or https://, not {host!r}")
    scheme = "https" if ssl else parts.scheme
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix(API_PREFIX)}"
