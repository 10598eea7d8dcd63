"""The other end of the client's seam, made of answers."""

from __future__ import annotations

import json
from typing import Any, cast

from ochredb.api.transport import Response

COLLECTION_ID = "0190a6e6-7c3f-7000-8000-000000000001"


class FakeServer:
    """Answers by method and last path segment, and remembers what it was sent."""

    def __init__(self, **checks: Any) -> None:
        self.checks = {"max_batch_size": 100, "supports_base64_encoding": True, **checks}
        self.sent: list[tuple[str, str, Any, str]] = []
        self.embedding_function: Any = None
        self.answers: dict[str, Any] = {}
        self.closed = 0

    def send(self, method: str, path: str, body: bytes | None = None, query: str = "") -> Response:
        document = None if body is None else json.loads(body)
        self.sent.append((method, path, document, query))
        return Response(200, {}, json.dumps(self.answer(method, path, document)).encode())

    def close(self) -> None:
        self.closed += 1

    def answer(self, method: str, path: str, document: Any) -> Any:
        last = path.rpartition("/")[2]
        if last in self.answers:
            return self.answers[last]
        if last == "pre-flight-checks":
            return self.checks
        if "/collections" in path and (last == "collections" or method == "GET"):
            return {
                "id": COLLECTION_ID,
                "name": (document or {}).get("name", last),
                "configuration_json": {
                    "hnsw": {"space": "l2", "ef_search": 100},
                    "spann": None,
                    "embedding_function": self.embedding_function,
                },
                "schema": {},
                "metadata": None,
                "dimension": None,
                "tenant": "default_tenant",
                "database": "default_database",
            }
        found = {"id": COLLECTION_ID, "name": last, "tenant": "default_tenant", "deleted": 1}
        return {**found, "ids": []}

    def last_body(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.sent[-1][2])
