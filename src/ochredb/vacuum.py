"""Vacuum: give back at once what deleted and replaced data takes, and erase it if asked to.

    from ochredb.vacuum import vacuum

    report = vacuum("./data")                        # or "http://127.0.0.1:8000"
    report = vacuum("./data", purge=True)            # deleted data is in no file any more
    assert report.is_complete, report.problems + report.kept

The work is done by the process that has the store: a server, or for a directory this one, beside
whatever else is open. Reads and writes go on. Here are the questions that its caller asks
(rest-contract section 12), the same ones for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ochredb.api.exceptions import ChromaError, RateLimitError
from ochredb.api.rest import Rest
from ochredb.clock import Clock, SystemClock
from ochredb.errors import InvalidArgument, Unavailable
from ochredb.storage.open_directory import CATALOG_FILE

if TYPE_CHECKING:
    from ochredb.api.transport import Transport

Phase = Literal["compacting", "waiting", "deleting", "catalog"]
# What is done, how far it is, and how much there is: of "compacting" collections, of "waiting"
# seconds until no read can need what was replaced, of "deleting" objects, of "catalog" steps.
Progress = Callable[[Phase, float, float], None]

_POLL_S = 0.1
_SILENCE_MAX_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VacuumReport:
    """What a vacuum did.

    bytes_before, bytes_after: of objects, catalog and its log.
    problems: what could not be done, and why. kept: who still keeps what was deleted.
    """

    purge: bool
    collections: int
    parts_rewritten: int
    objects_deleted: int
    bytes_before: int
    bytes_after: int
    problems: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all was done; of a purge, that nothing deleted before it began is left."""
        return not self.problems and not (self.purge and self.kept)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"complete": self.is_complete}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> VacuumReport:
        values = {name: document[name] for name in cls.__dataclass_fields__}
        for name in ("problems", "kept"):
            values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class VacuumState:
    """How far a vacuum is. state: running | done | failed | cancelled.

    report: once it is done. error: why it failed.
    """

    id: str
    purge: bool
    state: str = "running"
    phase: Phase = "compacting"
    done: float = 0.0
    total: float = 0.0
    error: str | None = None
    report: VacuumReport | None = None

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        document["report"] = None if self.report is None else self.report.to_json()
        return document


class Vacuums(Protocol):
    """The vacuums of one process: at most one at a time."""

    def start(self, *, purge: bool) -> VacuumState:
        """Begin one. Raises AlreadyExists if one is running."""
        ...

    def state(self, vacuum_id: str) -> VacuumState:
        """Raises NotFound unless it is the one begun last."""
        ...

    def cancel(self, vacuum_id: str) -> VacuumState:
        """Ask it to end soon; what it did stays done. Raises NotFound."""
        ...


def silent(_phase: Phase, _done: float, _total: float) -> None:
    """Tells nobody."""


def vacuum(
    target: str,
    *,
    purge: bool = False,
    headers: Mapping[str, str] | None = None,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> VacuumReport:
    """Vacuum a store, and wait until that is done.

    target: a store's directory, which other processes may have open, or a server's URL.
    headers: for a server, such as `{"Authorization": "Bearer …"}`.
    purge: also write anew everything that holds a deleted record, and the catalog.

    Raises InvalidArgument for a directory without a store, ChromaError if it is refused,
    Unavailable if it fails or the server does not answer any more. Cost: rewriting parts and graphs
    of which some per cent are dead (purge: any row), and waiting for a minute if anything was
    replaced.
    """
    clock = clock or SystemClock()
    rest = Rest(_transport(target, headers or {}))
    try:
        state = _begin(rest, target, purge)
        try:
            while state["state"] == "running":
                progress(state["phase"], state["done"], state["total"])
                clock.sleep(_POLL_S)
                state = _ask(rest, str(state["id"]), clock)
        except BaseException:
            _cancel(rest, str(state["id"]))
            raise
    finally:
        rest.close()
    if state["state"] != "done":
        raise Unavailable(f"the vacuum of {target} {state['state']}: {state['error']}")
    return VacuumReport.from_json(state["report"])


def _begin(rest: Rest, target: str, purge: bool) -> dict[str, Any]:
    try:
        state: dict[str, Any] = rest.call("POST", "vacuums", query={"purge": str(purge).lower()})
    except ConnectionError as error:
        raise Unavailable(str(error)) from error
    except ValueError as error:  # No JSON, which is what a server without this route sends.
        if isinstance(error, ChromaError):
            raise
        raise Unavailable(f"{target} offers no vacuum: {error}") from error
    return state


def _ask(rest: Rest, vacuum_id: str, clock: Clock) -> dict[str, Any]:
    """The state now; a server that is busy or away for some seconds is asked again."""
    deadline_s = clock.monotonic_s() + _SILENCE_MAX_S
    while True:
        try:
            state: dict[str, Any] = rest.call("GET", "vacuums", vacuum_id)
            return state
        except (ConnectionError, RateLimitError) as error:
            if clock.monotonic_s() > deadline_s:
                raise Unavailable(f"it is not known how the vacuum goes on: {error}") from error
        clock.sleep(1.0)


def _cancel(rest: Rest, vacuum_id: str) -> None:
    try:
        rest.call("DELETE", "vacuums", vacuum_id)
    except (ChromaError, ConnectionError):
        return  # It ended, or nobody is there; there is a better error to tell.


def _transport(target: str, headers: Mapping[str, str]) -> Transport:
    if target.startswith(("http://", "https://")):
        from ochredb.api.transport import HttpTransport  # Late: an HTTP client.

        return HttpTransport(target, headers=headers)
    if not os.path.exists(os.path.join(target, CATALOG_FILE)):
        raise InvalidArgument(f"{target} is no OchreDB directory: it has no {CATALOG_FILE}")
    from ochredb.embedded import open_transport

    return open_transport(target)
