"""Operations over records: the one place that says what add, update, upsert and delete mean.

The tail of a read, compaction, replay and the tests all fold with `Fold`:
add is ignored if the id lives; update is ignored if it does not; absent fields stay unchanged;
metadata merges key by key and a null removes the key; upsert is add or update; delete ends the
record and its seq. A record's `seq` is the offset at which it was inserted; updates keep it.

Rows are appended to chunks, never changed: a new state of a record is a new row, and the old row is
marked dead. So a View frozen earlier stays valid while folding goes on, and freezing costs one
small copy per chunk. Vectors move as blocks; strings are Python objects only here, in the bounded
tail.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ochredb.lazy import lazy
from ochredb.metadata import merge_metadata
from ochredb.parts.columns import BytesColumn
from ochredb.parts.metadata import MetadataIndex
from ochredb.segment import Graph, Rows, Segment, SegmentView, View
from ochredb.types import Float32s, Int64s, Op, Operations

_T = TypeVar("_T")
Place = tuple[int, int]  # (index of a chunk, or ~index of a base segment; row)
_CHUNK_ROWS_MIN = 256


class Chunk:
    """Append-only rows of the tail; rows that a view shows never change."""

    def __init__(self, dimension: int, capacity: int) -> None:
        self.count = 0
        self.ids: list[str] = []
        self.documents: list[str | None] = []
        self.uris: list[str | None] = []
        self.metadatas: list[bytes | None] = []
        self.row_of: dict[str, int] = {}
        self.previous: dict[int, int] = {}  # Row -> earlier row of the same id in this chunk.
        self.vectors = np.empty((capacity, dimension), np.float32)
        self.seqs = np.empty(capacity, np.int64)
        self.live = np.ones(capacity, np.bool_)
        self.dead_count = 0
        self._segment: TailSegment | None = None

    def _reserve(self, count: int) -> None:
        capacity = len(self.seqs)
        if self.count + count <= capacity:
            return
        capacity = max(2 * capacity, self.count + count)
        # Views hold the old arrays: grow by replacing, not in place.
        vectors = np.empty((capacity, self.vectors.shape[1]), np.float32)
        vectors[: self.count] = self.vectors[: self.count]
        seqs = np.empty(capacity, np.int64)
        seqs[: self.count] = self.seqs[: self.count]
        live = np.ones(capacity, np.bool_)
        live[: self.count] = self.live[: self.count]
        self.vectors, self.seqs, self.live = vectors, seqs, live

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
        self.vectors[first : first + count] = vectors
        self.seqs[first : first + count] = seqs
        if not self.row_of.keys().isdisjoint(ids):
            for row, name in enumerate(ids, first):
                if (earlier := self.row_of.get(name)) is not None:
                    self.previous[row] = earlier
        self.row_of.update(zip(ids, range(first, first + count), strict=True))
        self.ids += ids
        self.documents += documents
        self.uris += uris
        self.metadatas += metadatas
        self.count = first + count

    def kill(self, row: int) -> None:
        self.live[row] = False
        self.dead_count += 1

    def freeze(self) -> SegmentView:
        """The rows and their liveness now. Cost: a copy of the mask if a row is dead."""
        segment = self._segment
        if segment is None or len(segment) != self.count:
            segment = self._segment = TailSegment(self)
        live = self.live[: self.count].copy() if self.dead_count else None
        return SegmentView(segment, live, self.count - self.dead_count)


class TailSegment:
    """The first n rows of a chunk as a Segment; indexes are built on first use."""

    sorted_by_seq = False
    text = None
    graph: Graph | None = None
    graph_labels = 0

    def __init__(self, chunk: Chunk) -> None:
        # Not the chunk itself: it keeps its newest segment, and a cycle would outlive the fold.
        self._ids, self._row_of, self._previous = chunk.ids, chunk.row_of, chunk.previous
        self._documents, self._uris = chunk.documents, chunk.uris
        self._metadatas = chunk.metadatas
        self._count = chunk.count
        self._lock = threading.RLock()
        self.dimension = int(chunk.vectors.shape[1])
        self.vectors: Float32s = chunk.vectors[: chunk.count]
        self.seqs: Int64s = chunk.seqs[: chunk.count]

    def __len__(self) -> int:
        return self._count

    @lazy
    def squared_norms(self) -> Float32s:
        norms: Float32s = np.einsum("nd,nd->n", self.vectors, self.vectors)
        return norms

    @lazy
    def documents(self) -> BytesColumn:
        return BytesColumn.from_list(self._documents[: self._count])

    @lazy
    def metadata(self) -> MetadataIndex:
        return MetadataIndex.build(self._metadatas[: self._count])

    def find_ids(self, ids: Sequence[str]) -> Rows:
        row_of, previous = self._row_of, self._previous
        rows = np.empty(len(ids), np.int64)
        for position, name in enumerate(ids):
            row = row_of.get(name, -1)
            while row >= self._count:  # Appended after this segment was frozen.
                row = previous.get(row, -1)
            rows[position] = row
        return rows

    def has_open(self, names: Sequence[str]) -> bool:
        return "metadata" not in names or "metadata" in self.__dict__

    def take_ids(self, rows: Rows) -> list[str]:
        ids = self._ids
        return [ids[row] for row in rows.tolist()]

    def take_documents(self, rows: Rows) -> list[str | None]:
        documents = self._documents
        return [documents[row] for row in rows.tolist()]

    def take_uris(self, rows: Rows) -> list[str | None]:
        uris = self._uris
        return [uris[row] for row in rows.tolist()]

    def take_metadatas(self, rows: Rows) -> list[bytes | None]:
        metadatas = self._metadatas
        return [metadatas[row] for row in rows.tolist()]


class Fold:
    """Folds fragments, in order, over a version's parts.

    Not thread-safe; views that it freezes are. `last_offset` is the last one folded.
    """

    def __init__(self, version: int, indexed_offset: int, base: Sequence[SegmentView]) -> None:
        self.version = version
        self.indexed_offset = indexed_offset
        self.last_offset = indexed_offset
        self.base = list(base)
        self.chunks: list[Chunk] = []
        self.dimension: int | None = base[0].segment.dimension if base else None
        self._base_owned = [False] * len(self.base)  # Masks copied since the last freeze.
        self._rows = 0

    def apply(self, first_offset: int, operations: Operations) -> None:
        """Fold one fragment. The caller has checked that the log has no hole before it."""
        assert first_offset == self.last_offset + 1, "fragments are folded in order"
        if operations.op is not Op.NOOP:
            if operations.dimension is not None and self.dimension is None:
                self.dimension = operations.dimension
            for start, stop in _runs_of_distinct(operations.ids):
                self._apply_distinct(first_offset + start, operations, start, stop)
        self.last_offset = first_offset + len(operations) - 1

    def freeze(self) -> View:
        """The state as of `last_offset`, immutable."""
        self._base_owned = [False] * len(self.base)
        segments = [view for view in self.base if view.live_count]
        segments += [chunk.freeze() for chunk in self.chunks if chunk.count > chunk.dead_count]
        return View(
            version=self.version,
            indexed_offset=self.indexed_offset,
            last_offset=self.last_offset,
            dimension=self.dimension,
            segments=tuple(segments),
            count=sum(view.live_count for view in segments),
        )

    @property
    def tail_rows(self) -> int:
        """Rows held in memory, dead ones included."""
        return self._rows

    @property
    def tail_bytes(self) -> int:
        """Bytes of the vectors held in memory."""
        return sum(chunk.vectors.nbytes for chunk in self.chunks)

    # -- one run of distinct ids

    def _apply_distinct(self, first: int, operations: Operations, start: int, stop: int) -> None:
        ids = operations.ids if stop - start == len(operations) else operations.ids[start:stop]
        places = self._locate(ids)
        if operations.op is Op.DELETE:
            for place in places:
                if place is not None:
                    self._kill(place)
            return
        if operations.op is not Op.UPDATE:
            new = [i for i, place in enumerate(places) if place is None]
            if new:
                self._insert(first, operations, start, new)
        if operations.op is not Op.ADD:
            changed = [i for i, place in enumerate(places) if place is not None]
            if changed:
                self._change(operations, start, changed, places)

    def _insert(self, first: int, operations: Operations, start: int, new: list[int]) -> None:
        """Append records that did not exist; `new` counts from `start`."""
        count = len(operations)
        whole = len(new) == count
        rows = np.fromiter(new, np.int64, len(new))
        embeddings = operations.embeddings
        assert embeddings is not None, "add and upsert carry embeddings"
        picked = [start + i for i in new]
        metadatas = _pick(operations.metadatas, picked, whole)
        if operations.op is Op.UPSERT:
            metadatas = [
                merge_metadata(None, item) if item is not None and b"null" in item else item
                for item in metadatas
            ]
        self._open_chunk().append(
            operations.ids if whole else [operations.ids[i] for i in picked],
            first + rows,
            embeddings if whole else embeddings[start + rows],
            _pick(operations.documents, picked, whole),
            _pick(operations.uris, picked, whole),
            metadatas,
        )
        self._rows += len(new)

    def _change(
        self, operations: Operations, start: int, changed: list[int], places: list[Place | None]
    ) -> None:
        """Append the new states of records that exist, and mark their old rows dead."""
        assert self.dimension is not None
        count = len(changed)
        vectors = np.empty((count, self.dimension), np.float32)
        seqs = np.empty(count, np.int64)
        ids: list[str] = []
        documents: list[str | None] = []
        uris: list[str | None] = []
        metadatas: list[bytes | None] = []
        for position, i in enumerate(changed):
            place = places[i]
            assert place is not None
            segment, row = self._segment(place), np.array([place[1]], np.int64)
            at = start + i
            ids.append(operations.ids[at])
            seqs[position] = segment.seqs[place[1]]
            given = operations.embeddings is not None and (
                operations.embedded is None or bool(operations.embedded[at])
            )
            if given:
                assert operations.embeddings is not None
                vectors[position] = operations.embeddings[at]
            else:
                vectors[position] = segment.vectors[place[1]]
            document = operations.documents[at] if operations.documents else None
            uri = operations.uris[at] if operations.uris else None
            change = operations.metadatas[at] if operations.metadatas else None
            documents.append(segment.take_documents(row)[0] if document is None else document)
            uris.append(segment.take_uris(row)[0] if uri is None else uri)
            base = segment.take_metadatas(row)[0]
            metadatas.append(base if change is None else merge_metadata(base, change))
        for i in changed:
            place = places[i]
            assert place is not None
            self._kill(place)
        self._open_chunk().append(ids, seqs, vectors, documents, uris, metadatas)
        self._rows += count

    # -- where records are

    def _locate(self, ids: list[str]) -> list[Place | None]:
        """Where each id lives: (chunk or ~base index, row)."""
        places: list[Place | None] = [None] * len(ids)
        unknown: Sequence[int] = range(len(ids))
        for number in range(len(self.chunks) - 1, -1, -1):
            chunk = self.chunks[number]
            row_of = chunk.row_of
            if row_of.keys().isdisjoint(ids):
                continue
            rest = []
            for i in unknown:
                row = row_of.get(ids[i])
                if row is None:
                    rest.append(i)
                elif chunk.live[row]:
                    places[i] = (number, row)
                # A dead newest row means that the record is gone: older places are dead too.
            unknown = rest
        if not unknown:
            return places
        names = ids if len(unknown) == len(ids) else [ids[i] for i in unknown]
        for number, view in enumerate(self.base):
            rows = view.segment.find_ids(names)
            for position in np.flatnonzero(view.is_live(rows)).tolist():
                places[unknown[position]] = (~number, int(rows[position]))
        return places

    def _segment(self, place: Place) -> Segment:
        number = place[0]
        if number < 0:
            return self.base[~number].segment
        chunk = self.chunks[number]
        segment = chunk._segment
        if segment is None or len(segment) <= place[1]:
            segment = chunk._segment = TailSegment(chunk)
        return segment

    def _kill(self, place: Place) -> None:
        number, row = place
        if number >= 0:
            self.chunks[number].kill(row)
            return
        view = self.base[~number]
        live = view.live
        if not self._base_owned[~number]:
            live = np.ones(len(view.segment), np.bool_) if live is None else live.copy()
            self._base_owned[~number] = True
        assert live is not None
        live[row] = False
        self.base[~number] = SegmentView(view.segment, live, view.live_count - 1, view.part_id)

    def _open_chunk(self) -> Chunk:
        """The chunk for the next rows. Chunks grow with the tail, so they stay few."""
        rows_max = max(_CHUNK_ROWS_MIN, self._rows // 8)
        if not self.chunks or self.chunks[-1].count >= rows_max:
            assert self.dimension is not None
            self.chunks.append(Chunk(self.dimension, 16 if not self.chunks else rows_max))
        return self.chunks[-1]

    def tail_live_rows(self) -> list[tuple[TailSegment, Rows]]:
        """For each chunk, its segment and the rows that live: what compaction writes to a part."""
        out: list[tuple[TailSegment, Rows]] = []
        for chunk in self.chunks:
            rows = np.flatnonzero(chunk.live[: chunk.count])
            if len(rows):
                out.append((TailSegment(chunk), rows))
        return out


def _runs_of_distinct(ids: list[str]) -> list[tuple[int, int]]:
    """Split [0, n) where an id repeats, so that within each run all ids differ."""
    if len(set(ids)) == len(ids):
        return [(0, len(ids))]
    runs, start = [], 0
    seen: set[str] = set()
    for i, name in enumerate(ids):
        if name in seen:
            runs.append((start, i))
            start, seen = i, set()
        seen.add(name)
    runs.append((start, len(ids)))
    return runs


def _pick(values: list[_T | None] | None, rows: list[int], whole: bool) -> list[_T | None]:
    if values is None:
        return [None] * len(rows)
    return values if whole else [values[row] for row in rows]
