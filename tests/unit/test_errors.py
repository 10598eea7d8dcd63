"""The errors, pinned: what a caller sees of each must not change by accident."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import ochredb
from ochredb import errors
from ochredb.errors import Exhausted, Kind, OchreError

TREE = """
OchreError INTERNAL
    AlreadyExists EXISTS
    Cancelled INTERNAL
    Conflict CONFLICT
        Swept CONFLICT
    Corrupt CORRUPT
        Damage CORRUPT
        Unfoldable CORRUPT
    DeadlineExceeded TIMEOUT
    Exhausted EXHAUSTED
    Forbidden FORBIDDEN
    Gone UNAVAILABLE
    Internal INTERNAL
    InvalidArgument INVALID
        OtherFormat INVALID
        Unprocessable UNPROCESSABLE
    NotFound NOT_FOUND
    TooLarge TOO_LARGE
    Unauthenticated UNAUTHENTICATED
    Unavailable UNAVAILABLE
        Aborted UNAVAILABLE
        Busy UNAVAILABLE
        NewerFormat UNAVAILABLE
        OutOfMemory UNAVAILABLE
        OutcomeUnknown UNAVAILABLE
        StorageFull STORAGE_FULL
    Unimplemented UNIMPLEMENTED
"""
# name: gRPC status, HTTP status, retryable, Chroma's error name.
KINDS = {
    "INVALID": ("INVALID_ARGUMENT", 400, False, "InvalidArgumentError"),
    "UNPROCESSABLE": ("INVALID_ARGUMENT", 422, False, "ChromaError"),
    "UNAUTHENTICATED": ("UNAUTHENTICATED", 401, False, "AuthorizationError"),
    "FORBIDDEN": ("PERMISSION_DENIED", 403, False, "ChromaError"),
    "NOT_FOUND": ("NOT_FOUND", 404, False, "NotFoundError"),
    "EXISTS": ("ALREADY_EXISTS", 409, False, "ChromaError"),
    "CONFLICT": ("ABORTED", 412, True, "ChromaError"),
    "TOO_LARGE": ("INVALID_ARGUMENT", 413, False, "BatchSizeExceededError"),
    "EXHAUSTED": ("RESOURCE_EXHAUSTED", 429, True, "RateLimitError"),
    "INTERNAL": ("INTERNAL", 500, False, "InternalError"),
    "CORRUPT": ("DATA_LOSS", 500, False, "InternalError"),
    "UNIMPLEMENTED": ("UNIMPLEMENTED", 501, False, "ChromaError"),
    "UNAVAILABLE": ("UNAVAILABLE", 503, True, "ChromaError"),
    "TIMEOUT": ("DEADLINE_EXCEEDED", 504, True, "ChromaError"),
    "STORAGE_FULL": ("RESOURCE_EXHAUSTED", 507, True, "ChromaError"),
}


def _drawn(error: type[OchreError], depth: int = 0) -> list[str]:
    lines = [f"{'    ' * depth}{error.__name__} {error.kind.name}"]
    mine = [child for child in error.__subclasses__() if child.__module__.startswith("ochredb.")]
    for child in sorted(mine, key=lambda item: item.__name__):
        lines += _drawn(child, depth + 1)
    return lines


def test_the_tree_is_pinned() -> None:
    """Also for errors that the library's modules add near their use."""
    for module in pkgutil.walk_packages(ochredb.__path__, "ochredb."):
        if not module.name.startswith(("ochredb.catalog.migrations", "ochredb.testing")):
            importlib.import_module(module.name)
    assert _drawn(OchreError) == TREE.strip().splitlines()


def test_the_docstring_draws_every_public_error() -> None:
    public = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, OchreError)
    }
    assert {name for name in public if name not in (errors.__doc__ or "")} == set()


def test_the_kinds_are_pinned_and_none_is_an_alias() -> None:
    """Two kinds with equal rows would silently become one."""
    assert len(Kind) == len(Kind.__members__) == len(KINDS) == 15
    found = {kind.name: (kind.grpc, kind.http, kind.retryable, kind.chroma_name) for kind in Kind}
    assert found == KINDS


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
def test_statuses_are_possible(kind: Kind) -> None:
    assert 400 <= kind.http <= 507
    assert kind.grpc.isupper()
    assert kind.retryable == (kind.http in (412, 429, 503, 504, 507))


def test_detail_is_kept() -> None:
    error = errors.NotFound("gone", key="k", number=3)
    assert (str(error), error.detail) == ("gone", {"key": "k", "number": 3})
    busy = Exhausted("later", retry_after_s=2.5, queue=7)
    assert busy.retry_after_s == 2.5
    assert busy.detail == {"retry_after_s": 2.5, "queue": 7}
    assert type(busy)(str(busy), **busy.detail).retry_after_s == 2.5
