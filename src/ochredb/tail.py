"""Rows in memory: what the log holds beyond the newest version's parts, as segments.

A `Chunk` only grows: a new state of a record is a new row, and the old row is marked dead. So what
a reader holds never changes. Readers see a chunk as a few consecutive ranges, each at least twice
as long as the one after it: a view has a logarithmic number of segments, and what a segment builds
on first use (metadata index, documents column) is built again only for rows near the end.
Vectors move as blocks; strings are Python objects only here, in the bounded tail.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from ochredb.lazy import lazy
from ochredb.parts.columns import BytesColumn
from ochredb.parts.metadata import MetadataIndex
from ochredb.segment import Graph, Rows, SegmentView
from ochredb.types import Float32s, Int64s
from ochredb.vectors.codes import Codes, CodesOnUse, is_enough
from ochredb.vectors.distance import Space

_SEGMENT_ROWS_MIN = 256  # A shorter last segment is replaced when rows follow.
ROW_BYTES = 1_000  # Python objects, look-ups and indexes of one row, roughly.


class TailMemory:
    """How many bytes the tails take that reads hold in this process. Thread-safe.

    Exact as to what is alive: a share counts until its chunk and all segments of it are gone, that
    is, also while a read still holds a view that nobody else knows any more.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._lock = threading.Lock()
        self._changes: deque[int] = deque()  # Appended to without a lock, from finalisers too.
        self._bytes = 0

    def share(self) -> Share:
        return Share(self._changes)

    @property
    def size_bytes(self) -> int:
        """What all shares together take now. Cost: 0.2 µs."""
        with self._lock:
            while self._changes:
                self._bytes += self._changes.popleft()
            return self._bytes

    def has_room(self, needed: int = 0) -> bool:
        return self.size_bytes + needed <= self.bytes_max


class Share:
    """One chunk's part of the memory."""

    __slots__ = ("_changes", "size_bytes")

    def __init__(self, changes: deque[int] | None = None) -> None:
        self._changes, self.size_bytes = changes, 0

    def grow(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        if self._changes is not None:
            self._changes.append(size_bytes)

    def __del__(self) -> None:
        if self._changes is not None:
            self._changes.append(-self.size_bytes)


class Chunk:
    """Append-only rows; not thread-safe, but the segments that it gives out are.

    `share` counts the arrays; whoever appends adds the Python objects.
    """

    def __init__(self, dimension: int, capacity: int, share: Share | None = None) -> None:
        self.share = share or Share()
        self._array_bytes = 4 * dimension + 13  # Of one row: the four arrays.
        self.share.grow(capacity * self._array_bytes)
        self.count = 0
        self.ids: list[str] = []
        self.documents: list[str | None] = []
        self.uris: list[str | None] = []
        self.metadatas: list[bytes | None] = []
        self.row_of: dict[str, int] = {}
        self.previous: dict[int, int] = {}  # Row -> earlier row of the same id.
        self.vectors = np.empty((capacity, dimension), np.float32)
        self.squared_norms = np.empty(capacity, np.float32)
        self.seqs = np.empty(capacity, np.int64)
        self.live = np.ones(capacity, np.bool_)
        self.dead_count = 0
        self._is_closed = False
        self._segments: list[TailSegment] = []
        self._views: list[SegmentView] | None = None  # As of now, once asked for.

    def _reserve(self, count: int) -> None:
        if self.count + count <= len(self.seqs):
            return
        capacity = max(2 * len(self.seqs), self.count + count)
        # Views hold the old arrays: grow by replacing, not in place.
        vectors = np.empty((capacity, self.vectors.shape[1]), np.float32)
        norms, seqs = np.empty(capacity, np.float32), np.empty(capacity, np.int64)
        live = np.ones(capacity, np.bool_)
        vectors[: self.count] = self.vectors[: self.count]
        norms[: self.count] = self.squared_norms[: self.count]
        seqs[: self.count] = self.seqs[: self.count]
        live[: self.count] = self.live[: self.count]
        self.share.grow((capacity - len(self.seqs)) * self._array_bytes)
        self.vectors, self.squared_norms, self.seqs, self.live = vectors, norms, seqs, live
        for segment in self._segments:
            segment.point_at(self)  # The same values: only so that the old arrays can go.

    def append(
        self,
        ids: list[str],
        seqs: Int64s,
        vectors: Float32s,
        documents: list[str | None],
        uris: list[str | None],
        metadatas: list[bytes | None],
    ) -> None:
        """Append rows with distinct ids; the caller has marked their older rows dead."""
        count, first = len(ids), self.count
        self._reserve(count)
        stop = first + count
        self.vectors[first:stop] = vectors
        self.squared_norms[first:stop] = np.einsum("nd,nd->n", vectors, vectors)
        self.seqs[first:stop] = seqs
        if not self.row_of.keys().isdisjoint(ids):
            for row, name in enumerate(ids, first):
                if (earlier := self.row_of.get(name)) is not None:
                    self.previous[row] = earlier
        self.row_of.update(zip(ids, range(first, stop), strict=True))
        self.ids += ids
        self.documents += documents
        self.uris += uris
        self.metadatas += metadatas
        self.count = stop
        self._views = None

    def from_row(self, first: int, share: Share | None) -> Chunk:
        """A copy of the rows from `first` on, of a chunk whose rows all live."""
        assert self.dead_count == 0
        rows, count = slice(first, self.count), self.count - first
        copy = Chunk(self.vectors.shape[1], 2 * count, share)
        objects_bytes = self.share.size_bytes - len(self.seqs) * self._array_bytes
        copy.share.grow(objects_bytes * count // self.count)
        copy.append(
            self.ids[rows],
            self.seqs[rows],
            self.vectors[rows],
            self.documents[rows],
            self.uris[rows],
            self.metadatas[rows],
        )
        return copy

    def close(self) -> None:
        """No more rows will come: what readers see from now on is one range."""
        self._is_closed, self._views = True, None

    def kill(self, row: int) -> None:
        self.live[row] = False
        self.dead_count += 1
        self._views = None

    def freeze(self) -> list[SegmentView]:
        """The rows and their liveness now. Cost: some microseconds and a copy of the masks."""
        if self._views is None:
            self._cut()
            views = (self._view(segment) for segment in self._segments)
            self._views = [view for view in views if view.live_count]
        return self._views

    def whole(self) -> TailSegment:
        """All rows as one segment."""
        return TailSegment(self, 0, self.count)

    def _cut(self) -> None:
        """Bring the ranges up to the last row."""
        segments = self._segments
        if self._is_closed and len(segments) != 1:
            segments[:] = [self.whole()]
        start = segments[-1].stop if segments else 0
        if start == self.count:
            return
        if segments and len(segments[-1]) < _SEGMENT_ROWS_MIN:
            start = segments.pop().start
        while segments and len(segments[-1]) < 2 * (self.count - start):
            start = segments.pop().start
        segments.append(TailSegment(self, start, self.count))

    def _view(self, segment: TailSegment) -> SegmentView:
        if self.dead_count == 0:
            return SegmentView(segment, None, len(segment))
        live = self.live[segment.start : segment.stop].copy()
        count = int(np.count_nonzero(live))
        return SegmentView(segment, None if count == len(live) else live, count)


class TailSegment:
    """Rows [start, stop) of a chunk as a Segment; indexes are built on first use."""

    sorted_by_seq = False
    text = None
    graph: Graph | None = None
    graph_labels = graph_neighbors = 0
    graph_is_loaded = True  # There is none.
    graph_recall: tuple[tuple[int, float], ...] = ()
    verified_bytes = 0

    vectors: Float32s
    squared_norms: Float32s
    seqs: Int64s
    place: tuple[Float32s, Float32s, Int64s, int] | None

    def __init__(self, chunk: Chunk, start: int, stop: int) -> None:
        # Not the chunk itself: it keeps its segments, and a cycle would outlive the fold.
        self._ids, self._row_of, self._previous = chunk.ids, chunk.row_of, chunk.previous
        self._documents, self._uris = chunk.documents, chunk.uris
        self._metadatas = chunk.metadatas
        self._share = chunk.share  # Counted for as long as this is alive.
        self.start, self.stop = start, stop
        self._lock = threading.RLock()
        self.dimension = int(chunk.vectors.shape[1])
        self.coded = CodesOnUse(is_useful=is_enough(stop - start, self.dimension))
        self.point_at(chunk)

    def point_at(self, chunk: Chunk) -> None:
        """Use the chunk's arrays of now, which hold the same values."""
        rows = slice(self.start, self.stop)
        self.vectors, self.seqs = chunk.vectors[rows], chunk.seqs[rows]
        self.squared_norms = chunk.squared_norms[rows]
        self.place = chunk.vectors, chunk.squared_norms, chunk.seqs, self.start

    def __len__(self) -> int:
        return self.stop - self.start

    def codes(self, space: Space, *, makes: bool = True) -> Codes | None:
        return self.coded.find(space, lambda: (self.vectors, self.squared_norms), makes=makes)

    def code_ahead(self, space: Space) -> None:
        """Make the codes now: those who read shall not stop for it."""
        if not self.coded.is_settled:
            self.coded.expect()
            self.codes(space)

    @lazy
    def documents(self) -> BytesColumn:
        return BytesColumn.from_list(self._documents[self.start : self.stop])

    @lazy
    def metadata(self) -> MetadataIndex:
        return MetadataIndex.build(self._metadatas[self.start : self.stop])

    def find_ids(self, ids: Sequence[str]) -> Rows:
        row_of, previous, stop = self._row_of, self._previous, self.stop
        rows = np.empty(len(ids), np.int64)
        for position, name in enumerate(ids):
            row = row_of.get(name, -1)
            while row >= stop:  # Appended after this segment.
                row = previous.get(row, -1)
            rows[position] = row
        rows -= self.start
        return np.maximum(rows, -1, out=rows)  # Of a row before this segment nothing is said.

    def has_open(self, names: Sequence[str]) -> bool:
        return "metadata" not in names or "metadata" in self.__dict__

    def take_ids(self, rows: Rows) -> list[str]:
        ids, start = self._ids, self.start
        return [ids[start + row] for row in rows.tolist()]

    def take_documents(self, rows: Rows) -> list[str | None]:
        documents, start = self._documents, self.start
        return [documents[start + row] for row in rows.tolist()]

    def take_uris(self, rows: Rows) -> list[str | None]:
        uris, start = self._uris, self.start
        return [uris[start + row] for row in rows.tolist()]

    def take_metadatas(self, rows: Rows) -> list[bytes | None]:
        metadatas, start = self._metadatas, self.start
        return [metadatas[start + row] for row in rows.tolist()]
