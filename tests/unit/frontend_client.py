"""A client of a frontend in this process, with the roles behind it in memory."""

from __future__ import annotations

from typing import Any

import orjson

from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.messages import Request, Response

from .fake_roles import make_frontend

DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
UNKNOWN = "00000000-0000-4000-8000-000000000000"


class Client:
    """Sends requests to a frontend and decodes what it answers."""

    def __init__(self, config: FrontendConfig | None = None) -> None:
        self.frontend, self.world = make_frontend(config)

    def send(
        self, method: str, path: str, body: Any = None, query: str = "", **headers: str
    ) -> Response:
        request = Request(
            method=method,
            path=path,
            query_string=query,
            headers={"content-type": "application/json", **headers},
            body=b"" if body is None else orjson.dumps(body),
        )
        return self.frontend.handle(request)

    def call(
        self, method: str, path: str, body: Any = None, query: str = "", **headers: str
    ) -> Any:
        """Status and decoded body."""
        response = self.send(method, path, body, query, **headers)
        return response.status, orjson.loads(response.body)

    def refused(
        self, method: str, path: str, body: Any = None, query: str = ""
    ) -> tuple[int, str, str]:
        status, answer = self.call(method, path, body, query)
        assert set(answer) == {"error", "message"}
        return status, answer["error"], answer["message"]

    def collection(self, name: str = "abc") -> str:
        """The path of a new collection."""
        status, answer = self.call("POST", f"{DATABASE}/collections", {"name": name})
        assert status == 200
        return f"{DATABASE}/collections/{answer['id']}"
