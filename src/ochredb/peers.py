"""What the roles offer one another. A caller gets the object itself, or a client of the same shape.

All calls block and may be made from any thread. A `deadline_s` is a monotonic time (the clock's
`monotonic_s`), after which the call raises DeadlineExceeded; `Cancel` carries it together with the
client's disappearance.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ochredb.cancel import Cancel
from ochredb.explain import PlanStep
from ochredb.types import (
    Appended,
    CompactorStatus,
    Field,
    Float32s,
    IndexingStatus,
    Int64s,
    LogStatus,
    Operations,
    QueryAnswer,
    Records,
    Snapshot,
)
from ochredb.where import Where


class Log(Protocol):
    """Durable, ordered appends."""

    def append(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        expect_last_offset: int | None = None,
        cancel: Cancel,
    ) -> Appended:
        """Append one request atomically; returns after it is durable and visible.

        idempotency_key: the client's; a repeat with the same content returns the first answer, a
            repeat with other content raises InvalidArgument.
        request_hash: what "the same content" means; None: the operations themselves.
        request_id: the caller's own name for this write, made before its first attempt and given
            again with each repeat, to whichever node: applied once, for ten minutes at least. None:
            this is the only attempt. Not needed with an idempotency key.
        expect_last_offset: write only if this is still the log's last offset.

        Raises NotFound (collection), InvalidArgument (dimension), Conflict (expectation), Exhausted
        (backlog), OutcomeUnknown.
        """
        ...

    def submit(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        cancel: Cancel,
        deliver: Callable[[Appended | BaseException], None],
    ) -> None:
        """Append without waiting: `deliver` is told what `append` would return or raise.

        It is called from another thread and must be quick. What can be refused at once is raised.
        For small requests: encoding them takes the caller's time.
        """
        ...

    def append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        cancel: Cancel,
    ) -> Appended:
        """Append what `evaluate` returns, computed while no other write can land.

        A repeat of a write that was applied is answered without evaluating again.
        """
        ...

    def record_nothing(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        """Bind an idempotency key to a request that found nothing to do: an empty range.

        Returns the first answer if an attempt with the key has been applied meanwhile.
        Raises NotFound (collection), InvalidArgument (the key belongs to another request).
        """
        ...

    def repeated(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended | None:
        """The first answer to a request with this idempotency key, if it was applied.

        None proves nothing while an earlier attempt may still be landing; the append looks again,
        under the lock. Raises InvalidArgument if the key belongs to another request.
        """
        ...


@dataclass(frozen=True, slots=True)
class LogFragment:
    """One request of a log: its offsets, both ends included, and its bytes (`ochredb.fragment`)."""

    first_offset: int
    last_offset: int
    payload: bytes


class LogReader(Protocol):
    """The log itself, for replay and for operators."""

    def read(
        self, collection_id: str, first_offset: int, last_offset: int | None, *, cancel: Cancel
    ) -> Iterator[LogFragment]:
        """Fragments that cover [first_offset, last_offset], in order, checked, without holes.

        first_offset: the start of a fragment. last_offset: the end of one; None: the last there
        is. Raises NotFound (collection), Gone (the log does not reach back so far, or ends before),
        Corrupt.
        """
        ...

    def status(self, collection_id: str, *, cancel: Cancel) -> LogStatus:
        """Raises NotFound (collection)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GetRequest:
    """Records by id and filter, in order of first insertion.

    ids: None = all; duplicates collapse, unknown ones are skipped.
    limit: None = no limit.
    explain: answer with the executed plan too.
    """

    ids: list[str] | None = None
    where: Where | None = None
    limit: int | None = None
    offset: int = 0
    fields: Field = Field.DOCUMENT | Field.METADATA
    explain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRequest:
    """The n_results nearest records of each query vector among those that match.

    embeddings: float32[q, d]; may hold non-finite values, whose distances are then NaN.
    exact: never use an approximate index.
    explain: answer with the executed plan too.
    target_recall: share of the true nearest that an approximate index shall find, in [0, 1);
        0: as the collection's `ef_search` gives; None: the process's setting.
    """

    embeddings: Float32s
    n_results: int = 10
    ids: list[str] | None = None
    where: Where | None = None
    fields: Field = Field.DOCUMENT | Field.METADATA
    exact: bool = False
    explain: bool = False
    target_recall: float | None = None


ON_LOOP_US_MAX = 1_000.0


@dataclass(frozen=True, slots=True)
class QuickRead:
    """A read that is ready to run.

    group: reads of equal group may be run together, which costs less; None: only alone.
    search_us: what the search of a read with a group is estimated to take. Above ON_LOOP_US_MAX it
        is for a thread beside an event loop.
    """

    run: Callable[[Cancel], Records | QueryAnswer | int]
    group: Hashable = None
    embeddings: Float32s | None = None  # Of a read with a group.
    search_us: float = 0.0


class Batch(Protocol):
    """Several quick reads that are searched as one."""

    def search(self) -> None:
        """The first half, which hardly needs the interpreter's lock; in any thread."""
        ...

    def answers(self, cancel: Cancel) -> list[QueryAnswer]:
        """The second half: one answer for each read. Raises what either half failed with."""
        ...


class Query(Protocol):
    """Strong reads: each sees every write acknowledged before it began."""

    def get(self, collection_id: str, request: GetRequest, *, cancel: Cancel) -> Records:
        """Raises NotFound (collection)."""
        ...

    def query(self, collection_id: str, request: QueryRequest, *, cancel: Cancel) -> QueryAnswer:
        """Raises NotFound (collection), InvalidArgument (dimension)."""
        ...

    def count(self, collection_id: str, *, cancel: Cancel) -> int: ...

    def match(
        self, collection_id: str, request: GetRequest, *, cancel: Cancel
    ) -> tuple[list[str], int]:
        """Ids that match, in order of first insertion, and the last log offset that was seen."""
        ...

    def indexing_status(self, collection_id: str, *, cancel: Cancel) -> IndexingStatus: ...

    def quick(
        self, collection_id: str, request: GetRequest | QueryRequest | None
    ) -> QuickRead | None:
        """A read that answers from memory in an estimated millisecond or less, or None.

        Or in a few, for a thread beside an event loop: see `QuickRead.search_us`. `None` as the
        request means count. Never blocks; an event loop may call it and its result.
        """
        ...

    def together(self, reads: Sequence[QuickRead]) -> Batch:
        """Quick reads of one group, to be searched as one batch. As quick as they are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsRequest:
    """A share of another node's read: some parts of a collection at the snapshot that it took.

    part_ids: of the snapshot's version. request: as it was made, but for what each share decides
        alike (a query's target_recall is given, a get's page may be another).
    keys_only: no records, only which rows they would be.
    """

    snapshot: Snapshot
    part_ids: tuple[str, ...]
    request: GetRequest | QueryRequest
    keys_only: bool = False


@dataclass(slots=True)
class PartsAnswer:
    """The rows of a share: of several answers (one for each query vector) one after the other.

    records: their columns. splits: answer i is what lies at [splits[i], splits[i + 1]). seqs:
        int64[n]. distances: float32[n] of a query, exact; None for a get. Rows are in the order of
        the whole answer: by distance, then by seq; or by seq.
    any_lives: whether one of the ids that the request names lives in these parts.
    """

    records: Records
    splits: list[int]
    seqs: Int64s
    distances: Float32s | None = None
    any_lives: bool = False
    plan: PlanStep | None = None  # What was executed, if the request asked for it.


class QueryNode(Query, Protocol):
    """A query node as another one sees it."""

    def search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> PartsAnswer:
        """The nearest rows, or the first ones, of some parts alone; their tail is the caller's.

        Raises NotFound (collection); Gone if a part or the log up to the snapshot is not there any
        more.
        """
        ...

    def keep_copies(self, objects: Sequence[tuple[str, int]], *, cancel: Cancel) -> None:
        """Have copies of these objects near, as reads of them may come. Returns at once.

        objects: keys and sizes in bytes (0: not known, and small). Best effort.
        """
        ...


class DistantQueryNode(QueryNode, Protocol):
    """A query node in another process."""

    def begin_search_parts(
        self, collection_id: str, request: PartsRequest, *, cancel: Cancel
    ) -> Callable[[], PartsAnswer]:
        """The same without waiting: what is returned waits for the answer, and raises."""
        ...


class Compactor(Protocol):
    """Background folding, merging and collecting."""

    def compact_now(self, collection_id: str) -> None:
        """Fold the tail in the caller's thread (and merge what is due)."""
        ...

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        """Write one part anew, with all that is derived; False if it was replaced already.

        step: called now and then; it may raise to give up. Raises Corrupt if records of it are
        damaged too.
        """
        ...

    def hint(self, collection_id: str, last_offset: int, /) -> None:
        """Something was appended: look sooner. Best effort; never waits, never raises."""
        ...


class CompactorNode(Protocol):
    """A compactor as operators see it.

    step: called now and then while it works; it may raise to give up.
    """

    def compact_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        """Fold the tail, and merge until nothing is due. Raises NotFound (collection)."""
        ...

    def rebuild_now(self, collection_id: str, step: Callable[[], None] | None = None) -> None:
        """Write every part anew, with all that is derived. Raises NotFound (collection)."""
        ...

    def rebuild_part(self, part_id: str, step: Callable[[], None] | None = None) -> bool:
        """See `Compactor.rebuild_part`."""
        ...

    def settle(self, step: Callable[[], None] | None = None) -> None:
        """Fold every tail, and merge until nothing is due."""
        ...

    def status(self) -> CompactorStatus: ...

    def pause(self) -> None:
        """Begin no background work in this process; what was asked for by calls is done."""
        ...

    def resume(self) -> None: ...

    def hint(self, collection_id: str, last_offset: int, /) -> None:
        """See `Compactor.hint`."""
        ...
