"""The dispatcher and FastAPI serve one table: for every route both give the same answer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ochredb_frontend.app import App
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.routes import ROUTES
from ochredb_node.node import Node, NodeConfig

from .fake_roles import make_frontend

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
VALUES = {"tenant": "default_tenant", "database": "default_database"}
DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
Answer = tuple[int, bytes, str | None, dict[str, str]]


class Both:
    """One application, asked directly and by way of FastAPI."""

    def __init__(self) -> None:
        self.app = App(make_frontend(FrontendConfig(slow_request_s=1e9))[0])
        self.web = self.app.build_web()

    async def _receive(self, body: bytes) -> Any:
        return {"type": "http.request", "body": body}

    def _scope(self, method: str, path: str, query: str) -> dict[str, Any]:
        return {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(b"content-type", b"application/json"), (b"host", b"x")],
        }

    def direct(self, method: str, path: str, body: bytes, query: str) -> Answer:
        sent: list[Any] = []

        async def ask() -> None:
            async def send(message: Any) -> None:
                sent.append(message)

            async def receive() -> Any:
                return await self._receive(body)

            await self.app(self._scope(method, path, query), receive, send)

        asyncio.run(ask())
        head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        content_type = head.pop("content-type", None)
        assert head.pop("x-request-id") == head.pop("chroma-trace-id")
        length = int(head.pop("content-length"))
        assert method == "HEAD" or length == len(sent[1]["body"])
        return sent[0]["status"], sent[1]["body"], content_type, head

    def by_fastapi(self, method: str, path: str, body: bytes, query: str) -> Answer:
        async def ask() -> Any:
            async def receive() -> Any:
                return await self._receive(body)

            async def read_body() -> bytes:
                return body

            scope = self._scope(method, path, query)
            return await self.web.answer(scope, path, receive, read_body)

        _, response = asyncio.run(ask())
        content = b"" if method == "HEAD" else response.body
        return response.status, content, response.content_type, dict(response.headers)


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    made = Both()
    yield made
    made.app.close()


def filled(path: str, value: str) -> str:
    return "/".join(
        VALUES.get(segment[1:-1], value) if segment.startswith("{") else segment
        for segment in path.split("/")
    )


def assert_same(both: Both, method: str, path: str, body: bytes = b"{}", query: str = "") -> int:
    status, content, content_type, headers = both.direct(method, path, body, query)
    expected = both.by_fastapi(method, path, body, query)
    assert (status, content_type) == (expected[0], expected[2]), (method, path)
    if path.endswith(("/heartbeat", "/api/v2")) and content:
        assert json.loads(content).keys() == json.loads(expected[1]).keys()
    else:
        assert content == expected[1], (method, path)
    # FastAPI names the methods of the first route with this path only.
    allowed, some = headers.pop("allow", ""), expected[3].pop("allow", "")
    assert bool(allowed) == bool(some)
    assert set(some.replace(" ", "").split(",")) <= set(allowed.split(",")), (method, path)
    assert headers == expected[3]
    return status


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES}))
def test_every_path_with_every_method(both: Both, path: str) -> None:
    """Refusals, wrong methods and HEAD included; nothing is written, the bodies say nothing."""
    methods = {route.method for route in ROUTES if route.path == path}
    for value in ("some-value", "00000000-0000-4000-8000-000000000000", "a%2Fb%20%C3%A4", "%"):
        for method in METHODS:
            # What is deleted would be there for the first of the two only.
            place = path.replace("{database}", "gone") if method == "DELETE" else path
            status = assert_same(both, method, filled(place, value))
            assert method not in methods or status != 405, (method, path)
    for spelled in (
        path + "/",
        path.replace("/api/", "//api/"),
        path.replace("v2", "V2"),
        path[1:],
    ):
        assert_same(both, "GET", filled(spelled, "some-value"))
        assert_same(both, "POST", filled(spelled, "some-value"))


def test_answers_with_content(both: Both) -> None:
    created = both.direct("POST", f"{DATABASE}/collections", b'{"name":"abc"}', "")
    path = f"{DATABASE}/collections/{json.loads(created[1])['id']}"
    one = b'{"ids":["a"],"embeddings":[[1,2]],"documents":["x"]}'
    assert both.direct("POST", f"{path}/add", one, "")[0] == 201
    for method, where, body, query in (
        ("GET", f"{DATABASE}/collections/abc", b"", ""),
        ("GET", f"{DATABASE}/collections/by-id/{path.rsplit('/', 1)[1]}", b"", ""),
        ("GET", f"{DATABASE}/collections", b"", "limit=1&offset=0"),
        ("GET", f"{DATABASE}/collections", b"", "limit=x"),
        ("POST", f"{DATABASE}/collections", b'{"name":"abc","get_or_create":true}', ""),
        ("POST", f"{DATABASE}/collections", b"{", ""),
        ("GET", f"{path}/count", b"", "read_level=index_and_wal"),
        ("POST", f"{path}/get", b"{}", ""),
        ("POST", f"{path}/query", b'{"query_embeddings":[[1,2]]}', ""),
        ("GET", "/api/v2/tenants/%64efault_tenant", b"", ""),
        ("GET", "/api/v2/tenants/default_tenant%2F", b"", ""),
    ):
        assert_same(both, method, where, body, query)


@pytest.mark.parametrize("path", ["/", "", "/api", "/api/v2/", "/nope", "/favicon.ico", "*"])
def test_what_is_no_route(both: Both, path: str) -> None:
    assert assert_same(both, "GET", path) == 404


def test_pages_refuse_other_methods(both: Both) -> None:
    for path in ("/docs", "/openapi.json", "/metrics"):
        assert both.direct("GET", path, b"", "")[0] == 200
        assert both.direct("HEAD", path, b"", "")[1] == b""
        assert both.direct("PUT", path, b"", "")[:2] == (405, b"")


def test_a_server_starts_and_answers_without_what_it_does_not_need(tmp_path: Path) -> None:
    """Imports are most of a start; FastAPI, SQLAlchemy and the like come when they are needed."""
    node = Node(NodeConfig(path=str(tmp_path)))
    node.start(background=False)  # Creating a store migrates it, which imports more.
    node.close()
    code = f"""
import http.client, json, sys, threading
import ochredb_node.cli as cli
from ochredb_node.settings import Settings

HEAVY = "fastapi starlette pydantic sqlalchemy alembic httpx rich pandas importlib.metadata".split()
HEAVY += "grpc google.protobuf boto3 botocore psycopg redis kubernetes yaml http.server".split()
HEAVY += "ochredb.rpc ochredb.cluster ochredb.storage.s3 ochredb_node.serve".split()
BASE = "{DATABASE}/collections"

def ask(connection, method, path, body=None):
    connection.request(method, path, body, {{"content-type": "application/json"}})
    response = connection.getresponse()
    return response.status, response.read()

def loaded():
    return [name for name in HEAVY if name in sys.modules]

def use(url):
    print("at the start:", loaded())
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    _, created = ask(connection, "POST", BASE, '{{"name":"abc"}}')
    path = BASE + "/" + json.loads(created)["id"]
    statuses = [
        ask(connection, "GET", "/api/v2/version")[0],
        ask(connection, "GET", "/api/v2/tenants/default_tenant")[0],
        ask(connection, "GET", BASE + "/abc")[0],
        ask(connection, "POST", path + "/add", '{{"ids":["a"],"embeddings":[[1,2]]}}')[0],
        ask(connection, "POST", path + "/query", '{{"query_embeddings":[[1,2]]}}')[0],
        ask(connection, "GET", "/nope")[0],
        ask(connection, "GET", "/metrics")[0],
    ]
    print("statuses:", statuses)
    print("after use:", loaded())
    print("docs:", ask(connection, "GET", "/docs")[0], "fastapi" in sys.modules)

import os, signal
def say(text, **_):
    url = text.split()[4]
    def run():
        try:
            use(url)
        finally:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=run).start()
cli.print = say
sys.exit(cli.run(Settings(path={str(tmp_path)!r}, port=0), ["run"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "at the start: []",
        "statuses: [200, 200, 200, 201, 200, 404, 200]",
        "after use: []",
        "docs: 200 True",
    ]
