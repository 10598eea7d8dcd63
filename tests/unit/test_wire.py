"""Bodies to domain values: what is accepted, and every refusal with its status and message."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest

from ochredb.errors import InvalidArgument, OchreError, TooLarge, Unprocessable
from ochredb.peers import GetRequest, QueryRequest
from ochredb.types import Field, Op, Operations, QueryAnswer, Records
from ochredb.where import And, DocumentContains
from ochredb_frontend import wire
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import EdgeError, Request, error_response
from ochredb_frontend.vectors import parse_embeddings, parse_query_embeddings

CONFIG = FrontendConfig()
COLLECTION = "01890a5d-ac96-774b-bcce-b302099a8057"
SHAPE = "Failed to deserialize the JSON body into the target type: "


def request(
    body: Any, headers: dict[str, str] | None = None, *, raw: bytes | None = None
) -> Request:
    return Request(
        method="POST",
        path="",
        headers={"content-type": "application/json", **(headers or {})},
        body=orjson.dumps(body) if raw is None else raw,
        parameters={"collection_id": COLLECTION},
    )


def base64_of(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()


def write(body: Any, op: Op = Op.ADD) -> Operations:
    return wire.parse_write(request(body), op, CONFIG).operations


# -- embeddings


def test_base64_and_numbers_give_the_same_matrix() -> None:
    rows = [[1.0, 2.5, -3.0], [0.1, 0.0, 1e-3]]
    from_numbers, mask = parse_embeddings(rows, nullable=False)
    from_base64, _ = parse_embeddings([base64_of(*row) for row in rows], nullable=False)
    assert from_numbers is not None and from_base64 is not None and mask is None
    assert from_numbers.dtype == np.float32 and from_numbers.shape == (2, 3)
    assert from_numbers.flags.c_contiguous and from_base64.flags.c_contiguous
    assert np.array_equal(from_numbers, np.array(rows, dtype=np.float32))
    assert np.array_equal(from_numbers, from_base64)


def test_integers_of_any_size_become_floats() -> None:
    rows, _ = parse_embeddings([[1, 2**63, 2**64 - 1]], nullable=False)
    assert rows is not None and rows.tolist() == [[1.0, 2.0**63, 2.0**64]]


def test_null_items_leave_a_mask_in_update() -> None:
    rows, mask = parse_embeddings([None, base64_of(1, 2), None], nullable=True)
    assert rows is not None and mask is not None
    assert mask.tolist() == [False, True, False]
    assert rows.tolist() == [[0, 0], [1, 2], [0, 0]]
    assert parse_embeddings([None, None], nullable=True) == (None, None)
    assert parse_embeddings([], nullable=False) == (None, None)


NO_VARIANT = SHAPE + "embeddings: data did not match any variant of untagged enum EmbeddingsPayload"
NO_DIMENSION = "Validation error: embeddings: Each embedding must have at least 1 dimension"
NOT_FINITE = "Validation error: embeddings: Embeddings must not contain NaN or Infinity values"
ONES = [0.0, 1.0] * 1_500  # Long enough for the scan that looks at suspect rows only.


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, Unprocessable, NO_VARIANT),
        ({}, Unprocessable, NO_VARIANT),
        ("AAAA", Unprocessable, NO_VARIANT),
        ([1, 2], Unprocessable, NO_VARIANT),
        ([None], Unprocessable, NO_VARIANT),
        ([[1, "2"]], Unprocessable, NO_VARIANT),
        ([[1, None]], Unprocessable, NO_VARIANT),
        ([[1, True]], Unprocessable, NO_VARIANT),
        ([ONES, [*ONES[:-1], True]], Unprocessable, NO_VARIANT),
        ([[[1]]], Unprocessable, NO_VARIANT),
        ([[{}]], Unprocessable, NO_VARIANT),
        ([base64_of(1), [1]], Unprocessable, NO_VARIANT),
        ([[]], InvalidArgument, NO_DIMENSION),
        ([[1, 2], []], InvalidArgument, NO_DIMENSION),
        ([""], InvalidArgument, NO_DIMENSION),
        ([[1e40]], InvalidArgument, NOT_FINITE),
        ([[1, -1e39]], InvalidArgument, NOT_FINITE),
        ([[1, 2, 3], [1, 2]], InvalidArgument, "Inconsistent dimensions in provided embeddings"),
        (
            [base64_of(1, 2), base64_of(1)],
            InvalidArgument,
            "Inconsistent dimensions in provided embeddings",
        ),
        (["!!!!"], InvalidArgument, "Invalid base64 string: "),
        (["AAA"], InvalidArgument, "Invalid base64 string: "),
        (["é"], InvalidArgument, "Invalid base64 string: "),
        (["AAAA=AAA"], InvalidArgument, "Invalid base64 string: "),
        (
            ["AAAA"],
            InvalidArgument,
            "Invalid byte length: 3 bytes cannot be converted to f32 values"
            " (must be divisible by 4)",
        ),
        (
            [base64_of(1, float("nan"))],
            InvalidArgument,
            "Non-finite float value at embedding index 1: NaN",
        ),
        (
            [base64_of(float("-inf"))],
            InvalidArgument,
            "Non-finite float value at embedding index 0: -inf",
        ),
    ],
)
def test_bad_embeddings_are_refused(value: Any, error: type[OchreError], message: str) -> None:
    with pytest.raises(error) as caught:
        parse_embeddings(value, nullable=False)
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("dimension", [1, 2, 3, 7, 128])
def test_many_texts_give_what_each_gives(dimension: int) -> None:
    rows = np.random.default_rng(1).standard_normal((20, dimension)).astype(np.float32)
    parsed, _ = parse_embeddings([base64_of(*row) for row in rows], nullable=False)
    assert parsed is not None and parsed.flags.c_contiguous
    assert np.array_equal(parsed, rows)


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:1] + "!" + text[2:],
        lambda text: text[:1] + "é" + text[2:],
        lambda text: text[:1] + "=" + text[2:],
        lambda text: text[:-1],
        lambda text: text[:-1] + "B",
        lambda text: text[:-1] + "=",
        lambda text: text[:-2] + "==",
        lambda text: text + "AAAA",
        lambda text: text.rstrip("=")[:-1] + "/" + "=" * text.count("="),  # Bits that say nothing.
    ],
)
@pytest.mark.parametrize("where", [0, 9, 19])
def test_one_odd_text_among_many_is_taken_or_refused_as_alone(
    dimension: int, spoil: Callable[[str], str], where: int
) -> None:
    texts = [base64_of(*[1.5] * dimension)] * 20
    texts[where] = spoil(texts[where])
    outcomes: list[Any] = []
    for few in (False, True):  # Few are decoded one by one.
        try:
            some = [texts[where], texts[where - 1]] if few else texts
            rows, _ = parse_embeddings(some, nullable=False)
            outcomes.append(rows[0 if few else where].tolist() if rows is not None else None)
        except InvalidArgument as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_query_embeddings_may_hold_infinities_and_no_numbers_at_all() -> None:
    assert np.isinf(parse_query_embeddings([[1e40, 1]])[0, 0])
    assert parse_query_embeddings([[]]).shape == (1, 0)
    assert parse_query_embeddings([]).shape == (0, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "query_embeddings: invalid type: null, expected a sequence"),
        ([1, 2], "query_embeddings[0]: invalid type: integer `1`, expected a sequence"),
        (["AAAA"], 'query_embeddings[0]: invalid type: string "AAAA", expected a sequence'),
        ([[1], [2, True]], "query_embeddings[1][1]: invalid type: boolean `true`, expected f32"),
        ([[None]], "query_embeddings[0][0]: invalid type: null, expected f32"),
    ],
)
def test_bad_query_embeddings_are_refused(value: Any, message: str) -> None:
    with pytest.raises(Unprocessable) as caught:
        parse_query_embeddings(value)
    assert str(caught.value) == SHAPE + message


def test_query_embeddings_of_unequal_length_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^Inconsistent dimensions in provided embeddings$"):
        parse_query_embeddings([[1, 2], []])


# -- writes


def test_a_write_is_columns() -> None:
    parsed = wire.parse_write(
        request(
            {
                "ids": ["a", "b", "a"],
                "embeddings": [[1, 2], [3, 4], [5, 6]],
                "documents": ["x", None, ""],
                "metadatas": [{"n": 1, "s": "t"}, None, {}],
                "uris": [None, None, None],
                "unknown": 1,
            },
            {"idempotency-key": "k1"},
        ),
        Op.UPSERT,
        CONFIG,
    )
    operations = parsed.operations
    assert (parsed.collection_id, parsed.idempotency_key) == (COLLECTION, "k1")
    assert operations.op is Op.UPSERT
    assert operations.ids == ["a", "b", "a"]
    assert operations.embeddings is not None and operations.embeddings.shape == (3, 2)
    assert operations.documents == ["x", None, ""]
    assert operations.uris is None
    assert operations.metadatas is not None
    assert orjson.loads(operations.metadatas[0] or b"") == {"n": 1, "s": "t"}
    assert operations.metadatas[1] is None
    assert operations.key_types == {("n", "int"), ("s", "string")}


def test_update_needs_no_embeddings() -> None:
    assert write({"ids": ["a"]}, Op.UPDATE).embeddings is None
    assert write({"ids": ["a"], "embeddings": None}, Op.UPDATE).embeddings is None
    assert len(write({"ids": [], "embeddings": []})) == 0


ONE = {"ids": ["a"], "embeddings": [[1, 2]]}
UNEQUAL = "Inconsistent number of IDs, embeddings, documents, URIs and metadatas"
BAD_WRITES: list[tuple[Any, int, str]] = [
    ([], 422, SHAPE + "invalid type: sequence, expected a map"),
    ("x", 422, SHAPE + 'invalid type: string "x", expected a map'),
    ({}, 422, SHAPE + "missing field `ids`"),
    ({"ids": ["a"]}, 422, SHAPE + "missing field `embeddings`"),
    ({"ids": "a", "embeddings": []}, 422, SHAPE + 'ids: invalid type: string "a"'),
    ({"ids": [1], "embeddings": [[1]]}, 422, SHAPE + "ids[0]: invalid type: integer `1`"),
    ({"ids": [None], "embeddings": [[1]]}, 422, SHAPE + "ids[0]: invalid type: null"),
    ({"ids": [""], "embeddings": [[1]]}, 400, "Empty ID, ID must have at least one character"),
    ({"ids": ["a", "b"], "embeddings": [[1]]}, 400, UNEQUAL),
    ({"ids": [], "embeddings": [[1]]}, 400, UNEQUAL),
    ({**ONE, "documents": []}, 400, UNEQUAL),
    ({**ONE, "documents": ["x", "y"]}, 400, UNEQUAL),
    ({**ONE, "uris": ["x", None]}, 400, UNEQUAL),
    ({**ONE, "metadatas": [None, None]}, 400, UNEQUAL),
    ({**ONE, "documents": "x"}, 422, SHAPE + 'documents: invalid type: string "x", expected a seq'),
    ({**ONE, "documents": [1]}, 422, SHAPE + "documents[0]: invalid type: integer `1`, expected a"),
    ({**ONE, "uris": [1.5]}, 422, SHAPE + "uris[0]: invalid type: floating point `1.5`"),
    ({**ONE, "metadatas": "x"}, 422, SHAPE + 'metadatas: invalid type: string "x"'),
    ({**ONE, "metadatas": [5]}, 422, SHAPE + "metadatas[0]: invalid type: integer `5`"),
    ({**ONE, "metadatas": [{"a": None}]}, 422, SHAPE + "metadatas[0].a: data did not match"),
    ({**ONE, "metadatas": [{"a": {"b": 1}}]}, 422, SHAPE + "metadatas[0].a: data did not match"),
    ({**ONE, "metadatas": [{"a": [1, "x"]}]}, 422, SHAPE + "metadatas[0].a: data did not match"),
    ({**ONE, "metadatas": [{"$a": 1}]}, 400, "Validation error: metadatas: Invalid metadata at in"),
    ({**ONE, "metadatas": [{"": 1}]}, 400, "Validation error: metadatas: Invalid metadata at inde"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD_WRITES)
def test_bad_writes_are_refused(body: Any, status: int, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        write(body)
    assert caught.value.kind.http == status
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"ids":["\xff"],"embeddings":[[1]]}',
        b'{"ids":["\\ud800"],"embeddings":[[1]]}',
        b'{"ids":["a"],"embeddings":[[NaN]]}',
        b'{"ids":["a"],"embeddings":[[1e400]]}',
        b'{"ids":' + b"[" * 2_000 + b"]" * 2_000 + b"}",
    ],
)
def test_text_that_is_not_json_is_400(raw: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        wire.parse_write(request(None, raw=raw), Op.ADD, CONFIG)
    assert caught.value.kind.http == 400
    assert str(caught.value).startswith("Failed to parse the request body as JSON: ")


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/xml", "text/json"])
def test_other_content_types_are_415(content_type: str) -> None:
    with pytest.raises(EdgeError) as caught:
        wire.parse_write(request(ONE, {"content-type": content_type}), Op.ADD, CONFIG)
    response = error_response(caught.value)
    assert response.status == 415
    assert orjson.loads(response.body) == {
        "error": "ChromaError",
        "message": "Expected request with `Content-Type: application/json`",
    }


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
def test_json_content_types_are_accepted(content_type: str) -> None:
    assert wire.parse_write(request(ONE, {"content-type": content_type}), Op.ADD, CONFIG)


def test_a_path_without_uuid_is_refused() -> None:
    bad = request(ONE)
    bad.parameters = {"collection_id": "xyz"}
    with pytest.raises(InvalidArgument, match=r"^Collection ID is not a valid UUIDv4$"):
        wire.parse_write(bad, Op.ADD, CONFIG)


def test_too_large_a_batch_is_413() -> None:
    body = {"ids": ["a", "b", "c"], "embeddings": [[1], [1], [1]]}
    with pytest.raises(TooLarge, match=r"^Batch size 3 exceeds maximum batch size 2$"):
        wire.parse_write(request(body), Op.ADD, FrontendConfig(batch_records_max=2))


# -- reads and deletions


def get(body: Any) -> wire.Read:
    return wire.parse_get(request(body), CONFIG)


def test_get_defaults_and_fields() -> None:
    read = get({})
    assert read.request == GetRequest()
    read = get({"include": ["embeddings", "uris", "distances"], "limit": 3, "offset": None})
    assert read.request == GetRequest(limit=3, fields=Field.EMBEDDING | Field.URI)
    assert get({"ids": None, "where": None, "where_document": None}).request == GetRequest()
    assert get({"ids": []}).request == GetRequest(ids=[])


def test_where_and_where_document_combine() -> None:
    read = get({"where": {"a": 1}, "where_document": {"$contains": "x"}})
    assert isinstance(read.where, And)
    assert DocumentContains("x", False) in read.where.children
    assert read.request is not None and read.request.where == read.where


BAD_GETS: list[tuple[Any, int, str]] = [
    ({"include": None}, 422, SHAPE + "include: invalid type: null, expected a sequence"),
    ({"include": [1]}, 422, SHAPE + "include[0]: invalid type: integer `1`, expected a string"),
    (
        {"include": ["uris", "x"]},
        422,
        SHAPE + "include[1]: unknown variant `x`, expected one of `distances`, `documents`,"
        " `embeddings`, `metadatas`, `uris`",
    ),
    ({"limit": -1}, 422, SHAPE + "limit: invalid value: integer `-1`, expected u32"),
    ({"limit": "1"}, 422, SHAPE + 'limit: invalid type: string "1", expected u32'),
    ({"limit": 1.0}, 422, SHAPE + "limit: invalid type: floating point `1.0`, expected u32"),
    ({"limit": True}, 422, SHAPE + "limit: invalid type: boolean `true`, expected u32"),
    ({"limit": 5_000_000_000}, 422, SHAPE + "limit: invalid value: integer `5000000000`, expected"),
    ({"offset": -1}, 422, SHAPE + "offset: invalid value: integer `-1`, expected u32"),
    ({"ids": "x"}, 422, SHAPE + 'ids: invalid type: string "x", expected a sequence'),
    ({"where": {}}, 400, "Invalid where clause"),
    ({"where": "x"}, 400, "Invalid where clause"),
    ({"where": []}, 400, "Invalid where clause"),
    ({"where": {"a": {"$foo": 1}}}, 400, "Invalid where clause"),
    ({"where": {"a": 1, "b": 2}}, 400, "Invalid where clause"),
    ({"where_document": {}}, 400, "Invalid where document clause"),
    ({"where_document": 5}, 400, "Invalid where document clause"),
    ({"where_document": {"$regex": "("}}, 400, "Regex syntax errror: "),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD_GETS)
def test_bad_gets_are_refused(body: Any, status: int, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        get(body)
    assert caught.value.kind.http == status
    assert str(caught.value).startswith(message)


def nested(depth: int) -> dict[str, Any]:
    where: dict[str, Any] = {"a": 1}
    for _ in range(depth - 1):
        where = {"$and": [where]}
    return where


def test_filters_that_cost_too_much_are_refused() -> None:
    assert get({"where": nested(64)}).where is not None
    for body, message in (
        ({"where": nested(100)}, "Invalid where clause: it is nested more than 64 deep"),
        (
            {"where": {"$or": [{"a": 1}] * 1_000}},
            "Invalid where clause: it has more than 1000 conditions",
        ),
        (
            {"where_document": {"$regex": "x" * 4_097}},
            "Regex syntax errror: the pattern is longer than 4096 bytes",
        ),
    ):
        with pytest.raises(InvalidArgument) as caught:
            get(body)
        assert str(caught.value) == message


def test_query_defaults_and_limits() -> None:
    read = wire.parse_query(request({"query_embeddings": [[1, 2]]}), CONFIG)
    assert isinstance(read.request, QueryRequest)
    assert read.request.n_results == 10 and read.request.embeddings.tolist() == [[1, 2]]
    null = wire.parse_query(request({"query_embeddings": [[1]], "n_results": None}), CONFIG)
    assert isinstance(null.request, QueryRequest) and null.request.n_results == 10
    with pytest.raises(InvalidArgument) as caught:
        wire.parse_query(request({"query_embeddings": [[1], [2]], "n_results": 500_001}), CONFIG)
    assert str(caught.value) == (
        "n_results: 500001 results for each of 2 query embeddings are 1000002 results,"
        " more than the maximum of 1000000"
    )
    with pytest.raises(Unprocessable, match=r"missing field `query_embeddings`$"):
        wire.parse_query(request({}), CONFIG)
    with pytest.raises(Unprocessable, match="n_results: invalid value: integer `-1`, expected u32"):
        wire.parse_query(request({"query_embeddings": [[1]], "n_results": -1}), CONFIG)


def test_count_checks_its_read_level() -> None:
    asked = request({})
    asked.query_string = "read_level=index_only&other=1"
    assert wire.parse_count(asked, CONFIG).request is None
    for query_string, message in (
        ("read_level=foo", "read_level: unknown variant `foo`, expected one of `index_and_wal`"),
        ("read_level=a&read_level=b", "duplicate field `read_level`"),
    ):
        asked.query_string = query_string
        with pytest.raises(InvalidArgument) as caught:
            wire.parse_count(asked, CONFIG)
        assert str(caught.value).startswith(f"Failed to deserialize query string: {message}")


NO_LIMIT = "Validation error: limit, where: limit can only be specified when a where clause is"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"ids": []}, "Validation error: ids, where: Either ids or where must be specified"),
        ({"ids": ["q"], "limit": 1}, NO_LIMIT),
        ({"limit": 1}, NO_LIMIT),
        ({"limit": -1, "where": {"a": 1}}, SHAPE + "limit: invalid value: integer `-1`"),
        ({"ids": ["a"], "where": {}}, "Invalid where clause"),
    ],
)
def test_bad_deletions_are_refused(body: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        wire.parse_delete(request(body))
    assert str(caught.value).startswith(message)


# -- answers


def test_answers_have_every_key_and_the_shortest_floats() -> None:
    records = Records(
        ids=["a"],
        metadatas=[b'{"x":1.0}'],
        embeddings=np.array([[0.1, 1.0]], dtype=np.float32),
    )
    assert wire.encode_get(records, ["metadatas", "embeddings"]) == (
        b'{"ids":["a"],"embeddings":[[0.1,1.0]],"documents":null,"uris":null,'
        b'"metadatas":[{"x":1.0}],"include":["metadatas","embeddings"]}'
    )
    answer = QueryAnswer(
        [Records(ids=["a", "b"], documents=["x", None])],
        [np.array([0.1, np.nan], dtype=np.float32)],
    )
    assert wire.encode_query(answer, ["distances", "documents"]) == (
        b'{"ids":[["a","b"]],"embeddings":null,"documents":[["x",null]],"uris":null,'
        b'"metadatas":null,"distances":[[0.1,null]],"include":["distances","documents"]}'
    )
    assert wire.encode_query(QueryAnswer([], []), ["documents"]) == (
        b'{"ids":[],"embeddings":null,"documents":[],"uris":null,"metadatas":null,'
        b'"distances":null,"include":["documents"]}'
    )
