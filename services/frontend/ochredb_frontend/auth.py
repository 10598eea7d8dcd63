"""Who may talk to this server: one token, given in either of two headers."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from ochredb.errors import Unauthenticated

# Open to everybody: health checks and documents, which reveal nothing that is stored.
OPEN_PATHS = frozenset(
    (
        "/api/v2",
        "/api/v2/heartbeat",
        "/api/v2/healthcheck",
        "/api/v2/version",
        "/docs",
        "/openapi.json",
    )
)


class TokenAuth:
    """Checks `Authorization: Bearer TOKEN` and `X-Chroma-Token: TOKEN`; None lets all pass."""

    def __init__(self, token: str | None) -> None:
        self._expected = None if token is None else token.encode()

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises Unauthenticated. The comparison takes the same time wherever tokens differ."""
        if self._expected is None or path in OPEN_PATHS:
            return
        given = headers.get("x-chroma-token")
        if given is None:
            scheme, _, credential = headers.get("authorization", "").partition(" ")
            given = credential.strip() if scheme.lower() == "bearer" else ""
        if not given:
            raise Unauthenticated("This server needs a token: none was given")
        if not hmac.compare_digest(given.encode(), self._expected):
            raise Unauthenticated("This server needs a token: the one given is not valid")
