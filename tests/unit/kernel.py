"""What tests of the kernel share: operations, a model of records, a clock set by hand, nodes."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import sqlalchemy

from ochredb.cancel import Cancel
from ochredb.catalog.appends import BacklogLimits
from ochredb.catalog.statement import Statement
from ochredb.clock import SystemClock
from ochredb.configuration import resolve
from ochredb.ids import IdSource
from ochredb.peers import GetRequest
from ochredb.poison import Poison
from ochredb.segment import View
from ochredb.types import Appended, Bools, Field, Float32s, Op, Operations, Records
from ochredb_compactor.config import CompactorConfig
from ochredb_log.config import LogConfig
from ochredb_node.node import Node, NodeConfig

# Where processes that tests start must run, so that they can import `tests.unit`.
ROOT = Path(__file__).resolve().parent.parent.parent
ALL_FIELDS = Field.DOCUMENT | Field.EMBEDDING | Field.METADATA | Field.URI
Metadata = dict[str, Any] | None


def operations(
    op: Op,
    ids: Sequence[str],
    vectors: Any = None,
    *,
    embedded: Sequence[bool] | None = None,
    documents: Sequence[str | None] | None = None,
    uris: Sequence[str | None] | None = None,
    metadatas: Sequence[Metadata] | None = None,
) -> Operations:
    """One request, from plain values."""
    embeddings: Float32s | None = None
    if vectors is not None:
        embeddings = np.ascontiguousarray(np.asarray(vectors, np.float32))
    mask: Bools | None = None if embedded is None else np.asarray(embedded, np.bool_)
    return Operations(
        op=op,
        ids=list(ids),
        embeddings=embeddings,
        embedded=mask,
        documents=None if documents is None else list(documents),
        uris=None if uris is None else list(uris),
        metadatas=None
        if metadatas is None
        else [None if item is None else orjson.dumps(item) for item in metadatas],
    )


@dataclass
class Model:
    """Records as a dict of dicts: what the words of the design say, one operation at a time."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    next_offset: int = 1

    def apply(self, request: Operations) -> None:
        for position, name in enumerate(request.ids):
            self._apply_one(request, position, name, self.next_offset + position)
        self.next_offset += len(request)

    def _apply_one(self, request: Operations, i: int, name: str, offset: int) -> None:
        known = self.records.get(name)
        if request.op is Op.DELETE:
            self.records.pop(name, None)
        elif known is None and request.op in (Op.ADD, Op.UPSERT):
            self.records[name] = {"seq": offset, "document": None, "uri": None, "metadata": None}
            self._put(self.records[name], request, i)
        elif known is not None and request.op in (Op.UPDATE, Op.UPSERT):
            self._put(known, request, i)

    def _put(self, record: dict[str, Any], request: Operations, i: int) -> None:
        if request.embeddings is not None and (request.embedded is None or request.embedded[i]):
            record["embedding"] = request.embeddings[i].tolist()
        if request.documents is not None and request.documents[i] is not None:
            record["document"] = request.documents[i]
        if request.uris is not None and request.uris[i] is not None:
            record["uri"] = request.uris[i]
        change = None if request.metadatas is None else request.metadatas[i]
        if change is not None:
            merged = dict(record["metadata"] or {})
            for key, value in orjson.loads(change).items():
                if value is None:
                    merged.pop(key, None)
                else:
                    merged[key] = value
            record["metadata"] = merged or None

    def rows(self) -> list[dict[str, Any]]:
        """The records in order of insertion, each with its id; copies."""
        ordered = sorted(self.records.items(), key=lambda item: item[1]["seq"])
        return [{"id": name, **record} for name, record in ordered]


def rows_of(answer: Records, seqs: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """An answer with all fields in the model's form (without seqs, if none are given)."""
    assert answer.documents is not None
    assert answer.uris is not None
    assert answer.metadatas is not None
    assert answer.embeddings is not None
    rows = []
    for i, name in enumerate(answer.ids):
        metadata = answer.metadatas[i]
        row = {
            "id": name,
            "document": answer.documents[i],
            "uri": answer.uris[i],
            "metadata": None if metadata is None else orjson.loads(metadata),
            "embedding": answer.embeddings[i].tolist(),
        }
        rows.append(row if seqs is None else row | {"seq": seqs[i]})
    return rows


def rows_of_view(view: View) -> list[dict[str, Any]]:
    """Everything that a view shows, in the model's form and order."""
    from ochredb.plan.operators import Filter, Page, Project

    hits = Page(None).run(view, Filter().run(view, Cancel()))
    pairs = zip(hits.segments.tolist(), hits.rows.tolist(), strict=True)
    seqs = [int(view.segments[number].segment.seqs[row]) for number, row in pairs]
    return rows_of(Project(ALL_FIELDS).run(view, hits), seqs)


def sql(text: str) -> Statement:
    """A statement in plain SQL, for a session of any database."""
    return Statement(sqlalchemy.text(text))


class ManualClock:
    """Starts at the host's time and moves only when told, or when somebody sleeps."""

    def __init__(self) -> None:
        self._origin_us = SystemClock().now_us()
        self._elapsed_s = 0.0

    def now_us(self) -> int:
        return self._origin_us + int(self._elapsed_s * 1e6)

    def monotonic_s(self) -> float:
        return self._elapsed_s

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self._elapsed_s += seconds


@contextlib.contextmanager
def running_node(
    path: str | None = None,
    *,
    clock: Any = None,
    inline_bytes_max: int = 256 << 10,
    backlog: BacklogLimits | None = None,
    grace_s: float = 60.0,
    foreground: bool = False,
) -> Iterator[Node]:
    """A started node without background threads, closed at the end."""
    config = NodeConfig(
        path=path,
        foreground=foreground,
        log=LogConfig(inline_bytes_max=inline_bytes_max, flushes_max=1),
        backlog=backlog or BacklogLimits(),
        compactor=CompactorConfig(grace_s=grace_s, graph_threads=1),
    )
    clock = clock or SystemClock()
    node = Node(config, clock=clock, ids=IdSource(clock))
    node.start(background=False)
    try:
        yield node
    finally:
        node.close()


def forget_recent(node: Node) -> None:
    """Seconds later: what this process wrote has to be read back from the log."""
    node.logs.recent.age()
    node.logs.recent.age()


def unexpected(poison: Poison) -> None:
    """Told of an operation that is skipped, where there should be none."""
    raise AssertionError(poison)


def make_collection(node: Node, name: str = "records", space: str = "l2") -> str:
    """A new collection's id."""
    configuration, schema = resolve(None, {"hnsw": {"space": space}}, None, num_threads=1)
    info = node.namespace.create_collection(
        "default_tenant",
        "default_database",
        name,
        configuration=configuration,
        schema=schema,
        metadata=None,
        get_or_create=False,
    )
    return info.id


def submit(
    node: Node, collection: str, request: Operations, *, idempotency_key: str | None = None
) -> Appended:
    """Append the other way, without a thread of one's own; waits for the outcome all the same."""
    outcomes: queue.SimpleQueue[Appended | BaseException] = queue.SimpleQueue()
    node.log.submit(
        collection,
        request,
        idempotency_key=idempotency_key,
        cancel=Cancel(),
        deliver=outcomes.put,
    )
    outcome = outcomes.get(timeout=60)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def append(node: Node, collection: str, request: Operations, **more: Any) -> Appended:
    return node.log.append(collection, request, cancel=Cancel(), **more)


def add_rows(node: Node, collection: str, first: int, count: int, dimension: int = 4) -> None:
    """Records `first`.. with documents, metadata and vectors that depend on their numbers only."""
    numbers = range(first, first + count)
    vectors = [[float(number * (axis + 3) % 97) for axis in range(dimension)] for number in numbers]
    append(
        node,
        collection,
        operations(
            Op.ADD,
            [f"id-{number}" for number in numbers],
            vectors,
            documents=[f"document {number}" for number in numbers],
            metadatas=[{"number": number} for number in numbers],
        ),
    )


def all_rows(node: Node, collection: str) -> list[dict[str, Any]]:
    """Every record as a strong read gives it."""
    return rows_of(node.query.get(collection, GetRequest(fields=ALL_FIELDS), cancel=Cancel()))


def ids_of(node: Node, collection: str) -> list[str]:
    return node.query.get(collection, GetRequest(fields=Field.NONE), cancel=Cancel()).ids


def object_keys(node: Node) -> set[str]:
    """Keys of the objects that belong to collections, as they lie in the store."""
    return {item.key for item in node.store.list("")} - {"store_id"}
