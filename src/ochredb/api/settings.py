"""What a user may configure, under Chroma's names. Data only."""

from __future__ import annotations

import base64
import enum
import warnings
from dataclasses import dataclass, fields
from typing import Any


class TokenTransportHeader(enum.StrEnum):
    """The header that carries a token."""

    AUTHORIZATION = "Authorization"
    X_CHROMA_TOKEN = "X-Chroma-Token"


@dataclass(init=False)
class Settings:
    """Options of a client. Those of Chroma that mean nothing here are accepted, without effect.

    allow_reset: whether `reset()` may delete everything; for embedded nodes, a server has its own.
    is_persistent, persist_directory: what `Client(settings)` and `AdminClient(settings)` open.
    chroma_server_*: the server that they connect to, if a host is given.
    chroma_server_ssl_verify: False, or a file of certificates to trust.
    chroma_client_auth_provider: "TokenAuthClientProvider" or "BasicAuthClientProvider", possibly
        with a module in front.
    chroma_client_auth_credentials: the token, or "user:password".
    chroma_http_keepalive_secs: how long an idle connection is kept.
    """

    allow_reset: bool = False
    is_persistent: bool = False
    persist_directory: str = "./chroma"
    chroma_server_host: str | None = None
    chroma_server_http_port: int | None = None
    chroma_server_ssl_enabled: bool | None = False
    chroma_server_ssl_verify: bool | str | None = None
    chroma_server_headers: dict[str, str] | None = None
    chroma_client_auth_provider: str | None = None
    chroma_client_auth_credentials: str | None = None
    chroma_auth_token_transport_header: str | None = None
    chroma_http_keepalive_secs: float | None = 40.0
    chroma_http_max_connections: int | None = None
    chroma_http_max_keepalive_connections: int | None = None
    anonymized_telemetry: bool = False  # Accepted; nothing is ever sent.

    def __init__(self, **values: Any) -> None:
        known = {field.name: field.default for field in fields(self)}
        for name, default in known.items():
            setattr(self, name, values.get(name, default))
        unknown = sorted(
            name
            for name in values.keys() - known.keys()
            if not name.startswith(("chroma_", "migrations")) and name not in _IGNORED
        )
        if unknown:
            # A warning, since Chroma takes any name; a misspelt option must not go unnoticed.
            warnings.warn(f"unknown settings have no effect: {', '.join(unknown)}", stacklevel=2)

    def authentication_headers(self) -> dict[str, str]:
        """The headers that carry the credentials. Raises ValueError on an unknown provider."""
        provider, secret = self.chroma_client_auth_provider, self.chroma_client_auth_credentials
        if provider is None:
            return {}
        if secret is None:
            raise ValueError("chroma_client_auth_credentials must be set for an auth provider")
        if provider.endswith("TokenAuthClientProvider"):
            header = TokenTransportHeader(
                self.chroma_auth_token_transport_header or TokenTransportHeader.AUTHORIZATION
            )
            if header is TokenTransportHeader.AUTHORIZATION:
                return {header.value: f"Bearer {secret}"}
            return {header.value: secret}
        if provider.endswith("BasicAuthClientProvider"):
            return {"Authorization": "Basic " + base64.b64encode(secret.encode()).decode()}
        raise ValueError(f"unknown chroma_client_auth_provider: {provider}")


_IGNORED = frozenset({"environment", "tenant_id", "topic_namespace", "worker_memberlist_name"})
