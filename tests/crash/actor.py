"""What the threads of a storm do, over whatever reaches an engine, and the record that they keep.

A record is one line of JSON before an operation and one after it, each written by one system call:
what a killed process wrote stays. Times are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ochredb.types import Appended

PREFIX = "/api/v2"
DATABASE = f"{PREFIX}/tenants/default_tenant/databases/default_database"
COLLECTIONS = ("storm-0", "storm-1", "storm-2")
IDS = [f"k{number}" for number in range(60)]
DIMENSION = 4

Call = Callable[[str, str, Any, str | None], tuple[int, Any]]


class Gone(Exception):
    """No answer came: the outcome is unknown."""


class Recorder:
    """One process's history file."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._lock = threading.Lock()
        self._count = 0

    def line(self, **fields: Any) -> None:
        data = json.dumps(fields).encode() + b"\n"
        with self._lock:
            os.write(self._fd, data)

    @contextlib.contextmanager
    def operation(self, **fields: Any) -> Iterator[dict[str, Any]]:
        """Around a call; what the block puts into the dict is the second line."""
        with self._lock:
            self._count += 1
            number = self._count
        self.line(n=number, begin=time.monotonic_ns(), **fields)
        done: dict[str, Any] = {}
        yield done
        self.line(n=number, end=time.monotonic_ns(), **done)


class Actor:
    """One thread's operations, over whatever `call` reaches.

    collections: names of those that all actors share.
    """

    def __init__(
        self,
        recorder: Recorder,
        rng: random.Random,
        name: str,
        call: Call,
        collections: tuple[str, ...] = COLLECTIONS,
    ) -> None:
        self._recorder, self._rng, self._name, self._call = recorder, rng, name, call
        self.collections = collections
        self._written = 0
        self._ids: dict[str, str] = {}  # By name.
        self.offsets: Callable[[], Appended | None] = lambda: None

    def has_opened(self, *names: str) -> bool:
        return all(name in self._ids for name in names or self.collections)

    def open_collections(self, *names: str) -> None:
        for name in names or self.collections:
            body = {"name": name, "get_or_create": True}
            with self._recorder.operation(kind="name", verb="create", name=name) as done:
                status, answer = self._ask("POST", f"{DATABASE}/collections", body, done)
                if status == 200:
                    done["collection"] = self._ids[name] = answer["id"]

    def _ask(
        self, method: str, path: str, body: Any, done: dict[str, Any], key: str | None = None
    ) -> tuple[int, Any]:
        """Status and answer, both recorded. Without an answer only the first line stays, alone."""
        status, answer = self._call(method, path, body, key)
        done["status"] = status
        if status >= 400:
            done["error"] = answer
        return status, answer

    def id_of(self, name: str) -> str:
        """Of a collection that was opened."""
        return self._ids[name]

    def write(self, *names: str) -> None:
        rng, name = self._rng, self._rng.choice(names or self.collections)
        self._written += 1
        if rng.random() < 0.25:
            verb, body = "delete", self._deletion()
        else:
            verb = rng.choice(("add", "upsert", "upsert", "update"))
            body = self._records(rng.sample(IDS, rng.randint(1, 6)))
        self.send(self._ids[name], verb, body, f"{self._name}-{self._written}")

    def _deletion(self) -> dict[str, Any]:
        rng = self._rng
        if rng.random() < 0.4:
            return {"ids": rng.sample(IDS, rng.randint(1, 3))}
        where: dict[str, Any] = {"group": rng.randrange(30)}
        if rng.random() < 0.3:
            where = {"$and": [where, {"round": {"$gte": 5}}]}
        return {"where": where}

    def _records(self, ids: list[str]) -> dict[str, Any]:
        rng, mark = self._rng, f"{self._name}-{self._written}"
        filler = "." * (400 if rng.random() < 0.3 else 0)
        return {
            "ids": ids,
            "embeddings": [[float(rng.randrange(9)) for _ in range(DIMENSION)] for _ in ids],
            "documents": [f"{mark} says {name} {filler}" for name in ids],
            "metadatas": [
                {"mark": mark, "group": rng.randrange(30), "round": rng.randrange(10)} for _ in ids
            ],
        }

    def send(self, collection: str, verb: str, body: dict[str, Any], key: str) -> None:
        """One attempt at a write. Raises Gone."""
        with self._recorder.operation(
            kind="write", verb=verb, collection=collection, body=body, key=key
        ) as done:
            path = f"{DATABASE}/collections/{collection}/{verb}"
            status, answer = self._ask("POST", path, body, done, key)
            appended = self.offsets()
            if status < 300 and appended is not None:
                done.update(first=appended.first_offset, last=appended.last_offset)
            if status < 300 and verb == "delete":
                done["deleted"] = answer["deleted"]

    def read(self, *names: str) -> None:
        self.ask(*self.pick_read(*names))

    def pick_read(self, *names: str) -> tuple[str, str, str, dict[str, Any]]:
        """The arguments of `ask`."""
        rng = self._rng
        collection = self._ids[rng.choice(names or self.collections)]
        path = f"{DATABASE}/collections/{collection}"
        body: dict[str, Any]
        verb = rng.choice(("get", "get", "get", "query", "count", "last_offset"))
        if verb == "query":
            vector = [float(rng.randrange(9)) for _ in range(DIMENSION)]
            body = {"query_embeddings": [vector], "n_results": rng.randint(1, 8), "exact": True}
            body["include"] = ["distances"]
        else:
            body = rng.choice(
                (
                    {"include": ["documents", "metadatas", "embeddings"]},
                    {"ids": rng.sample(IDS, 4)},
                    {"where": {"group": {"$lt": rng.randrange(1, 30)}}},
                    {"where_document": {"$contains": f"k{rng.randrange(60)} "}, "limit": 5},
                )
            )
        return collection, path, verb, body

    def ask(self, collection: str, path: str, verb: str, body: dict[str, Any]) -> Any:
        """One read, recorded with its answer."""
        recorded = body if verb in ("get", "query") else {}
        with self._recorder.operation(
            kind="read", verb=verb, collection=collection, body=recorded
        ) as done:
            if verb in ("get", "query"):
                status, answer = self._ask("POST", f"{path}/{verb}", body, done)
                if status == 200 and verb == "query":
                    answer = {"ids": answer["ids"], "distances": answer["distances"]}
            elif verb == "count":
                status, answer = self._ask("GET", f"{path}/count", None, done)
            else:
                status, answer = self._ask("GET", f"{path}/indexing_status", None, done)
                answer = answer["total_ops"] if status == 200 else answer
            if status == 200:
                done["answer"] = answer
        return done.get("answer")

    def churn(self, name: str) -> None:
        """A collection's whole life; this actor is the only one that drops this name."""
        self.open_collections(name)
        for _ in range(self._rng.randint(1, 6)):
            self.write(name)
            self.read(name)
        with self._recorder.operation(
            kind="name", verb="drop", name=name, collection=self._ids[name]
        ) as done:
            self._ask("DELETE", f"{DATABASE}/collections/{name}", None, done)

    def look_up(self, name: str) -> None:
        """Find a collection that comes and goes, and read it."""
        with self._recorder.operation(kind="name", verb="lookup", name=name) as done:
            status, answer = self._ask("GET", f"{DATABASE}/collections/{name}", None, done)
            if status != 200:
                return
            done["collection"] = self._ids[name] = answer["id"]
        self.read(name)


def unfinished(history: str) -> list[dict[str, Any]]:
    """The writes whose second line is missing in a dead process's file."""
    begun: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError), open(history, encoding="utf-8") as file:
        for text in file:
            with contextlib.suppress(ValueError):  # A last line that was cut off.
                line = json.loads(text)
                if line.get("kind") == "write":
                    begun[line["n"]] = line
                elif "end" in line:
                    begun.pop(line["n"], None)
    return list(begun.values())


class Connection:
    """To one of the servers ("host:port"); to another one after each failure."""

    def __init__(
        self, addresses: Sequence[str], rng: random.Random, *, timeout_s: float = 60.0
    ) -> None:
        self._addresses, self._timeout_s = addresses, timeout_s
        self._turn = rng.randrange(len(addresses))
        self._connection: http.client.HTTPConnection | None = None
        self.last_write: tuple[str, str, Any, str] | None = None
        self.last_status: int | None = None  # None: no answer came.

    def call(self, method: str, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        """Raises Gone."""
        self.last_write = self.last_status = None
        if key is not None:
            *_, collection, verb = path.split("/")
            self.last_write = collection, verb, body, key
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = key
        try:
            connection = self._connected()
            data = None if body is None else json.dumps(body)
            connection.request(method, path, body=data, headers=headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
            self.last_status = response.status
            return response.status, answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Gone(repr(error)) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> http.client.HTTPConnection:
        while self._connection is None:
            self._turn = (self._turn + 1) % len(self._addresses)
            address = self._addresses[self._turn]
            made = http.client.HTTPConnection(address, timeout=self._timeout_s)
            try:
                made.connect()
                self._connection = made
            except ConnectionRefusedError:  # Nothing was sent.
                time.sleep(0.02)
        return self._connection
