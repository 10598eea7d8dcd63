"""JSON over a transport: paths, bodies, batch limits, and errors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import orjson
from numpy.typing import NDArray

from ochredb.api.exceptions import error_from_response
from ochredb.api.transport import API_PREFIX, Transport
from ochredb.api.types import Embeddings


class Rest:
    """One client's conversation with one server. Usable from any thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._checks: dict[str, Any] | None = None
        self._closed = False

    def call(
        self,
        method: str,
        *segments: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make one request and return the answer's JSON.

        segments: the path after /api/v2, not encoded. query: values of None are left out.

        Raises a ChromaError if the server refuses, ValueError if `body` has no JSON form (text that
        is no valid Unicode, an integer beyond 64 bits).
        """
        if self._closed:
            raise RuntimeError("this client was closed")
        path = "/".join((API_PREFIX, *(quote(segment, safe="") for segment in segments)))
        parameters = {key: value for key, value in (query or {}).items() if value is not None}
        response = self._transport.send(
            method, path, None if body is None else encode(body), urlencode(parameters)
        )
        if response.status >= 400:
            raise error_from_response(response.status, response.headers, response.body)
        return orjson.loads(response.body)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.close()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def batch_size_max(self) -> int:
        """Records that one request may carry; -1 if the server does not say."""
        return int(self._pre_flight_checks().get("max_batch_size", -1))

    def encode_embeddings(self, embeddings: Embeddings) -> Sequence[Any]:
        """Base64 of little-endian float32 where the server takes it, else arrays of numbers."""
        if not self._pre_flight_checks().get("supports_base64_encoding", False):
            return embeddings
        from pybase64 import b64encode_as_string

        return [b64encode_as_string(_little_endian(row)) for row in embeddings]

    def _pre_flight_checks(self) -> dict[str, Any]:
        if self._checks is None:
            self._checks = self.call("GET", "pre-flight-checks")
        return self._checks


def encode(body: Mapping[str, Any]) -> bytes:
    """Raises ValueError, naming what cannot be sent."""
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:
        raise ValueError(f"the request cannot be sent as JSON: {error}") from error


def _little_endian(row: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(row, dtype="<f4").tobytes()
