"""A part's manifest: its sections, where their bytes are, and what is known about its rows.

The manifest is a JSON document in the catalog (docs/formats/part.md). Truth is in the sections
`records` and `vectors`; every other section is derived and can be rebuilt from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from ochredb.errors import Corrupt, NewerFormat, newer_message
from ochredb.json_text import loads

FORMAT_VERSION = 2
TRUTH = ("records", "vectors")  # The sections that nothing else can replace.


@dataclass(frozen=True, slots=True)
class SectionPlace:
    """Bytes [start, stop) of an object."""

    object: int  # Index into the manifest's objects.
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a part.

    checksum: xxh3-64 of the table of block checksums at the object's end or, without a table (a
        graph of format 1, which hnswlib reads by path), of the whole object.
    """

    key: str
    size: int  # Bytes, the table included.
    checksum: int
    has_table: bool = True


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of an object, and their xxh3-64."""

    start: int
    stop: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the catalog knows about a part.

    rows: n, dead ones included. graph_labels: size of the graph's label space, 0 without a graph.
    graph_neighbors: its M; 0: what the collection's settings say.
    graph_recall: (ef, recall at 10), both ascending, as measured on this graph or on the one that
        it grew from, which had graph_recall_labels labels; empty if neither was.
    graph_recall_queries: measured with so many queries of each kind.
    truth_checksums: xxh3-64 of `records` and of `vectors` where they share an object, and so
        blocks, with what is derived: damage to that is then none of theirs.
    """

    id: str
    rows: int
    dimension: int
    graph_labels: int
    seq_min: int
    seq_max: int
    objects: tuple[ObjectInfo, ...]
    sections: dict[str, SectionPlace]
    graph_neighbors: int = 0
    graph_recall: tuple[tuple[int, float], ...] = ()
    graph_recall_labels: int = 0
    graph_recall_queries: int = 0
    truth_checksums: dict[str, int] = field(default_factory=dict)

    def spans(self, number: int) -> list[Span]:
        """What of an object has a checksum of its own."""
        places = [(self.sections[name], found) for name, found in self.truth_checksums.items()]
        return [
            Span(place.start, place.stop, checksum)
            for place, checksum in places
            if place.object == number
        ]

    @property
    def size_bytes(self) -> int:
        return sum(item.size for item in self.objects)

    @property
    def has_graph(self) -> bool:
        return self.graph_labels > 0

    def to_json(self) -> str:
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "id": self.id,
            "rows": self.rows,
            "dimension": self.dimension,
            "graph_labels": self.graph_labels,
            "seq_min": self.seq_min,
            "seq_max": self.seq_max,
            "objects": [[o.key, o.size, f"{o.checksum:016x}", o.has_table] for o in self.objects],
            "sections": {k: [p.object, p.start, p.stop] for k, p in self.sections.items()},
        }
        if self.graph_neighbors:
            document["graph_neighbors"] = self.graph_neighbors
        if self.graph_recall:
            document["graph_recall"] = self.graph_recall
            document["graph_recall_labels"] = self.graph_recall_labels
            document["graph_recall_queries"] = self.graph_recall_queries
        if self.truth_checksums:
            document["truth_checksums"] = {k: f"{c:016x}" for k, c in self.truth_checksums.items()}
        return orjson.dumps(document).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Raises NewerFormat for a part of a newer release, Corrupt for anything else."""
        try:
            document = loads(text)
            if (version := document["format_version"]) > FORMAT_VERSION:
                raise NewerFormat(newer_message("a part", version, FORMAT_VERSION))
            return cls(
                id=document["id"],
                rows=document["rows"],
                dimension=document["dimension"],
                graph_labels=document["graph_labels"],
                seq_min=document["seq_min"],
                seq_max=document["seq_max"],
                objects=tuple(
                    ObjectInfo(k, s, int(c, 16), t) for k, s, c, t in document["objects"]
                ),
                sections={k: SectionPlace(*p) for k, p in document["sections"].items()},
                graph_neighbors=document.get("graph_neighbors", 0),
                graph_recall=tuple(
                    (int(ef), float(recall)) for ef, recall in document.get("graph_recall", ())
                ),
                graph_recall_labels=document.get("graph_recall_labels", 0),
                graph_recall_queries=document.get("graph_recall_queries", 0),
                truth_checksums={
                    k: int(c, 16) for k, c in document.get("truth_checksums", {}).items()
                },
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"not a part manifest: {error}") from error
