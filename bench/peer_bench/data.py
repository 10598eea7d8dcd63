"""The corpus: vectors hard enough for graph indexes, three metadata fields, 100-word documents."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

NEAREST = 10  # k of every query.
BATCH = 250  # Records per write request.
CLUSTER_RANK = 24
CLUSTER_SPREAD = 0.35
NOISE = 0.4
VOCABULARY = 5000
WORDS = 98


def clustered(n: int, dim: int, queries: int, seed: int) -> tuple[Floats, Any, Floats]:
    """Return unit vectors float32[n, dim], the cluster of each, and float32[queries, dim].

    Overlapping Gaussian clusters, each in a subspace of its own, and noise: hard enough that a
    graph (M=16, ef=100) stays below recall 1. About 100 points per cluster at every n; a fixed
    number of clusters would make the task easier as n grows, and recall would not compare.
    """
    clusters = max(200, n // 100)
    rng = np.random.default_rng(seed)
    centers = CLUSTER_SPREAD * rng.standard_normal((clusters, dim)).astype(np.float32)
    bases = rng.standard_normal((clusters, CLUSTER_RANK, dim)).astype(np.float32)
    bases /= np.sqrt(CLUSTER_RANK)

    def draw(count: int) -> tuple[Floats, Any]:
        cluster = rng.integers(0, clusters, count)
        x = np.empty((count, dim), np.float32)
        z = rng.standard_normal((count, CLUSTER_RANK)).astype(np.float32)
        for j in range(clusters):
            rows = np.flatnonzero(cluster == j)
            x[rows] = centers[j] + z[rows] @ bases[j]
        x += NOISE * rng.standard_normal((count, dim)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x, cluster

    x, cluster = draw(n)
    return x, cluster, draw(queries)[0]


def exact(x: Floats, queries: Floats, mask: Mask | None = None) -> list[set[int]]:
    """Return the rows of the nearest per query by dot product, among those where mask is true.

    For unit vectors that is the order by l2 and by cosine too.
    """
    rows = np.arange(len(x)) if mask is None else np.flatnonzero(mask)
    if len(rows) == 0:
        return [set() for _ in queries]
    candidates, nearest = x[rows], []
    k = min(NEAREST, len(rows))
    for start in range(0, len(queries), 64):
        similarity = queries[start : start + 64] @ candidates.T
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        nearest += [set(rows[row].tolist()) for row in top]
    return nearest


def encode(vectors: Floats, base64_encoded: bool) -> list[Any]:
    """Return embeddings as they stand in a request: base64 strings or lists of numbers."""
    if base64_encoded:
        return [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
    return list(vectors.tolist())


class Data:
    """n records and `queries` query vectors, all from one seed."""

    def __init__(self, n: int, dim: int, queries: int, seed: int) -> None:
        self.n, self.dim, self.query_count = n, dim, queries
        self.x, self.cluster, self.q = clustered(n, dim, queries, seed)
        rng = np.random.default_rng(seed + 1)
        self.num = rng.integers(0, 1000, n)
        self.price = np.round(rng.random(n) * 100, 3)
        self.cat = self.cluster % 10
        self.ids = [f"id-{i:08d}" for i in range(n)]
        vocabulary = [
            "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(3, 10)))
            for _ in range(VOCABULARY)
        ]
        weight = 1.0 / np.arange(1, VOCABULARY + 1) ** 0.9
        words = rng.choice(VOCABULARY, size=(min(n, 20000), WORDS), p=weight / weight.sum())
        self.rare1 = rng.random(n) < 0.01
        self.rare01 = rng.random(n) < 0.001
        self.documents = []
        for i in range(n):
            text = [vocabulary[j] for j in words[i % len(words)]]
            if self.rare1[i]:
                text[40] = "quixoticmarker"
            if self.rare01[i]:
                text[60] = "zanzibarmarker"
            self.documents.append(" ".join(text))

    def metadata(self, i: int) -> dict[str, Any]:
        return {"cat": f"c{self.cat[i]}", "num": int(self.num[i]), "price": float(self.price[i])}

    def batch(
        self,
        start: int,
        stop: int,
        base64_encoded: bool,
        x: Floats | None = None,
        prefix: str | None = None,
    ) -> bytes:
        """Return the body of an add of rows [start, stop).

        x: other vectors; prefix: other ids, and then rows may pass n.
        """
        vectors = (self.x if x is None else x)[start:stop]
        rows = [i % self.n for i in range(start, stop)]
        numbers = range(start, stop)
        ids = self.ids[start:stop] if prefix is None else [f"{prefix}{i:08d}" for i in numbers]
        return orjson.dumps(
            {
                "ids": ids,
                "embeddings": encode(vectors, base64_encoded),
                "metadatas": [self.metadata(i) for i in rows],
                "documents": [self.documents[i] for i in rows],
                "uris": None,
            }
        )

    def batches(self, n: int, base64_encoded: bool, x: Floats | None = None) -> list[bytes]:
        """Return the bodies that add the first n records."""
        return [
            self.batch(start, min(n, start + BATCH), base64_encoded, x)
            for start in range(0, n, BATCH)
        ]

    def query(
        self,
        i: int,
        where: Any = None,
        where_document: Any = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        """Return the body of the query for vector i; `extra` are further fields."""
        return orjson.dumps(
            {
                "ids": None,
                "query_embeddings": [self.q[i].tolist()],
                "n_results": NEAREST,
                "where": where,
                "where_document": where_document,
                "include": ["metadatas", "distances"],
                **(extra or {}),
            }
        )
