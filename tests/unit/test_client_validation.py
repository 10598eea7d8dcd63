"""What the client refuses before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ochredb
from ochredb.api.client import ClientAPI
from ochredb.api.rest import Rest

from .fake_server import FakeServer

WRONG: list[tuple[str, type[Exception], str, Callable[[Any], object]]] = [
    ("no ids", ValueError, "non-empty list", lambda c: c.add(ids=[], documents=[])),
    ("id type", ValueError, "expected ID to be a str", lambda c: c.add(ids=[1], documents=["a"])),
    (
        "same id twice",
        ochredb.DuplicateIDError,
        "duplicated: a in add",
        lambda c: c.add(ids=["a", "b", "a"], documents=["x", "y", "z"]),
    ),
    ("lengths", ValueError, "same length", lambda c: c.add(ids=["a"], documents=["x", "y"])),
    ("nothing to embed", ValueError, "exactly one of documents", lambda c: c.add(ids=["a"])),
    (
        "two things to embed",
        ValueError,
        "exactly one of",
        lambda c: c.add(ids=["a"], documents=["x"], uris=["file:x"]),
    ),
    ("document type", ValueError, "must be a str", lambda c: c.add(ids=["a"], documents=[1])),
    ("document gap", ValueError, "must be a str", lambda c: c.add(ids=["a"], documents=[None])),
    ("text vector", ValueError, "numbers", lambda c: c.add(ids=["a"], embeddings=["x"])),
    ("mixed vector", ValueError, "numbers", lambda c: c.add(ids=["a"], embeddings=[[1, "x"]])),
    ("empty vector", ValueError, "non-empty", lambda c: c.add(ids=["a"], embeddings=[[]])),
    ("no vectors", ValueError, "non-empty", lambda c: c.query(query_embeddings=[])),
    ("bool vector", ValueError, "numbers", lambda c: c.query(query_embeddings=np.array([True]))),
    ("deep vector", ValueError, "one dimension", lambda c: c.query(np.zeros((1, 1, 1)))),
    (
        "empty metadata",
        ValueError,
        "non-empty dict",
        lambda c: c.add(ids=["a"], documents=["x"], metadatas=[{}]),
    ),
    (
        "metadata value",
        ValueError,
        "metadata value of 'k'",
        lambda c: c.update(ids=["a"], metadatas=[{"k": object()}]),
    ),
    (
        "metadata key",
        TypeError,
        "metadata key",
        lambda c: c.update(ids=["a"], metadatas=[{1: "x"}]),
    ),
    (
        "mixed metadata list",
        ValueError,
        "one type",
        lambda c: c.update(ids=["a"], metadatas=[{"k": [1, True]}]),
    ),
    (
        "empty metadata list",
        ValueError,
        "non-empty",
        lambda c: c.update(ids=["a"], metadatas=[{"k": []}]),
    ),
    (
        "reserved key",
        ValueError,
        "reserved",
        lambda c: c.upsert(ids=["a"], documents=["x"], metadatas={"chroma:document": "y"}),
    ),
    ("include type", ValueError, "must be a list", lambda c: c.get(include="documents")),
    ("include name", ValueError, "include may name", lambda c: c.get(include=["docs"])),
    ("include distances", ValueError, "not 'distances'", lambda c: c.get(include=["distances"])),
    ("data, no loader", ValueError, "data loader", lambda c: c.get(include=["data"])),
    ("where type", ValueError, "where must be a dict", lambda c: c.get(where=[])),
    ("no query", ValueError, "one of embeddings, texts", lambda c: c.query()),
    ("n_results 0", TypeError, "positive", lambda c: c.query([1.0], n_results=0)),
    ("n_results type", ValueError, "an int", lambda c: c.query([1.0], n_results="5")),
    ("delete nothing", ValueError, "must be given in delete", lambda c: c.delete()),
    ("delete limit", ValueError, "limit needs a where", lambda c: c.delete(ids=["a"], limit=1)),
    ("limit < 0", ValueError, "non-negative", lambda c: c.delete(where={"a": 1}, limit=-1)),
    ("limit type", TypeError, "non-negative", lambda c: c.delete(where={"a": 1}, limit=True)),
    ("modify space", ValueError, "distance", lambda c: c.modify(metadata={"hnsw:space": "ip"})),
    ("modify empty", ValueError, "non-empty dict", lambda c: c.modify(metadata={})),
    (
        "unpaired surrogate",
        ValueError,
        "not valid UTF-8",
        lambda c: c.add(ids=["a"], embeddings=[[1.0]], documents=["\ud800"]),
    ),
    (
        "huge int",
        ValueError,
        "64-bit",
        lambda c: c.update(ids=["a"], metadatas=[{"k": 2**70}]),
    ),
]


@pytest.mark.parametrize(
    ("error", "message", "call"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    error: type[Exception],
    message: str,
    call: Callable[[Any], object],
) -> None:
    server = FakeServer()
    collection = ClientAPI(rest=Rest(server)).create_collection("abc")
    before = len(server.sent)
    with pytest.raises(error, match=message):
        call(collection)
    paths = {path for _, path, _, _ in server.sent[before:]}
    assert paths <= {"/api/v2/pre-flight-checks"}
