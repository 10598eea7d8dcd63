"""What every `peers.Log`, `peers.LogReader` and `peers.Query` must do, by calls alone.

Subclass, give the `roles` fixture, inherit the tests:

class TestMyRoles(PeersSuite):
    @pytest.fixture
    def roles(self) -> Roles:
        return Roles(log=..., reader=..., query=..., new_collection=...)
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb.cancel import Cancel, Cancelled
from ochredb.errors import (
    Conflict,
    DeadlineExceeded,
    Gone,
    InvalidArgument,
    NotFound,
    OchreError,
    Unprocessable,
)
from ochredb.fragment import decode, encode
from ochredb.peers import GetRequest, Log, LogReader, Query, QueryRequest
from ochredb.types import Appended, Field, Op, Operations, Records
from ochredb.where import And, Compare, DocumentContains, Or, Where

ALL_FIELDS = Field.DOCUMENT | Field.EMBEDDING | Field.METADATA | Field.URI
NO_SUCH = "00000000-0000-7000-8000-000000000000"
_DOCUMENTS = ("plain", "Größe 🦀\u0000", "", None)


@dataclass(frozen=True, slots=True)
class Roles:
    """What the tests drive. new_collection: makes one (l2) and returns its id."""

    log: Log
    reader: LogReader
    query: Query
    new_collection: Callable[[], str]


def operations(op: Op, ids: Sequence[str], dimension: int = 3, first: int = 0) -> Operations:
    """One request: vectors, documents, uris and metadata follow from the position."""
    rows = range(first, first + len(ids))
    if op is Op.DELETE:
        return Operations(op=op, ids=list(ids))
    vectors = [[float(row * (axis + 2) % 31) for axis in range(dimension)] for row in rows]
    return Operations(
        op=op,
        ids=list(ids),
        embeddings=np.array(vectors, np.float32).reshape(len(ids), dimension),
        documents=[_DOCUMENTS[row % 4] for row in rows],
        uris=[None if row % 3 else f"file:///{row}" for row in rows],
        metadatas=[
            None if row % 5 == 4 else orjson.dumps({"n": row, "f": row / 8}) for row in rows
        ],
        key_types=frozenset({("n", "int"), ("f", "float")}),
    )


def _metadata(row: int) -> bytes:
    return orjson.dumps({"n": row, "f": row / 8})


def plain(records: Records) -> dict[str, Any]:
    """Everything of an answer in comparable form."""
    vectors = records.embeddings
    return {
        "ids": records.ids,
        "documents": records.documents,
        "uris": records.uris,
        "metadatas": records.metadatas,
        "embeddings": None if vectors is None else (vectors.shape, vectors.tolist()),
    }


class PeersSuite:
    """The behaviour of a log and a query role on one store."""

    @pytest.fixture
    def roles(self) -> Roles:
        """Roles on one store."""
        raise NotImplementedError("a subclass gives the roles")

    @pytest.fixture
    def collection(self, roles: Roles) -> str:
        return roles.new_collection()

    # -- appends

    def test_appends_are_dense_and_seen_at_once(self, roles: Roles, collection: str) -> None:
        first = _append(roles, collection, operations(Op.ADD, ["a", "b", "c"]))
        second = _append(roles, collection, operations(Op.UPSERT, ["c", "d"], first=3))
        assert (first.first_offset, first.last_offset) == (1, 3)
        assert (second.first_offset, second.last_offset) == (4, 5)
        assert not first.repeated
        assert _ids(roles, collection) == ["a", "b", "c", "d"]
        _append(roles, collection, operations(Op.DELETE, ["a", "x"]))
        assert _ids(roles, collection) == ["b", "c", "d"]

    def test_every_column_comes_back(self, roles: Roles, collection: str) -> None:
        request = operations(Op.ADD, [f"id-{row}" for row in range(9)])
        _append(roles, collection, request)
        found = roles.query.get(collection, GetRequest(fields=ALL_FIELDS), cancel=Cancel())
        assert request.embeddings is not None
        assert plain(found) == {
            "ids": request.ids,
            "documents": request.documents,
            "uris": request.uris,
            "metadatas": request.metadatas,
            "embeddings": ((9, 3), request.embeddings.tolist()),
        }
        assert found.plan is None

    def test_updates_leave_alone_what_they_do_not_name(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a", "b"]))
        update = Operations(
            op=Op.UPDATE,
            ids=["a", "b"],
            embeddings=np.array([[7, 7, 7], [0, 0, 0]], np.float32),
            embedded=np.array([True, False]),
        )
        _append(roles, collection, update)
        found = roles.query.get(collection, GetRequest(fields=ALL_FIELDS), cancel=Cancel())
        assert found.embeddings is not None
        assert found.embeddings.tolist() == [[7, 7, 7], [2, 3, 4]]
        assert found.documents == ["plain", "Größe 🦀\u0000"]

    def test_a_key_is_applied_once(self, roles: Roles, collection: str) -> None:
        request = operations(Op.ADD, ["a", "b"])
        first = _append(roles, collection, request, idempotency_key="ключ")
        again = _append(roles, collection, request, idempotency_key="ключ")
        assert again == replace(first, repeated=True)
        with pytest.raises(Unprocessable, match="ключ"):
            _append(roles, collection, operations(Op.ADD, ["c"]), idempotency_key="ключ")
        assert _ids(roles, collection) == ["a", "b"]

    def test_the_hash_says_what_is_the_same(self, roles: Roles, collection: str) -> None:
        more = {"idempotency_key": "k", "request_hash": b"\x00same\xff"}
        first = _append(roles, collection, operations(Op.ADD, ["a"]), **more)
        again = _append(roles, collection, operations(Op.ADD, ["b"]), **more)
        assert again == replace(first, repeated=True)
        assert roles.log.repeated(collection, "k", b"\x00same\xff", cancel=Cancel()) == again
        assert roles.log.repeated(collection, "other", b"hash", cancel=Cancel()) is None
        with pytest.raises(Unprocessable):
            roles.log.repeated(collection, "k", b"not the same", cancel=Cancel())

    def test_a_named_write_is_applied_once(self, roles: Roles, collection: str) -> None:
        request = operations(Op.ADD, ["a", "b"])
        first = _append(roles, collection, request, request_id="name-1")
        again = _append(roles, collection, request, request_id="name-1")
        assert again == replace(first, repeated=True)
        assert _append(roles, collection, request, request_id="name-2").first_offset == 3

    def test_nothing_is_recorded_under_a_key(self, roles: Roles, collection: str) -> None:
        nothing = roles.log.record_nothing(collection, "k", b"hash", cancel=Cancel())
        assert (nothing.first_offset, nothing.last_offset) == (1, 0)
        again = roles.log.record_nothing(collection, "k", b"hash", cancel=Cancel())
        assert again == replace(nothing, repeated=True)

    def test_an_expectation_that_fails_writes_nothing(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a"]), expect_last_offset=0)
        with pytest.raises(Conflict, match="expected last offset 0, found 1"):
            _append(roles, collection, operations(Op.ADD, ["b"]), expect_last_offset=0)
        assert _ids(roles, collection) == ["a"]

    def test_refusals_are_of_their_class(self, roles: Roles, collection: str) -> None:
        with pytest.raises(NotFound, match=NO_SUCH):
            _append(roles, NO_SUCH, operations(Op.ADD, ["a"]))
        _append(roles, collection, operations(Op.ADD, ["a"]))
        with pytest.raises(InvalidArgument, match="dimension of 3, got 2"):
            _append(roles, collection, operations(Op.ADD, ["b"], dimension=2))
        with pytest.raises(InvalidArgument, match="embedding"):
            _append(roles, collection, Operations(op=Op.ADD, ids=["c"]))

    def test_a_submitted_write_is_told(self, roles: Roles, collection: str) -> None:
        assert _submit(roles, collection, operations(Op.ADD, ["a"])) == Appended(1, 1)
        outcome = _submit(roles, collection, operations(Op.ADD, ["b"], dimension=2))
        assert isinstance(outcome, InvalidArgument)
        named = partial(_submit, roles, collection, operations(Op.ADD, ["c"]), request_id="n")
        assert named() == Appended(2, 2)
        assert named() == Appended(2, 2, repeated=True)
        assert _ids(roles, collection) == ["a", "c"]

    def test_many_submitted_writes_are_all_told(self, roles: Roles, collection: str) -> None:
        told: queue.SimpleQueue[Appended | BaseException] = queue.SimpleQueue()
        for number in range(50):
            request = operations(Op.ADD, [str(number)])
            roles.log.submit(collection, request, cancel=Cancel(), deliver=told.put)
        outcomes = [told.get(timeout=60) for _ in range(50)]
        assert all(isinstance(outcome, Appended) for outcome in outcomes), outcomes
        offsets = {each.first_offset for each in outcomes if isinstance(each, Appended)}
        assert offsets == set(range(1, 51))

    # -- evaluated appends

    def test_what_is_evaluated_is_appended(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a", "b"]))

        def evaluate() -> Operations:
            return Operations(op=Op.DELETE, ids=_ids(roles, collection))

        done = roles.log.append_evaluated(collection, evaluate, cancel=Cancel())
        assert (done.first_offset, done.last_offset) == (3, 4)
        assert _ids(roles, collection) == []
        nothing = roles.log.append_evaluated(collection, evaluate, cancel=Cancel())
        assert (nothing.first_offset, nothing.last_offset) == (5, 4)

    def test_a_repeat_is_not_evaluated_again(self, roles: Roles, collection: str) -> None:
        calls: list[int] = []

        def evaluate() -> Operations:
            calls.append(1)
            return operations(Op.ADD, ["a"])

        for more in (
            {"idempotency_key": "k", "request_hash": b"h"},
            {"request_id": "n"},
        ):
            calls.clear()
            append = partial(roles.log.append_evaluated, collection, evaluate, cancel=Cancel())
            first, again = append(**more), append(**more)
            assert again == replace(first, repeated=True)
            assert len(calls) == 1

    def test_what_evaluation_fails_with_is_raised_and_the_lock_is_free(
        self, roles: Roles, collection: str
    ) -> None:
        class _Odd(Exception):
            pass

        def evaluate() -> Operations:
            raise _Odd("no")

        with pytest.raises(_Odd):
            roles.log.append_evaluated(collection, evaluate, cancel=Cancel())
        assert _append(roles, collection, operations(Op.ADD, ["a"])) == Appended(1, 1)
        with pytest.raises(NotFound):
            roles.log.append_evaluated(NO_SUCH, evaluate, cancel=Cancel())

    # -- the log itself

    def test_the_log_is_read_back_as_it_was_written(self, roles: Roles, collection: str) -> None:
        requests = [
            operations(Op.ADD, ["a", "b"]),
            operations(Op.UPSERT, ["a"], first=7),
            operations(Op.DELETE, ["b"]),
        ]
        for request in requests:
            _append(roles, collection, request)
        found = list(roles.reader.read(collection, 1, None, cancel=Cancel()))
        assert [(each.first_offset, each.last_offset) for each in found] == [(1, 2), (3, 3), (4, 4)]
        assert [each.payload for each in found] == [encode(each).to_pybytes() for each in requests]
        assert decode(found[0].payload).ids == ["a", "b"]
        some = list(roles.reader.read(collection, 3, 3, cancel=Cancel()))
        assert [each.first_offset for each in some] == [3]
        assert list(roles.reader.read(collection, 5, None, cancel=Cancel())) == []
        with pytest.raises(Gone):
            list(roles.reader.read(collection, 2, None, cancel=Cancel()))
        with pytest.raises(NotFound):
            list(roles.reader.read(NO_SUCH, 1, None, cancel=Cancel()))

    def test_a_log_says_how_long_it_is(self, roles: Roles, collection: str) -> None:
        assert roles.reader.status(collection, cancel=Cancel()).last_offset == 0
        request = operations(Op.ADD, ["a", "b"])
        _append(roles, collection, request)
        status = roles.reader.status(collection, cancel=Cancel())
        assert (status.floor_offset, status.indexed_offset, status.last_offset) == (0, 0, 2)
        assert status.tail_bytes == encode(request).size
        with pytest.raises(NotFound):
            roles.reader.status(NO_SUCH, cancel=Cancel())

    # -- reads

    def test_columns_that_were_not_asked_for_are_none(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a", "b"]))
        for fields in (Field.NONE, Field.DOCUMENT, Field.EMBEDDING, Field.METADATA, Field.URI):
            found = roles.query.get(collection, GetRequest(fields=fields), cancel=Cancel())
            assert (found.documents is not None) == (fields is Field.DOCUMENT)
            assert (found.embeddings is not None) == (fields is Field.EMBEDDING)
            assert (found.metadatas is not None) == (fields is Field.METADATA)
            assert (found.uris is not None) == (fields is Field.URI)

    def test_pages_ids_and_filters(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, [str(row) for row in range(20)]))
        get = partial(_ids, roles, collection)
        assert get(limit=3, offset=5) == ["5", "6", "7"]
        assert get(limit=0) == []
        assert get(ids=["7", "x", "3", "7"]) == ["3", "7"]
        assert get(ids=[]) == []
        recent = Compare("n", "$gte", 15)
        assert get(where=recent) == ["15", "16", "17", "18"]
        both = And((recent, DocumentContains("Größe", negated=False)))
        assert get(where=both) == ["17"]
        assert get(where=Or(())) == []
        assert roles.query.match(collection, GetRequest(where=both), cancel=Cancel()) == (
            ["17"],
            20,
        )
        assert roles.query.count(collection, cancel=Cancel()) == 20

    def test_an_empty_collection_answers(self, roles: Roles, collection: str) -> None:
        found = roles.query.get(collection, GetRequest(fields=ALL_FIELDS), cancel=Cancel())
        assert (found.ids, found.documents, found.metadatas) == ([], [], [])
        assert roles.query.count(collection, cancel=Cancel()) == 0
        nearest = _nearest(roles, collection, [[1, 2, 3], [0, 0, 0]])
        assert [each.ids for each in nearest.records] == [[], []]
        assert [each.tolist() for each in nearest.distances] == [[], []]
        assert roles.query.match(collection, GetRequest(), cancel=Cancel()) == ([], 0)

    def test_the_nearest_come_with_their_distances(self, roles: Roles, collection: str) -> None:
        request = operations(Op.ADD, [str(row) for row in range(30)])
        _append(roles, collection, request)
        assert request.embeddings is not None
        queries = np.array([[1, 2, 3], [30, 0, 7]], np.float32)
        exact = ((request.embeddings[None] - queries[:, None]) ** 2).sum(2)
        answer = _nearest(roles, collection, queries, n_results=4, fields=ALL_FIELDS)
        for number, (records, distances) in enumerate(
            zip(answer.records, answer.distances, strict=True)
        ):
            order = np.argsort(exact[number], kind="stable")[:4]
            assert records.ids == [str(row) for row in order]
            assert distances.dtype == np.float32
            assert distances.tolist() == exact[number][order].astype(np.float32).tolist()
            assert records.embeddings is not None
            assert records.embeddings.tolist() == request.embeddings[order].tolist()
            assert request.documents is not None
            assert records.documents == [request.documents[row] for row in order]
        where: Where = Compare("n", "$lt", 2)
        some = _nearest(roles, collection, queries, where=where, fields=Field.NONE, exact=True)
        assert sorted(some.records[0].ids) == ["0", "1"]
        assert some.records[0].documents is None

    def test_queries_that_are_refused(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a"]))
        with pytest.raises(InvalidArgument, match="dimension of 3, got 2"):
            _nearest(roles, collection, [[1, 2]])
        with pytest.raises(InvalidArgument, match="none of the given ids"):
            _nearest(roles, collection, [[1, 2, 3]], ids=["x"])
        for read in (
            lambda: roles.query.get(NO_SUCH, GetRequest(), cancel=Cancel()),
            lambda: _nearest(roles, NO_SUCH, [[1, 2, 3]]),
            lambda: roles.query.count(NO_SUCH, cancel=Cancel()),
            lambda: roles.query.match(NO_SUCH, GetRequest(), cancel=Cancel()),
            lambda: roles.query.indexing_status(NO_SUCH, cancel=Cancel()),
        ):
            with pytest.raises(NotFound, match=NO_SUCH):
                read()

    def test_no_vectors_no_answers(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a"]))
        answer = _nearest(roles, collection, np.empty((0, 3), np.float32))
        assert (answer.records, answer.distances) == ([], [])

    def test_plans_come_where_they_are_asked_for(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a", "b"]))
        where = Compare("n", "$lt", 1)
        got = roles.query.get(collection, GetRequest(where=where, explain=True), cancel=Cancel())
        assert got.ids == ["a"]
        assert got.plan is not None
        assert (got.plan.operator, got.plan.steps[0].operator) == ("Get", "Snapshot")
        found = _nearest(roles, collection, [[1, 2, 3]], explain=True)
        assert found.plan is not None
        assert found.plan.operator == "Query"
        assert found.records[0].ids

    def test_what_is_indexed_is_told(self, roles: Roles, collection: str) -> None:
        _append(roles, collection, operations(Op.ADD, ["a", "b"]))
        status = roles.query.indexing_status(collection, cancel=Cancel())
        assert (status.num_unindexed_ops, status.total_ops) == (2, 2)

    # -- ends

    def test_what_is_out_of_time_or_unwanted_is_not_begun(
        self, roles: Roles, collection: str
    ) -> None:
        gone = Cancel()
        gone.cancel()
        for cancel, kind in ((Cancel(-1.0), DeadlineExceeded), (gone, Cancelled)):
            expected: type[OchreError] = kind
            with pytest.raises(expected):
                roles.log.append(collection, operations(Op.ADD, ["a"]), cancel=cancel)
            with pytest.raises(expected):
                roles.query.get(collection, GetRequest(), cancel=cancel)
            with pytest.raises(expected):
                roles.query.count(collection, cancel=cancel)
            with pytest.raises(expected):
                roles.query.indexing_status(collection, cancel=cancel)
            with pytest.raises(expected):
                roles.log.repeated(collection, "k", b"hash", cancel=cancel)
            with pytest.raises(expected):
                roles.log.record_nothing(collection, "k", b"hash", cancel=cancel)
            with pytest.raises(expected):
                roles.reader.status(collection, cancel=cancel)
        assert _ids(roles, collection) == []
        assert roles.log.repeated(collection, "k", b"hash", cancel=Cancel()) is None


def _append(roles: Roles, collection: str, request: Operations, **more: Any) -> Appended:
    return roles.log.append(collection, request, cancel=Cancel(), **more)


def _submit(
    roles: Roles, collection: str, request: Operations, **more: Any
) -> Appended | BaseException:
    told: queue.SimpleQueue[Appended | BaseException] = queue.SimpleQueue()
    roles.log.submit(collection, request, cancel=Cancel(), deliver=told.put, **more)
    return told.get(timeout=60)


def _ids(roles: Roles, collection: str, **more: Any) -> list[str]:
    request = GetRequest(fields=Field.NONE, **more)
    return roles.query.get(collection, request, cancel=Cancel()).ids


def _nearest(roles: Roles, collection: str, queries: Any, **more: Any) -> Any:
    request = QueryRequest(embeddings=np.asarray(queries, np.float32), **more)
    return roles.query.query(collection, request, cancel=Cancel())
