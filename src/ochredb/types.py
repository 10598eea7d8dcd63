"""The domain's values: what a request writes, what a read returns. Columnar, no behaviour."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ochredb.explain import PlanStep

_T = TypeVar("_T")

Float32s = NDArray[np.float32]
Bools = NDArray[np.bool_]
Int64s = NDArray[np.int64]


class Op(enum.IntEnum):
    """What an operation does to one record. Values are on disk: never renumber."""

    ADD = 1  # Ignored if the id lives.
    UPDATE = 2  # Ignored if the id does not live.
    UPSERT = 3  # Add or update.
    DELETE = 4
    NOOP = 5  # A purged operation; keeps its offset.


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The operations of one request, all of one kind, column by column.

    ids: n strings, not empty; duplicates are applied in order.
    embeddings: float32[n, d], C-contiguous and finite, or None if no operation has one.
    embedded: bool[n], which rows of `embeddings` count; None means all of them.
    documents, uris: n items, None = absent (an update leaves the field unchanged).
    metadatas: n items, each a JSON object as bytes, or None = absent. In update and upsert a null
        value removes its key. Integers fit int64; other numbers are floats.
    key_types: the (metadata key, type) pairs in `metadatas`; type is one of `METADATA_TYPES`.
    encoded_bytes: size as a fragment; 0 before it was one.
    encoded: the fragment (a pyarrow buffer) that these were decoded from, if that is at hand; None
        of operations that were changed since.
    """

    op: Op
    ids: list[str]
    embeddings: Float32s | None = None
    embedded: Bools | None = None
    documents: list[str | None] | None = None
    uris: list[str | None] | None = None
    metadatas: list[bytes | None] | None = None
    key_types: frozenset[tuple[str, str]] = frozenset()
    encoded_bytes: int = 0
    encoded: Any = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int | None:
        return None if self.embeddings is None else int(self.embeddings.shape[1])


# Scalar and list types of metadata values, by the names that the collection's schema JSON uses.
METADATA_TYPES = (
    "string", "int", "float", "bool", "string_list", "int_list", "float_list", "bool_list",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionInfo:
    """A collection as the catalog knows it.

    configuration, schema: the JSON objects of rest-contract section 4, as stored.
    dimension: None until the first write that has an embedding.
    revision: grows with each rename or change of metadata or configuration.
    """

    id: str
    name: str
    tenant: str
    database: str
    configuration: dict[str, Any]
    schema: dict[str, Any]
    metadata: dict[str, Any] | None
    dimension: int | None
    revision: int
    key_types: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one read sees: a version and the end of the log. One catalog row.

    The log holds offsets floor_offset+1 .. next_offset-1; those up to `indexed_offset` are in the
    version's parts, the others are the tail.
    """

    collection_id: str
    state: str
    revision: int
    dimension: int | None
    version: int
    indexed_offset: int
    next_offset: int
    floor_offset: int

    @property
    def last_offset(self) -> int:
        return self.next_offset - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStatus:
    """How long a log is: it holds the offsets above `floor_offset` up to `last_offset`.

    tail_bytes: of the operations above `indexed_offset`, as fragments.
    """

    floor_offset: int
    indexed_offset: int
    last_offset: int
    tail_bytes: int


@dataclass(frozen=True, slots=True)
class Appended:
    """An acknowledged request: its contiguous range of log offsets, both ends included."""

    first_offset: int
    last_offset: int
    deleted: int | None = None
    repeated: bool = False  # True if an earlier attempt with the same key was the one applied.


class Field(enum.Flag):
    """Columns that a read may ask for."""

    NONE = 0
    DOCUMENT = enum.auto()
    EMBEDDING = enum.auto()
    METADATA = enum.auto()
    URI = enum.auto()


@dataclass(slots=True)
class Records:
    """Rows of an answer, column by column; a column that was not asked for is None.

    metadatas holds JSON objects as bytes (None = no metadata), ready to be sent on.
    """

    ids: list[str] = field(default_factory=list)
    documents: list[str | None] | None = None
    uris: list[str | None] | None = None
    metadatas: list[bytes | None] | None = None
    embeddings: Float32s | None = None  # float32[n, d]
    plan: PlanStep | None = None  # What was executed, if the request asked for it.

    @property
    def size_bytes(self) -> int:
        """Roughly what this takes in an answer: characters and bytes of all columns."""
        size = sum(map(len, self.ids))
        for column in (self.documents, self.uris, self.metadatas):
            if column is not None:
                size += sum(len(value) for value in column if value is not None)
        return size + (0 if self.embeddings is None else 8 * self.embeddings.size)

    def split(self, splits: list[int]) -> list[Records]:
        """Rows [splits[i], splits[i + 1]) as answers of their own."""
        if len(splits) == 2:
            return [self]

        def cut(column: list[_T] | None, start: int, stop: int) -> list[_T] | None:
            return None if column is None else column[start:stop]

        return [
            Records(
                ids=self.ids[start:stop],
                documents=cut(self.documents, start, stop),
                uris=cut(self.uris, start, stop),
                metadatas=cut(self.metadatas, start, stop),
                embeddings=None if self.embeddings is None else self.embeddings[start:stop],
            )
            for start, stop in pairwise(splits)
        ]


@dataclass(slots=True)
class QueryAnswer:
    """One entry for each query vector: its nearest records, nearest first."""

    records: list[Records]
    distances: list[Float32s]  # float32[k], ascending.
    plan: PlanStep | None = None  # What was executed, if the request asked for it.

    def split(self, counts: Sequence[int]) -> list[QueryAnswer]:
        """The answers for the first counts[0] query vectors, for the next counts[1], and so on."""
        answers, start = [], 0
        for count in counts:
            piece = slice(start, start + count)
            answers.append(QueryAnswer(self.records[piece], self.distances[piece]))
            start += count
        return answers


@dataclass(frozen=True, slots=True)
class PendingWork:
    """A collection with a tail, or with parts that wait for a merge.

    time_us: of its last write.
    """

    collection: str
    tail_rows: int
    tail_bytes: int
    time_us: int
    unsettled_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """What is known of one kind of background work on one collection ("": on the store).

    owner: the process that has, or last had, the lease. until_us: when that ends. attempts: since
    it last succeeded. last_error: of the last attempt, if it failed.
    """

    collection_id: str
    kind: str
    owner: str
    running: bool
    until_us: int
    attempts: int
    last_error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactorStatus:
    """What a compactor has to do, and what is being done, by whichever process."""

    paused: bool
    tails: list[PendingWork]
    merges: list[PendingWork]
    jobs: list[JobStatus]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexingStatus:
    """Operations of the log that are, or are not yet, in settled parts.

    num_quarantined_ops: of the indexed ones, those that could not be folded (`ochredb.poison`).
    """

    num_indexed_ops: int
    num_unindexed_ops: int
    num_quarantined_ops: int = 0

    @property
    def total_ops(self) -> int:
        return self.num_indexed_ops + self.num_unindexed_ops

    @property
    def progress(self) -> float:
        return 1.0 if self.total_ops == 0 else self.num_indexed_ops / self.total_ops
