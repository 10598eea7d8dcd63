"""A segment: rows that operators can search, whether they lie in a part or in the log's tail.

A `View` is what one read works on: segments with the rows that live in them, at one offset of the
log. It is immutable; a later state is another View that shares most of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ochredb.parts.columns import BytesColumn
from ochredb.parts.metadata import MetadataIndex
from ochredb.parts.text import TextIndex
from ochredb.types import Bools, Float32s, Int64s
from ochredb.vectors.codes import Codes, CodesOnUse
from ochredb.vectors.distance import Space

Rows = NDArray[np.int64]


class Graph(Protocol):
    """An approximate index over a segment's vectors."""

    def search(self, queries: Float32s, ef: int) -> Rows | None:
        """int64[q, m], m <= ef: rows near each of float32[q, d], nearest first, -1 = dead.

        None if the graph cannot give so many.
        """
        ...


class Segment(Protocol):
    """Rows 0..n-1, dead ones included."""

    def __len__(self) -> int: ...

    @property
    def seqs(self) -> Int64s:
        """int64[n]: the offset at which each record was first inserted."""
        ...

    @property
    def sorted_by_seq(self) -> bool:
        """Whether rows ascend by seq."""
        ...

    @property
    def dimension(self) -> int:
        """d. Known without opening the vectors."""
        ...

    @property
    def vectors(self) -> Float32s:
        """float32[n, d], as given by the user."""
        ...

    @property
    def squared_norms(self) -> Float32s:
        """float32[n]."""
        ...

    def codes(self, space: Space, *, makes: bool = True) -> Codes | None:
        """For a scan of all rows: their codes, or None where it reads the vectors.

        makes: they may be made now, if it is time.
        """
        ...

    @property
    def coded(self) -> CodesOnUse:
        """How far its codes are: whether such scans read any, and would make them first."""
        ...

    @property
    def place(self) -> tuple[Float32s, Float32s, Int64s, int] | None:
        """Of what arrays `vectors`, `squared_norms` and `seqs` are slices, and from which row on.

        None: of none that another segment's rows lie in.
        """
        ...

    @property
    def documents(self) -> BytesColumn: ...

    @property
    def metadata(self) -> MetadataIndex: ...

    @property
    def text(self) -> TextIndex | None:
        """None: scan the documents."""
        ...

    @property
    def graph_labels(self) -> int:
        """Size of the graph's label space; 0 if there is no graph. Known without loading it."""
        ...

    @property
    def graph_neighbors(self) -> int:
        """Of each of the graph's nodes (M); any number if there is no graph."""
        ...

    @property
    def graph_recall(self) -> tuple[tuple[int, float], ...]:
        """(ef, recall at 10) as measured on the graph, ascending; empty if nothing is known."""
        ...

    @property
    def graph_is_loaded(self) -> bool:
        """Whether using the graph, if there is one, neither reads nor waits."""
        ...

    @property
    def graph(self) -> Graph | None:
        """None: scan the vectors."""
        ...

    def find_ids(self, ids: Sequence[str]) -> Rows:
        """int64[m]: the newest row of each id, -1 where it is not here."""
        ...

    def has_open(self, names: Sequence[str]) -> bool:
        """Whether these attributes were used before, so that using them neither reads nor waits."""
        ...

    @property
    def verified_bytes(self) -> int:
        """How many bytes of stored objects were read and checked for it so far."""
        ...

    def take_ids(self, rows: Rows) -> list[str]: ...

    def take_documents(self, rows: Rows) -> list[str | None]: ...

    def take_uris(self, rows: Rows) -> list[str | None]: ...

    def take_metadatas(self, rows: Rows) -> list[bytes | None]: ...


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A segment and which of its rows live; `live` None means all of them."""

    segment: Segment
    live: Bools | None
    live_count: int
    part_id: str | None = None  # None: in the tail.

    def is_live(self, rows: Rows) -> Bools:
        """bool[m]; a row of -1 is not."""
        present: Bools = rows >= 0
        return present if self.live is None else present & self.live[rows]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a read sees: the segments of one version and of the tail up to `last_offset`.

    Equal only to itself.
    """

    version: int
    indexed_offset: int
    last_offset: int
    dimension: int | None
    segments: tuple[SegmentView, ...]
    count: int

    def find_ids(self, ids: Sequence[str]) -> list[Rows]:
        """For each segment, int64[m]: the live row of each id in it, or -1."""
        found = []
        for view in self.segments:
            rows = view.segment.find_ids(ids)
            if view.live is not None:
                rows = np.where(view.is_live(rows), rows, -1)
            found.append(rows)
        return found

    def of(self, part_ids: Collection[str], *, with_tail: bool) -> View:
        """The same state, of some parts alone, and of the tail if that is wanted."""
        segments = tuple(
            item
            for item in self.segments
            if (with_tail if item.part_id is None else item.part_id in part_ids)
        )
        return replace(self, segments=segments, count=sum(item.live_count for item in segments))
