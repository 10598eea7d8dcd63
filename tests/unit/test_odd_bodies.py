"""No client can poison a collection: odd JSON is refused with a 4xx, or is stored, folded and read.

Each round writes mostly right bodies with odd values in them, byte for byte as a client may send
them, then folds and merges, and compares what reads of every kind answer before and after.
`make odd-long` for more rounds; a failure names its seed (OCHREDB_ODD_SEED).
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections import Counter

import numpy as np
import pytest

from ochredb.parts import writer
from ochredb_compactor import scheduler
from ochredb_node.node import Node

from .kernel import forget_recent, make_collection, running_node

SEED = int(os.environ.get("OCHREDB_ODD_SEED", "1"))
ROUNDS = int(os.environ.get("OCHREDB_ODD_ROUNDS", "40"))
_ODD = 0.05  # So much of what is sent.
_HEADERS = {"content-type": "application/json"}
_COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"

# Values of metadata that are right, at the edges of what can be stored.
_VALUES = [
    b"1", b"2.5", b"true", b'"x"', b"[1,2]", b'["a"]', b"0", b"-0.0", b'"\\u0000"', b"[]", b'""',
    b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"1e308",
    b"1" + b"0" * 300, b"18446744073709551615", b"[9223372036854775808,1]", b'[""]', b"5e-324",
    b"[18446744073709551616,1.5]", b'"\\ud83d\\ude00"', b'"' + b"a" * 5_000 + b'"', b"[1,2.5]",
    b'"null"', b"[true,false]", b'"\\uffff"',
]  # fmt: skip
_ODD_VALUES = [
    b"null", b"{}", b'{"a":1}', b"[[]]", b"[null]", b'[1,"a"]', b'"\\ud800"', b'"\xff"', b"NaN",
    b"Infinity", b"1e400", b'"\xed\xa0\x80"', b"1" + b"0" * 400, b"[1e308,1e309]",
    b"[" * 260 + b"1" + b"]" * 260, b"[" * 2_000 + b"]" * 2_000,
    b'{"a":' * 1_000 + b"1" + b"}" * 1_000, b'{"indices":[1],"values":[1.0]}',
]  # fmt: skip
_KEYS = [b'"a"', b'"b"', b'"a"', b'"\\u0000"', b'"\xc3\xbc"', b'"a.b"', b'"' + b"k" * 3_000 + b'"']
_ODD_KEYS = [b'""', b'"#x"', b'"$x"', b'"\\ud800"', b'"chroma:document"', b'"\xff"', b"1"]
_IDS = [b'"x"', b'"y"', b'"z"', b'"\\u0000"', b'" "', b'"' + b"i" * 3_000 + b'"', b'"\\n"']
_ODD_IDS = [b'""', b"1", b"null", b'"\\ud800"', b'"\xff"', b"{}"]
_TEXTS = [
    b"null",
    b'"text"',
    b'""',
    b'"\\u0000"',
    b'"\xf0\x9f\x98\x80"',
    b'"' + b"d" * 9_000 + b'"',
]
_ODD_TEXTS = [b"1", b'"\\ud800"', b'"\xff"', b"[]", b'"\xf4\x90\x80\x80"']
_NUMBERS = [b"1", b"0", b"-1.5", b"3.4028235e38", b"1e-46", b"-0.0", b"9007199254740993"]
_ODD_NUMBERS = [b"NaN", b"1e400", b"3.5e38", b"null", b'"a"', b"true", b"1e39", b"[]"]

_READS = [
    ("POST", "get", b'{"include":["documents","metadatas","embeddings","uris"]}'),
    ("GET", "count", b""),
    ("POST", "query", b'{"query_embeddings":[[1,0.5]],"include":["documents","distances"]}'),
    ("POST", "get", b'{"where":{"a":{"$gt":-1}}}'),
    ("POST", "get", b'{"where":{"a":{"$contains":1}}}'),
    ("POST", "get", b'{"where":{"b":"x"}}'),
    ("POST", "get", b'{"where":{"\\u0000":{"$ne":1}}}'),
    ("POST", "get", b'{"where_document":{"$contains":"t"}}'),
    ("POST", "get", b'{"where_document":{"$regex":"d+"}}'),
    ("POST", "get", b'{"ids":["x","\\u0000"," "]}'),
]


class Writer:
    """Bodies from a seed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def body(self, verb: str) -> bytes:
        count = self._rng.choice([1, 1, 1, 2, 3])
        fields = [b'"ids":' + self._list(count, _IDS, _ODD_IDS)]
        if verb != "delete":
            if verb != "update" or self._rng.random() < 0.6:
                vectors = b",".join(self._vector() for _ in range(count))
                fields.append(b'"embeddings":[' + vectors + b"]")
            if self._rng.random() < 0.8:
                items = b",".join(self._metadata() for _ in range(count))
                fields.append(b'"metadatas":[' + items + b"]")
            for name in (b"documents", b"uris"):
                if self._rng.random() < 0.4:
                    fields.append(b'"' + name + b'":' + self._list(count, _TEXTS, _ODD_TEXTS))
        return b"{" + b",".join(fields) + b"}"

    def _one(self, right: list[bytes], odd: list[bytes]) -> bytes:
        return self._rng.choice(odd if self._rng.random() < _ODD else right)

    def _list(self, count: int, right: list[bytes], odd: list[bytes]) -> bytes:
        return b"[" + b",".join(self._one(right, odd) for _ in range(count)) + b"]"

    def _metadata(self) -> bytes:
        if self._rng.random() < 0.1:
            return self._one([b"null", b"{}"], _ODD_VALUES)
        pairs = [
            self._one(_KEYS, _ODD_KEYS) + b":" + self._one(_VALUES, _ODD_VALUES)
            for _ in range(self._rng.randint(0, 3))
        ]
        return b"{" + b",".join(pairs) + b"}"

    def _vector(self) -> bytes:
        dimension = 2 if self._rng.random() > _ODD / 3 else self._rng.choice([0, 1, 3])
        if self._rng.random() < 0.8:
            return self._list(dimension, _NUMBERS, _ODD_NUMBERS)
        numbers = [1.0, 0.0, 3e38, 1e-45, -2.5]
        if self._rng.random() < _ODD:
            numbers = [float("nan"), float("inf")]
        data = np.array([self._rng.choice(numbers) for _ in range(dimension)], "<f4").tobytes()
        return b'"' + base64.b64encode(data) + b'"'


def _never(text: str) -> float:
    raise AssertionError(f"{text} is not JSON")


def _call(node: Node, collection: str, method: str, verb: str, body: bytes) -> tuple[int, bytes]:
    path = f"{_COLLECTIONS}/{collection}/{verb}"
    status, _, answer = node.handle(method, path, "", _HEADERS, body)
    assert status < 500 or status == 501, (verb, body, answer)
    json.loads(answer, parse_constant=_never)
    return status, answer


def _answers(node: Node, collection: str) -> list[tuple[int, bytes]]:
    forget_recent(node)  # As any other process: from the log.
    return [_call(node, collection, *read) for read in _READS]


def test_odd_bodies_are_refused_or_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """I5, I12: never a 500, never poison, and every read answers the same after folding."""
    monkeypatch.setattr(scheduler, "GRAPH_ROWS_MIN", 8)
    monkeypatch.setattr(scheduler, "GRAPH_COMPONENTS_MIN", 16)
    monkeypatch.setattr(writer, "TEXT_INDEX_ROWS_MIN", 4)
    statuses: Counter[int] = Counter()
    for seed in range(SEED, SEED + ROUNDS):
        print("OCHREDB_ODD_SEED =", seed)
        rng = random.Random(seed)
        bodies = Writer(rng)
        with running_node() as node:
            collection = make_collection(node, space=rng.choice(["l2", "cosine", "ip"]))
            for _ in range(rng.randint(4, 16)):
                verb = rng.choice(["add", "add", "upsert", "upsert", "update", "delete"])
                statuses[_call(node, collection, "POST", verb, bodies.body(verb))[0]] += 1
                if rng.random() < 0.3:
                    before = _answers(node, collection)
                    if rng.random() < 0.5:
                        node.compactor.fold_now(collection)
                    else:
                        node.compactor.compact_now(collection)
                    assert _answers(node, collection) == before
            assert node.quarantine.table.list() == []
    assert statuses[200] + statuses[201] > ROUNDS, "the odd is rare enough to be stored"
    assert statuses[400] + statuses[422] > ROUNDS // 2, "and not too rare"
