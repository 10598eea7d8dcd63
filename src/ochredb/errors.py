"""Every error that OchreDB raises on purpose, and what its receiver should do about it.

    OchreError
    ├── InvalidArgument     400  the request is wrong; mend it
    │   ├── Unprocessable   422  the JSON has the wrong shape (HTTP only; gRPC: INVALID_ARGUMENT)
    │   └── OtherFormat     400  the whole store has a newer format, or may not be migrated
    ├── Unauthenticated     401  no valid credential was given
    ├── Forbidden           403  the credential, or a read-only store, does not allow this
    ├── NotFound            404  no such tenant, database, collection or object
    ├── AlreadyExists       409  the name or key is taken
    ├── Conflict            412  somebody else changed it first; read again, then retry
    ├── TooLarge            413  the request is above a published limit
    ├── Exhausted           429  overload or backlog; retry after a pause (`retry_after_s`)
    ├── Gone                503  the snapshot is too old: plan again on a new one
    ├── Internal            500  a bug
    ├── Corrupt             500  stored bytes fail their checksum
    ├── Unimplemented       501  not offered (yet)
    ├── Unavailable         503  a dependency failed
    │   ├── OutcomeUnknown  503  it may have happened: repeat with the same idempotency key
    │   ├── OutOfMemory     503  the process has no memory for it now; retry, or ask for less
    │   ├── NewerFormat     503  written by a newer OchreDB: run that one
    │   └── StorageFull     507  the disk is full; deletes are still taken, other writes refused
    └── DeadlineExceeded    504  out of time

`chroma_name` is the error name on the wire (rest-contract section 2). Anything outside this tree
that reaches an edge is a bug and is reported as Internal.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any


class Kind(enum.Enum):
    """What the caller should do next. A new member needs a decision record."""

    #                  gRPC status            HTTP  retry  Chroma's error name
    INVALID = ("INVALID_ARGUMENT", 400, False, "InvalidArgumentError")
    UNPROCESSABLE = ("INVALID_ARGUMENT", 422, False, "ChromaError")
    UNAUTHENTICATED = ("UNAUTHENTICATED", 401, False, "AuthorizationError")
    FORBIDDEN = ("PERMISSION_DENIED", 403, False, "ChromaError")
    NOT_FOUND = ("NOT_FOUND", 404, False, "NotFoundError")
    EXISTS = ("ALREADY_EXISTS", 409, False, "ChromaError")
    CONFLICT = ("ABORTED", 412, True, "ChromaError")
    TOO_LARGE = ("INVALID_ARGUMENT", 413, False, "BatchSizeExceededError")
    EXHAUSTED = ("RESOURCE_EXHAUSTED", 429, True, "RateLimitError")
    INTERNAL = ("INTERNAL", 500, False, "InternalError")
    CORRUPT = ("DATA_LOSS", 500, False, "InternalError")
    UNIMPLEMENTED = ("UNIMPLEMENTED", 501, False, "ChromaError")
    UNAVAILABLE = ("UNAVAILABLE", 503, True, "ChromaError")
    TIMEOUT = ("DEADLINE_EXCEEDED", 504, True, "ChromaError")
    STORAGE_FULL = ("RESOURCE_EXHAUSTED", 507, True, "ChromaError")

    def __init__(self, grpc: str, http: int, retryable: bool, chroma_name: str) -> None:
        self.grpc, self.http, self.retryable = grpc, http, retryable
        self.chroma_name = chroma_name


class OchreError(Exception):
    """Root of every error raised on purpose. `detail` is machine-readable context."""

    kind: Kind = Kind.INTERNAL

    def __init__(self, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.detail = detail


class InvalidArgument(OchreError):
    """The request is wrong; nothing was changed."""

    kind = Kind.INVALID


class Unprocessable(InvalidArgument):
    """The JSON document has the wrong shape; nothing was changed."""

    kind = Kind.UNPROCESSABLE


class Unauthenticated(OchreError):
    """No valid credential was given."""

    kind = Kind.UNAUTHENTICATED


class Forbidden(OchreError):
    """The credential, or a store that is open for reading only, does not allow this."""

    kind = Kind.FORBIDDEN


class NotFound(OchreError):
    """No such tenant, database, collection or object."""

    kind = Kind.NOT_FOUND


class AlreadyExists(OchreError):
    """The name or key is taken; nothing was written."""

    kind = Kind.EXISTS


class Conflict(OchreError):
    """Another writer changed it first: read it again, then retry."""

    kind = Kind.CONFLICT


class TooLarge(OchreError):
    """The request is above a published limit."""

    kind = Kind.TOO_LARGE


class Exhausted(OchreError):
    """Overload or backlog: retry after `retry_after_s` seconds."""

    kind = Kind.EXHAUSTED

    def __init__(self, message: str, *, retry_after_s: float = 1.0, **detail: Any) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **detail)
        self.retry_after_s = retry_after_s


class Gone(OchreError):
    """What a snapshot names is not there any more: it is too old, plan again on a new one."""

    kind = Kind.UNAVAILABLE


class Internal(OchreError):
    """A bug."""

    kind = Kind.INTERNAL


class Corrupt(OchreError):
    """Stored bytes fail their checksum; they are not served."""

    kind = Kind.CORRUPT


class Unimplemented(OchreError):
    """Not offered by this server."""

    kind = Kind.UNIMPLEMENTED


class Unavailable(OchreError):
    """A dependency failed; retry after a pause."""

    kind = Kind.UNAVAILABLE


class OutcomeUnknown(Unavailable):
    """The write may or may not have happened: repeat it with the same idempotency key."""


class OtherFormat(InvalidArgument):
    """A whole store of a format that cannot be read here: nothing is wrong with it."""


class NewerFormat(Unavailable):
    """Bytes in a format that this release does not know: they are not damaged, it is too old."""


def newer_message(what: str, found: int, known: int) -> str:
    """What is refused, both formats, and what to do."""
    return (
        f"{what} has format version {found}; this OchreDB reads up to {known}: "
        "install a newer OchreDB"
    )


class OutOfMemory(Unavailable):
    """The process has no memory for it now; nothing was changed."""


class StorageFull(Unavailable):
    """The disk is full; nothing was changed. It ends by itself when there is space again."""

    kind = Kind.STORAGE_FULL


class DeadlineExceeded(OchreError):
    """The request ran out of time."""

    kind = Kind.TIMEOUT


if TYPE_CHECKING:
    # `chromadb.errors.NotFoundError` and the like: the client's exceptions, Chroma's path.
    from ochredb.api.exceptions import AuthorizationError as AuthorizationError
    from ochredb.api.exceptions import BatchSizeExceededError as BatchSizeExceededError
    from ochredb.api.exceptions import ChromaAuthError as ChromaAuthError
    from ochredb.api.exceptions import ChromaError as ChromaError
    from ochredb.api.exceptions import DuplicateIDError as DuplicateIDError
    from ochredb.api.exceptions import IDAlreadyExistsError as IDAlreadyExistsError
    from ochredb.api.exceptions import InternalError as InternalError
    from ochredb.api.exceptions import InvalidArgumentError as InvalidArgumentError
    from ochredb.api.exceptions import InvalidDimensionException as InvalidDimensionException
    from ochredb.api.exceptions import InvalidHTTPVersion as InvalidHTTPVersion
    from ochredb.api.exceptions import InvalidUUIDError as InvalidUUIDError
    from ochredb.api.exceptions import NotFoundError as NotFoundError
    from ochredb.api.exceptions import QuotaError as QuotaError
    from ochredb.api.exceptions import RateLimitError as RateLimitError
    from ochredb.api.exceptions import UniqueConstraintError as UniqueConstraintError
    from ochredb.api.exceptions import VersionMismatchError as VersionMismatchError
else:

    def __getattr__(name: str) -> Any:
        from ochredb.api import exceptions

        found = vars(exceptions).get(name)
        if isinstance(found, type) and issubclass(found, exceptions.ChromaError):
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
