"""Errors on their way between processes: the caller raises what the other side raised.

A servicer's error travels in the trailing metadata: its class, and those above it, its message and
its detail. A call that failed without that failed on the way, which the status code tells: then
`detail["unreachable"]` is True if the other side was not reached or did not answer.
"""

from __future__ import annotations

from typing import Any

import grpc
import orjson

from ochredb import errors
from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import (
    DeadlineExceeded,
    Internal,
    OchreError,
    OutcomeUnknown,
    OutOfMemory,
    TooLarge,
    Unavailable,
    Unimplemented,
)
from ochredb.proto.v1.common_pb2 import Failure

FAILURE_KEY = "ochredb-failure-bin"
UNREACHABLE = "unreachable"
# Trailers above 8 KiB may be refused by the other side; these travel in base64.
_MESSAGE_BYTES_MAX = 2_000
_DETAIL_BYTES_MAX = 2_000
_SUMMARY_CHARS_MAX = 200

CLASSES: dict[str, type[OchreError]] = {
    name: found
    for name, found in [*vars(errors).items(), (Cancelled.__name__, Cancelled)]
    if isinstance(found, type) and issubclass(found, OchreError)
}

# What grpc says of a call that no connection was found for: not a byte of it was sent.
_NOT_SENT = (
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
    "empty address list",
)


def of_exception(error: BaseException) -> OchreError:
    """Whatever a servicer failed with, as an error of the tree: what is not in it is a bug."""
    if isinstance(error, OchreError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory("not enough memory for this now; retry later")
    return Internal(f"{type(error).__name__}: {error}")


def encode(error: OchreError) -> bytes:
    """The trailer. A detail too long for one is left out, but for the pause before a retry."""
    classes = [
        each.__name__
        for each in type(error).__mro__
        if issubclass(each, OchreError) and each is not OchreError
    ]
    # Whom our side could not reach, the caller could; it has not even tried.
    detail = {name: value for name, value in error.detail.items() if name != UNREACHABLE}
    detail_json = orjson.dumps(detail, default=str) if detail else b""
    if len(detail_json) > _DETAIL_BYTES_MAX:
        kept = {name: detail[name] for name in ("retry_after_s",) if name in detail}
        detail_json = orjson.dumps(kept, default=str)
    failure = Failure(
        classes=classes or [Internal.__name__],
        message=_cut(str(error)),
        detail_json=detail_json,
    )
    return failure.SerializeToString()


def _cut(message: str) -> str:
    return message.encode(errors="replace")[:_MESSAGE_BYTES_MAX].decode(errors="ignore")


def decode(data: bytes) -> OchreError:
    """The error again: of the same class, or of the nearest above it that is known here."""
    failure = Failure.FromString(data)
    kind = next((CLASSES[name] for name in failure.classes if name in CLASSES), Internal)
    detail: dict[str, Any] = orjson.loads(failure.detail_json) if failure.detail_json else {}
    return kind(failure.message, **detail)


def summary(error: OchreError) -> str:
    """For the status line, which tools show; in ASCII: all else would take three times as much."""
    text = f"{type(error).__name__}: {error}"[:_SUMMARY_CHARS_MAX]
    return text.encode("ascii", "replace").decode()


def of_call(call: Any, cancel: Cancel, *, writes: bool) -> OchreError:
    """What a failed call means to its caller.

    call: a finished one, of grpc. writes: it may have changed something, so that a lost answer
    leaves the outcome unknown.
    """
    for key, value in call.trailing_metadata() or ():
        if key == FAILURE_KEY:
            return decode(value)
    code, details = call.code(), call.details() or ""
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            if writes:
                return OutcomeUnknown("the log did not answer in time; the write may have happened")
            return DeadlineExceeded("the request ran out of time")
        case grpc.StatusCode.CANCELLED:
            try:
                cancel.check()
            except OchreError as reason:
                if writes:
                    return OutcomeUnknown(f"{reason}; the write may have happened")
                return reason
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return TooLarge(f"a message between processes is too large: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return Unimplemented(f"the other process does not offer this: {details}")
    text = f"{code.name}: {details}"
    if writes and not (code is grpc.StatusCode.UNAVAILABLE and details.startswith(_NOT_SENT)):
        return OutcomeUnknown(
            f"the answer was lost, the write may have happened: {text}", unreachable=True
        )
    return Unavailable(f"the other process cannot be reached: {text}", unreachable=True)
