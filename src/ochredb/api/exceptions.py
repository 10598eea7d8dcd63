"""What the client raises. Names and meanings are Chroma's, so existing handlers keep working.

    ChromaError                     the server refused; the message is the server's
    ├── InvalidArgumentError  400   the request is wrong (also a ValueError)
    ├── InvalidDimensionException   an embedding has the wrong length
    ├── InvalidUUIDError            an id that should be a UUID is none
    ├── DuplicateIDError            one request names an id twice
    ├── IDAlreadyExistsError  409   the id is taken
    ├── QuotaError            400   a published quota is used up
    ├── AuthorizationError    401   no valid credential was sent
    ├── ChromaAuthError       403   the credential does not allow this
    ├── NotFoundError         404   no such tenant, database or collection
    ├── UniqueConstraintError 409   the name is taken
    ├── BatchSizeExceededError 413  more records than one request may carry
    ├── RateLimitError        429   too much at once: pause, then retry
    ├── InternalError         500   a bug in the server
    ├── VersionMismatchError  500   client and server do not understand each other
    └── InvalidHTTPVersion          the wrong HTTP version

Arguments that are wrong on their face (a number as an id, lists of unequal length) raise ValueError
or TypeError before anything is sent, as Chroma's client does. A lost connection raises
ConnectionError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import orjson


class ChromaError(Exception):
    """Root of every refusal by a server. `trace_id` names the request in the server's log."""

    trace_id: str | None = None
    _code: ClassVar[int] = 400
    _name: ClassVar[str] = "ChromaError"

    def code(self) -> int:
        """The HTTP status that belongs to this class."""
        return self._code

    def message(self) -> str:
        return ", ".join(str(argument) for argument in self.args)

    @classmethod
    def name(cls) -> str:
        """The name on the wire."""
        return cls._name


class InvalidArgumentError(ChromaError, ValueError):
    """The request is wrong.

    Also a ValueError: callers need not know which of the two sides found the mistake.
    """

    _name = "InvalidArgumentError"


class InvalidDimensionException(ChromaError):
    """An embedding's length is not the collection's."""

    _name = "InvalidDimension"


class InvalidUUIDError(ChromaError):
    """Not a UUID."""

    _name = "InvalidUUID"


class DuplicateIDError(ChromaError):
    """One request names an id twice."""

    _name = "DuplicateID"


class IDAlreadyExistsError(ChromaError):
    """The id is taken."""

    _code = 409
    _name = "IDAlreadyExists"


class QuotaError(ChromaError):
    """A published quota is used up."""

    _name = "QuotaError"


class AuthorizationError(ChromaError):
    """No valid credential was sent."""

    _code = 401
    _name = "AuthorizationError"


class ChromaAuthError(ChromaError):
    """The credential does not allow this."""

    _code = 403
    _name = "AuthError"


class NotFoundError(ChromaError):
    """No such tenant, database, collection or record."""

    _code = 404
    _name = "NotFoundError"


class UniqueConstraintError(ChromaError):
    """The name is taken."""

    _code = 409
    _name = "UniqueConstraintError"


class BatchSizeExceededError(ChromaError):
    """More records, or bytes, than one request may carry."""

    _code = 413
    _name = "BatchSizeExceededError"


class RateLimitError(ChromaError):
    """Too much at once: pause, then retry."""

    _code = 429
    _name = "RateLimitError"


class InternalError(ChromaError):
    """A bug in the server."""

    _code = 500
    _name = "InternalError"


class VersionMismatchError(ChromaError):
    """Client and server do not understand each other."""

    _code = 500
    _name = "VersionMismatchError"


class InvalidHTTPVersion(ChromaError):
    """The wrong HTTP version."""

    _name = "InvalidHTTPVersion"


_classes: list[type[ChromaError]] = [ChromaError, *ChromaError.__subclasses__()]
error_types: dict[str, type[ChromaError]] = {cls.name(): cls for cls in _classes}

# The server says only "ChromaError" for some statuses; the status still tells which class it is.
_by_status: dict[int, type[ChromaError]] = {
    401: AuthorizationError,
    409: UniqueConstraintError,
    413: BatchSizeExceededError,
    429: RateLimitError,
}


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> ChromaError:
    """The exception for an answer with a status of 400 or more; never fails, whatever the body."""
    name, text = "ChromaError", ""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None  # A proxy's page, or plain text: shown as it is, below.
    if isinstance(document, dict) and "error" in document:
        name = str(document["error"])
        text = str(document.get("message", ""))
    cls = error_types.get(name, ChromaError)
    if cls is ChromaError:
        cls = _by_status.get(status, ChromaError)
    error = cls(text or f"HTTP {status}: {body[:1000].decode(errors='replace') or 'empty answer'}")
    error.trace_id = headers.get("chroma-trace-id")
    return error
