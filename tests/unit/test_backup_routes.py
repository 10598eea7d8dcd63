"""What the frontend answers to those who take a backup over HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from ochredb.backup.source import READ_BYTES_MAX
from ochredb.errors import Unimplemented
from ochredb_frontend.messages import Request
from ochredb_node.node import Node

from .kernel import add_rows, make_collection, object_keys, running_node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(str(tmp_path / "store"), inline_bytes_max=0) as node:
        yield node


def _ask(node: Node, method: str, path: str, query: str = "") -> tuple[int, Any]:
    request = Request(method=method, path=f"/api/v2/backups{path}", query_string=query)
    response = node.frontend.handle(request)
    if response.content_type == "application/octet-stream":
        return response.status, response.body
    return response.status, orjson.loads(response.body)


def test_the_routes_give_what_the_pin_keeps_and_nothing_else(node: Node) -> None:
    add_rows(node, make_collection(node), 0, 40)
    status, begun = _ask(node, "POST", "", "owner=me")
    assert status == 201
    backup_id = begun["id"]
    status, content = _ask(node, "GET", f"/{backup_id}/catalog", f"start=0&stop={READ_BYTES_MAX}")
    assert (status, len(content)) == (200, begun["catalog_bytes"])
    assert content.startswith(b"SQLite format 3\0")
    (key,) = object_keys(node)
    whole = node.store.get(key)
    for start, stop, expected in ((0, len(whole), whole), (5, 10, whole[5:10])):
        query = f"key={key}&start={start}&stop={stop}"
        assert _ask(node, "GET", f"/{backup_id}/object", query) == (200, expected)
    beyond = f"key={key}&start={len(whole) - 3}&stop={len(whole) + 9}"
    assert _ask(node, "GET", f"/{backup_id}/object", beyond) == (200, whole[-3:])
    assert _ask(node, "POST", f"/{backup_id}") == (200, {})
    for path, query, refusal in (
        (f"/{backup_id}/object", "key=store_id&start=0&stop=9", 404),
        (f"/{backup_id}/object", "key=../../x&start=0&stop=9", 404),
        (f"/{backup_id}/object", f"key={key}&start=0", 400),
        (f"/{backup_id}/object", "start=0&stop=9", 400),
        (f"/{backup_id}/object", f"key={key}&start=9&stop=1", 400),
        (f"/{backup_id}/object", f"key={key}&start=-1&stop=1", 400),
        (f"/{backup_id}/object", f"key={key}&start=0&stop={READ_BYTES_MAX + 1}", 400),
        ("/no-such/object", f"key={key}&start=0&stop=9", 404),
        ("/no-such/catalog", "start=0&stop=9", 404),
    ):
        status, error = _ask(node, "GET", path, query)
        assert (status, set(error)) == (refusal, {"error", "message"}), (path, query, error)
    for _ in range(2):
        assert _ask(node, "DELETE", f"/{backup_id}") == (200, {})
    assert _ask(node, "POST", f"/{backup_id}")[0] == 404
    assert _ask(node, "GET", f"/{backup_id}/catalog", "start=0&stop=9")[0] == 404
    assert _ask(node, "DELETE", "/..%2F..%2Fochredb.txt")[0] == 400
    assert os.listdir(os.path.join(str(node.config.path), "objects", "tmp")) == []


def test_a_database_in_memory_says_that_it_cannot() -> None:
    with running_node() as node:
        assert _ask(node, "POST", "")[0] == 501
        with pytest.raises(Unimplemented):
            _ = node.frontend.backups
