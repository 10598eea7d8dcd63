"""The processes of a storm: each does operations on one directory and records them.

Run as a program this is the nursery: it has imported everything and opened nothing, and forks a
process for each line of its standard input. So a process is on the directory some milliseconds
after its order; started anew, most would be killed while they import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
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

from . import nursery
from .actor import Actor, Connection, Gone, Recorder, unfinished

LEASE_TTL_S = 2.0
GRACE_S = 0.5
_REPEAT_PROBABILITY = 0.7


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
        connection = Connection(order["addresses"], rng)
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


def run(order: dict[str, Any]) -> None:
    """What a forked process does."""
    {"server": server, "client": client}.get(order["role"], embedded)(order)


if __name__ == "__main__":
    import ochredb_frontend.app
    import ochredb_frontend.server  # noqa: F401  Imported before the forks.

    nursery.serve(run)
