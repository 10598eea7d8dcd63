"""What a process that is going to be killed was asked to do, and what it answered; and by that,
what must be in its stores afterwards.

The journal lies outside the stores and is written by plain appends, which outlive their process.
Requests come one after the other, so at most the last one is unanswered: everything before it must
be there, and of it all or nothing.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ochredb.testing.model import CollectionModel

Json = dict[str, Any]
# (method, path, body, idempotency key) -> (status, answer)
Call = Callable[[str, str, Json | None, str | None], tuple[int, Any]]

TENANTS = "/api/v2/tenants"
DATABASES = f"{TENANTS}/default_tenant/databases"
DEFAULT = "default_database"
EVERYTHING = {"include": ["embeddings", "documents", "uris", "metadatas"]}
_DONE = (200, 201)
_DONE_BEFORE = (404, 409)  # Of a repeat: it was dropped, it exists.


class Journal:
    """Appends to the file at `path`."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def given(self, store: str, state: Json) -> None:
        """A store had this state to begin with; nothing is asked of it later."""
        self._line({"given": store, "state": state})

    def opened(self, store: str) -> None:
        """A store is to be there, possibly empty."""
        self._line({"opened": store})

    def done(self, fact: str) -> None:
        """Something that is no request has been completed."""
        self._line({"done": fact})

    def perform(self, call: Call, store: str, request: Json) -> None:
        """Note the request, make it, note that it was answered."""
        self._line({"sent": store, "request": request})
        status, answer = perform(call, request)
        assert status in _DONE, (request, status, answer)
        self._line({"answered": store})

    def _line(self, line: Json) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


@dataclass
class StoreModel:
    """What a store holds, by dicts and loops."""

    tenants: dict[str, str | None] = field(default_factory=dict)  # But for the default one.
    databases: set[str] = field(default_factory=lambda: {DEFAULT})
    collections: dict[tuple[str, str], CollectionModel] = field(default_factory=dict)

    def apply(self, request: Json) -> None:
        op, name = request["op"], request.get("name", "")
        place = (request.get("database", DEFAULT), name)
        match op:
            case "create-tenant":
                self.tenants[name] = None
            case "update-tenant":
                self.tenants[name] = request["resource"]
            case "create-database":
                self.databases.add(name)
            case "drop-database":
                self.databases.remove(name)
                for known in [known for known in self.collections if known[0] == name]:
                    del self.collections[known]
            case "create-collection":
                self.collections[place] = CollectionModel(name, metadata=request.get("metadata"))
            case "change-collection":
                model = self.collections.pop(place)
                model.name, model.metadata = request["new_name"], request["metadata"]
                self.collections[place[0], model.name] = model
            case "drop-collection":
                del self.collections[place]
            case "reset":
                self.tenants, self.databases, self.collections = {}, {DEFAULT}, {}
            case "delete":
                self.collections[place].delete(request["body"])
            case _:
                self.collections[place].write(op, request["body"])

    def state(self) -> Json:
        """In the form of `observed`."""
        return {
            "tenants": self.tenants,
            "databases": sorted(self.databases),
            "collections": {
                f"{database}/{name}": {
                    "metadata": model.metadata,
                    "operations": model.operations,
                    "records": model.get(EVERYTHING),
                }
                for (database, name), model in sorted(self.collections.items())
            },
        }


@dataclass
class Expected:
    """What must be in one store: `states` are the possible ones, `unanswered` the last request.

    If there is one, `states` are those without it and with it.
    """

    states: list[Json]
    unanswered: Json | None = None
    last_with_key: Json | None = None  # Answered; repeating it must change nothing.
    tenants: frozenset[str] = frozenset()  # All names that were ever used.


def expected(path: str | Path) -> tuple[dict[str, Expected], set[str]]:
    """By store; and the facts that are noted as done."""
    stores: dict[str, Expected] = {}
    models: dict[str, StoreModel] = {}
    facts = set()
    for line in _lines(path):
        if "given" in line:
            stores[line["given"]] = Expected([line["state"]])
        elif "done" in line:
            facts.add(line["done"])
        elif "opened" in line or "sent" in line:
            store = line.get("opened") or line["sent"]
            models.setdefault(store, StoreModel())
            known = stores.setdefault(store, Expected([]))
            if "sent" in line:
                assert known.unanswered is None, "requests come one after the other"
                known.unanswered = line["request"]
        else:
            known, model = stores[line["answered"]], models[line["answered"]]
            assert known.unanswered is not None
            model.apply(known.unanswered)
            known.tenants |= model.tenants.keys()
            if "key" in known.unanswered:
                known.last_with_key = known.unanswered
            known.unanswered = None
    for store, model in models.items():
        known = stores[store]
        if known.states:
            continue  # As it was given, and opened since.
        known.states = [copy.deepcopy(model.state())]
        if known.unanswered is not None:
            model.apply(known.unanswered)
            known.tenants |= model.tenants.keys()
            known.states.append(model.state())
    return stores, facts


def _lines(path: str | Path) -> Iterator[Json]:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def perform(call: Call, request: Json, *, again: bool = False) -> tuple[int, Any]:
    """Make a request. again: it may have been applied before."""
    op, name = request["op"], request.get("name", "")
    collections = f"{DATABASES}/{request.get('database', DEFAULT)}/collections"
    match op:
        case "create-tenant":
            status, answer = call("POST", TENANTS, {"name": name}, None)
        case "update-tenant":
            body = {"resource_name": request["resource"]}
            status, answer = call("PATCH", f"{TENANTS}/{name}", body, None)
        case "create-database":
            status, answer = call("POST", DATABASES, {"name": name}, None)
        case "drop-database":
            status, answer = call("DELETE", f"{DATABASES}/{name}", None, None)
        case "create-collection":
            body = {"name": name, "metadata": request.get("metadata")}
            status, answer = call("POST", collections, body, None)
        case "change-collection":
            status, answer = call("GET", f"{collections}/{name}", None, None)
            if status == 200:
                body = {"new_name": request["new_name"], "new_metadata": request["metadata"]}
                status, answer = call("PUT", f"{collections}/{answer['id']}", body, None)
        case "drop-collection":
            status, answer = call("DELETE", f"{collections}/{name}", None, None)
        case "reset":
            status, answer = call("POST", "/api/v2/reset", {}, None)
        case _:
            status, answer = call("GET", f"{collections}/{name}", None, None)
            assert status == 200, (request, status, answer)
            path = f"{collections}/{answer['id']}/{op}"
            status, answer = call("POST", path, request["body"], request.get("key"))
            return status, answer
    if again and status in _DONE_BEFORE:
        return 200, answer
    return status, answer


def observed(call: Call, tenants: frozenset[str]) -> Json:
    """What a store holds, as its API tells: every record of every collection."""

    def ask(method: str, path: str, body: Json | None = None) -> Any:
        status, answer = call(method, path, body, None)
        assert status == 200, (method, path, status, answer)
        return answer

    found: Json = {"tenants": {}, "databases": [], "collections": {}}
    for name in sorted(tenants):
        status, answer = call("GET", f"{TENANTS}/{name}", None, None)
        if status == 200:
            found["tenants"][name] = answer.get("resource_name")
        else:
            assert status == 404, (name, status, answer)
    found["databases"] = sorted(item["name"] for item in ask("GET", DATABASES))
    for database in found["databases"]:
        path = f"{DATABASES}/{database}/collections"
        for item in ask("GET", path):
            place = f"{path}/{item['id']}"
            records = ask("POST", f"{place}/get", EVERYTHING)
            count = ask("GET", f"{place}/count")
            assert count == len(records["ids"]), (item["name"], count, len(records["ids"]))
            found["collections"][f"{database}/{item['name']}"] = {
                "metadata": item["metadata"],
                "operations": ask("GET", f"{place}/indexing_status")["total_ops"],
                "records": records,
            }
    return found
