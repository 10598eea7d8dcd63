"""Hypothesis strategies for requests: small pools, so that ids, values and vectors collide.

Vectors are made from few directions, lengths from 1e-3 to 1e4 (and 1e-20) and tiny perturbations:
duplicates, near-duplicates, zero vectors. Documents and filters share words, so that filters
select something. Regular expressions are only such as Python's `re` and RE2 read alike.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from ochredb.testing.model import float32_list

Json = dict[str, Any]
Float32s = NDArray[np.float32]

SPACES = ("l2", "cosine", "ip")
LENGTHS = (1e-20, 1e-3, 0.5, 1.0, 1.0, 37.0, 1e4)
_DIRECTIONS = 6
_PERTURBATIONS = (0.0, 0.0, 1e-7, 1e-4, 0.1)
_SEED = 20_240_229

# -- ids and vectors

ID_POOL = (
    *(f"id-{number}" for number in range(24)),
    "a", "A", "é", "e\u0301", "漢字", "🦀", "with space", "a/b", "%2B+", '"', "\\", "\u0000",
    "null",
)  # fmt: skip
ids = st.one_of(st.sampled_from(ID_POOL), st.sampled_from(ID_POOL), st.text("abé", min_size=1))


def _generator(*seed: int) -> np.random.Generator:  # noqa: TID251 - built from a seed
    return np.random.Generator(np.random.PCG64(seed))  # noqa: TID251


def vector(direction: int, length: float, perturbation: float, variant: int, dim: int) -> Float32s:
    """float32[dim]; direction 0 is the zero vector, every other is fixed by its number."""
    if direction == 0:
        return np.zeros(dim, np.float32)
    values = _generator(_SEED, direction, dim).standard_normal(dim)
    values /= np.linalg.norm(values)
    if perturbation:
        noise = _generator(_SEED, variant, dim, 1).standard_normal(dim)
        values += perturbation * noise
    return (length * values).astype(np.float32)


def vectors(dim: int) -> st.SearchStrategy[Float32s]:
    """float32[dim] of the pools, now and then with small integers as components."""
    pooled = st.builds(
        vector,
        st.integers(0, _DIRECTIONS),
        st.sampled_from(LENGTHS),
        st.sampled_from(_PERTURBATIONS),
        st.integers(0, 3),
        st.just(dim),
    )
    small = st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=dim, max_size=dim)
    return st.one_of(pooled, pooled, small.map(lambda values: np.array(values, np.float32)))


def encoded(item: Float32s | None, as_base64: bool) -> Any:
    """An embedding as a request carries it: base64 or numbers."""
    if item is None:
        return None
    if as_base64:
        return base64.b64encode(item.astype("<f4").tobytes()).decode()
    return float32_list(item)


# -- documents and metadata

WORDS = (
    "red", "Red", "green", "blue", "tower", "Straße", "naïve", "日本語", "emoji 🦀!", "a.b", "x",
    "1999", "2024-02-29", "the quick brown fox", "quick", "\\d+", "\t", "%", "",
    "e\u0301", "\u0000", "\u200d", "𝔘𝔫𝔦",
)  # fmt: skip
documents = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("".join),
    st.text(max_size=8).map(lambda text: text.replace("\n", " ")),
)
uris = st.sampled_from(["", "https://example.org/ä?q=1", "file:///x", "s3://bucket/key"])

KEYS = ("i", "f", "s", "b", "m", "li", "lf", "ls", "lb", "größe", "a.b", "null")
INTEGERS = (-1, 0, 1, 2, 3, 7, 300, -70_000, 2**53, 2**53 + 1, 2**62 + 1, 2**63 - 1, -(2**63))
FLOATS = (
    -0.5, 0.0, -0.0, 1.0, 1.5, 2.0, 0.1, 300.0, 1e300, 5e-324, float(2**53), float(2**62),
    float(2**63), -float(2**63),
)  # fmt: skip
STRINGS = (
    "", "x", "X", "tower", "Straße", "1", "true", "日本語", "a" * 40, "é", "e\u0301", "\u0000",
    "🦀",
)  # fmt: skip

integers = st.sampled_from(INTEGERS)
floats = st.sampled_from(FLOATS)
strings = st.sampled_from(STRINGS)
booleans = st.booleans()
scalars = st.one_of(integers, floats, strings, booleans)
_too_large = st.sampled_from([2**63, 2**64 - 1, -(2**63) - 1])
_lists = st.one_of(
    st.lists(integers, max_size=4),
    st.lists(floats, max_size=4),
    st.lists(strings, max_size=4),
    st.lists(booleans, max_size=4),
    st.lists(st.one_of(integers, floats), max_size=4),  # Mixed numbers are stored as floats.
)
# Most keys hold their own type, some any: a key may change its type from record to record.
_typed = {
    "i": integers, "f": floats, "s": strings, "b": booleans, "li": st.lists(integers, max_size=4),
    "lf": st.lists(floats, max_size=4), "ls": st.lists(strings, max_size=4),
    "lb": st.lists(booleans, max_size=4),
}  # fmt: skip
_any_value = st.one_of(scalars, _lists, _too_large)


def metadatas(*, nulls: bool) -> st.SearchStrategy[Json | None]:
    """Metadata of one record; `nulls` for update and upsert, where they remove keys."""

    def one(key: str) -> st.SearchStrategy[Any]:
        options = [_typed.get(key, _any_value)] * 3 + [_any_value]
        return st.one_of(*options, st.none()) if nulls else st.one_of(*options)

    pair = st.sampled_from(KEYS).flatmap(lambda key: st.tuples(st.just(key), one(key)))
    return st.one_of(st.none(), st.lists(pair, max_size=5).map(dict))


# -- filters

PATTERNS = (
    "red", "[Rr]ed", "^the", "qu[a-z]+k", "tow.r", r"\d{4}", r"\d+-\d\d", "(?i)RED", "fox$",
    "a\\.b", "Straße|naïve", "(quick )?brown", "日本", "", "x*", "(red|blue).*tower",
    r"\bfox\b", "[^a-z]",
    r"\\d", "🦀", "q.{3}k", r"\s\s",
)  # fmt: skip
NEEDLES = (
    "red", "Red", "e", "quick brown", "tower", "ß", "ïv", "日本語", "🦀", "", " ", "\\", "1999",
    "not in there", "the quick brown fox", "a.b", "ab", "\u0301", "e\u0301", "\u0000", "語", "𝔘𝔫",
    "xred", "redx", "rx", "towerred", "d t", "er", "ipsum lorem ipsum", "z" * 40,
    "the quick brown fox the quick brown fox",
)  # fmt: skip

_document_leaf = st.one_of(
    st.builds(
        lambda op, text: {op: text},
        st.sampled_from(["$contains", "$not_contains"]),
        st.sampled_from(NEEDLES),
    ),
    st.builds(
        lambda op, text: {op: text},
        st.sampled_from(["$regex", "$not_regex"]),
        st.sampled_from(PATTERNS),
    ),
)
_key = st.sampled_from(KEYS)
_one_type = st.one_of(
    *(st.lists(kind, min_size=1, max_size=size)
      for kind in (integers, floats, strings, booleans) for size in (4, 12)),
    # Floats admit integers after them.
    st.builds(lambda first, rest: [first, *rest], floats,
              st.lists(st.one_of(integers, floats), max_size=5)),
)  # fmt: skip
_names = st.sampled_from(("id-1", "id-2", "id-7", "a", "🦀", "r0", "r1", "r7", "r29", "\u0000"))
_id_leaf = st.one_of(
    st.builds(lambda name: {"#id": name}, _names),
    st.builds(lambda op, name: {"#id": {op: name}}, st.sampled_from(["$eq", "$ne"]), _names),
    st.builds(
        lambda op, names: {"#id": {op: names}},
        st.sampled_from(["$in", "$nin"]),
        st.lists(_names, min_size=1, max_size=6),
    ),
)
_leaf = st.one_of(
    st.builds(lambda key, value: {key: value}, _key, scalars),
    st.builds(
        lambda key, op, value: {key: {op: value}},
        _key,
        st.sampled_from(["$eq", "$ne", "$contains", "$not_contains"]),
        scalars,
    ),
    st.builds(
        lambda key, op, value: {key: {op: value}},
        _key,
        st.sampled_from(["$lt", "$lte", "$gt", "$gte"]),
        st.one_of(integers, floats),
    ),
    st.builds(
        lambda key, op, values: {key: {op: values}},
        _key,
        st.sampled_from(["$in", "$nin"]),
        _one_type,
    ),
    st.builds(lambda condition: {"#document": condition}, _document_leaf),
    _id_leaf,
)


def _tree(leaf: st.SearchStrategy[Json], depth: int) -> st.SearchStrategy[Json]:
    """Trees whose longest path has at most `depth` objects."""
    if depth == 1:
        return leaf
    child = _tree(leaf, depth - 1)
    branch = st.builds(
        lambda op, children: {op: children},
        st.sampled_from(["$and", "$or"]),
        st.lists(child, max_size=3),
    )
    return st.one_of(leaf, branch, branch)


DEPTH_MAX = 4
wheres = st.one_of(_leaf, _tree(_leaf, DEPTH_MAX))
where_documents = st.one_of(_document_leaf, _tree(_document_leaf, DEPTH_MAX))


# -- requests

_sometimes = st.sampled_from([True, False, False])


@st.composite
def writes(draw: st.DrawFn, verb: str, dim: int, *, rows_max: int = 8, names: Any = ids) -> Json:
    """A body for add, update or upsert; ids repeat now and then."""
    given = draw(st.lists(names, max_size=rows_max))
    count = len(given)

    def column(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(strategy, min_size=count, max_size=count))

    body: Json = {"ids": given}
    as_base64 = draw(booleans)
    if verb != "update":
        body["embeddings"] = [encoded(item, as_base64) for item in column(vectors(dim))]
    elif draw(booleans):
        items = column(st.one_of(st.none(), vectors(dim)))
        body["embeddings"] = [encoded(item, as_base64) for item in items]
    if draw(booleans):
        body["documents"] = column(st.one_of(st.none(), documents))
    if draw(booleans):
        body["metadatas"] = column(metadatas(nulls=verb != "add"))
    if draw(_sometimes):
        body["uris"] = column(st.one_of(st.none(), uris))
    return body


@st.composite
def _selections(draw: st.DrawFn, names: Any) -> Json:
    """ids, where and where_document, each now and then."""
    body: Json = {}
    if draw(_sometimes):
        body["ids"] = draw(st.lists(names, max_size=20))
    if draw(_sometimes):
        body["where"] = draw(wheres)
    if draw(_sometimes):
        body["where_document"] = draw(where_documents)
    return body


_includes = st.lists(
    st.sampled_from(["documents", "metadatas", "embeddings", "uris", "distances"]), unique=True
)
_EVERYTHING = ["documents", "metadatas", "embeddings", "uris"]


@st.composite
def gets(draw: st.DrawFn, *, names: Any = ids) -> Json:
    body = draw(_selections(names))
    if draw(_sometimes):
        body["limit"] = draw(st.sampled_from([0, 1, 2, 5, 1000]))
    if draw(_sometimes):
        body["offset"] = draw(st.sampled_from([0, 1, 3, 1000]))
    body["include"] = draw(st.one_of(st.just(_EVERYTHING), _includes))
    return body if draw(booleans) else {k: v for k, v in body.items() if k != "include"}


@st.composite
def queries(draw: st.DrawFn, dim: int, *, names: Any = ids) -> Json:
    body = draw(_selections(names))
    items = draw(st.lists(vectors(dim), max_size=3))
    body["query_embeddings"] = [float32_list(item) for item in items]
    if items and draw(st.sampled_from([False] * 11 + [True])):
        body["query_embeddings"][0][0] = 1e39  # Beyond float32: its distances are null.
    if draw(booleans):
        body["n_results"] = draw(st.sampled_from([0, 1, 2, 3, 5, 10, 17, 50, 1000]))
    body["include"] = [*draw(st.one_of(st.just(_EVERYTHING), _includes)), "distances"]
    body["include"] = list(dict.fromkeys(body["include"]))
    return body


@st.composite
def deletes(draw: st.DrawFn, *, names: Any = ids) -> Json:
    body = draw(_selections(names))
    filtered = "where" in body or "where_document" in body
    if filtered and draw(_sometimes):
        body["limit"] = draw(st.sampled_from([0, 1, 2, 5, 1000]))
    if not filtered and body.get("ids") == []:
        return {}
    return body


configurations = st.fixed_dictionaries(
    {"space": st.sampled_from(SPACES)},
    optional={
        "max_neighbors": st.sampled_from([2, 5, 16, 64]),
        "ef_construction": st.sampled_from([1, 10, 100, 400]),
        "ef_search": st.sampled_from([0, 1, 10, 100, 1000]),
        "resize_factor": st.sampled_from([1.2, 2.0]),
        "sync_threshold": st.sampled_from([2, 1000]),
    },
)
configuration_changes = st.fixed_dictionaries(
    {},
    optional={
        "max_neighbors": st.sampled_from([3, 16]),
        "ef_search": st.sampled_from([0, 1, 7, 100, 500]),
        "resize_factor": st.sampled_from([1.2, 3.0]),
        "sync_threshold": st.sampled_from([2, 500]),
    },
)
collection_metadatas = st.dictionaries(
    st.sampled_from(["a", "b", "größe", "owner"]), scalars, min_size=1, max_size=3
)


# -- refusals


@dataclass(frozen=True, slots=True)
class Malformed:
    """A request on a collection that must be refused, whatever the collection holds."""

    verb: str
    body: Any
    status: int
    error: str
    message: str = ""  # A part of the answer's message.


_INVALID, _SHAPE = "InvalidArgumentError", "ChromaError"
_UNEQUAL = "Inconsistent number of IDs, embeddings, documents, URIs and metadatas"
_WHERE, _WHERE_DOCUMENT = "Invalid where clause", "Invalid where document clause"
_BAD_WHERES: tuple[Any, ...] = (
    {}, {"k": None}, {"k": {"$eq": [1]}}, {"k": 1, "l": 2}, {"k": {"$like": "x"}}, {"$k": 1},
    {"k": {"$gt": "a"}}, {"k": {"$lt": True}}, {"k": {"$in": []}}, {"k": {"$in": [1, 2.5]}},
    {"k": {"$in": [1, "x"]}}, {"k": {"$eq": 1, "$ne": 2}}, {"k": {"$regex": "x"}}, {"$and": {}},
    {"$and": [{}]}, {"$or": [{"k": 1}, {"k": {"$gt": None}}]},
)  # fmt: skip


def malformed(dim: int) -> st.SearchStrategy[Malformed]:
    """Requests that a collection of dimension `dim` refuses with 400 or 422."""
    one = [0.5] * dim
    cases = [
        Malformed("add", {"ids": ["a", "b"], "embeddings": [one]}, 400, _INVALID, _UNEQUAL),
        Malformed("add", {"ids": ["a"], "embeddings": [one], "documents": []}, 400, _INVALID,
                  _UNEQUAL),
        Malformed("add", {"ids": [""], "embeddings": [one]}, 400, _INVALID, "Empty ID"),
        Malformed("add", {"ids": ["new"], "embeddings": [[]]}, 400, _INVALID,
                  "Each embedding must have at least 1 dimension"),
        Malformed("add", {"ids": ["new"], "embeddings": [[1e39] * dim]}, 400, _INVALID,
                  "Embeddings must not contain NaN or Infinity values"),
        Malformed("add", {"ids": ["new"], "embeddings": ["not base64!"]}, 400, _INVALID,
                  "Invalid base64 string"),
        Malformed("add", {"ids": ["new"], "embeddings": [[0.5] * (dim + 1)]}, 400, _INVALID,
                  f"Collection expecting embedding with dimension of {dim}, got {dim + 1}"),
        Malformed("add", {"ids": ["new"], "embeddings": None}, 422, _SHAPE),
        Malformed("upsert", {"ids": ["new"]}, 422, _SHAPE),
        Malformed("upsert", {"ids": ["new"], "embeddings": [None]}, 422, _SHAPE),
        Malformed("upsert", {"ids": [7], "embeddings": [one]}, 422, _SHAPE),
        Malformed("upsert", {"embeddings": [one]}, 422, _SHAPE),
        Malformed("update", {"ids": ["id-1"], "embeddings": [[0.5] * (dim + 2)]}, 400, _INVALID,
                  f"Collection expecting embedding with dimension of {dim}, got {dim + 2}"),
        Malformed("add", {"ids": ["new"], "embeddings": [one], "metadatas": [{"k": None}]}, 422,
                  _SHAPE),
        Malformed("add", {"ids": ["new"], "embeddings": [one], "metadatas": [{"k": {"l": 1}}]},
                  422, _SHAPE),
        Malformed("upsert", {"ids": ["id-1"], "embeddings": [one], "metadatas": [{"#k": 1}]}, 400,
                  _INVALID, "Validation error: metadatas: Invalid metadata at index 0"),
        Malformed("update", {"ids": ["id-1"], "metadatas": [{"k": [1, "x"]}]}, 422, _SHAPE),
        Malformed("update", {"ids": ["id-1"], "documents": [7]}, 422, _SHAPE),
        Malformed("get", {"limit": -1}, 422, _SHAPE),
        Malformed("get", {"include": ["nonsense"]}, 422, _SHAPE),
        Malformed("get", {"where_document": {"$regex": "("}}, 400, _INVALID, "Regex syntax"),
        Malformed("get", {"where_document": {}}, 400, _INVALID, _WHERE_DOCUMENT),
        Malformed("get", {"where_document": {"$contains": 7}}, 400, _INVALID, _WHERE_DOCUMENT),
        Malformed("get", [], 422, _SHAPE),
        Malformed("query", {"query_embeddings": [one], "n_results": -1}, 422, _SHAPE),
        Malformed("query", {"n_results": 1}, 422, _SHAPE),
        Malformed("query", {"query_embeddings": ["AACAPw=="]}, 422, _SHAPE),
        Malformed("query", {"query_embeddings": [[0.5] * (dim + 1)]}, 400, _INVALID,
                  f"Collection expecting embedding with dimension of {dim}, got {dim + 1}"),
        Malformed("delete", {"ids": []}, 400, _INVALID,
                  "Validation error: ids, where: Either ids or where must be specified"),
        Malformed("delete", {"ids": ["id-1"], "limit": 1}, 400, _INVALID,
                  "limit can only be specified when a where clause is provided"),
        *(Malformed(verb, {"where": where, "query_embeddings": [one]}, 400, _INVALID, _WHERE)
          for where in _BAD_WHERES for verb in ("get", "query", "delete")),
    ]  # fmt: skip
    return st.sampled_from(cases)
