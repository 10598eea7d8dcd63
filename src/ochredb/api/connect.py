"""Settings in, transport out."""

from __future__ import annotations

from ochredb.api.settings import Settings
from ochredb.api.transport import HttpTransport, Transport

DEFAULT_PORT = 8000


def connect(settings: Settings) -> Transport:
    """HTTP if the settings name a host, else a node in this process, on disk or in memory."""
    if settings.chroma_server_host is None:
        from ochredb.embedded import open_transport

        path = settings.persist_directory if settings.is_persistent else None
        return open_transport(path, allow_reset=settings.allow_reset)
    verify = settings.chroma_server_ssl_verify
    return HttpTransport(
        settings.chroma_server_host,
        int(settings.chroma_server_http_port or DEFAULT_PORT),
        bool(settings.chroma_server_ssl_enabled),
        {
            "User-Agent": "OchreDB Python client",
            **(settings.chroma_server_headers or {}),
            **settings.authentication_headers(),
        },
        verify=True if verify is None else verify,
        keepalive_s=settings.chroma_http_keepalive_secs,
        connections_max=settings.chroma_http_max_connections,
        keepalive_connections_max=settings.chroma_http_max_keepalive_connections,
    )
