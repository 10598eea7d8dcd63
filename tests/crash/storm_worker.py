"""The processes of a storm: each does operations on one directory and records them.

Run as a program this is the nursery: it has imported everything and opened nothing, and forks a
process for each line of its standard input. So a process is on the directory some milliseconds
after its order; started anew, most would be killed while they import.

A record is one line of JSON before an operation and one after it, each written by one system call:
what a killed process wrote stays. Times are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ochredb_node.cli as cli
from ochredb.errors import NotFound
from ochredb.types import Appended
from ochredb_compactor.config import CompactorConfig
from ochredb_log.config import LogConfig
from ochredb_node.node import Node, NodeConfig

PREFIX = "/api/v2"
DATABASE = f"{PREFIX}/tenants/default_tenant/databases/default_database"
COLLECTIONS = ("storm-0", "storm-1", "storm-2")
IDS = [f"k{number}" for number in range(60)]
DIMENSION = 4
LEASE_TTL_S = 2.0
GRACE_S = 0.5
_REPEAT_PROBABILITY = 0.7

Call = Callable[[str, str, Any, str | None], tuple[int, Any]]


class Gone(Exception):
    """No answer came: the outcome is unknown."""


def eager(plain: NodeConfig) -> NodeConfig:
    """Compaction, merges and collection all the time, and objects for half of the writes."""
    compactor = CompactorConfig(
        tail_rows_due=60,
        tail_bytes_due=64 << 10,
        idle_due_s=0.1,
        lease_ttl_s=LEASE_TTL_S,
        replaced_retention_s=0.5,
        grace_s=GRACE_S,
        collect_period_s=0.2,
        sweep_period_s=0.5,
    )
    return dataclasses.replace(plain, compactor=compactor, log=LogConfig(inline_bytes_max=1200))


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
    """One thread's operations, over whatever `call` reaches."""

    def __init__(self, recorder: Recorder, rng: random.Random, name: str, call: Call) -> None:
        self._recorder, self._rng, self._name, self._call = recorder, rng, name, call
        self._written = 0
        self._ids: dict[str, str] = {}
        self.offsets: Callable[[], Appended | None] = lambda: None

    def open_collections(self, names: tuple[str, ...] = COLLECTIONS) -> None:
        for name in names:
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

    def write(self, names: tuple[str, ...] = COLLECTIONS) -> None:
        rng, name = self._rng, self._rng.choice(names)
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

    def read(self, names: tuple[str, ...] = COLLECTIONS) -> None:
        rng = self._rng
        collection = self._ids[rng.choice(names)]
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
        self.ask(collection, path, verb, body)

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
        self.open_collections((name,))
        for _ in range(self._rng.randint(1, 6)):
            self.write((name,))
            self.read((name,))
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
        self.read((name,))


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


def embedded(order: dict[str, Any]) -> None:
    """An embedded engine and two threads that use it, until killed or told to stop."""
    recorder = Recorder(order["history"])
    node = Node(eager(NodeConfig(path=order["directory"], foreground=True)))
    node.start()
    recorder.line(started=time.monotonic_ns())
    appended = threading.local()

    def noted(function: Callable[..., Appended]) -> Callable[..., Appended]:
        def call(*arguments: Any, **named: Any) -> Appended:
            result = appended.last = function(*arguments, **named)
            return result

        return call

    log: Any = node.log
    log.append, log.append_evaluated = noted(log.append), noted(log.append_evaluated)

    def call(method: str, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        appended.last = None
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["idempotency-key"] = key
        data = b"" if body is None else json.dumps(body).encode()
        status, _, answer = node.handle(method, path, "", headers, data)
        return status, json.loads(answer)

    def work(number: int) -> None:
        name = f"{order['name']}.{number}"
        rng = random.Random(f"{order['seed']}/{name}")
        actor = Actor(recorder, rng, name, call)
        actor.offsets = lambda: appended.last
        actor.open_collections()
        if number == 0:
            for write in unfinished(order["predecessor"]):
                if rng.random() < _REPEAT_PROBABILITY:
                    actor.send(write["collection"], write["verb"], write["body"], write["key"])
        _ROLES[order["role"]](actor, node, rng, order, number)

    _in_threads(work, 2, recorder)
    node.close()


def _until_stopped(order: dict[str, Any]) -> Iterator[None]:
    while not os.path.exists(order["stop"]):
        yield


def _writer(actor: Actor, _n: Node, rng: random.Random, order: dict[str, Any], _: int) -> None:
    for _step in _until_stopped(order):
        actor.write() if rng.random() < 0.7 else actor.read()


def _reader(actor: Actor, _n: Node, rng: random.Random, order: dict[str, Any], _: int) -> None:
    for _step in _until_stopped(order):
        actor.read() if rng.random() < 0.9 else actor.look_up("churn")
        time.sleep(rng.uniform(0, 0.01))  # Leaves the machine to the others.


def _compactor(
    actor: Actor, node: Node, rng: random.Random, order: dict[str, Any], number: int
) -> None:
    for _ in _until_stopped(order):
        if number == 0:
            for work in node.logs.pending():
                with contextlib.suppress(NotFound):  # Dropped meanwhile.
                    node.compactor.compact_now(work.collection)
            node.compactor.collect_now(sweep_orphans=rng.random() < 0.3)
            time.sleep(0.02)
        actor.read()


def _churner(actor: Actor, _n: Node, _r: random.Random, order: dict[str, Any], number: int) -> None:
    for _ in _until_stopped(order):
        if number == 0:
            actor.churn("churn")
        else:
            actor.write()


_ROLES = {"writer": _writer, "reader": _reader, "compactor": _compactor, "churner": _churner}


def client(order: dict[str, Any]) -> None:
    """Two clients of the servers. They are not killed; what they speak to is."""
    recorder = Recorder(order["history"])
    recorder.line(started=time.monotonic_ns())

    def work(number: int) -> None:
        name = f"{order['name']}.{number}"
        rng = random.Random(f"{order['seed']}/{name}")
        connection = Connection(order["ports"], rng)
        actor = Actor(recorder, rng, name, connection.call)
        opened = False
        again: list[Callable[[], None]] = []
        for _ in _until_stopped(order):
            try:
                if not opened:
                    actor.open_collections()
                    opened = True
                elif again and rng.random() < _REPEAT_PROBABILITY:
                    again[-1]()
                elif rng.random() < 0.5:
                    actor.write()
                else:
                    actor.read()
                again.clear()
            except Gone as gone:
                sent = connection.last_write
                again = [partial(actor.send, *sent)] if sent else []
                recorder.line(gone=str(gone))

    _in_threads(work, 2, recorder)


class Connection:
    """To either of the servers; another one after each failure."""

    def __init__(self, ports: list[int], rng: random.Random) -> None:
        self._ports, self._rng = ports, rng
        self._connection: http.client.HTTPConnection | None = None
        self.last_write: tuple[str, str, Any, str] | None = None

    def call(self, method: str, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        """Raises Gone."""
        self.last_write = None
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
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            raise Gone(repr(error)) from error

    def _connected(self) -> http.client.HTTPConnection:
        while self._connection is None:
            port = self._rng.choice(self._ports)
            made = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                made.connect()
                self._connection = made
            except ConnectionRefusedError:  # Nothing was sent.
                time.sleep(0.02)
        return self._connection


def server(order: dict[str, Any]) -> None:
    """`ochredb run`, with eager housekeeping."""
    as_set = cli.node_config
    cli.node_config = lambda settings: eager(as_set(settings))
    recorder = Recorder(order["history"])
    recorder.line(started=time.monotonic_ns())
    status = cli.main(["run", "--path", order["directory"], "--port", str(order["port"])])
    if status != 0:
        raise SystemExit(status)


def _in_threads(work: Callable[[int], None], count: int, recorder: Recorder) -> None:
    """Run it, and end the process loudly if it fails."""

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException:
            recorder.line(failed=traceback.format_exc())
            raise SystemExit(1) from None

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _child(order: dict[str, Any]) -> int:
    """What a forked process does; its exit status."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=log)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    try:
        {"server": server, "client": client}.get(order["role"], embedded)(order)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def nursery() -> None:
    """Read orders, answer each with one line. Kills and waits here, where the children are."""
    children: set[int] = set()
    for text in sys.stdin:
        order = json.loads(text)
        answer: dict[str, Any] = {}
        if order["do"] == "spawn":
            pid = os.fork()
            if pid == 0:
                os._exit(_child(order))
            children.add(pid)
            answer["pid"] = pid
        elif order["do"] == "kill":
            assert order["pid"] in children
            os.kill(order["pid"], getattr(signal, order["signal"]))
            if order["signal"] == "SIGKILL":
                children.discard(order["pid"])
                answer["status"] = os.waitpid(order["pid"], 0)[1]
        else:
            ended = []
            for pid in sorted(children):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    children.discard(pid)
                    ended.append((pid, os.waitstatus_to_exitcode(status)))
            answer["ended"] = ended
        print(json.dumps(answer), flush=True)
    for pid in children:  # Whoever gave the orders is gone.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    import ochredb_frontend.app
    import ochredb_frontend.server  # noqa: F401  Imported before the forks.

    nursery()
