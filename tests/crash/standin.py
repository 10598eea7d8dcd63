"""A tiny server with the routes that the harness needs, to test the harness: honest, or with a bug.

python standin.py DIRECTORY PORT [BUG]

It keeps a log in SQLite (write-ahead, synchronous), large requests in a DirectoryStore, and all
records in memory.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ochredb.storage import files
from ochredb.storage.directory import DirectoryStore

BUGS = (
    "acknowledge-first",  # The answer is sent before the commit.
    "half-requests",  # One commit for each record.
    "no-wal-sync",  # Found by power loss only.
    "no-object-sync",  # Found by power loss only.
    "forget-deletes",  # Not after a restart.
    "duplicate",  # A record that nobody wrote.
)
INLINE_BYTES_MAX = 64 << 10
COLUMNS = {"embeddings": "embedding", "documents": "document", "metadatas": "metadata"}


class State:
    """The log and what follows from it; every method under `lock`."""

    def __init__(self, directory: str, bug: str) -> None:
        self.bug = bug
        self.lock = threading.Lock()
        self.collections: dict[str, str] = {}  # name -> id
        self.records: dict[str, dict[str, dict[str, Any]]] = {}
        self.store = DirectoryStore(directory + "/objects")
        self.log = sqlite3.connect(
            directory + "/log.sqlite3", isolation_level=None, check_same_thread=False
        )
        self.log.execute("PRAGMA journal_mode=WAL")
        self.log.execute(f"PRAGMA synchronous={'OFF' if bug == 'no-wal-sync' else 'FULL'}")
        self.log.execute(
            "CREATE TABLE IF NOT EXISTS log (i INTEGER PRIMARY KEY, payload BLOB, key TEXT)"
        )
        for payload, key in self.log.execute("SELECT payload, key FROM log ORDER BY i").fetchall():
            self.apply(json.loads(payload if key is None else self.store.get(key)))

    def append(self, operation: dict[str, Any]) -> None:
        operations = [operation]
        if self.bug == "half-requests" and "ids" in operation:
            operations = [
                {k: [v[i]] if isinstance(v, list) else v for k, v in operation.items()}
                for i in range(len(operation["ids"]))
            ]
        for one in operations:
            payload, key = json.dumps(one).encode(), None
            if len(payload) > INLINE_BYTES_MAX:
                key = f"fragments/{uuid.uuid4()}"
                self.store.create(key, payload)
                payload = b""
            self.log.execute("INSERT INTO log (payload, key) VALUES (?, ?)", (payload, key))
            self.apply(one)

    def apply(self, operation: dict[str, Any]) -> None:
        verb = operation["verb"]
        if verb == "create":
            self.collections[operation["name"]] = operation["id"]
            self.records[operation["id"]] = {}
            return
        records = self.records[operation["collection"]]
        for i, key in enumerate(operation["ids"]):
            if verb == "delete":
                records.pop(key, None)
            elif (key in records, verb) not in ((True, "add"), (False, "update")):
                records[key] = {name: operation[column][i] for column, name in COLUMNS.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # Head and body in one packet.
    state: State

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text or b"{}")
        if self.state.bug == "acknowledge-first" and self.path.endswith(("/add", "/upsert")):
            self.send(201, {})
            time.sleep(0.005)
            with self.state.lock:
                self.handle_call(body)
            return
        with self.state.lock:
            status, answer = self.handle_call(body)
        self.send(status, answer)

    def send(self, status: int, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def handle_call(self, body: dict[str, Any]) -> tuple[int, object]:
        state = self.state
        if self.path == "/api/v2/heartbeat":
            return 200, {}
        if self.path.endswith("/collections"):
            if body["name"] not in state.collections:
                identity = str(uuid.uuid4())
                state.append({"verb": "create", "name": body["name"], "id": identity})
            return 200, {"id": state.collections[body["name"]]}
        found = re.search(r"/collections/([^/]+)(?:/(\w+))?$", self.path)
        assert found is not None
        if found[2] is None and found[1] in state.collections:
            return 200, {"id": state.collections[found[1]]}
        if found[2] is None or found[1] not in state.records:
            return 404, {}
        return self.handle_records(found[1], found[2], body)

    def handle_records(
        self, collection: str, verb: str, body: dict[str, Any]
    ) -> tuple[int, object]:
        records = self.state.records[collection]
        if verb == "count":
            return 200, len(records)
        if verb == "query":
            return 200, {"ids": [list(records)[: body["n_results"]]]}
        batches = (body.get("where") or {}).get("batch")
        wanted = set(batches["$in"] if isinstance(batches, dict) else [batches])
        matches = [
            (key, record)
            for key, record in records.items()
            if batches is None or record["metadata"]["batch"] in wanted
        ]
        if verb == "get":
            rows = matches[body["offset"] : body["offset"] + body["limit"]]
            answer: dict[str, Any] = {"ids": [key for key, _ in rows]}
            for column, name in COLUMNS.items():
                answer[column] = [record[name] for _, record in rows]
            return 200, answer
        operation = {**body, "verb": verb, "collection": collection}
        if verb == "delete":
            operation["ids"] = body.get("ids") or [key for key, _ in matches]
            if self.state.bug == "forget-deletes":
                self.state.apply(operation)
                return 200, {"deleted": len(operation["ids"])}
        if self.state.bug == "duplicate" and verb == "add":
            operation["ids"] = [*operation["ids"], "another"]
            for column in COLUMNS:
                operation[column] = [*operation[column], operation[column][0]]
        self.state.append(operation)
        if verb == "delete":
            return 200, {"deleted": len(operation["ids"])}
        return 201 if verb == "add" else 200, {}

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    directory, port, *bug = sys.argv[1:]
    assert not bug or bug[0] in BUGS
    if bug == ["no-object-sync"]:
        files.sync = lambda descriptor: None
    Handler.state = State(directory, bug[0] if bug else "")
    Server(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
